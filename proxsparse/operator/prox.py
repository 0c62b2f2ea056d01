"""The proximal operator of the 2:4 penalty, the penalty itself, and the mask it leads to.

    R(w)      = |w1 w2 w3| + |w2 w3 w4| + |w3 w4 w1| + |w4 w1 w2|          per block of four weights
    prox_op   = argmin_u 1/2 ||u - w||^2 + lambda R(u)

Blocks run along the last dimension. R is zero exactly on blocks with at most two non-zero weights.
``proxsparse/operator/kernels/__init__.py`` derives how the minimiser is found.

Source: Liu et al., ProxSparse, ICML 2025, https://arxiv.org/abs/2502.00258.
Shapes: (..., I) with I a multiple of 4: linear weights (O, I), stacked experts (E, O, I).
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from proxsparse.operator.kernels import eager

logger = logging.getLogger(__name__)
_KERNELS = {"eager": eager.prox_}
try:
    from proxsparse.operator.kernels import cpu

    _KERNELS["cpu"] = cpu.prox_
except ImportError:  # numba has no wheel for this Python or platform
    logger.warning("numba can't be imported: the proximal operator runs in plain torch on the CPU, many times slower")
try:
    from proxsparse.operator.kernels import triton

    _KERNELS["triton"] = triton.prox_
except ImportError:  # comes with torch's GPU builds
    if torch.cuda.is_available():
        logger.warning("triton can't be imported: the proximal operator runs in plain torch on the GPU")

_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}  # ROCm devices are called cuda too


class ProxStats(NamedTuple):
    """What one call of ``prox_op_`` found, over the blocks of the weight."""

    blocks: int
    blocks_24: int  # blocks with at most two non-zeros afterwards


def kernel_for(weight: Tensor) -> str:
    """Name of the fastest kernel for this weight: 'cpu' (numba), 'triton' (GPU), or 'eager' (torch operations)."""
    name = _BY_DEVICE.get(weight.device.type, "eager")
    return name if name in _KERNELS and weight.dtype in _FUSED_DTYPES.get(name, ()) else "eager"


def _check(weight: Tensor, lambda_: float, scale: Tensor | None) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point tensor, got {weight.dtype}.")
    if weight.dim() == 0 or weight.shape[-1] % 4:
        raise ValueError(
            f"The last dimension of weight must be a multiple of 4 for 2:4 blocks, got shape {tuple(weight.shape)}. "
            "Leave this weight out, or transpose it so that its input dimension comes last."
        )
    if not (math.isfinite(lambda_) and lambda_ >= 0):
        raise ValueError(f"lambda_ must be a finite number >= 0, got {lambda_}.")
    stacked = (*weight.shape[:1], *weight.shape[-1:])
    if scale is not None and tuple(scale.shape) not in (weight.shape[-1:], stacked):
        raise ValueError(
            f"scale must have one entry per input, shape {tuple(weight.shape[-1:])}, got {tuple(scale.shape)}."
        )


@torch.no_grad()
def prox_op_(
    weight: Tensor,
    lambda_: float,
    *,
    scale: Tensor | None = None,
    stochastic: bool = False,
    seed: int = 0,
    kernel: str | None = None,
) -> ProxStats:
    """Apply ``prox_op`` to ``weight`` in place.

    Args:
        weight: (..., I), any float dtype, any strides; overwritten. Solved in float32 (float64 for a float64 weight).
        lambda_: strength per call, unit 1 / |weight * scale|; not multiplied by the learning rate.
        scale: (I,) positive, (E, I) for stacked experts, or None. The operator acts on weight * scale, and the result
            is divided back. With the norms of the inputs, a block compares what its weights contribute to the output.
        stochastic: round bfloat16 results stochastically. Rounding to nearest loses a shrinkage below half a unit in
            the last place; stochastic rounding keeps it on average.
        seed: seed of the rounding noise; give each call another one.
        kernel: 'cpu', 'triton' or 'eager'; None picks the fastest (``kernel_for``).

    Returns:
        Counts of blocks, and of blocks that are 2:4 afterwards.

    Raises:
        ValueError: the last dimension is no multiple of 4, lambda_ is negative or not finite, scale has the
            wrong shape, or the weight has NaN or infinite entries.
    """
    _check(weight, lambda_, scale)
    blocks = weight.numel() // 4
    if lambda_ == 0 or blocks == 0:
        return ProxStats(blocks, int((_nonzeros(weight) <= 2).sum()) if blocks else 0)
    if scale is not None and scale.dim() == 2:
        parts = [
            prox_op_(rows, lambda_, scale=own, stochastic=stochastic, seed=seed + i, kernel=kernel)
            for i, (rows, own) in enumerate(zip(weight, scale, strict=True))
        ]
        return ProxStats(blocks, sum(part.blocks_24 for part in parts))
    kernel = kernel or kernel_for(weight)
    run = _KERNELS.get(kernel)
    if run is None:
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}; got {kernel!r}.")
    flat = weight if weight.is_contiguous() else weight.contiguous()
    sparse, bad = run(flat, lambda_, scale, stochastic, seed)
    if flat is not weight:
        weight.copy_(flat)
    if bad:
        raise ValueError(f"weight has NaN or infinite entries in {bad} of its blocks of four; they have no minimiser.")
    return ProxStats(blocks, sparse)


def prox_op(weight: Tensor, lambda_: float, *, scale: Tensor | None = None) -> Tensor:
    """Proximal operator of the 2:4 penalty: argmin_u 1/2 ||u - w||^2 + lambda_ R(u), per block of four.

    Args:
        weight: (..., I), any float dtype, I a multiple of 4; not modified. Solved in float32.
        lambda_: strength per call, >= 0, unit 1 / |weight|; not multiplied by the learning rate.
        scale: (I,) positive, or None; see ``prox_op_``.

    Returns:
        Tensor of the shape and dtype of ``weight``. No entry grows or changes sign; the two largest of a
        block stay the two largest.

    Raises:
        ValueError: see ``prox_op_``.

    Example:
        >>> prox_op(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 0.25)
        tensor([[4., 3., 0., 0.]])
        >>> prox_op(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), 0.0)
        tensor([[4., 3., 2., 1.]])
    """
    out = weight.detach().clone(memory_format=torch.contiguous_format)
    prox_op_(out, lambda_, scale=scale)
    return out


def regularizer(weight: Tensor) -> Tensor:
    """Sum of R(w) over all blocks, a differentiable scalar in float32 (float64 for a float64 weight).

    Args:
        weight: (..., I), I a multiple of 4.

    Example:
        >>> regularizer(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
        tensor(6.)
    """
    _check(weight, 0.0, None)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b, c, d = weight.to(dtype).abs().unflatten(-1, (-1, 4)).unbind(-1)
    return (a * b * (c + d) + c * d * (a + b)).sum()


def top2_mask(weight: Tensor) -> Tensor:
    """Boolean mask of the two largest magnitudes of every block of four; exactly two are True.

    Among equal magnitudes the earlier entry wins, everywhere, so that the same weight always gives the same mask.

    Args:
        weight: (..., I), I a multiple of 4.

    Returns:
        (..., I) bool, True = keep.

    Example:
        >>> top2_mask(torch.tensor([[0.1, -4.0, 2.0, 2.0]])).int()
        tensor([[0, 1, 1, 0]], dtype=torch.int32)
    """
    _check(weight, 0.0, None)
    a, b, c, d = weight.detach().abs().unflatten(-1, (-1, 4)).unbind(-1)
    # Kept where fewer than two others are larger.
    ab, ac, ad, bc, bd, cd = b > a, c > a, d > a, c > b, d > b, d > c
    larger = (
        ab.byte() + ac.byte() + ad.byte(),
        (~ab).byte() + bc.byte() + bd.byte(),
        (~ac).byte() + (~bc).byte() + cd.byte(),
        (~ad).byte() + (~bd).byte() + (~cd).byte(),
    )
    return torch.stack([count < 2 for count in larger], -1).flatten(-2)


@torch.no_grad()
def top2_product_(out: Tensor, base: Tensor, learned: Tensor, scale: Tensor | None = None) -> None:
    """Write base * top2_mask(learned * scale) into ``out``: the original weights under the learned mask.

    Args:
        out: (..., I), I a multiple of 4; overwritten.
        base: (..., I), the original weights.
        learned: (..., I), the learned weights.
        scale: (I,) positive, (E, I) for stacked experts, or None for ones.
    """
    if scale is not None and scale.dim() == 2:
        for parts in zip(out, base, learned, scale, strict=True):
            top2_product_(*parts)
        return
    if kernel_for(learned) == "cpu" and all(
        t.dtype == torch.float32 and t.is_contiguous() for t in (out, base, learned)
    ):
        flat = [t.view(-1).numpy() for t in (out, base, learned)]
        cpu.top2_product_(*flat, cpu.columns(scale), cpu.parts())  # type: ignore[call-arg]
        return
    out.copy_(base * top2_mask(learned if scale is None else learned.float() * scale.to(learned.device)))


@torch.no_grad()
def survey_(weight: Tensor, codes: Tensor, scale: Tensor | None = None) -> tuple[int, float]:
    """How many entries of the mask changed since the last call, and the penalty, in one pass over the weight.

    Args:
        weight: (..., I), I a multiple of 4.
        codes: (weight.numel() / 4,) uint8, where this function remembers the mask; zeros before the first call.
        scale: (I,) positive, (E, I) for stacked experts, or None for ones.

    Returns:
        (mask entries that changed, sum of R(weight * scale)).
    """
    if scale is not None and scale.dim() == 2:
        parts = [survey_(w, c, s) for w, c, s in zip(weight, codes.view(len(weight), -1), scale, strict=True)]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)
    if kernel_for(weight) == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
        memory = codes.view(-1).numpy()
        changed, penalty = cpu.survey_(weight.view(-1).numpy(), cpu.columns(scale), memory, cpu.parts())
        return int(changed), float(penalty)
    scored = weight.float() if scale is None else weight.float() * scale.to(weight.device)
    bits = top2_mask(scored).unflatten(-1, (-1, 4)).to(torch.uint8)
    now = (bits * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)
    before = codes.view(now.shape)
    changed = sum(int(((now ^ before) >> k & 1).sum()) for k in range(4))
    before.copy_(now)
    return changed, regularizer(scored).item()


def expand_scale(scale: Tensor, rows: Tensor) -> Tensor:
    """A scale (I,) or (E, I), ready to multiply rows of (O, I) or (E, O, I)."""
    return (scale if scale.dim() == 1 else scale[:, None]).to(rows.device)


def _nonzeros(weight: Tensor) -> Tensor:
    """Non-zero entries of each block: (..., I) -> (..., I / 4)."""
    return weight.unflatten(-1, (-1, 4)).count_nonzero(-1)
