"""What the Triton kernels share: tiles of whole blocks within a row, the four columns of a tile, and rounded stores.

A program works on one tile of one row. Its weights are loaded and stored as one contiguous vector, so that the compiler
makes 16-byte accesses, and the four columns are split off in registers. bfloat16 comes as int16 bits, because Triton's
interpreter, in which tests run, has no bfloat16.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_of(blocks, width, group, TILE: tl.constexpr):
    """Of this program: its first block in the weight, its blocks, and of its 4 * TILE entries the places in the weight
    and in the scale, and which are there.

    ``blocks`` is the number of blocks of a row, ``width`` of entries; ``group`` rows share a row of the scale.
    """
    tiles = tl.cdiv(blocks, TILE)
    row = tl.program_id(0) // tiles
    first = (tl.program_id(0) - row * tiles) * TILE
    count = tl.minimum(blocks - first, TILE)
    lane = 4 * first.to(tl.int64) + tl.arange(0, 4 * TILE)
    place, column = row.to(tl.int64) * width + lane, (row // group).to(tl.int64) * width + lane
    return row.to(tl.int64) * blocks + first, count, place, column, tl.arange(0, 4 * TILE) < 4 * count


@triton.jit
def read(tensor, place, inside, BFLOAT16: tl.constexpr):
    """float32 values, 0 outside."""
    value = tl.load(tensor + place, mask=inside, other=0)
    if BFLOAT16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def split4(x, TILE: tl.constexpr):
    """The four columns of the blocks: (4 * TILE,) -> four times (TILE,)."""
    even, odd = tl.split(tl.reshape(x, (TILE, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def join4(a, b, c, d, TILE: tl.constexpr):
    """Inverse of split4."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * TILE,))


@triton.jit
def ranks(a, b, c, d):
    """Rank of every magnitude in its block, 0 to 3; ties go to the earlier one."""
    ab, ac, ad = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)
    bc, bd, cd = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
    return ab + ac + ad, 1 - ab + bc + bd, 2 - ac - bc + cd, 3 - ad - bd - cd


@triton.jit
def mixed(x):
    """32 well-mixed bits of a counter (Wellons' lowbias32)."""
    x = x.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def write(tensor, place, value, inside, seed, origin, BFLOAT16: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Store float32 values, rounded. ``seed`` and ``origin``, the index of the first entry, are int32 bits."""
    if BFLOAT16:
        bits = value.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            index = place.to(tl.uint32) + origin.to(tl.uint32)
            noise = (mixed(index ^ seed.to(tl.uint32)) & 0xFFFF).to(tl.int32)
        else:
            noise = 0x7FFF + ((bits >> 16) & 1)
        still = (bits & 0x7F800000) == 0x7F800000  # NaN and infinity stay as they are
        tl.store(tensor + place, tl.where(still, bits >> 16, (bits + noise) >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(tensor + place, value.to(tensor.dtype.element_ty), mask=inside)


def bits(tensor: Tensor) -> Tensor:
    """A tensor as kernels take it: bfloat16 as int16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def scales(scale: Tensor | None, weight: Tensor) -> Tensor:
    """A scale (I,) or (E, I) as kernels take it; where there is none, any tensor will do."""
    return weight if scale is None else scale.to(weight.device, torch.float32).contiguous()


class Grid:
    """How the programs of a launch share a contiguous weight.

    Args:
        weight: (..., I), I a multiple of 4.
        scale: (I,), (E, I) or None. Without one, rows do not matter, and the weight is one row.
        most: blocks per program.

    Attributes:
        sizes: (blocks, width, rows per row of the scale), which every kernel takes.
        tile: blocks per program, a power of two.
        programs: of the launch.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, most: int):
        width = weight.numel() if scale is None else weight.shape[-1]
        rows, blocks = weight.numel() // width, width // 4
        self.sizes = (blocks, width, rows if scale is None or scale.dim() == 1 else rows // scale.shape[0])
        self.tile = min(most, triton.next_power_of_2(blocks))
        self.programs = rows * triton.cdiv(blocks, self.tile)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launches inside go to the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
