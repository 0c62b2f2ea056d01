"""Stochastic rounding to bfloat16, and its noise: one hash of an entry's place, the same on every device.

bfloat16 has eight significant bits. So a step of 1e-4 on a weight of 0.05 is below half a unit in the last place, and
rounding to nearest loses it every time. Stochastic rounding keeps it on average, and needs no extra memory.

The noise of entry i of a weight is the lower half of hash(i ^ seed), where the hash is Wellons' lowbias32
(https://github.com/skeeto/hash-prospector). Every kernel computes it for itself. Other kinds of noise, torch's too,
depend on how a device shares out the work.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 18  # entries that are rounded at a time: the noise takes a MiB, whatever the size of the weight


class Noise(NamedTuple):
    """Noise for the entries of a weight, or of a part of it: rounded in parts or at once, they get the same.

    Attributes:
        seed: 32 bits count.
        first: index in the whole weight of the part's first entry.
    """

    seed: int
    first: int = 0

    def after(self, entries: int) -> "Noise":
        """For a part that begins so many entries later."""
        return Noise(self.seed, self.first + entries)

    def values(self, count: int, device: torch.device) -> Tensor:
        """Of the first ``count`` entries: (count,) int32 in [0, 2^16)."""
        x = torch.arange(count, dtype=torch.int32, device=device).add_(signed(self.first))
        x ^= signed(self.seed)
        # Products and sums of int32 keep the lowest 32 bits of uint32's; shifts need the copies of the sign removed.
        x ^= (x >> 16) & 0xFFFF
        x *= 0x7FEB352D
        x ^= (x >> 15) & 0x1FFFF
        x *= signed(0x846CA68B)
        x ^= x >> 16
        return x.bitwise_and_(0xFFFF)


def noise_seed(seed: int, step: int, place: int) -> int:
    """One seed per rounding: 32 bits mixed from the run's seed, the step, and the weight's place among all weights."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77 + place * 0xC2B2AE3D + 0x27D4EB2F) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    mixed = (mixed * 0x2C1B3C6D) & 0xFFFFFFFF
    return mixed ^ (mixed >> 13)


def signed(bits: int) -> int:
    """The lowest 32 bits of a number, read as an int32: the way to give a kernel all of them."""
    bits &= 0xFFFFFFFF
    return bits - (1 << 32) if bits >> 31 else bits


def round_stochastically(values: Tensor, noise: Noise) -> Tensor:
    """Round float32 to the bfloat16 below or above, each with the probability that keeps the mean.

    Args:
        values: float32, any shape, finite.

    Returns:
        bfloat16 tensor of the same shape.
    """
    bits = values.contiguous().view(torch.int32).view(-1)
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    flat = rounded.view(-1)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK]
        sums = noise.after(start).values(len(part), values.device).add_(part).bitwise_and_(-65536)
        flat[start : start + CHUNK] = sums.view(torch.float32)
    return rounded


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none: Apple's GPUs, and some of Intel's."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not getattr(torch.xpu.get_device_properties(device), "has_fp64", True):
        return torch.float32
    return torch.float64
