"""Stochastic rounding to bfloat16, and the seeds of its noise.

bfloat16 has eight significant bits. So a step of 1e-4 on a weight of 0.05 is below half a unit in the last place, and
rounding to nearest loses it every time. Stochastic rounding keeps it on average, and needs no extra memory.
"""

import torch
from torch import Tensor


def noise_seed(seed: int, step: int, place: int) -> int:
    """One seed per rounding: 32 bits mixed from the run's seed, the step, and the weight's place among all weights."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77 + place * 0xC2B2AE3D + 0x27D4EB2F) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    mixed = (mixed * 0x2C1B3C6D) & 0xFFFFFFFF
    return mixed ^ (mixed >> 13)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to the bfloat16 below or above, each with the probability that keeps the mean.

    Args:
        values: float32, any shape, finite.
        generator: on the device of ``values``.

    Returns:
        bfloat16 tensor of the same shape.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -65536
    return bits.view(torch.float32).to(torch.bfloat16)
