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
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from proxsparse.operator.kernels import eager
from proxsparse.operator.rounding import Noise, widest

logger = logging.getLogger(__name__)
_KERNELS: dict[str, ModuleType | None] = {"eager": eager, "cpu": None, "triton": None}
_PRODUCTS = dict(_KERNELS)  # with top2_product_ and survey_
try:
    from proxsparse.operator.kernels import cpu, cpu_products

    _KERNELS["cpu"], _PRODUCTS["cpu"] = cpu, cpu_products
except ImportError:  # numba has no wheel for this Python or platform
    logger.warning("numba can't be imported: the proximal operator runs in plain torch on the CPU, many times slower")
try:
    from proxsparse.operator.kernels import triton, triton_products

    _KERNELS["triton"], _PRODUCTS["triton"] = triton, triton_products
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
    return name if _KERNELS.get(name) and weight.dtype in _FUSED_DTYPES.get(name, ()) else "eager"


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
        seed: of the rounding noise, which is the same on every device; give each call its own.
        kernel: 'cpu', 'triton' or 'eager'; None picks the fastest (``kernel_for``).

    Returns:
        Counts of blocks, and of blocks that are 2:4 afterwards.

    Raises:
        ValueError: the last dimension is no multiple of 4, lambda_ is negative or not finite, scale has the
            wrong shape, or the weight has NaN or infinite entries.
    """
    counts = torch.zeros(2, dtype=torch.int32, device=weight.device)
    prox_counted_(weight, lambda_, counts, scale=scale, noise=Noise(seed) if stochastic else None, kernel=kernel)
    sparse, bad = counts.tolist()
    if bad:
        raise ValueError(non_finite(bad))
    return ProxStats(weight.numel() // 4, sparse)


@torch.no_grad()
def prox_counted_(
    weight: Tensor,
    lambda_: float,
    counts: Tensor,
    *,
    scale: Tensor | None = None,
    noise: Noise | None = None,
    kernel: str | None = None,
) -> None:
    """``prox_op_`` whose counts stay on the device: nothing waits for the result.

    Args:
        weight, lambda_, scale, kernel: as in ``prox_op_``.
        counts: (2,) int32 on the weight's device, to which are added the blocks that are 2:4 afterwards, and the
            blocks with NaN or infinite entries, which are left as they were.
        noise: of stochastic rounding, or None to round to nearest.

    Raises:
        ValueError: as ``prox_op_``, but not for NaN or infinite entries.
    """
    _check(weight, lambda_, scale)
    name = kernel or kernel_for(weight)
    module = _KERNELS.get(name)
    if module is None:
        raise ValueError(f"kernel must be one of {', '.join(n for n, m in _KERNELS.items() if m)}; got {kernel!r}.")
    if not weight.numel():
        return
    if lambda_ == 0:
        finite = weight.isfinite().unflatten(-1, (-1, 4)).all(-1)
        counts[0] += ((_nonzeros(weight) <= 2) & finite).sum().to(counts.dtype)
        counts[1] += (~finite).sum().to(counts.dtype)
        return
    solved = weight if weight.is_contiguous() else weight.contiguous()
    for part, own, after in _parts(solved, scale, name):
        module.prox_(part, lambda_, own, noise and noise.after(after), counts)
    if solved is not weight:
        weight.copy_(solved)


def non_finite(blocks: int) -> str:
    """What is wrong with a weight that has such blocks."""
    return f"weight has NaN or infinite entries in {blocks} of its blocks of four; they have no minimiser."


def _parts(weight: Tensor, scale: Tensor | None, kernel: str) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Parts of a weight that share a scale (I,): (part, its scale, entries before it). Triton's kernels need none."""
    if scale is None or scale.dim() == 1 or kernel == "triton":
        yield weight, scale, 0
        return
    for number, (expert, own) in enumerate(zip(weight, scale, strict=True)):
        yield expert, own, number * expert.numel()


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
    return eager.penalty(weight.to(dtype))


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
    return eager.top2_mask(weight.detach())


@torch.no_grad()
def top2_product_(
    out: Tensor, base: Tensor, learned: Tensor, scale: Tensor | None = None, kernel: str | None = None
) -> None:
    """Write base * top2_mask(learned * scale) into ``out``: the original weights under the learned mask.

    Args:
        out: (..., I), I a multiple of 4; overwritten. It may be ``base`` or ``learned``.
        base: (..., I), the original weights.
        learned: (..., I), the learned weights.
        scale: (I,) positive, (E, I) for stacked experts, or None for ones.
        kernel: as in ``prox_op_``.
    """
    if not out.numel():  # an empty shard
        return
    name, module = _product_kernel(kernel, out, base, learned)
    for (written, own, _), kept, scored in zip(
        _parts(out, scale, name), _tensors(base, scale, name), _tensors(learned, scale, name), strict=True
    ):
        module.top2_product_(written, kept, scored, own)


@torch.no_grad()
def survey_(weight: Tensor, codes: Tensor, scale: Tensor | None = None, kernel: str | None = None) -> Tensor:
    """How many entries of the mask changed since the last call, and the penalty, in one pass over the weight.

    Args:
        weight: (..., I), I a multiple of 4.
        codes: (weight.numel() / 4,) uint8, where this function remembers the mask; zeros before the first call.
        scale: (I,) positive, (E, I) for stacked experts, or None for ones.
        kernel: as in ``prox_op_``.

    Returns:
        (2,) float64 (see ``widest``) on the weight's device: mask entries that changed, sum of R(weight * scale).
    """
    name, module = _product_kernel(kernel, weight)
    found = torch.zeros(2, dtype=widest(weight.device), device=weight.device)
    for part, own, after in _parts(weight, scale, name):
        found += module.survey_(part, codes[after // 4 : (after + part.numel()) // 4], own)
    return found


def _product_kernel(kernel: str | None, *tensors: Tensor) -> tuple[str, ModuleType]:
    """Name and module of the kernel for tensors that are read together; only 'eager' takes unlike ones."""
    alike = all(t.is_contiguous() and t.dtype == tensors[0].dtype for t in tensors)
    name = kernel or (kernel_for(tensors[0]) if alike else "eager")
    module = _PRODUCTS[name]
    assert module is not None, name
    return name, module


def _tensors(weight: Tensor, scale: Tensor | None, kernel: str) -> Iterator[Tensor]:
    return (part for part, _, _ in _parts(weight, scale, kernel))


def expand_scale(scale: Tensor, rows: Tensor) -> Tensor:
    """A scale (I,) or (E, I), ready to multiply rows of (O, I) or (E, O, I)."""
    return (scale if scale.dim() == 1 else scale[:, None]).to(rows.device)


def _nonzeros(weight: Tensor) -> Tensor:
    """Non-zero entries of each block: (..., I) -> (..., I / 4)."""
    return weight.unflatten(-1, (-1, 4)).count_nonzero(-1)
