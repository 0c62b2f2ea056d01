"""What the 2:4 mask of learned weights is needed for, on the CPU: the original weights under it, and how it changes.

As in ``cpu.py``, a tile of blocks is read in structure-of-arrays form, and each inner loop becomes SIMD instructions.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from proxsparse.operator.kernels.cpu import _FAST, TILE, _load, _times, columns, flat, parts

U8, I32 = np.uint8, np.int32
NONE, SOME, TWO = I32(0), I32(1), I32(2)
ALL, NOTHING = np.uint32(0xFFFFFFFF), np.uint32(0)


@numba.njit(error_model="numpy", cache=True)  # no fast-math, under which a NaN may compare in any way
def _kept(measured, keep, count):
    """Row k of ``keep``: all bits set where entry k of a block is one of its two largest, else none.

    Kept where fewer than two others are larger; ties go to the earlier entry, as in top2_mask.
    """
    for j in range(count):
        a, b, c, d = abs(measured[0, j]), abs(measured[1, j]), abs(measured[2, j]), abs(measured[3, j])
        # numba widens sums of int32 to 64 bits, which would halve the lanes: each is cut.
        ab, ac, ad = (SOME if b > a else NONE), (SOME if c > a else NONE), (SOME if d > a else NONE)
        ba, bc, bd = (SOME if a >= b else NONE), (SOME if c > b else NONE), (SOME if d > b else NONE)
        ca, cb, cd = (SOME if a >= c else NONE), (SOME if b >= c else NONE), (SOME if d > c else NONE)
        da, db, dc = (SOME if a >= d else NONE), (SOME if b >= d else NONE), (SOME if c >= d else NONE)
        keep[0, j] = ALL if I32(ab + ac + ad) < TWO else NOTHING
        keep[1, j] = ALL if I32(ba + bc + bd) < TWO else NOTHING
        keep[2, j] = ALL if I32(ca + cb + cd) < TWO else NOTHING
        keep[3, j] = ALL if I32(da + db + dc) < TWO else NOTHING


@numba.njit(error_model="numpy", cache=True)
def _under(base, keep, out, count):
    """The bits of ``base`` where they are kept."""
    for j in range(count):
        out[4 * j], out[4 * j + 1] = base[4 * j] & keep[0, j], base[4 * j + 1] & keep[1, j]
        out[4 * j + 2], out[4 * j + 3] = base[4 * j + 2] & keep[2, j], base[4 * j + 3] & keep[3, j]


@numba.njit(error_model="numpy", cache=True)
def _measured(source, scale, start, count, tile, bits, own):
    """The (4, TILE) values that the blocks from ``start`` on are compared by: the weights, or their scores.

    Args:
        tile: where the weights are put, whose bits ``bits`` shows; own: where scores are put, if there are scales.
    """
    _load(source, 4 * start, count, tile, bits)
    if scale.size == 0:
        return tile
    _times(tile, scale, own, start % scale.shape[1], count)
    return own


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _product_flat_(out, base, learned, scale, parts):
    """Write ``base`` times the top-two mask of ``learned * scale`` into ``out``.

    Args:
        out, base: (N,) bits as unsigned integers; N a multiple of 4; ``out`` is overwritten.
        learned: (N,) float32, or uint16 bits of bfloat16.
        scale: as in prox_flat_.
        parts: number of contiguous parts that the threads share.
    """
    blocks = learned.size // 4
    for part in numba.prange(parts):
        bits, keep = np.empty((4, TILE), np.uint32), np.empty((4, TILE), np.uint32)
        tile, own = bits.view(np.float32), np.empty((4, TILE), np.float32)
        last = (part + 1) * blocks // parts
        for start in range(part * blocks // parts, last, TILE):
            count = min(TILE, last - start)
            _kept(_measured(learned, scale, start, count, tile, bits, own), keep, count)
            _under(base[4 * start : 4 * (start + count)], keep, out[4 * start : 4 * (start + count)], count)


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def _survey_flat_(weight, scale, codes, found):
    """Look at every block once: how many mask entries changed since the last call, and the sum of R.

    Args:
        weight: (N,) float32, or uint16 bits of bfloat16; N a multiple of 4.
        codes: (N / 4,) uint8, bit k set where entry k of a block is kept; overwritten.
        scale: as in prox_flat_.
        found: (parts, 2) float64, overwritten: for each of the contiguous parts that the threads share, the changed
            entries and the sum of R(weight * scale).
    """
    blocks, parts = weight.size // 4, found.shape[0]
    for part in numba.prange(parts):
        bits, keep = np.empty((4, TILE), np.uint32), np.empty((4, TILE), np.uint32)
        tile, own = bits.view(np.float32), np.empty((4, TILE), np.float32)
        changed, penalty = 0, 0.0
        last = (part + 1) * blocks // parts
        for start in range(part * blocks // parts, last, TILE):
            count = min(TILE, last - start)
            measured = _measured(weight, scale, start, count, tile, bits, own)
            _kept(measured, keep, count)
            before = codes[start : start + count]
            for j in range(count):
                a, b, c, d = abs(measured[0, j]), abs(measured[1, j]), abs(measured[2, j]), abs(measured[3, j])
                penalty += a * b * (c + d) + c * d * (a + b)
                # Both codes have two bits set, so entries change in pairs: one leaves, one comes.
                code = U8((keep[0, j] & 1) | (keep[1, j] & 2) | (keep[2, j] & 4) | (keep[3, j] & 8))
                difference = code ^ before[j]
                changed += (difference & 1) + (difference >> 1 & 1) + (difference >> 2 & 1) + (difference >> 3)
                before[j] = code
        found[part, 0], found[part, 1] = changed, penalty


def top2_product_(out: Tensor, base: Tensor, learned: Tensor, scale: Tensor | None) -> None:
    """Write ``base`` times the top-two mask of ``learned * scale`` into ``out``.

    Args:
        out, base, learned: contiguous, of one dtype, float32 or bfloat16; ``out`` may be one of the others.
        scale: (I,), or None for ones.
    """
    _product_flat_(_bits(out), _bits(base), flat(learned), columns(scale), parts())


def survey_(weight: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    """Look at every block once.

    Args:
        weight: contiguous float32 or bfloat16.
        codes: (blocks,) uint8, bit k set where entry k of a block is kept; overwritten.
        scale: (I,), or None for ones.

    Returns:
        (2,) float64: entries of the mask that changed, sum of R(weight * scale).
    """
    found = np.empty((parts(), 2))
    _survey_flat_(flat(weight), columns(scale), codes.view(-1).numpy(), found)
    return torch.from_numpy(found.sum(axis=0))


def _bits(weight: Tensor) -> np.ndarray:
    """(N,) unsigned integers: the same memory."""
    return flat(weight).view(np.uint16 if weight.dtype == torch.bfloat16 else np.uint32)
