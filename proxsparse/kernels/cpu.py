"""The 2:4 proximal operator fused for the CPU: one read and one write a weight, all cores.

The algorithm and its derivation are in ``proxsparse/kernels/__init__.py``. numba compiles it on first use
(some seconds, then cached on disk). A tile of blocks is sorted and solved in structure-of-arrays form, so that
the compiler turns every inner loop into SIMD instructions; the only extra memory is one tile a thread.

bfloat16 weights come as their uint16 bits (numpy has no bfloat16), are solved in float32, and are rounded on the
way out: to nearest even, or stochastically, so that shrinkages below half a unit in the last place survive on average.
"""

import math

import numba
import numpy as np
from numba.extending import overload

TILE = 128  # blocks; 16 float32 columns = 8 KiB a thread, inside the L1 cache
MAX_STEPS = 32
_FAST = {"contract", "arcp", "nsz", "afn", "reassoc"}
_inline = numba.njit(fastmath=_FAST, error_model="numpy", cache=True)

F = np.float32
ZERO, HALF, ONE, TWO, THREE, FOUR = F(0), F(0.5), F(1), F(2), F(3), F(4)
TINY, SETTLED, STRONGEST = F(1e-30), F(1e-7), F(3)
INFINITE = np.uint32(0x7F800000)  # exponent bits of infinities and NaNs


@_inline
def _hash(x):
    """32 well-mixed bits of a counter (Wellons' lowbias32)."""
    x = np.uint32(x)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


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
            for j in range(count):
                b = start + 4 * j
                tile[0, j], tile[1, j] = weight[b], weight[b + 1]
                tile[2, j], tile[3, j] = weight[b + 2], weight[b + 3]
    else:

        def load(weight, start, count, tile, tile_bits):
            for j in range(count):
                for k in range(4):
                    tile_bits[k, j] = np.uint32(weight[start + 4 * j + k]) << np.uint32(16)

    return load


def _store(weight, start, count, tile, tile_bits, stochastic, seed):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_store)
def _store_overload(weight, start, count, tile, tile_bits, stochastic, seed):
    if weight.dtype == numba.float32:

        def store(weight, start, count, tile, tile_bits, stochastic, seed):
            for j in range(count):
                b = start + 4 * j
                weight[b], weight[b + 1] = tile[0, j], tile[1, j]
                weight[b + 2], weight[b + 3] = tile[2, j], tile[3, j]
    else:

        def store(weight, start, count, tile, tile_bits, stochastic, seed):
            for j in range(count):
                for k in range(4):
                    i = start + 4 * j + k
                    bits = tile_bits[k, j]
                    if stochastic:
                        noise = _hash(np.uint32(i) ^ seed) & np.uint32(0xFFFF)
                    else:
                        noise = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                    weight[i] = _bfloat16_bits(bits, noise)

    return store


@_inline
def _sort(measured, bits, z, lam_block, count, lam):
    """Sort magnitudes, divide by the largest, and count the blocks that need solving: (any, any strong, non-finite)."""
    solve, strong, bad = np.int32(0), np.int32(0), np.int32(0)
    for j in range(count):
        a, b, c, d = abs(measured[0, j]), abs(measured[1, j]), abs(measured[2, j]), abs(measured[3, j])
        high1, low1, high2, low2 = max(a, b), min(a, b), max(c, d), min(c, d)
        z1, z4 = max(high1, high2), min(low1, low2)
        mid1, mid2 = min(high1, high2), max(low1, low2)
        z2, z3 = max(mid1, mid2), min(mid1, mid2)
        # By the exponent's bits: fast-math may assume what it likes about NaN arithmetic.
        ea, eb = bits[0, j] & INFINITE, bits[1, j] & INFINITE
        ec, ed = bits[2, j] & INFINITE, bits[3, j] & INFINITE
        finite = max(max(ea, eb), max(ec, ed)) != INFINITE
        bad += np.int32(0) if finite else np.int32(1)
        scaled = lam * z1
        active = finite and z3 > ZERO and scaled > ZERO
        # A block with nothing to solve gets strength 0 and a harmless shape.
        scaled = min(scaled, FOUR) if active else ZERO
        top = z1 if active else ONE
        z2, z3, z4 = (z2 / top, z3 / top, z4 / top) if active else (ONE, ZERO, ZERO)
        solvable = active and scaled < STRONGEST
        solve += np.int32(1) if solvable else np.int32(0)
        strong += np.int32(1) if solvable and TWO * scaled * (ONE + z2 + z3 - z4) >= ONE else np.int32(0)
        z[0, j], z[1, j], z[2, j] = z2, z3, z4
        z[3, j] = top
        lam_block[j] = scaled
    return solve, strong, bad


@_inline
def _three_step(t, z2, z3, lam):
    """One Newton step on h for x3 = t, the largest magnitude being 1. Returns (new t, whether a root can exist)."""
    product = FOUR * t * (z3 - t)
    s1 = math.sqrt(max(ONE - product, ZERO))
    s2 = math.sqrt(max(z2 * z2 - product, ZERO))
    x1, x2 = HALF * (ONE + s1), HALF * (z2 + s2)
    slope = ONE + lam * (TWO * t - z3) * (x2 / max(s1, TINY) + x1 / max(s2, TINY))
    new = t - (lam * x1 * x2 - (z3 - t)) / (slope if slope > ZERO else ONE)
    exists = slope > ZERO and new >= ZERO
    return (min(new, t) if exists else t), exists


@_inline
def _three(z, lam_block, t, exists, count):
    for j in range(count):
        t[j] = z[1, j]
        exists[j] = ONE
    for _ in range(MAX_STEPS):
        moving = np.int32(0)
        for j in range(count):
            z2, z3, lam, old = z[0, j], z[1, j], lam_block[j], t[j]
            new, found = _three_step(old, z2, z3, lam)
            found = found and exists[j] > ZERO
            new = new if found else old
            moving += np.int32(1) if old - new > SETTLED * z3 else np.int32(0)
            t[j] = new
            exists[j] = ONE if found else ZERO
        if moving == 0:
            break


@_inline
def _mild_step(y, g1, g2, g3, z4, lam):
    """One Newton step on R for y = x1 + x2 + x3 - x4. Returns (new y, x1, x2, x3, x4 at the old y)."""
    q = ONE - lam * y
    q2, four = q * q, FOUR * lam
    r1, r2, r3 = math.sqrt(q2 + four * g1), math.sqrt(q2 + four * g2), math.sqrt(q2 + four * g3)
    d1, d2, d3 = TWO * g1 / (r1 + q), TWO * g2 / (r2 + q), TWO * g3 / (r3 + q)
    x4 = HALF * (y - d1 - d2 - d3)
    x1, x2, x3 = x4 + d1, x4 + d2, x4 + d3
    e1, e2, e3 = lam * d1 / r1, lam * d2 / r2, lam * d3 / r3
    dx4 = HALF * (ONE - e1 - e2 - e3)
    residual = x4 - z4 + lam * (x1 * x2 + x2 * x3 + x3 * x1)
    slope = dx4 + lam * ((dx4 + e1) * (x2 + x3) + (dx4 + e2) * (x3 + x1) + (dx4 + e3) * (x1 + x2))
    return y - residual / slope, x1, x2, x3, x4


@_inline
def _four_mild(z, lam_block, x, count):
    for j in range(count):
        z2, z3, z4, lam = z[0, j], z[1, j], z[2, j], lam_block[j]
        y = ONE + z2 + z3 - z4
        mild = TWO * lam * y < ONE
        lam = lam if mild else ZERO  # keeps a strong block's lane finite; its result is not used
        g1, g2, g3 = ONE - z4, z2 - z4, z3 - z4
        y, _, _, _, _ = _mild_step(y, g1, g2, g3, z4, lam)
        y, _, _, _, _ = _mild_step(y, g1, g2, g3, z4, lam)
        y, _, _, _, _ = _mild_step(y, g1, g2, g3, z4, lam)
        _, x1, x2, x3, x4 = _mild_step(y, g1, g2, g3, z4, lam)
        x[0, j], x[1, j], x[2, j] = x1, x2, x3
        x[3, j] = x4 if mild else -ONE


@_inline
def _four_strong(z, lam_block, q_tile, exists, x, count):
    for j in range(count):
        q_tile[j] = ONE
        exists[j] = ONE if lam_block[j] < STRONGEST else ZERO
    for _ in range(MAX_STEPS):
        moving = np.int32(0)
        for j in range(count):
            z2, z3, z4, lam, q = z[0, j], z[1, j], z[2, j], lam_block[j], q_tile[j]
            q2, four = q * q, FOUR * lam
            r1, r2 = math.sqrt(q2 + four * (ONE - z4)), math.sqrt(q2 + four * (z2 - z4))
            r3 = math.sqrt(q2 + four * (z3 - z4))
            r = math.sqrt(max(q2 - ONE + TWO * lam * (ONE + z2 + z3 - z4), ZERO))
            value = TWO - HALF * (q + r1 + r2 + r3) - r
            slope = -HALF * (ONE + q / max(r1, TINY) + q / max(r2, TINY) + q / max(r3, TINY)) - q / max(r, TINY)
            found = slope < ZERO and exists[j] > ZERO
            new = min(q - value / (slope if found else -ONE), q) if found else q
            moving += np.int32(1) if q - new > SETTLED else np.int32(0)
            q_tile[j] = new
            exists[j] = ONE if found else ZERO
        if moving == 0:
            break
    for j in range(count):
        z2, z3, z4, lam, q = z[0, j], z[1, j], z[2, j], lam_block[j], q_tile[j]
        q2, four = q * q, FOUR * lam
        r1, r2 = math.sqrt(q2 + four * (ONE - z4)), math.sqrt(q2 + four * (z2 - z4))
        r3 = math.sqrt(q2 + four * (z3 - z4))
        a = HALF * (q + r1 + r2 + r3) - ONE
        half = HALF / max(lam, TINY)
        strong = TWO * lam * (ONE + z2 + z3 - z4) >= ONE
        found = strong and exists[j] > ZERO
        x[0, j] = (r1 - a) * half if strong else x[0, j]
        x[1, j] = (r2 - a) * half if strong else x[1, j]
        x[2, j] = (r3 - a) * half if strong else x[2, j]
        x4 = (q - a) * half if found else -ONE
        x[3, j] = x4 if strong else x[3, j]


@_inline
def _finish(tile, measured, z, lam_block, t, exists3, x, count, scaled):
    """Choose the best candidate of each block and write it into the tile. Returns (blocks now 2:4, sum of e3)."""
    sparse, penalty = np.int32(0), ZERO
    for j in range(count):
        z2, z3, z4, lam, top = z[0, j], z[1, j], z[2, j], lam_block[j], z[3, j]
        # Two weights.
        best = HALF * (z3 * z3 + z4 * z4)
        s1, s2, s3, s4 = ZERO, ZERO, z3, z4
        # Three.
        t3 = min(max(t[j], ZERO), z3)
        product = FOUR * t3 * (z3 - t3)
        x1 = HALF * (ONE + math.sqrt(max(ONE - product, ZERO)))
        x2 = HALF * (z2 + math.sqrt(max(z2 * z2 - product, ZERO)))
        p1, p2, p3 = lam * x2 * t3, lam * x1 * t3, min(lam * x1 * x2, z3)
        r1, r2, r3 = ONE - x1, z2 - x2, z3 - t3
        value = HALF * (r1 * r1 + r2 * r2 + r3 * r3 + z4 * z4) + lam * x1 * x2 * t3
        better = exists3[j] > ZERO and t3 > ZERO and value < best
        best = value if better else best
        s1, s2, s3 = (p1 if better else s1), (p2 if better else s2), (p3 if better else s3)
        # Four.
        x1, x2, x3, x4 = x[0, j], x[1, j], x[2, j], x[3, j]
        p1, p2 = lam * (x2 * x3 + x3 * x4 + x4 * x2), lam * (x1 * x3 + x3 * x4 + x4 * x1)
        p3, p4 = lam * (x1 * x2 + x2 * x4 + x4 * x1), lam * (x1 * x2 + x2 * x3 + x3 * x1)
        p3, p4 = min(p3, z3), min(p4, z4)
        e3 = x1 * x2 * (x3 + x4) + x3 * x4 * (x1 + x2)
        r1, r2, r3, r4 = ONE - x1, z2 - x2, z3 - x3, z4 - x4
        value = HALF * (r1 * r1 + r2 * r2 + r3 * r3 + r4 * r4) + lam * e3
        better = x4 > ZERO and value < best
        s1, s2 = (p1 if better else s1), (p2 if better else s2)
        s3, s4 = (p3 if better else s3), (p4 if better else s4)
        untouched = lam == ZERO
        kill3, kill4 = (not untouched) and s3 >= z3, (not untouched) and s4 >= z4
        sparse += np.int32(1) if kill3 or (untouched and z3 == ZERO) else np.int32(0)
        s1, s2 = (ZERO, ZERO) if untouched else (s1 * top, s2 * top)
        s3, s4 = (ZERO, ZERO) if untouched else (s3 * top, s4 * top)
        # Back to the order of the weights.
        a, b, c, d = abs(measured[0, j]), abs(measured[1, j]), abs(measured[2, j]), abs(measured[3, j])
        ra = (1 if b > a else 0) + (1 if c > a else 0) + (1 if d > a else 0)
        rb = (1 if a >= b else 0) + (1 if c > b else 0) + (1 if d > b else 0)
        rc = (1 if a >= c else 0) + (1 if b >= c else 0) + (1 if d > c else 0)
        rd = (1 if a >= d else 0) + (1 if b >= d else 0) + (1 if c >= d else 0)
        sa = s1 if ra == 0 else (s2 if ra == 1 else (s3 if ra == 2 else s4))
        sb = s1 if rb == 0 else (s2 if rb == 1 else (s3 if rb == 2 else s4))
        sc = s1 if rc == 0 else (s2 if rc == 1 else (s3 if rc == 2 else s4))
        sd = s1 if rd == 0 else (s2 if rd == 1 else (s3 if rd == 2 else s4))
        ka = (kill3 and ra == 2) or (kill4 and ra == 3)
        kb = (kill3 and rb == 2) or (kill4 and rb == 3)
        kc = (kill3 and rc == 2) or (kill4 and rc == 3)
        kd = (kill3 and rd == 2) or (kill4 and rd == 3)
        # measured = weight * scale, so the shrinkage is divided back.
        wa, wb, wc, wd = tile[0, j], tile[1, j], tile[2, j], tile[3, j]
        if scaled:
            sa, sb = sa * abs(wa) / max(a, TINY), sb * abs(wb) / max(b, TINY)
            sc, sd = sc * abs(wc) / max(c, TINY), sd * abs(wd) / max(d, TINY)
        tile[0, j] = ZERO if ka else (wa - math.copysign(min(sa, abs(wa)), wa) if sa > ZERO else wa)
        tile[1, j] = ZERO if kb else (wb - math.copysign(min(sb, abs(wb)), wb) if sb > ZERO else wb)
        tile[2, j] = ZERO if kc else (wc - math.copysign(min(sc, abs(wc)), wc) if sc > ZERO else wc)
        tile[3, j] = ZERO if kd else (wd - math.copysign(min(sd, abs(wd)), wd) if sd > ZERO else wd)
    return sparse, penalty


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def prox_flat_(weight, width, lam, scale, stochastic, seed, parts):
    """Apply the operator to a contiguous weight in place.

    Args:
        weight: (N,) float32, or uint16 bits of bfloat16; N a multiple of 4.
        width: length of a row, a multiple of 4; used with ``scale`` only.
        lam: float32 strength, > 0.
        scale: (width,) float32 positive, or (0,) for ones.
        stochastic: round bfloat16 stochastically, with noise from ``seed`` and the weight's index.
        parts: number of contiguous parts shared out among the threads.

    Returns:
        (2,) int64: blocks that are 2:4 afterwards, blocks with a non-finite entry (left as they were).
    """
    blocks = weight.size // 4
    counts = np.zeros((parts, 2), np.int64)
    for part in numba.prange(parts):
        first, last = part * blocks // parts, (part + 1) * blocks // parts
        bits = np.empty((4, TILE), np.uint32)
        tile = bits.view(np.float32)
        own_bits = np.empty((4, TILE), np.uint32)
        own = own_bits.view(np.float32)
        z = np.empty((4, TILE), np.float32)
        x = np.empty((4, TILE), np.float32)
        lam_block, t = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        exists3, exists4 = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
        q = np.empty(TILE, np.float32)
        scaled = scale.size > 0
        sparse, bad = 0, 0
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            _load(weight, 4 * start, count, tile, bits)
            if scaled:
                column = (4 * start) % width
                for j in range(count):
                    for k in range(4):
                        own[k, j] = tile[k, j] * scale[column + k]
                    column += 4
                    if column == width:
                        column = 0
                measured, measured_bits = own, own_bits
            else:
                measured, measured_bits = tile, bits
            solve, strong, wrong = _sort(measured, measured_bits, z, lam_block, count, lam)
            if solve > 0:
                _three(z, lam_block, t, exists3, count)
                if strong < solve:
                    _four_mild(z, lam_block, x, count)
                else:
                    x[:] = -ONE
                if strong > 0:
                    _four_strong(z, lam_block, q, exists4, x, count)
            else:
                exists3[:] = ZERO
                x[:] = -ONE
            now, _ = _finish(tile, measured, z, lam_block, t, exists3, x, count, scaled)
            _store(weight, 4 * start, count, tile, bits, stochastic, seed)
            sparse += now
            bad += wrong
        counts[part, 0], counts[part, 1] = sparse, bad
    return counts.sum(axis=0)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def top2_product_(out, base, learned, scale, parts):
    """Write ``base`` times the top-two mask of ``learned * scale`` into ``out``.

    Args:
        out, base, learned: (N,) float32 contiguous, N a multiple of 4; ``out`` is overwritten.
        scale: (I,) float32, I the length of a row and a multiple of 4, or (0,) for ones.
        parts: number of contiguous parts shared out among the threads.
    """
    blocks = learned.size // 4
    scaled = scale.size > 0
    for part in numba.prange(parts):
        for block in range(part * blocks // parts, (part + 1) * blocks // parts):
            i = 4 * block
            a, b, c, d = abs(learned[i]), abs(learned[i + 1]), abs(learned[i + 2]), abs(learned[i + 3])
            if scaled:
                k = i % scale.size
                a, b, c, d = a * scale[k], b * scale[k + 1], c * scale[k + 2], d * scale[k + 3]
            # Kept where fewer than two others are larger; ties go to the earlier entry, as in top2_mask.
            out[i] = base[i] if (b > a) + (c > a) + (d > a) < 2 else ZERO
            out[i + 1] = base[i + 1] if (a >= b) + (c > b) + (d > b) < 2 else ZERO
            out[i + 2] = base[i + 2] if (a >= c) + (b >= c) + (d > c) < 2 else ZERO
            out[i + 3] = base[i + 3] if (a >= d) + (b >= d) + (c >= d) < 2 else ZERO


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def survey_(weight, scale, codes, parts):
    """Look at every block once: how many mask entries changed since the last call, and the sum of R.

    Args:
        weight: (N,) float32 contiguous, N a multiple of 4.
        scale: (I,) float32 or (0,), as in top2_product_.
        codes: (N / 4,) uint8, bit k set where entry k of a block is kept; overwritten.
        parts: number of contiguous parts shared out among the threads.

    Returns:
        (2,) float64: changed entries, sum of R(weight * scale).
    """
    blocks = weight.size // 4
    scaled = scale.size > 0
    found = np.zeros((parts, 2), np.float64)
    for part in numba.prange(parts):
        changed, penalty = 0, 0.0
        for block in range(part * blocks // parts, (part + 1) * blocks // parts):
            i = 4 * block
            a, b, c, d = abs(weight[i]), abs(weight[i + 1]), abs(weight[i + 2]), abs(weight[i + 3])
            if scaled:
                k = i % scale.size
                a, b, c, d = a * scale[k], b * scale[k + 1], c * scale[k + 2], d * scale[k + 3]
            penalty += a * b * (c + d) + c * d * (a + b)
            code = (b > a) + (c > a) + (d > a) < 2
            code |= ((a >= b) + (c > b) + (d > b) < 2) << 1
            code |= ((a >= c) + (b >= c) + (d > c) < 2) << 2
            code |= ((a >= d) + (b >= d) + (c >= d) < 2) << 3
            # Both codes have two bits set, so entries change in pairs: one leaves, one comes.
            difference = code ^ codes[block]
            changed += (difference & 1) + (difference >> 1 & 1) + (difference >> 2 & 1) + (difference >> 3)
            codes[block] = code
        found[part, 0], found[part, 1] = changed, penalty
    return found.sum(axis=0)


def threads(wanted: int) -> int:
    """Use ``wanted`` threads if numba has that many; returns how many it uses."""
    count = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(count)
    return count
