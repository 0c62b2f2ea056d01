"""Boolean tensors with one bit per entry, for masks that stay in memory while a model trains."""

import torch
from torch import Tensor

_PLACES = 8  # entries per byte


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor into bytes, lowest bit first.

    Args:
        mask: bool, of any shape and on any device.

    Returns:
        (ceil(entries / 8),) uint8 on the same device.
    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % _PLACES)).view(-1, _PLACES)
    return (padded << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The boolean tensor of a shape that ``pack_bits`` has packed."""
    bits = (packed.unsqueeze(-1) >> _shifts(packed.device)) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(shape).bool()


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(_PLACES, dtype=torch.uint8, device=device)
