"""The 2:4 proximal operator as one Triton kernel for CUDA and ROCm: one launch, one read, one write.

``proxsparse/operator/kernels/__init__.py`` derives the algorithm. Weights are float32, bfloat16 or float16 and are
solved in float32. bfloat16 results are rounded stochastically on request. With TRITON_INTERPRET=1 the same kernel runs
on CPU tensors, for tests.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # blocks of four per program


@triton.jit
def _hash(x):
    """32 well-mixed bits of a counter (Wellons' lowbias32)."""
    x = x.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _gentle(z2, z3, z4, lam):
    """Coordinate descent where the problem is convex; sixteen sweeps are below float32's resolution there."""
    a, b, c, d = z2 * 0 + 1, z2, z3, z4
    for _ in range(16):
        d = tl.maximum(z4 - lam * (a * b + c * (a + b)), 0.0)
        c = tl.maximum(z3 - lam * (a * b + d * (a + b)), 0.0)
        b = tl.maximum(z2 - lam * (c * d + a * (c + d)), 0.0)
        a = tl.maximum(1.0 - lam * (c * d + b * (c + d)), 0.0)
    return a, b, c, d


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
def _shrunk(weight, magnitude, rank, s1, s2, s3, s4):
    """The weight less the shrinkage of its rank; +0 where nothing is left. The shrinkage is in units of magnitude."""
    own = tl.where(rank == 0, s1, tl.where(rank == 1, s2, tl.where(rank == 2, s3, s4)))
    share = tl.where(magnitude > 0, own / tl.where(magnitude > 0, magnitude, 1.0), 0.0)
    left = tl.abs(weight) - tl.abs(weight) * share
    left = tl.where(own >= magnitude, 0.0, tl.maximum(left, 0.0))
    return tl.where(own == 0, weight, tl.where(weight < 0, -left, left) + 0.0)


@triton.jit
def _load(weights, place, inside, BFLOAT16: tl.constexpr):
    value = tl.load(weights + place, mask=inside, other=0)
    if BFLOAT16:  # as bits: Triton's interpreter has no bfloat16
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _store(weights, place, value, inside, seed, BFLOAT16: tl.constexpr, STOCHASTIC: tl.constexpr):
    value = value.to(tl.float32)
    if BFLOAT16:
        bits = value.to(tl.int32, bitcast=True)
        if STOCHASTIC:
            noise = (_hash(place.to(tl.uint32) ^ seed.to(tl.uint32)) & 0xFFFF).to(tl.int32)
        else:
            noise = 0x7FFF + ((bits >> 16) & 1)
        tl.store(weights + place, ((bits + noise) >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(weights + place, value.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def _sorted(a, b, c, d):
    """The four columns in descending order."""
    high1, low1, high2, low2 = tl.maximum(a, b), tl.minimum(a, b), tl.maximum(c, d), tl.minimum(c, d)
    mid1, mid2 = tl.minimum(high1, high2), tl.maximum(low1, low2)
    return tl.maximum(high1, high2), tl.maximum(mid1, mid2), tl.minimum(mid1, mid2), tl.minimum(low1, low2)


@triton.jit(do_not_specialize=["seed"])
def _prox(
    weights,
    scales,
    counts,
    blocks,
    width,
    lam,
    seed,
    SCALED: tl.constexpr,
    BFLOAT16: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = block < blocks
    place = 4 * block
    wa = _load(weights, place, inside, BFLOAT16)
    wb = _load(weights, place + 1, inside, BFLOAT16)
    wc = _load(weights, place + 2, inside, BFLOAT16)
    wd = _load(weights, place + 3, inside, BFLOAT16)
    a, b, c, d = tl.abs(wa), tl.abs(wb), tl.abs(wc), tl.abs(wd)
    if SCALED:
        column = place % width
        a *= tl.load(scales + column, mask=inside, other=1.0)
        b *= tl.load(scales + column + 1, mask=inside, other=1.0)
        c *= tl.load(scales + column + 2, mask=inside, other=1.0)
        d *= tl.load(scales + column + 3, mask=inside, other=1.0)
    finite = (a < float("inf")) & (b < float("inf")) & (c < float("inf")) & (d < float("inf"))
    z1, z2, z3, z4 = _sorted(a, b, c, d)
    # A block with nothing to solve gets strength 0 and a harmless shape.
    active = finite & (z3 > 0) & (lam * z1 > 0)
    strength = tl.where(active, tl.minimum(lam * z1, 3.0), 0.0)
    top = tl.where(active, z1, 1.0)
    z2, z3, z4 = tl.where(active, z2 / top, 1.0), tl.where(active, z3 / top, 0.0), tl.where(active, z4 / top, 0.0)
    strong = 2 * strength * (1.0 + z2 + z3 - z4) >= 1.0
    x1, x2, x3, x4 = _gentle(z2, z3, z4, tl.where(strong, 0.0, strength))
    if tl.max(strong.to(tl.int32), 0) > 0:
        y1, y2, y3, y4 = _strong(z2, z3, z4, strength)
        x1, x2 = tl.where(strong, y1, x1), tl.where(strong, y2, x2)
        x3, x4 = tl.where(strong, y3, x3), tl.where(strong, y4, x4)
    huge = 3.4e38  # a float32 constant; larger than any weight that can be shrunk to zero by it
    s1 = strength * (x2 * x3 + x4 * (x2 + x3)) * top
    s2 = strength * (x1 * x3 + x4 * (x1 + x3)) * top
    s3 = tl.where(x3 > 0, strength * (x1 * x2 + x4 * (x1 + x2)) * top, huge)
    s4 = tl.where(x4 > 0, strength * (x1 * x2 + x3 * (x1 + x2)) * top, huge)
    s3, s4 = tl.where(active, s3, 0.0), tl.where(active, s4, 0.0)
    # Back to the weights' own order; ties go to the earlier one.
    ab, ac, ad = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)
    bc, bd, cd = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
    wa = _shrunk(wa, a, ab + ac + ad, s1, s2, s3, s4)
    wb = _shrunk(wb, b, (1 - ab) + bc + bd, s1, s2, s3, s4)
    wc = _shrunk(wc, c, (1 - ac) + (1 - bc) + cd, s1, s2, s3, s4)
    wd = _shrunk(wd, d, (1 - ad) + (1 - bd) + (1 - cd), s1, s2, s3, s4)
    _store(weights, place, wa, inside & finite, seed, BFLOAT16, STOCHASTIC)
    _store(weights, place + 1, wb, inside & finite, seed, BFLOAT16, STOCHASTIC)
    _store(weights, place + 2, wc, inside & finite, seed, BFLOAT16, STOCHASTIC)
    _store(weights, place + 3, wd, inside & finite, seed, BFLOAT16, STOCHASTIC)
    sparse = inside & finite & (x3 <= 0)
    tl.atomic_add(counts, tl.sum(sparse.to(tl.int32), 0))
    tl.atomic_add(counts + 1, tl.sum((inside & (finite == 0)).to(tl.int32), 0))


def prox_(weight: Tensor, lam: float, scale: Tensor | None, stochastic: bool, seed: int) -> tuple[int, int]:
    """Apply the operator to a contiguous weight in place.

    Args:
        weight: contiguous float32, bfloat16 or float16; last dimension a multiple of 4.
        scale: (I,), or None for ones.
        stochastic: round bfloat16 stochastically.

    Returns:
        (blocks that are 2:4 afterwards, blocks with a non-finite entry, left as they were).
    """
    blocks = weight.numel() // 4
    bfloat16 = weight.dtype == torch.bfloat16
    counts = torch.zeros(2, dtype=torch.int32, device=weight.device)
    with torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
        _prox[(triton.cdiv(blocks, TILE),)](
            weight.view(torch.int16) if bfloat16 else weight,
            weight if scale is None else scale.to(weight.device, torch.float32).contiguous(),
            counts,
            blocks,
            weight.shape[-1],
            min(lam, 3.0e38),
            seed & 0x7FFFFFFF,
            SCALED=scale is not None,
            BFLOAT16=bfloat16,
            STOCHASTIC=stochastic,
            TILE=TILE,
        )
    sparse, bad = counts.tolist()
    return sparse, bad
