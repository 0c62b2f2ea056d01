"""Matrix-vector product with a compact 2:4 weight on the CPU: reads 0.56 of the bytes that a dense weight has.

Decoding one token reads every weight once, and memory limits it, so fewer bytes take less time. The layout makes the
arithmetic SIMD without gathers: PANEL rows lie next to each other, so that one input value goes to all of them and each
row picks its two of four inputs by comparisons of its position bits. numba compiles the loops on first use.

Shapes: O = out_features, I = in_features, P = panels of PANEL rows, G = pairs of blocks (I / 8, rounded up),
T = tokens.
"""

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from proxsparse.model.compact import as_numpy
from proxsparse.operator.kernels.cache import choose_cache
from proxsparse.operator.kernels.threads import match_torch

choose_cache()

PANEL = 32  # rows: two or more SIMD registers
RUN = 32  # pairs of blocks widened together: 16 KiB, inside the L1 cache

U = np.uint32


class Panels:
    """A compact weight in the layout of the kernel.

    Args:
        values: (O, I / 2) float32, bfloat16, or int8 codes.
        positions: (O, I / 2) uint8 in 0..3, of each value within its block; the second of a block is the larger.
        scales: (O,) float32, of int8 codes: a weight is its code times the scale of its row.
    """

    def __init__(self, values: Tensor, positions: Tensor, scales: Tensor | None = None):
        self.shape = values.shape[0], 2 * values.shape[1]
        self.values, self.codes = pack_panels(as_numpy(values), positions.numpy())
        self.scales = None if scales is None else scales.numpy()

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def multiply(self, inputs: Tensor) -> Tensor:
        """(T, I) float32 -> (T, O) float32."""
        padded = np.zeros((len(inputs), 8 * self.codes.shape[1]), np.float32)
        padded[:, : self.shape[1]] = inputs.numpy()
        out = np.empty((len(inputs), len(self.codes) * PANEL), np.float32)
        match_torch()
        multiply(self.values, self.codes, padded, out)
        found = out[:, : self.shape[0]]
        return torch.from_numpy(found if self.scales is None else found * self.scales)

    def expand(self, first: int, out: Tensor) -> None:
        """Write dense rows into out (rows, I) float32; ``first`` is the number of the first one."""
        scales = np.ones(self.shape[0], np.float32) if self.scales is None else self.scales
        match_torch()
        expand(self.values, self.codes, scales, first, out.numpy())


def pack_panels(values: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kept values and positions in the kernel's layout.

    Args:
        values: (O, I / 2) float32, uint16 bits of bfloat16, or int8.
        positions: (O, I / 2) uint8 in 0..3, of each value within its block; the second of a block is the larger.

    Returns:
        (P, G, 4, PANEL) values and (P, G, PANEL) uint8 codes of four positions each; rows and blocks beyond the
        weight's are zero.
    """
    rows, kept = values.shape
    panels, pairs = -(-rows // PANEL), -(-kept // 4)
    padded = np.zeros((panels * PANEL, pairs * 4), values.dtype)
    padded[:rows, :kept] = values
    places = np.tile(np.array([0, 1, 0, 1], np.uint8), (panels * PANEL, pairs))
    places[:rows, :kept] = positions
    first, second = places[:, 0::2], places[:, 1::2]
    # Two bits each: the first value of a block is at 0, 1 or 2, the second at 1, 2 or 3.
    codes = (first | (second - 1) << 2).reshape(-1, pairs, 2)
    codes = codes[..., 0] | codes[..., 1] << 4
    return (
        np.ascontiguousarray(padded.reshape(panels, PANEL, pairs, 4).transpose(0, 2, 3, 1)),
        np.ascontiguousarray(codes.reshape(panels, PANEL, pairs).transpose(0, 2, 1)),
    )


def _widened(values, wide, bits):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_widened)
def _widened_overload(values, wide, bits):
    """A run of values as float32: themselves, int8 as numbers, or bfloat16 bits shifted into the upper half."""
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


@numba.njit(parallel=True, fastmath={"contract", "nsz", "nnan", "reassoc"}, error_model="numpy", cache=True)
def multiply(values, codes, inputs, out):
    """out = inputs W^T for a compact W.

    Args:
        values, codes: the result of ``pack_panels``.
        inputs: (T, 8 G) float32, zero beyond I.
        out: (T, P * PANEL) float32, overwritten.
    """
    panels, pairs = codes.shape[0], codes.shape[1]
    for p in numba.prange(panels):
        wide = np.empty((RUN, 4, PANEL), np.float32)
        bits = wide.view(np.uint32)
        for t in range(inputs.shape[0]):
            sums = np.zeros(PANEL, np.float32)
            x = inputs[t]
            for start in range(0, pairs, RUN):
                stop = min(start + RUN, pairs)
                run = _widened(values[p, start:stop], wide, bits)
                for g in range(start, stop):
                    a, b, c, d = x[8 * g], x[8 * g + 1], x[8 * g + 2], x[8 * g + 3]
                    e, f, h, i = x[8 * g + 4], x[8 * g + 5], x[8 * g + 6], x[8 * g + 7]
                    code, kept = codes[p, g], run[g - start]
                    for r in range(PANEL):
                        place = U(code[r])
                        first = c if place & U(2) else (b if place & U(1) else a)
                        second = d if place & U(8) else (c if place & U(4) else b)
                        third = h if place & U(32) else (f if place & U(16) else e)
                        fourth = i if place & U(128) else (h if place & U(64) else f)
                        sums[r] += kept[0, r] * first + kept[1, r] * second + kept[2, r] * third + kept[3, r] * fourth
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
def expand(values, codes, scales, first, out):
    """Dense rows of a compact weight, times their scales: out (rows, I) float32, of which the first is ``first``."""
    count, width = out.shape
    for o in numba.prange(count):
        p, r, scale = (first + o) // PANEL, (first + o) % PANEL, scales[first + o]
        for i in range(width):
            out[o, i] = 0
        # Views of a row or a panel would be counted by numba in each turn, which takes longer than the work.
        for g in range(codes.shape[1]):
            code, i = np.int64(codes[p, g, r]), 8 * g
            out[o, i + (code & 3)] = _number(values[p, g, 0, r]) * scale
            out[o, i + 1 + (code >> 2 & 3)] = _number(values[p, g, 1, r]) * scale
            if i + 4 < width:
                out[o, i + 4 + (code >> 4 & 3)] = _number(values[p, g, 2, r]) * scale
                out[o, i + 5 + (code >> 6)] = _number(values[p, g, 3, r]) * scale
