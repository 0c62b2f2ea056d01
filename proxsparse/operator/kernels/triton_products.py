"""The masked product and the survey as Triton kernels: one launch and one pass each, nothing of the weight's size next
to it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxsparse.operator.kernels.triton_tiles import (
    Grid,
    bits,
    join4,
    on_device,
    ranks,
    read,
    scales,
    split4,
    tile_of,
)

TILE, WARPS = 1024, 4  # blocks of four per program, and its warps


@triton.jit
def scores(weights, scale, place, column, inside, BFLOAT16: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr):
    """|weight * scale| of the four columns of a tile. ``column`` is the tile's place in the scale."""
    score = tl.abs(read(weights, place, inside, BFLOAT16))
    if SCALED:
        score *= tl.load(scale + column, mask=inside, other=0.0)
    return split4(score, TILE)


@triton.jit
def _product(
    out,
    base,
    learned,
    scale,
    blocks,
    width,
    group,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
    TILE: tl.constexpr,
):
    _, _, place, column, inside = tile_of(blocks, width, group, TILE)
    a, b, c, d = scores(learned, scale, place, column, inside, BFLOAT16, SCALED, TILE)
    ra, rb, rc, rd = ranks(a, b, c, d)
    rank = join4(ra, rb, rc, rd, TILE)
    value = tl.load(base + place, mask=inside, other=0)
    tl.store(out + place, tl.where(rank < 2, value, tl.zeros_like(value)), mask=inside)


@triton.jit
def _survey(
    weights,
    scale,
    codes,
    moved,
    penalties,
    blocks,
    width,
    group,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
    TILE: tl.constexpr,
):
    start, count, place, column, inside = tile_of(blocks, width, group, TILE)
    a, b, c, d = scores(weights, scale, place, column, inside, BFLOAT16, SCALED, TILE)
    ra, rb, rc, rd = ranks(a, b, c, d)
    code = (ra < 2).to(tl.int32) + 2 * (rb < 2).to(tl.int32) + 4 * (rc < 2).to(tl.int32) + 8 * (rd < 2).to(tl.int32)
    block = tl.arange(0, TILE)
    here = block < count
    own = codes + start + block
    before = tl.load(own, mask=here, other=0).to(tl.int32)
    tl.store(own, code.to(tl.uint8), mask=here)
    changed = code ^ before
    entries = (changed & 1) + (changed >> 1 & 1) + (changed >> 2 & 1) + (changed >> 3 & 1)
    # One sum per program, added up by torch: the same result every time, which atomic sums of floats would not give.
    tl.store(moved + tl.program_id(0), tl.sum(tl.where(here, entries, 0), 0))
    penalty = tl.where(here, a * b * (c + d) + c * d * (a + b), 0.0)
    tl.store(penalties + tl.program_id(0), tl.sum(penalty, 0))


def top2_product_(out: Tensor, base: Tensor, learned: Tensor, scale: Tensor | None) -> None:
    """Write ``base`` times the top-two mask of ``learned * scale`` into ``out``.

    Args:
        out, base, learned: contiguous, of one dtype and shape; ``out`` may be one of the others.
        scale: (I,), (E, I) for stacked experts, or None for ones.
    """
    grid = Grid(learned, scale, TILE)
    with on_device(out):
        _product[(grid.programs,)](
            bits(out), bits(base), bits(learned), scales(scale, learned), *grid.sizes,
            SCALED=scale is not None, BFLOAT16=out.dtype == torch.bfloat16, TILE=grid.tile, num_warps=WARPS,
        )  # fmt: skip


def survey_(weight: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    """Look at every block once. Nothing is waited for.

    Args:
        weight: contiguous.
        codes: (blocks,) uint8 contiguous, bit k set where entry k of a block is kept; overwritten.
        scale: (I,), (E, I) for stacked experts, or None for ones.

    Returns:
        (2,) float64: entries of the mask that changed, sum of R(weight * scale).
    """
    grid = Grid(weight, scale, TILE)
    moved = torch.empty(grid.programs, dtype=torch.int32, device=weight.device)
    penalties = torch.empty(grid.programs, dtype=torch.float32, device=weight.device)
    with on_device(weight):
        _survey[(grid.programs,)](
            bits(weight), scales(scale, weight), codes, moved, penalties, *grid.sizes,
            SCALED=scale is not None, BFLOAT16=weight.dtype == torch.bfloat16, TILE=grid.tile, num_warps=WARPS,
        )  # fmt: skip
    return torch.stack((moved.sum().double(), penalties.double().sum()))
