"""The 2:4 proximal operator fused for the CPU: one read and one write per weight, on all cores.

``proxsparse/operator/kernels/__init__.py`` derives the algorithm. numba compiles it on first use (some seconds, then
cached on disk). A tile of blocks is sorted and solved in structure-of-arrays form, so that the compiler turns every
inner loop into SIMD instructions. The only extra memory is one tile per thread.

bfloat16 weights come as their uint16 bits, because numpy has no bfloat16. They are solved in float32 and rounded when
they are written: to nearest even, or stochastically (``proxsparse/operator/rounding.py`` says why).
"""

import math

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from proxsparse.operator.kernels.cache import choose_cache
from proxsparse.operator.kernels.threads import match_torch
from proxsparse.operator.rounding import Noise

choose_cache()

TILE = 128  # blocks; 16 float32 columns = 8 KiB per thread, inside the L1 cache
MAX_STEPS = 32
# Reassociation and reciprocals would overflow on huge and denormal weights.
_FAST = {"contract", "nsz", "nnan"}
_inline = numba.njit(fastmath=_FAST, error_model="numpy", cache=True)

F, I32 = np.float32, np.int32
ZERO, HALF, ONE, TWO, THREE, FOUR = F(0), F(0.5), F(1), F(2), F(3), F(4)
ONE_HALF, TWO_HALF = F(1.5), F(2.5)
TINY, HUGE, SETTLED, STRONGEST = F(1e-30), F(3.4028235e38), F(1e-7), F(3)
SWEEP_SETTLED = F(1e-6)  # movement between two sweeps; the error after the second is far smaller
# Integer sums vectorise, float maxima do not. numba widens them to 64 bits, and the loop would have half the lanes: so
# each is cut.
NONE, SOME = I32(0), I32(1)
INFINITE = np.uint32(0x7F800000)  # exponent bits of infinities and NaNs


@_inline
def _hash(x):
    """32 well-mixed bits of a counter (Wellons' lowbias32). numba widens products to 64 bits, so each is cut."""
    x = np.uint32(x)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_inline
def _bfloat16_bits(bits, noise):
    """Round float32 bits to bfloat16 bits by adding noise in [0, 2^16) to the part cut off."""
    return np.uint16((bits + noise) >> np.uint32(16))


def _load(weight, start, count, tile, tile_bits):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_load)
def _load_overload(weight, start, count, tile, tile_bits):
    if weight.dtype == numba.float32:

        def load(weight, start, count, tile, tile_bits):
            piece = weight[start : start + 4 * count]
            for j in range(count):
                tile[0, j], tile[1, j] = piece[4 * j], piece[4 * j + 1]
                tile[2, j], tile[3, j] = piece[4 * j + 2], piece[4 * j + 3]
    else:

        def load(weight, start, count, tile, tile_bits):
            piece = weight[start : start + 4 * count]
            for j in range(count):
                for k in range(4):
                    tile_bits[k, j] = np.uint32(piece[4 * j + k]) << np.uint32(16)

    return load


def _store(weight, start, count, tile, tile_bits, stochastic, seed, origin):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_store)
def _store_overload(weight, start, count, tile, tile_bits, stochastic, seed, origin):
    if weight.dtype == numba.float32:

        def store(weight, start, count, tile, tile_bits, stochastic, seed, origin):
            piece = weight[start : start + 4 * count]
            for j in range(count):
                piece[4 * j], piece[4 * j + 1] = tile[0, j], tile[1, j]
                piece[4 * j + 2], piece[4 * j + 3] = tile[2, j], tile[3, j]
    else:

        def store(weight, start, count, tile, tile_bits, stochastic, seed, origin):
            piece = weight[start : start + 4 * count]
            for j in range(count):
                for k in range(4):
                    bits = tile_bits[k, j]
                    if stochastic:
                        noise = _hash(np.uint32(origin + start + 4 * j + k) ^ seed) & np.uint32(0xFFFF)
                    else:
                        noise = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                    piece[4 * j + k] = _bfloat16_bits(bits, noise)

    return store


@_inline
def _times(tile, scale, out, column, count):
    """Scale every weight of the tile by its input's factor; ``column`` is the first block's place in its row."""
    start = 0
    while start < count:  # as many pieces as the tile has rows
        width = min(count - start, scale.shape[1] - column)
        for k in range(4):
            # Slices, because an index that might be negative keeps the loop from becoming SIMD instructions.
            piece, factor, scaled = tile[k, start : start + width], scale[k, column : column + width], out[k, start:]
            for j in range(width):
                scaled[j] = piece[j] * factor[j]
        start, column = start + width, 0


@_inline
def _divide_back(tile, scale, solved, column, count):
    """Shrink the weights of the tile as their scaled values were shrunk. Where those kept their bits, these do too."""
    start = 0
    while start < count:
        width = min(count - start, scale.shape[1] - column)
        for k in range(4):
            piece, factor, shrunk = tile[k, start : start + width], scale[k, column : column + width], solved[k, start:]
            for j in range(width):
                before = piece[j] * factor[j]
                ratio = shrunk[j] / (before if before != ZERO else ONE)
                piece[j] = piece[j] * (ratio if before != ZERO else ONE)
        start, column = start + width, 0


@_inline
def _sort(measured, bits, z, lam_block, x, count, lam):
    """Sort magnitudes, divide by the largest, start at x = z. Returns (gentle, strong, non-finite) block counts."""
    gentle, strong, bad = NONE, NONE, NONE
    for j in range(count):
        a, b, c, d = abs(measured[0, j]), abs(measured[1, j]), abs(measured[2, j]), abs(measured[3, j])
        high1, low1, high2, low2 = max(a, b), min(a, b), max(c, d), min(c, d)
        z1, z4 = max(high1, high2), min(low1, low2)
        mid1, mid2 = min(high1, high2), max(low1, low2)
        z2, z3 = max(mid1, mid2), min(mid1, mid2)
        # Test the exponent's bits, because fast-math may assume that there are no NaNs.
        ea, eb = bits[0, j] & INFINITE, bits[1, j] & INFINITE
        ec, ed = bits[2, j] & INFINITE, bits[3, j] & INFINITE
        finite = max(max(ea, eb), max(ec, ed)) != INFINITE
        bad = I32(bad + (NONE if finite else SOME))
        scaled = lam * z1
        active = finite and z3 > ZERO and scaled > ZERO
        # A block with nothing to solve gets strength 0 and a harmless shape.
        scaled = min(scaled, STRONGEST) if active else ZERO
        top = z1 if active else ONE
        z2, z3, z4 = (z2 / top if active else ONE), (z3 / top if active else ZERO), (z4 / top if active else ZERO)
        is_strong = TWO * scaled * (ONE + z2 + z3 - z4) >= ONE
        gentle = I32(gentle + (SOME if active and not is_strong else NONE))
        strong = I32(strong + (SOME if is_strong else NONE))
        z[0, j], z[1, j], z[2, j], z[3, j] = z2, z3, z4, top
        x[0, j], x[1, j], x[2, j], x[3, j] = ONE, z2, z3, z4
        lam_block[j] = scaled
    return gentle, strong, bad


@_inline
def _gentle(z, lam_block, x, count):
    """Coordinate descent, two sweeps at a time, until no block of the tile moves."""
    for _ in range(MAX_STEPS):
        moving = NONE
        for j in range(count):
            z2, z3, z4, lam = z[0, j], z[1, j], z[2, j], lam_block[j]
            # A strong block would not settle; it stays at z here and is solved by _strong.
            lam = lam if TWO * lam * (ONE + z2 + z3 - z4) < ONE else ZERO
            a, b, c, d = x[0, j], x[1, j], x[2, j], x[3, j]
            ab = a * b
            d = max(z4 - lam * (ab + c * (a + b)), ZERO)
            c = max(z3 - lam * (ab + d * (a + b)), ZERO)
            cd = c * d
            b = max(z2 - lam * (cd + a * (c + d)), ZERO)
            a = max(ONE - lam * (cd + b * (c + d)), ZERO)
            old_a, old_b, old_c, ab = a, b, c, a * b
            d = max(z4 - lam * (ab + c * (a + b)), ZERO)
            c = max(z3 - lam * (ab + d * (a + b)), ZERO)
            cd = c * d
            b = max(z2 - lam * (cd + a * (c + d)), ZERO)
            a = max(ONE - lam * (cd + b * (c + d)), ZERO)
            x[0, j], x[1, j], x[2, j], x[3, j] = a, b, c, d
            # One entry alone may stand still while it turns round, and the others still move.
            moved = max(max(abs(a - old_a), abs(b - old_b)), abs(c - old_c))
            moving = I32(moving + (SOME if moved > SWEEP_SETTLED else NONE))
        if moving == NONE:
            break


@_inline
def _strong(z, lam_block, x, count, work, place):
    """Put the best of two, three and four weights into x for the strong blocks of the tile; the others' x stay."""
    zs, t, exists3, q, exists4, lams = work[:3], work[3], work[4], work[5], work[6], work[7]
    found = np.int64(0)  # for a literal 0, numba would compile the three functions below once more
    for j in range(count):  # move strong blocks next to each other: there may be few
        z2, z3, z4, lam = z[0, j], z[1, j], z[2, j], lam_block[j]
        if TWO * lam * (ONE + z2 + z3 - z4) >= ONE:
            zs[0, found], zs[1, found], zs[2, found] = z2, z3, z4
            lams[found], place[found] = lam, j
            found += 1
    _three(zs, lams, t, exists3, found)
    _four(zs, lams, q, exists4, found)
    _best(zs, lams, t, exists3, q, exists4, found)
    for i in range(found):
        j = place[i]
        x[0, j], x[1, j], x[2, j], x[3, j] = t[i], exists3[i], q[i], exists4[i]


@_inline
def _best(z, lams, t, exists3, q, exists4, count):
    """The least of the three candidates; its four magnitudes replace t, exists3, q and exists4."""
    for j in range(count):
        z2, z3, z4, lam = z[0, j], z[1, j], z[2, j], lams[j]
        best = HALF * (z3 * z3 + z4 * z4)
        b1, b2, b3, b4 = ONE, z2, ZERO, ZERO
        # Three.
        x3 = min(max(t[j], ZERO), z3)
        product = FOUR * x3 * (z3 - x3)
        x1 = HALF * (ONE + math.sqrt(max(ONE - product, ZERO)))
        x2 = HALF * (z2 + math.sqrt(max(z2 * z2 - product, ZERO)))
        r1, r2, r3 = ONE - x1, z2 - x2, z3 - x3
        value = HALF * (r1 * r1 + r2 * r2 + r3 * r3 + z4 * z4) + lam * x1 * x2 * x3
        value = value if exists3[j] > ZERO else HUGE
        b1, b2, b3 = (x1 if value < best else b1), (x2 if value < best else b2), (x3 if value < best else b3)
        best = min(value, best)
        # Four.
        q2, four = q[j] * q[j], FOUR * lam
        d1, d2 = math.sqrt(q2 + four * (ONE - z4)), math.sqrt(q2 + four * (z2 - z4))
        d3 = math.sqrt(q2 + four * (z3 - z4))
        a = HALF * (q[j] + d1 + d2 + d3) - ONE
        half = HALF / lam
        x1, x2 = min(max((d1 - a) * half, ZERO), ONE), min(max((d2 - a) * half, ZERO), z2)
        x3, x4 = min(max((d3 - a) * half, ZERO), z3), min((q[j] - a) * half, z4)
        r1, r2, r3, r4 = ONE - x1, z2 - x2, z3 - x3, z4 - x4
        value = HALF * (r1 * r1 + r2 * r2 + r3 * r3 + r4 * r4) + lam * (x1 * x2 * (x3 + x4) + x3 * x4 * (x1 + x2))
        value = value if min(exists4[j], x4) > ZERO else HUGE
        t[j], exists3[j] = (x1 if value < best else b1), (x2 if value < best else b2)
        q[j], exists4[j] = (x3 if value < best else b3), (x4 if value < best else b4)


@_inline
def _three(z, lam_block, t, exists, count):
    """Largest root of h for x3 of every block, by Newton from above."""
    for j in range(count):
        t[j] = z[1, j]
        exists[j] = ONE if lam_block[j] < STRONGEST else ZERO
    for _ in range(MAX_STEPS):
        moving = NONE
        for j in range(count):
            z2, z3, lam, old = z[0, j], z[1, j], lam_block[j], t[j]
            product = FOUR * old * (z3 - old)
            s1 = math.sqrt(max(ONE - product, ZERO))
            s2 = math.sqrt(max(z2 * z2 - product, ZERO))
            x1, x2 = HALF * (ONE + s1), HALF * (z2 + s2)
            slope = ONE + lam * (TWO * old - z3) * (x2 / max(s1, TINY) + x1 / max(s2, TINY))
            new = min(old - (lam * x1 * x2 - (z3 - old)) / max(slope, TINY), old)
            found = ONE if min(slope, exists[j]) > ZERO else ZERO
            found = found if new >= ZERO else ZERO
            new = new if found > ZERO else old
            moving = I32(moving + (SOME if old - new > SETTLED * z3 else NONE))
            t[j] = new
            exists[j] = found
        if moving == NONE:
            break


@_inline
def _four(z, lam_block, q_tile, exists, count):
    """Largest root of G for q of every block, by Newton from 1."""
    for j in range(count):
        q_tile[j] = ONE
        exists[j] = ONE if lam_block[j] < STRONGEST else ZERO
    for _ in range(MAX_STEPS):
        moving = NONE
        for j in range(count):
            z2, z3, z4, lam, q = z[0, j], z[1, j], z[2, j], lam_block[j], q_tile[j]
            q2, four = q * q, FOUR * lam
            d1, d2 = math.sqrt(q2 + four * (ONE - z4)), math.sqrt(q2 + four * (z2 - z4))
            d3 = math.sqrt(q2 + four * (z3 - z4))
            root = math.sqrt(max(q2 - ONE + TWO * lam * (ONE + z2 + z3 - z4), ZERO))
            value = TWO - HALF * (q + d1 + d2 + d3) - root
            slope = HALF * (ONE + q / max(d1, TINY) + q / max(d2, TINY) + q / max(d3, TINY)) + q / max(root, TINY)
            found = ONE if min(slope, exists[j]) > ZERO else ZERO
            new = min(q + value / max(slope, TINY), q) if found > ZERO else q
            moving = I32(moving + (SOME if q - new > SETTLED else NONE))
            q_tile[j] = new
            exists[j] = found
        if moving == NONE:
            break


@_inline
def _finish(measured, z, lam_block, x, count):
    """Write the minimisers in place, in the weights' own order. Returns the number of blocks that are 2:4."""
    sparse = NONE
    for j in range(count):
        lam, top = lam_block[j], z[3, j]
        x1, x2, x3, x4 = x[0, j], x[1, j], x[2, j], x[3, j]
        # Shrinkage, not z - x: its rounding would move weights that shrink by less than float32 resolves.
        live = ONE if lam > ZERO else ZERO
        s1 = lam * (x2 * x3 + x4 * (x2 + x3)) * top
        s2 = lam * (x1 * x3 + x4 * (x1 + x3)) * top
        s3 = lam * (x1 * x2 + x4 * (x1 + x2)) * top
        s4 = lam * (x1 * x2 + x3 * (x1 + x2)) * top
        s3, s4 = live * (s3 if x3 > ZERO else HUGE), live * (s4 if x4 > ZERO else HUGE)
        sparse = I32(sparse + (NONE if x3 > ZERO else SOME))
        # Rank of every weight in its block; ties go to the earlier one.
        wa, wb, wc, wd = measured[0, j], measured[1, j], measured[2, j], measured[3, j]
        a, b, c, d = abs(wa), abs(wb), abs(wc), abs(wd)
        ab, ac, ad = ONE if b > a else ZERO, ONE if c > a else ZERO, ONE if d > a else ZERO
        bc, bd, cd = ONE if c > b else ZERO, ONE if d > b else ZERO, ONE if d > c else ZERO
        ra, rb = ab + ac + ad, (ONE - ab) + bc + bd
        rc, rd = (ONE - ac) + (ONE - bc) + cd, (ONE - ad) + (ONE - bd) + (ONE - cd)
        sa = (s1 if ra < HALF else s2) if ra < ONE_HALF else (s3 if ra < TWO_HALF else s4)
        sb = (s1 if rb < HALF else s2) if rb < ONE_HALF else (s3 if rb < TWO_HALF else s4)
        sc = (s1 if rc < HALF else s2) if rc < ONE_HALF else (s3 if rc < TWO_HALF else s4)
        sd = (s1 if rd < HALF else s2) if rd < ONE_HALF else (s3 if rd < TWO_HALF else s4)
        # Subtracting a weight from itself leaves +0.
        measured[0, j] = wa - math.copysign(min(sa, a), wa)
        measured[1, j] = wb - math.copysign(min(sb, b), wb)
        measured[2, j] = wc - math.copysign(min(sc, c), wc)
        measured[3, j] = wd - math.copysign(min(sd, d), wd)
    return sparse


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def prox_flat_(weight, scale, lam, stochastic, seed, origin, counts):
    """Apply the operator to a contiguous weight in place.

    Args:
        weight: (N,) float32, or uint16 bits of bfloat16; N a multiple of 4.
        scale: (4, I / 4) float32 positive, entry k of every block in row k, or (4, 0) for ones.
        lam: float32 strength, > 0.
        stochastic: round bfloat16 stochastically, with noise from ``seed`` (uint32) and the entry's index, counted
            from ``origin`` (int64).
        counts: (parts, 2) int64, overwritten: for each of the contiguous parts that the threads share, the blocks that
            are 2:4 afterwards, and the blocks with a non-finite entry (left as they were).
    """
    blocks = weight.size // 4
    # A tile's sweeps end when its last block has settled. Threads share whole tiles, so their number changes no bit.
    tiles = (blocks + TILE - 1) // TILE
    parts = counts.shape[0]
    for part in numba.prange(parts):
        first, last = part * tiles // parts * TILE, min(blocks, (part + 1) * tiles // parts * TILE)
        bits = np.empty((4, TILE), np.uint32)
        tile = bits.view(np.float32)
        own_bits = np.empty((4, TILE), np.uint32)
        own = own_bits.view(np.float32)
        z = np.empty((4, TILE), np.float32)
        x = np.empty((4, TILE), np.float32)
        lam_block, place = np.empty(TILE, np.float32), np.empty(TILE, np.int32)
        work = np.empty((8, TILE), np.float32)
        scaled = scale.size > 0
        sparse, bad = 0, 0
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            _load(weight, 4 * start, count, tile, bits)
            if scaled:
                _times(tile, scale, own, start % scale.shape[1], count)
                measured, measured_bits = own, own_bits
            else:
                measured, measured_bits = tile, bits
            gentle, strong, wrong = _sort(measured, measured_bits, z, lam_block, x, count, lam)
            if gentle > NONE:
                _gentle(z, lam_block, x, count)
            if strong > NONE:
                _strong(z, lam_block, x, count, work, place)
            sparse += _finish(measured, z, lam_block, x, count)
            if scaled:
                _divide_back(tile, scale, own, start % scale.shape[1], count)
            _store(weight, 4 * start, count, tile, bits, stochastic, seed, origin)
            bad += wrong
        counts[part, 0], counts[part, 1] = sparse, bad


def parts() -> int:
    """Number of parts that a weight is cut into: several per torch thread, so that the threads end together."""
    return 8 * match_torch()


def prox_(weight: Tensor, lam: float, scale: Tensor | None, noise: Noise | None, counts: Tensor) -> None:
    """Apply the operator to a contiguous float32 or bfloat16 weight in place.

    Args:
        scale: (I,), or None for ones.
        noise: of stochastic rounding, or None to round bfloat16 to nearest.
        counts: (2,), to which are added the blocks that are 2:4 afterwards, and the blocks with a non-finite entry,
            which are left as they were.
    """
    seed, first = noise or (0, 0)
    strength = F(min(lam, float(HUGE)))
    found, seed = np.empty((parts(), 2), np.int64), np.uint32(seed & 0xFFFFFFFF)
    prox_flat_(flat(weight), columns(scale), strength, noise is not None, seed, first, found)
    counts += torch.from_numpy(found.sum(axis=0))


def flat(weight: Tensor) -> np.ndarray:
    """(N,) float32, or uint16 bits of bfloat16: the same memory."""
    bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
    return bits.view(-1).numpy()


def columns(scale: Tensor | None) -> np.ndarray:
    """A scale (I,) as the kernels take it: (4, I / 4) float32, or (4, 0) for ones."""
    if scale is None:
        return np.empty((4, 0), np.float32)
    return np.ascontiguousarray(scale.detach().to("cpu", torch.float32).numpy().reshape(-1, 4).T)
