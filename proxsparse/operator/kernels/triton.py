"""The 2:4 proximal operator as one Triton kernel for CUDA and ROCm: one launch, one read, one write, no waiting.

``proxsparse/operator/kernels/__init__.py`` derives the algorithm. Weights are float32, bfloat16 or float16 and are
solved in float32. bfloat16 results are rounded stochastically on request. With TRITON_INTERPRET=1 the same kernel runs
on CPU tensors, for tests.
"""

import os

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
    write,
)
from proxsparse.operator.rounding import Noise, signed

# Blocks of four per program, and its warps: the fastest of eight pairs on an H100. A small program that has a strong
# block keeps few others waiting. Triton's interpreter takes the same time per program whatever its size.
TILE, WARPS = (4096 if os.environ.get("TRITON_INTERPRET") == "1" else 128), 2


@triton.jit
def _gentle(z2, z3, z4, lam, rounds):
    """Coordinate descent where the problem is convex: four sweeps per round."""
    a, b, c, d = z2 * 0 + 1, z2, z3, z4
    for _ in range(rounds):
        for _ in tl.static_range(4):
            ab, low = a * b, a + b
            d = tl.maximum(z4 - lam * (ab + c * low), 0.0)
            c = tl.maximum(z3 - lam * (ab + d * low), 0.0)
            cd, high = c * d, c + d
            b = tl.maximum(z2 - lam * (cd + a * high), 0.0)
            a = tl.maximum(1.0 - lam * (cd + b * high), 0.0)
    return a, b, c, d


@triton.jit
def _rounds(push):
    """Rounds after which coordinate descent is below float32's resolution.

    ``push``, 2 L (z1 + z2 + z3 - z4), is the largest of the program. float64 sweeps over 800,000 blocks, corners and
    ties among them, were within 6e-8 of the limit after 4 sweeps up to a push of 0.05, 8 up to 0.35, 12 up to 0.75 and
    16 at the edge.
    """
    return 1 + (push > 0.05).to(tl.int32) + (push > 0.35).to(tl.int32) + (push > 0.75).to(tl.int32)


@triton.jit
def _three(z2, z3, lam):
    """Largest root of h for x3, by Newton from above. Returns (x1, x2, x3, 1 where it exists)."""
    t = z3
    exists = tl.where(lam < 3.0, 1.0, 0.0)
    for _ in range(16):
        product = 4 * t * (z3 - t)
        s1 = tl.sqrt(tl.maximum(1.0 - product, 0.0))
        s2 = tl.sqrt(tl.maximum(z2 * z2 - product, 0.0))
        x1, x2 = (1.0 + s1) * 0.5, (z2 + s2) * 0.5
        slope = 1.0 + lam * (2 * t - z3) * (x2 / tl.maximum(s1, 1e-30) + x1 / tl.maximum(s2, 1e-30))
        new = tl.minimum(t - (lam * x1 * x2 - (z3 - t)) / tl.maximum(slope, 1e-30), t)
        exists = tl.where((slope > 0) & (new >= 0), exists, 0.0)
        t = tl.where(exists > 0, new, t)
    t = tl.minimum(tl.maximum(t, 0.0), z3)
    product = 4 * t * (z3 - t)
    x1 = (1.0 + tl.sqrt(tl.maximum(1.0 - product, 0.0))) * 0.5
    x2 = (z2 + tl.sqrt(tl.maximum(z2 * z2 - product, 0.0))) * 0.5
    return x1, x2, t, exists


@triton.jit
def _four(z2, z3, z4, lam):
    """Largest root of G for q, by Newton from 1. Returns (x1, x2, x3, x4, 1 where it exists)."""
    q = z2 * 0 + 1.0
    exists = tl.where(lam < 3.0, 1.0, 0.0)
    k = 1.0 - 2 * lam * (1.0 + z2 + z3 - z4)
    for _ in range(20):
        d1 = tl.sqrt(q * q + 4 * lam * (1.0 - z4))
        d2 = tl.sqrt(q * q + 4 * lam * (z2 - z4))
        d3 = tl.sqrt(q * q + 4 * lam * (z3 - z4))
        root = tl.sqrt(tl.maximum(q * q - k, 0.0))
        value = 2.0 - 0.5 * (q + d1 + d2 + d3) - root
        ratios = q / tl.maximum(d1, 1e-30) + q / tl.maximum(d2, 1e-30) + q / tl.maximum(d3, 1e-30)
        slope = 0.5 * (1.0 + ratios) + q / tl.maximum(root, 1e-30)
        exists = tl.where(slope > 0, exists, 0.0)
        q = tl.where(exists > 0, tl.minimum(q + value / tl.maximum(slope, 1e-30), q), q)
    d1 = tl.sqrt(q * q + 4 * lam * (1.0 - z4))
    d2 = tl.sqrt(q * q + 4 * lam * (z2 - z4))
    d3 = tl.sqrt(q * q + 4 * lam * (z3 - z4))
    a = 0.5 * (q + d1 + d2 + d3) - 1.0
    half = 0.5 / tl.maximum(lam, 1e-30)
    x1 = tl.minimum(tl.maximum((d1 - a) * half, 0.0), 1.0)
    x2 = tl.minimum(tl.maximum((d2 - a) * half, 0.0), z2)
    x3 = tl.minimum(tl.maximum((d3 - a) * half, 0.0), z3)
    x4 = tl.minimum((q - a) * half, z4)
    return x1, x2, x3, x4, tl.where(x4 > 0, exists, 0.0)


@triton.jit
def _objective(x1, x2, x3, x4, z2, z3, z4, lam):
    r1, r2, r3, r4 = 1.0 - x1, z2 - x2, z3 - x3, z4 - x4
    return 0.5 * (r1 * r1 + r2 * r2 + r3 * r3 + r4 * r4) + lam * (x1 * x2 * (x3 + x4) + x3 * x4 * (x1 + x2))


@triton.jit
def _strong(z2, z3, z4, lam):
    """The best of two, three and four weights."""
    best = 0.5 * (z3 * z3 + z4 * z4)
    zero = z2 * 0
    b1, b2, b3, b4 = zero + 1.0, z2, zero, zero
    x1, x2, x3, exists = _three(z2, z3, lam)
    value = _objective(x1, x2, x3, zero, z2, z3, z4, lam)
    better = (exists > 0) & (value < best)
    best = tl.where(better, value, best)
    b1, b2, b3 = tl.where(better, x1, b1), tl.where(better, x2, b2), tl.where(better, x3, b3)
    x1, x2, x3, x4, exists = _four(z2, z3, z4, lam)
    better = (exists > 0) & (_objective(x1, x2, x3, x4, z2, z3, z4, lam) < best)
    b1, b2 = tl.where(better, x1, b1), tl.where(better, x2, b2)
    return b1, b2, tl.where(better, x3, b3), tl.where(better, x4, b4)


@triton.jit
def _minimiser(z1, z2, z3, z4, lam, active):
    """Magnitudes of the minimiser relative to z1, lam * z1, and z1 (1 where there is nothing to solve)."""
    # A block with nothing to solve gets strength 0 and a harmless shape.
    strength = tl.where(active, tl.minimum(lam * z1, 3.0), 0.0)
    top = tl.where(active, z1, 1.0)
    # One division instead of three. A power of two keeps the inverse of tiny and huge weights among float32's normals.
    near = tl.where(top < 1e-30, 18446744073709551616.0, tl.where(top > 1e30, 5.421010862427522e-20, 1.0))  # 2^64
    unit = tl.where(active, 1.0 / (top * near), 0.0)
    z2, z3, z4 = tl.where(active, z2 * near * unit, 1.0), z3 * near * unit, z4 * near * unit
    push = 2 * strength * (1.0 + z2 + z3 - z4)
    strong = push >= 1.0
    most = tl.max(push, 0)
    x1, x2, x3, x4 = _gentle(z2, z3, z4, tl.where(strong, 0.0, strength), _rounds(most))
    if most >= 1.0:
        y1, y2, y3, y4 = _strong(z2, z3, z4, strength)
        x1, x2 = tl.where(strong, y1, x1), tl.where(strong, y2, x2)
        x3, x4 = tl.where(strong, y3, x3), tl.where(strong, y4, x4)
    return x1, x2, x3, x4, strength, top


@triton.jit
def _shrinkage(x1, x2, x3, x4, strength, top, active):
    """By how much each of the four magnitudes, in descending order, gets smaller; huge where nothing is left."""
    huge = 3.4e38  # a float32 constant; larger than any weight that can be shrunk to zero by it
    force, x12, x34, low, high = strength * top, x1 * x2, x3 * x4, x1 + x2, x3 + x4
    s3 = tl.where(x3 > 0, force * (x12 + x4 * low), huge)
    s4 = tl.where(x4 > 0, force * (x12 + x3 * low), huge)
    return force * (x34 + x2 * high), force * (x34 + x1 * high), tl.where(active, s3, 0.0), tl.where(active, s4, 0.0)


@triton.jit
def _shrunk(weight, magnitude, factor, rank, s1, s2, s3, s4, SCALED: tl.constexpr):
    """The weight less the shrinkage of its rank; +0 where nothing is left. ``magnitude`` is |weight| * factor."""
    own = tl.where(rank < 2, tl.where(rank == 0, s1, s2), tl.where(rank == 2, s3, s4))
    left = tl.abs(weight) - (own / factor if SCALED else own)
    left = tl.where(own >= magnitude, 0.0, tl.maximum(left, 0.0))
    return tl.where(own == 0, weight, tl.where(weight < 0, -left, left) + 0.0)


@triton.jit
def _sorted(a, b, c, d):
    """The four columns in descending order."""
    high1, low1, high2, low2 = tl.maximum(a, b), tl.minimum(a, b), tl.maximum(c, d), tl.minimum(c, d)
    mid1, mid2 = tl.minimum(high1, high2), tl.maximum(low1, low2)
    return tl.maximum(high1, high2), tl.maximum(mid1, mid2), tl.minimum(mid1, mid2), tl.minimum(low1, low2)


@triton.jit
def solve(wa, wb, wc, wd, fa, fb, fc, fd, lam, SCALED: tl.constexpr):
    """The operator on the four columns of a tile, with a factor for each column where there is a scale.

    Returns:
        the new columns; where the block is finite; where it is 2:4 now.
    """
    a, b, c, d = tl.abs(wa), tl.abs(wb), tl.abs(wc), tl.abs(wd)
    if SCALED:
        a, b, c, d = a * fa, b * fb, c * fc, d * fd
    finite = (a < float("inf")) & (b < float("inf")) & (c < float("inf")) & (d < float("inf"))
    z1, z2, z3, z4 = _sorted(a, b, c, d)
    active = finite & (z3 > 0) & (lam * z1 > 0)
    x1, x2, x3, x4, strength, top = _minimiser(z1, z2, z3, z4, lam, active)
    s1, s2, s3, s4 = _shrinkage(x1, x2, x3, x4, strength, top, active)
    ra, rb, rc, rd = ranks(a, b, c, d)
    na = _shrunk(wa, a, fa, ra, s1, s2, s3, s4, SCALED)
    nb = _shrunk(wb, b, fb, rb, s1, s2, s3, s4, SCALED)
    nc = _shrunk(wc, c, fc, rc, s1, s2, s3, s4, SCALED)
    nd = _shrunk(wd, d, fd, rd, s1, s2, s3, s4, SCALED)
    na, nb = tl.where(finite, na, wa), tl.where(finite, nb, wb)
    nc, nd = tl.where(finite, nc, wc), tl.where(finite, nd, wd)
    return na, nb, nc, nd, finite, finite & (x3 <= 0)


@triton.jit
def tally(counts, sparse, bad):
    """Add to the two counts of a weight. Nothing is ordered by them, so a fence around the sums would only cost."""
    both = tl.sum(tl.where(sparse, 1, 0) + tl.where(bad, 65536, 0), 0)  # two sums in one: a tile is smaller than 65536
    tl.atomic_add(counts, both & 0xFFFF, sem="relaxed")
    tl.atomic_add(counts + 1, both >> 16, sem="relaxed")


@triton.jit(do_not_specialize=["seed", "origin", "group"], do_not_specialize_on_alignment=["counts"])
def _prox(
    weights,
    scale,
    counts,
    blocks,
    width,
    group,
    lam,
    seed,
    origin,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    _, count, place, column, inside = tile_of(blocks, width, group, TILE)
    wa, wb, wc, wd = split4(read(weights, place, inside, BFLOAT16), TILE)
    fa, fb, fc, fd = 1.0, 1.0, 1.0, 1.0
    if SCALED:
        fa, fb, fc, fd = split4(tl.load(scale + column, mask=inside, other=1.0), TILE)
    na, nb, nc, nd, finite, sparse = solve(wa, wb, wc, wd, fa, fb, fc, fd, lam, SCALED)
    write(weights, place, join4(na, nb, nc, nd, TILE), inside, seed, origin, BFLOAT16, STOCHASTIC)
    here = tl.arange(0, TILE) < count
    tally(counts, here & sparse, here & (finite == 0))


def prox_(weight: Tensor, lam: float, scale: Tensor | None, noise: Noise | None, counts: Tensor) -> None:
    """Apply the operator to a contiguous weight in place. Nothing is waited for.

    Args:
        weight: contiguous float32, bfloat16 or float16; last dimension a multiple of 4.
        scale: (I,), (E, I) for stacked experts, or None for ones.
        noise: of stochastic rounding, or None to round bfloat16 to nearest.
        counts: (2,) int32 on the weight's device, to which are added the blocks that are 2:4 afterwards, and the
            blocks with a non-finite entry, which are left as they were.
    """
    grid = Grid(weight, scale, TILE)
    seed, origin = noise or (0, 0)
    with on_device(weight):
        _prox[(grid.programs,)](
            bits(weight),
            scales(scale, weight),
            counts,
            *grid.sizes,
            float(min(lam, 3.0e38)),
            signed(seed),
            signed(origin),
            SCALED=scale is not None,
            BFLOAT16=weight.dtype == torch.bfloat16,
            STOCHASTIC=noise is not None and weight.dtype == torch.bfloat16,
            TILE=grid.tile,
            enable_fp_fusion=True,
            num_warps=WARPS,
        )
