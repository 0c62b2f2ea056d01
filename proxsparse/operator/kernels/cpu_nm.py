"""Which scores of every block are the N largest, for blocks of any length: numba, on all cores.

A tile of blocks is ranked in structure-of-arrays form, pair by pair, so that the compiler turns every inner loop into
SIMD instructions.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from proxsparse.operator.kernels.cache import choose_cache
from proxsparse.operator.kernels.threads import match_torch

choose_cache()

TILE = 128  # blocks; of length 16 they take 16 KiB per thread, inside the L1 cache


@numba.njit(error_model="numpy", cache=True)  # no fast-math, under which a NaN may compare in any way
def _rank(scores, tile, rank, count, m):
    """How many others of its block are larger than each score; ties go to the earlier one."""
    for j in range(count):
        for k in range(m):
            tile[k, j] = abs(scores[m * j + k])
            rank[k, j] = 0
    for first in range(m):
        for second in range(first + 1, m):
            a, b, of_a, of_b = tile[first], tile[second], rank[first], rank[second]
            for j in range(count):
                larger = np.int32(b[j] > a[j])
                of_a[j] += larger
                of_b[j] += np.int32(1) - larger


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _largest_flat_(scores, kept, n, m, parts):
    """Write which entries are kept.

    Args:
        scores: (N,) float32, N a multiple of m.
        kept: (N,) bool; overwritten.
        parts: number of contiguous parts that the threads share.
    """
    blocks = scores.size // m
    for part in numba.prange(parts):
        tile, rank = np.empty((m, TILE), np.float32), np.empty((m, TILE), np.int32)
        last = (part + 1) * blocks // parts
        for start in range(part * blocks // parts, last, TILE):
            count = min(TILE, last - start)
            _rank(scores[m * start : m * (start + count)], tile, rank, count, m)
            out = kept[m * start : m * (start + count)]
            for j in range(count):
                for k in range(m):
                    out[m * j + k] = rank[k, j] < n


def largest(scores: Tensor, n: int, m: int) -> Tensor:
    """Where a score is one of the n largest of its block; ties go to the earlier one.

    Args:
        scores: (..., I) contiguous float32 on the CPU, I a multiple of m.

    Returns:
        (..., I) bool.
    """
    kept = torch.empty(scores.shape, dtype=torch.bool)
    _largest_flat_(scores.view(-1).numpy(), kept.view(-1).numpy(), n, m, 8 * match_torch())
    return kept
