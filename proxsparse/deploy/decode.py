"""Product of a few tokens with a compact N:M weight on the CPU: reads the kept values and their places, nothing else.

Decoding one token reads every weight once, and memory limits it, so fewer bytes take less time. PANEL rows lie next to
each other, so that SIMD instructions work on several of them: each row picks the inputs of its own kept values. On
processors with AVX2 one shuffle does that (``decode_avx2``). Others take a plain loop. Sums are float32 in both.

Inputs are taken in groups: 8, or 16 where M is 16. The places within a group have 4 bits, two to a byte. In 2:4
weights the places within a block have 2 bits, four to a byte.

Shapes: O = out_features, I = in_features, P = panels of PANEL rows, G = groups (rounded up), V = kept values per group
(rounded up to an even number), C = bytes of places per group, T = tokens.
"""

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from proxsparse.deploy import decode_avx2
from proxsparse.deploy.decode_avx2 import EIGHT, LANES, PAIRED, PANEL, SIXTEEN
from proxsparse.model.compact import as_numpy, check_pattern
from proxsparse.operator.kernels.threads import match_torch
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

RUN = 32  # groups widened together by the plain loop: inside the L1 cache

U = np.uint32


class Panels:
    """A compact weight in the layout of the kernel.

    Args:
        values: (O, I N / M) float32, bfloat16, or int8 codes.
        positions: (O, I N / M) uint8 in 0..M-1, of each value within its block.
        scales: (O,) float32, of int8 codes: a weight is its code times the scale of its row.
        pattern: N:M.

    Raises:
        UsageError: the pattern has no compact form.
    """

    def __init__(self, values: Tensor, positions: Tensor, scales: Tensor | None = None, pattern: Pattern = TWO_OF_FOUR):
        check_pattern(pattern)
        self.pattern = pattern
        self.shape = values.shape[0], values.shape[1] // pattern.n * pattern.m
        self.layout = PAIRED if pattern == TWO_OF_FOUR else EIGHT if pattern.m <= LANES else SIXTEEN
        self.values, self.codes = _pack(as_numpy(values), positions.numpy(), pattern, self.layout)
        self.scales = None if scales is None else scales.numpy()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def multiply(self, inputs: Tensor) -> Tensor:
        """(T, I) float32 -> (T, O) float32."""
        missing = self.codes.shape[1] * _group(self.pattern) - self.shape[1]
        padded = torch.nn.functional.pad(inputs, (0, missing)) if missing else inputs.contiguous()
        out = np.empty((len(inputs), len(self.codes) * PANEL), np.float32)
        product = decode_avx2.multiply if decode_avx2.supported() else _multiply_plain
        match_torch()
        product(self.codes, self.values, padded.numpy(), self.layout, out)
        found = out[:, : self.shape[0]]
        return torch.from_numpy(found if self.scales is None else found * self.scales)

    def expand(self, first: int, out: Tensor) -> None:
        """Write dense rows into out (rows, I) float32; ``first`` is the number of the first one."""
        scales = np.ones(self.shape[0], np.float32) if self.scales is None else self.scales
        match_torch()
        _expand(self.codes, self.values, scales, self.layout, self.pattern.n, self.pattern.m, first, out.numpy())


def _group(pattern: Pattern) -> int:
    return max(LANES, pattern.m)


def _pack(values: np.ndarray, positions: np.ndarray, pattern: Pattern, layout: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept values (P, G, V, PANEL), and their places (P, G, C, PANEL) uint8; what is beyond the weight is zero."""
    rows, kept = values.shape
    of_group = _group(pattern) // pattern.m * pattern.n
    panels, groups, even = -(-rows // PANEL), -(-kept // of_group), of_group + of_group % 2
    block = np.arange(groups * of_group) % of_group // pattern.n  # of each value, within its group
    places = np.zeros((panels * PANEL, groups * of_group), np.uint8)
    places[:rows, :kept] = positions
    if layout != PAIRED:
        places += (block * pattern.m).astype(np.uint8)
    padded = np.zeros(places.shape, values.dtype)
    padded[:rows, :kept] = values

    def laid(of_rows: np.ndarray) -> np.ndarray:
        found = np.zeros((panels, groups, even, PANEL), of_rows.dtype)
        found[:, :, :of_group] = of_rows.reshape(panels, PANEL, groups, of_group).transpose(0, 2, 3, 1)
        return found

    bits = 2 if layout == PAIRED else 4
    places = laid(places)
    codes = places[:, :, 0 :: 8 // bits].copy()
    for number in range(1, 8 // bits):
        codes |= places[:, :, number :: 8 // bits] << (bits * number)
    return laid(padded), codes


def _in_float32(values, wide, bits):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_in_float32)
def _in_float32_overload(values, wide, bits):
    """A run of values as float32, ``bits`` is the memory of ``wide``."""
    if values.dtype == numba.float32:
        return lambda values, wide, bits: values
    if values.dtype == numba.int8:

        def converted(values, wide, bits):
            source, flat = values.reshape(-1), wide.reshape(-1)
            for j in range(source.size):
                flat[j] = source[j]
            return wide

        return converted

    def widened(values, wide, bits):
        source, flat = values.reshape(-1), bits.reshape(-1)
        for j in range(source.size):
            flat[j] = U(source[j]) << U(16)
        return wide

    return widened


@numba.njit(parallel=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", cache=True)
def _multiply_plain(codes, values, inputs, layout, out):  # pragma: no cover (compiled)
    """``decode_avx2.multiply`` for any processor."""
    panels, groups, even = values.shape[0], values.shape[1], values.shape[2]
    group = inputs.shape[1] // groups
    for p in numba.prange(panels):
        wide = np.empty((RUN, even, PANEL), np.float32)
        bits = wide.view(np.uint32)
        for t in range(len(inputs)):
            sums, x = np.zeros(PANEL, np.float32), inputs[t]
            for start in range(0, groups, RUN):
                stop = min(start + RUN, groups)
                run = _in_float32(values[p, start:stop], wide, bits)
                for g in range(start, stop):
                    code, kept = codes[p, g], run[g - start]
                    if layout == PAIRED:
                        # Comparisons, which become SIMD instructions; reads at many places do not.
                        a, b, c, d = x[8 * g], x[8 * g + 1], x[8 * g + 2], x[8 * g + 3]
                        e, f, h, i = x[8 * g + 4], x[8 * g + 5], x[8 * g + 6], x[8 * g + 7]
                        for r in range(PANEL):
                            place = U(code[0, r])
                            # The first of two positions is at most 2, and the second at least 1.
                            first = c if place & U(2) else (b if place & U(1) else a)
                            second = (d if place & U(4) else c) if place & U(8) else b
                            third = h if place & U(32) else (f if place & U(16) else e)
                            fourth = (i if place & U(64) else h) if place & U(128) else f
                            sums[r] += (
                                kept[0, r] * first + kept[1, r] * second + kept[2, r] * third + kept[3, r] * fourth
                            )
                    else:
                        for v in range(even):
                            for r in range(PANEL):
                                place = U(code[v // 2, r]) >> U(4 * (v % 2)) & U(15)
                                sums[r] += kept[v, r] * x[group * g + np.int64(place)]
            out[t, p * PANEL : (p + 1) * PANEL] = sums


def _number(value):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_number)
def _number_overload(value):
    """One value as float32."""
    if value == numba.uint16:
        return lambda value: U(U(value) << U(16)).view(np.float32)
    return lambda value: np.float32(value)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _expand(codes, values, scales, layout, n, m, first, out):  # pragma: no cover (compiled)
    """Dense rows of a compact weight, times their scales: out (rows, I) float32, of which the first is ``first``."""
    count, width = out.shape
    group = max(LANES, m)
    for o in numba.prange(count):
        p, r, scale = (first + o) // PANEL, (first + o) % PANEL, scales[first + o]
        for i in range(width):
            out[o, i] = 0
        # Views of a row or a panel would be counted by numba in each turn, which takes longer than the work.
        for g in range(codes.shape[1]):
            i = group * g
            if layout == PAIRED:
                code = np.int64(codes[p, g, 0, r])
                out[o, i + (code & 3)] = _number(values[p, g, 0, r]) * scale
                out[o, i + (code >> 2 & 3)] = _number(values[p, g, 1, r]) * scale
                if i + 4 < width:
                    out[o, i + 4 + (code >> 4 & 3)] = _number(values[p, g, 2, r]) * scale
                    out[o, i + 4 + (code >> 6)] = _number(values[p, g, 3, r]) * scale
                continue
            for v in range(min(group // m, (width - i) // m) * n):
                place = np.int64(codes[p, g, v // 2, r]) >> (4 * (v % 2)) & 15
                out[o, i + place] = _number(values[p, g, v, r]) * scale
