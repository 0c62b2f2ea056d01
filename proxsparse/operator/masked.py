"""The mask of learned weights for any N:M pattern, the original weights under it, and how much of it changes.

The product and the survey of 2:4 go through the fused kernels of ``proxsparse.operator.prox``. Everything else is
ranked some rows at a time: by numba on the CPU, and by comparisons (2:4) or a stable sort elsewhere. Nothing of a
weight's size but the mask itself is made, and nothing waits for a device. The same scores give the same mask
everywhere: among equals the earlier entry is kept.

Shapes: (..., I) with I a multiple of m: linear weights (O, I), stacked experts (E, O, I).
"""

import torch
from torch import Tensor

from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern, nm_mask
from proxsparse.operator.prox import survey_, top2_mask, top2_product_
from proxsparse.operator.rounding import widest

try:
    from proxsparse.operator.kernels.cpu_nm import largest
except ImportError:  # no numba here; ``prox`` says so
    largest = nm_mask

ENTRIES, ENTRIES_OF_A_GPU = 1 << 21, 1 << 24  # at a time
LONGEST = 32  # block; comparing pairs of longer ones takes longer than sorting them


@torch.no_grad()
def learned_mask(learned: Tensor, pattern: Pattern, scale: Tensor | None = None) -> Tensor:
    """Mask of the largest |learned * scale| of every block.

    Args:
        learned: (..., I) finite, any float dtype, any strides.
        scale: (I,) positive, (E, I) for stacked experts, or None for ones.

    Returns:
        (..., I) bool, True = keep; exactly n of every m.

    Raises:
        ValueError: I is no multiple of m, or the pattern is mixed or unstructured.
    """
    if not pattern.is_nm or learned.shape[-1] % pattern.m:
        raise ValueError(f"{pattern} has no blocks in a weight of shape {tuple(learned.shape)}.")
    if learned.dim() == 1:
        return learned_mask(learned[None], pattern, scale)[0]
    mask = torch.empty(learned.shape, dtype=torch.bool, device=learned.device)
    stacks = [(mask, learned, scale)] if learned.dim() < 3 else [
        (mask[e], learned[e], scale if scale is None or scale.dim() == 1 else scale[e]) for e in range(len(learned))
    ]  # fmt: skip
    on_cpu = learned.device.type == "cpu"
    select = _top2 if pattern == TWO_OF_FOUR else largest if on_cpu and pattern.m <= LONGEST else nm_mask
    step = max(1, (ENTRIES if on_cpu else ENTRIES_OF_A_GPU) // max(1, learned.shape[-1]))
    for out, rows, own in stacks:
        for written, part in zip(out.split(step), rows.split(step), strict=True):
            scores = part if own is None and pattern == TWO_OF_FOUR else part.float()
            scores = scores if own is None else scores * own.to(part.device)
            written.copy_(select(scores.contiguous(), pattern.n, pattern.m))
    return mask


def _top2(scores: Tensor, n: int, m: int) -> Tensor:
    return top2_mask(scores)


@torch.no_grad()
def masked_product_(out: Tensor, base: Tensor, learned: Tensor, pattern: Pattern, scale: Tensor | None = None) -> None:
    """Write base * learned_mask(learned) into ``out``: the original weights under the learned mask.

    Args:
        out: (..., I); overwritten. It may be ``base`` or ``learned``.
        base: (..., I), the original weights.
        learned, scale: as in ``learned_mask``.
    """
    if pattern == TWO_OF_FOUR:
        top2_product_(out, base, learned, scale)
        return
    mask = learned_mask(learned, pattern, scale)
    if out.data_ptr() != base.data_ptr():
        out.copy_(base)
    out.masked_fill_(mask.logical_not_(), 0)


@torch.no_grad()
def survey_mask_(learned: Tensor, codes: Tensor, pattern: Pattern, scale: Tensor | None = None) -> Tensor:
    """How many entries of the mask changed since the last call, and the 2:4 penalty, 0 for other patterns.

    Args:
        learned, scale: as in ``learned_mask``.
        codes: (``code_bytes(learned.numel(), pattern)``,) uint8, where this function remembers the mask; zeros before
            the first call.

    Returns:
        (2,) float64 on the weight's device.
    """
    if pattern == TWO_OF_FOUR:
        return survey_(learned, codes, scale)
    now = packed(learned_mask(learned, pattern, scale))
    changed = sum(((now ^ codes) >> bit & 1).sum() for bit in range(8))
    codes.copy_(now)
    dtype = widest(learned.device)
    return torch.stack((torch.as_tensor(changed, device=learned.device).to(dtype), codes.new_zeros((), dtype=dtype)))


def code_bytes(entries: int, pattern: Pattern) -> int:
    """Bytes that remember the mask of so many entries: one per block of four, one per eight entries of others."""
    return entries // 4 if pattern == TWO_OF_FOUR else -(-entries // 8)


def packed(mask: Tensor) -> Tensor:
    """Eight entries of a mask per byte, lowest bit first: (...) bool -> (ceil(numel / 8),) uint8."""
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) << bits).sum(-1, dtype=torch.uint8)


def unpacked(codes: Tensor, like: Tensor) -> Tensor:
    """Inverse of ``packed``, in the shape of a tensor."""
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes[:, None] >> bits).bitwise_and_(1).view(-1)[: like.numel()].view(like.shape).bool()
