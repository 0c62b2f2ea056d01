"""Product with a compact 2:4 weight of int8 values, on CPUs with AVX2: reads 0.31 of the bytes of dense 16-bit weights.

The inputs of every token become integers of 14 bits, q = round(x / step) + ZERO, in two parts of 7 bits each. One byte
shuffle then picks the inputs of 32 kept values at once, and two instructions multiply them and add four products per
row, in int32. Nothing is rounded after the inputs, whose error is at most step / 2 = max |x| / 16382. Next to the
largest input that is 32 to 64 times smaller than bfloat16's own error. Seven bits are what the instruction allows: it
adds two products of bytes in 16 bits, and 2 * 127 * 127 fits. numba has no byte shuffle, so the loop is written in
LLVM's language with the instructions' own names.

Shapes: O = out_features, I = in_features, P = panels of PANEL rows, G = groups of GROUP inputs (I / 32, rounded up),
T = tokens. The sums of int32 do not overflow below 266,000 inputs.
"""

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from proxsparse.operator.kernels.cache import choose_cache
from proxsparse.operator.kernels.threads import match_torch

choose_cache()

PANEL, GROUP = 8, 32  # rows and inputs whose positions fill one register of 32 bytes
TILE = 4  # tokens that share the work of unpacking positions
FEW = 4  # tokens that one thread splits alone
SHARE = 4  # panels of a thread's piece of work: the inputs of a tile stay in the cache between them
ZERO, MOST = 8192, 8191  # the integer of 0.0, and the largest distance from it

BYTE, WORD, INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)
BYTES, WORDS, SUMS = ir.VectorType(BYTE, 32), ir.VectorType(WORD, 16), ir.VectorType(INT, 8)
TABLE = ir.VectorType(BYTE, 16)


def supported() -> bool:
    """Whether numba compiles for a processor that has AVX2."""
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen is None:
        return bool(binding.get_host_cpu_features().get("avx2"))
    return "+avx2" in chosen.split(",")


class Int8Panels:
    """A compact weight in the layout of the kernel.

    Args:
        values: (O, I / 2) int8 codes of -127 to 127.
        positions: (O, I / 2) uint8 in 0..3, of each value within its block.
        scales: (O,) float32; a weight is its code times the scale of its row.
    """

    def __init__(self, values: Tensor, positions: Tensor, scales: Tensor):
        self.shape = values.shape[0], 2 * values.shape[1]
        panels, groups = -(-self.shape[0] // PANEL), -(-self.shape[1] // GROUP)
        codes = np.zeros((panels * PANEL, groups * GROUP // 2), np.int8)
        places = codes.view(np.uint8).copy()
        codes[: self.shape[0], : values.shape[1]] = values.numpy()
        places[: self.shape[0], : values.shape[1]] = positions.numpy()
        self.sums = codes.sum(1, dtype=np.int32)
        self.scales = np.zeros(panels * PANEL, np.float32)
        self.scales[: self.shape[0]] = scales.numpy()
        # Four parts of a group follow one another, each with four values of every row. A byte holds the positions of
        # the same value in all four parts.
        codes = codes.reshape(panels, PANEL, groups, 4, 4).transpose(0, 2, 3, 1, 4)
        places = places.reshape(panels, PANEL, groups, 4, 4).transpose(3, 0, 2, 1, 4)
        self.values = np.ascontiguousarray(codes).reshape(panels, groups, 4, 4 * PANEL)
        packed = places[0] | places[1] << 2 | places[2] << 4 | places[3] << 6
        self.codes = np.ascontiguousarray(packed).reshape(panels, groups, 4 * PANEL)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.codes.nbytes + self.scales.nbytes + self.sums.nbytes

    def multiply(self, inputs: Tensor) -> Tensor:
        """(T, I) float32 -> (T, O) float32."""
        steps = inputs.abs().amax(1).div_(MOST).numpy()  # torch's largest value of a row with a NaN is NaN
        split = np.zeros((len(inputs), 2 * GROUP * self.codes.shape[1]), np.uint8)
        out = np.empty((len(inputs), len(self.scales)), np.float32)
        match_torch()
        # To start the threads takes longer than to split one token.
        (_split_few if len(inputs) < FEW else _split_many)(inputs.contiguous().numpy(), steps, split)
        _multiply(self.codes, self.values, self.sums, self.scales, split, steps, out)
        return torch.from_numpy(out)[:, : self.shape[0]]

    def expand(self, first: int, out: Tensor) -> None:
        """Write dense rows into out (rows, I) float32; ``first`` is the number of the first one."""
        match_torch()
        _expand(self.values, self.codes, self.scales, first, out.numpy())


def _dot_of(tile: int):
    """The loop over the groups of one panel, for so many tokens at once.

    It takes addresses: of a panel's codes, its values and the first token's parts; the bytes from a token to the next;
    the number of groups; and where to write (tile, 2, PANEL) int32 sums, of the upper and of the lower parts.
    """

    @intrinsic
    def dot(typing, codes, values, inputs, stride, groups, sums):  # pragma: no cover (compiled)
        def code(context, builder, signature, args):
            _build_dot(builder, tile, *args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), code

    return dot


def _build_dot(builder, tile, codes, values, inputs, stride, groups, sums) -> None:
    """Write the loop of ``_dot_of`` in LLVM's language."""
    pick = _instruction(builder, "llvm.x86.avx2.pshuf.b", BYTES, BYTES)
    add_pairs = _instruction(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, BYTES)
    add_twos = _instruction(builder, "llvm.x86.avx2.pmadd.wd", SUMS, WORDS)
    ones, nothing = ir.Constant(WORDS, [1] * 16), ir.Constant(SUMS, [0] * 8)
    totals = [[cgutils.alloca_once(builder, SUMS) for _ in range(2)] for _ in range(tile)]
    for total in (total for both in totals for total in both):
        builder.store(nothing, total)
    with cgutils.for_range(builder, groups) as loop:
        packed = _load(builder, BYTES, codes, loop.index, 4 * PANEL)
        for part in range(4):
            kept = _load(builder, BYTES, values, loop.index, 16 * PANEL, 4 * PANEL * part)
            shifted = builder.lshr(packed, _bytes([2 * part]))
            # The last two of a row's four values belong to the second block of the part. Its lower parts lie behind.
            upper = builder.or_(builder.and_(shifted, _bytes([3])), _bytes([0, 0, 4, 4]))
            lower = builder.or_(upper, _bytes([8]))
            for token in range(tile):
                start = builder.add(inputs, builder.mul(stride, ir.Constant(stride.type, token)))
                table = _load(builder, TABLE, start, loop.index, 2 * GROUP, 16 * part)
                table = builder.shuffle_vector(table, table, ir.Constant(ir.VectorType(INT, 32), [*range(16)] * 2))
                for total, places in zip(totals[token], (upper, lower), strict=True):
                    products = builder.call(add_pairs, [builder.call(pick, [table, places]), kept])
                    found = builder.call(add_twos, [products, ones])
                    builder.store(builder.add(builder.load(total), found), total)
    for number, total in enumerate(total for both in totals for total in both):
        place = builder.add(sums, ir.Constant(sums.type, 4 * PANEL * number))
        builder.store(builder.load(total), builder.inttoptr(place, SUMS.as_pointer()), align=4)


def _instruction(builder, name, result, argument):
    kind = ir.FunctionType(result, [argument, argument])
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _bytes(pattern):
    return ir.Constant(BYTES, pattern * (32 // len(pattern)))


def _load(builder, kind, start, index, step, offset=0):
    """What lies at start + index * step + offset."""
    place = builder.add(start, builder.mul(index, ir.Constant(index.type, step)))
    place = builder.add(place, ir.Constant(place.type, offset))
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)


_dot_one, _dot_tile = _dot_of(1), _dot_of(TILE)


def _split(inputs, steps, out):  # pragma: no cover (compiled)
    """Inputs as integers: for every eight of them, eight upper parts and then eight lower parts."""
    for t in numba.prange(len(inputs)):
        row, parts = inputs[t], out[t]
        inverse = np.float32(1) / steps[t] if steps[t] > 0 else np.float32(0)
        for start in range(0, row.size, 8):
            for i in range(start, min(start + 8, row.size)):
                number = np.int32(row[i] * inverse + np.float32(ZERO + 0.5))
                parts[start + i] = number >> 7
                parts[start + i + 8] = number & 127


_split_few = numba.njit(error_model="numpy", cache=True)(_split)
_split_many = numba.njit(parallel=True, error_model="numpy", cache=True)(_split)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _multiply(codes, values, sums, scales, inputs, steps, out):  # pragma: no cover (compiled)
    """out (T, P * PANEL) = inputs W^T, from the results of ``Int8Panels`` and ``_split``."""
    panels, groups = codes.shape[0], codes.shape[1]
    tokens, stride = inputs.shape
    for share in numba.prange((panels + SHARE - 1) // SHARE):
        found = np.empty((TILE, 2, PANEL), np.int32)
        to = found.ctypes.data
        for first in range(0, tokens, TILE):
            count = min(TILE, tokens - first)
            x = inputs.ctypes.data + first * stride
            for p in range(share * SHARE, min(panels, (share + 1) * SHARE)):
                where, kept = codes.ctypes.data + p * codes.strides[0], values.ctypes.data + p * values.strides[0]
                if count == TILE:
                    _dot_tile(where, kept, x, stride, groups, to)
                else:
                    for t in range(count):
                        _dot_one(where, kept, x + t * stride, stride, groups, to + t * found.strides[0])
                for t in range(count):
                    for r in range(PANEL):
                        row = PANEL * p + r
                        total = 128 * np.int64(found[t, 0, r]) + found[t, 1, r] - ZERO * np.int64(sums[row])
                        out[first + t, row] = np.float32(total) * (scales[row] * steps[first + t])


@numba.njit(parallel=True, error_model="numpy", cache=True)
def _expand(values, codes, scales, first, out):  # pragma: no cover (compiled)
    count, width = out.shape
    for o in numba.prange(count):
        p, r, scale = (first + o) // PANEL, 4 * ((first + o) % PANEL), scales[first + o]
        for i in range(width):
            out[o, i] = 0
        for i in range(0, width, 4):
            g, part, k = i // GROUP, i % GROUP // 8, r + i % 8 // 2
            one, two = codes[p, g, k] >> (2 * part) & 3, codes[p, g, k + 1] >> (2 * part) & 3
            out[o, i + one] = np.float32(values[p, g, part, k]) * scale
            out[o, i + two] = np.float32(values[p, g, part, k + 1]) * scale
