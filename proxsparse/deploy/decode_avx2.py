"""The product of ``decode`` on processors with AVX2, which pick eight inputs by one shuffle.

numba has no such shuffle, so the loop is written in LLVM's language, with the instructions' own names. Shapes are those
of ``decode``.
"""

import functools

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from proxsparse.operator.kernels.cache import choose_cache

choose_cache()

PANEL = 16  # rows
LANES = 8  # float32 in a register
TILE = 4  # tokens that share the reading of values and places
PAIRED, EIGHT, SIXTEEN = 0, 1, 2  # layouts: 2:4, other blocks of up to 8 inputs, blocks of 16

FLOAT, INT, SHORT, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
FLOATS, INTS, SHORTS, BYTES = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT, SHORT, BYTE))


_host_features = functools.cache(binding.get_host_cpu_features)  # to ask takes longer than a small product


def supported() -> bool:
    """Whether numba compiles for a processor that has AVX2."""
    chosen = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if chosen is None:
        return bool(_host_features().get("avx2"))
    return "+avx2" in chosen.split(",")


def _dot_of(layout: int, tile: int):
    """The loop over the groups of one panel in a layout, for so many tokens at once.

    It takes the address of the panel's places, its values (G, V, PANEL), the address of the first token's inputs, the
    bytes from a token to the next, the bytes of places per group, and where to write (tile, PANEL) float32 sums.
    """

    @intrinsic
    def dot(typing, places, values, inputs, stride, bytes_of_group, sums):  # pragma: no cover (compiled)
        def code(context, builder, signature, args):
            held = make_array(signature.args[1])(context, builder, args[1])
            groups = builder.extract_value(held.shape, 0)
            start = builder.ptrtoint(held.data, args[0].type)
            addresses = (args[0], start, *args[2:])
            _build_dot(builder, layout, tile, signature.args[1].dtype, groups, *addresses)
            return context.get_dummy_value()

        return types.void(types.intp, values, *[types.intp] * 4), code

    return dot


def _build_dot(builder, layout, tile, dtype, groups, places, values, inputs, stride, bytes_of_group, sums) -> None:
    """Write the loop of ``_dot_of`` in LLVM's language."""
    halves, size = range(PANEL // LANES), dtype.bitwidth // 8
    at_once = 4 if layout == PAIRED else 2  # values whose places share a byte
    add = _instruction(builder, "llvm.fma.v8f32", FLOATS, FLOATS, FLOATS)
    totals = [[cgutils.alloca_once(builder, FLOATS) for _ in halves] for _ in range(tile)]
    for total in (total for both in totals for total in both):
        builder.store(ir.Constant(FLOATS, [0.0] * LANES), total)
    with cgutils.for_range(builder, groups) as loop:
        width = 4 * (2 if layout == SIXTEEN else 1) * LANES
        starts = [_place(builder, inputs, (stride, token), (loop.index, width)) for token in range(tile)]
        tables = [_tables(builder, layout, start) for start in starts]

        def add_byte(byte) -> None:
            """Add the products of the values whose places are in one byte per row."""
            for half in halves:
                packed = _load(builder, BYTES, _place(builder, places, (byte, PANEL), (half, LANES)))
                packed = builder.zext(packed, INTS)
                for number in range(at_once):
                    chosen = builder.lshr(packed, _same(8 // at_once * number))
                    row = _place(builder, values, (byte, at_once * PANEL * size), (number, PANEL * size))
                    kept = _widened(builder, dtype, _place(builder, row, (half, LANES * size)))
                    for token in range(tile):
                        picked = _pick(builder, layout, tables[token], chosen, number)
                        total = totals[token][half]
                        builder.store(builder.call(add, [kept, picked, builder.load(total)]), total)

        if layout == PAIRED:
            add_byte(loop.index)
        else:
            first = builder.mul(loop.index, bytes_of_group)
            with cgutils.for_range(builder, bytes_of_group) as inner:
                add_byte(builder.add(first, inner.index))
    for number, total in enumerate(total for both in totals for total in both):
        to = _place(builder, sums, (number, 4 * LANES))
        builder.store(builder.load(total), builder.inttoptr(to, FLOATS.as_pointer()), align=4)


def _tables(builder, layout, start) -> list:
    """The inputs of a group in registers: both blocks of 2:4 twice each, else eight inputs per register."""
    if layout == PAIRED:
        four = ir.VectorType(FLOAT, 4)
        blocks = [_load(builder, four, _place(builder, start, (block, 16))) for block in range(2)]
        twice = ir.Constant(INTS, [0, 1, 2, 3] * 2)
        return [builder.shuffle_vector(block, block, twice) for block in blocks]
    count = 2 if layout == SIXTEEN else 1
    return [_load(builder, FLOATS, _place(builder, start, (number, 4 * LANES))) for number in range(count)]


def _pick(builder, layout, tables, chosen, number):
    """The input of each row; both shuffles look at the lowest bits of the places alone, two or three."""
    if layout == PAIRED:
        pick = _instruction(builder, "llvm.x86.avx.vpermilvar.ps.256", FLOATS, INTS)
        return builder.call(pick, [tables[number // 2], chosen])
    pick = _instruction(builder, "llvm.x86.avx2.permps", FLOATS, INTS)
    found = [builder.call(pick, [table, chosen]) for table in tables]
    if layout == EIGHT:
        return found[0]
    upper = builder.icmp_signed("<", builder.shl(chosen, _same(28)), _same(0))  # the fourth bit of the place
    return builder.select(upper, found[1], found[0])


def _widened(builder, dtype, place):
    """Eight values as float32: themselves, int8 as numbers, or bfloat16 bits shifted into the upper half."""
    if dtype == types.float32:
        return _load(builder, FLOATS, place)
    if dtype == types.int8:
        return builder.sitofp(builder.sext(_load(builder, BYTES, place), INTS), FLOATS)
    return builder.bitcast(builder.shl(builder.zext(_load(builder, SHORTS, place), INTS), _same(16)), FLOATS)


def _instruction(builder, name, *arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, arguments), name)


def _same(number):
    return ir.Constant(INTS, [number] * LANES)


def _place(builder, start, *steps):
    """The address start + index * step + ...; a step is a number of bytes, an index a number or one of LLVM's."""
    for index, step in steps:
        if isinstance(index, int):
            offset = ir.Constant(start.type, index * step)
        else:
            offset = builder.mul(index, ir.Constant(index.type, step) if isinstance(step, int) else step)
        start = builder.add(start, offset)
    return start


def _load(builder, kind, place):
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)


_paired_one, _paired_tile = _dot_of(PAIRED, 1), _dot_of(PAIRED, TILE)
_eight_one, _eight_tile = _dot_of(EIGHT, 1), _dot_of(EIGHT, TILE)
_sixteen_one, _sixteen_tile = _dot_of(SIXTEEN, 1), _dot_of(SIXTEEN, TILE)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def multiply(codes, values, inputs, layout, out):  # pragma: no cover (compiled)
    """out (T, P * PANEL) = inputs W^T; inputs are (T, G * group) float32, zero beyond I. It needs AVX2."""
    tokens, stride = inputs.shape[0], inputs.strides[0]
    size = codes.shape[2]
    for p in numba.prange(len(codes)):
        found = np.empty((TILE, PANEL), np.float32)
        to, places, kept = found.ctypes.data, codes.ctypes.data + p * codes.strides[0], values[p]
        for first in range(0, tokens, TILE):
            count = min(TILE, tokens - first)
            x = inputs.ctypes.data + first * stride
            if count == TILE:
                if layout == PAIRED:
                    _paired_tile(places, kept, x, stride, size, to)
                elif layout == EIGHT:
                    _eight_tile(places, kept, x, stride, size, to)
                else:
                    _sixteen_tile(places, kept, x, stride, size, to)
            else:
                for t in range(count):
                    if layout == PAIRED:
                        _paired_one(places, kept, x + t * stride, stride, size, to + t * found.strides[0])
                    elif layout == EIGHT:
                        _eight_one(places, kept, x + t * stride, stride, size, to + t * found.strides[0])
                    else:
                        _sixteen_one(places, kept, x + t * stride, stride, size, to + t * found.strides[0])
            for t in range(count):
                out[first + t, p * PANEL : (p + 1) * PANEL] = found[t]
