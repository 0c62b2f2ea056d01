"""The loops of ``decode``: its product on processors with AVX2, its product on any other, and dense rows.

Processors with AVX2 pick eight inputs by one shuffle. numba has no such shuffle, so that loop is written in LLVM's
language, with the instructions' own names. Shapes are those of ``decode``. What the loops share stands in this one
file, because numba takes a compiled loop from its cache for as long as the loop's own file is unchanged.
"""

import functools

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array

from proxsparse.operator.kernels.cache import choose_cache

choose_cache()

PANEL = 16  # rows
LANES = 8  # float32 in a register
TILE = 4  # tokens that share the reading of values and places
RUN = 32  # groups whose products are summed alone, so that less is rounded away; inside the L1 cache
PAIRED, EIGHT, SIXTEEN = 0, 1, 2  # layouts: 2:4, other blocks of up to 8 inputs, blocks of 16

FLOAT, INT, SHORT, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
FLOATS, INTS, SHORTS, BYTES = (ir.VectorType(kind, LANES) for kind in (FLOAT, INT, SHORT, BYTE))
U = np.uint32


@functools.cache  # to ask takes longer than a small product
def _shuffles_with(chosen: str | None) -> bool:
    features = get_host_cpu_features() if chosen is None else chosen
    return {"+avx2", "+fma"} <= set(features.split(","))


def has_shuffles() -> bool:
    """Whether numba compiles for a processor that has AVX2 and FMA."""
    return _shuffles_with(numba.config.CPU_FEATURES)  # type: ignore[attr-defined]


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
    nothing = ir.Constant(FLOATS, [0.0] * LANES)
    totals, partial = ([[cgutils.alloca_once(builder, FLOATS) for _ in halves] for _ in range(tile)] for _ in range(2))
    for total in (total for both in totals for total in both):
        builder.store(nothing, total)

    def add_byte(byte, tables) -> None:
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
                    total = partial[token][half]
                    builder.store(builder.call(add, [kept, picked, builder.load(total)]), total)

    run = ir.Constant(groups.type, RUN)
    with cgutils.for_range(builder, builder.sdiv(builder.add(groups, ir.Constant(groups.type, RUN - 1)), run)) as runs:
        first = builder.mul(runs.index, run)
        left = builder.sub(groups, first)
        count = builder.select(builder.icmp_signed("<", left, run), left, run)
        for total in (total for both in partial for total in both):
            builder.store(nothing, total)
        with cgutils.for_range(builder, count) as loop:
            group = builder.add(first, loop.index)
            width = 4 * (2 if layout == SIXTEEN else 1) * LANES
            starts = [_place(builder, inputs, (stride, token), (group, width)) for token in range(tile)]
            tables = [_tables(builder, layout, start) for start in starts]
            if layout == PAIRED:
                add_byte(group, tables)
            else:
                with cgutils.for_range(builder, bytes_of_group) as inner:
                    add_byte(builder.add(builder.mul(group, bytes_of_group), inner.index), tables)
        for token in range(tile):
            for half in halves:
                total = totals[token][half]
                builder.store(builder.fadd(builder.load(total), builder.load(partial[token][half])), total)
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
    if dtype != types.uint16:
        raise TypingError(f"values of {dtype}")
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
    """out (T, P * PANEL) = inputs W^T; inputs are (T, G * group) float32, zero beyond I. It needs ``has_shuffles``."""
    tokens, stride = inputs.shape[0], inputs.strides[0]
    size = codes.shape[2]
    for p in numba.prange(len(codes)):
        found = np.empty((TILE, PANEL), np.float32)
        to, places, kept = found.ctypes.data, codes.ctypes.data + p * codes.strides[0], values[p]
        for start in range(0, tokens, TILE):
            # The last tile begins earlier where too few tokens are left; the sums of a token are the same in any tile.
            first, count = (min(start, tokens - TILE), TILE) if tokens >= TILE else (0, tokens)
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
def multiply_plain(codes, values, inputs, layout, out):  # pragma: no cover (compiled)
    """``multiply`` for any processor."""
    panels, groups, even = values.shape[0], values.shape[1], values.shape[2]
    group = inputs.shape[1] // groups
    for p in numba.prange(panels):
        wide = np.empty((RUN, even, PANEL), np.float32)
        bits = wide.view(np.uint32)
        for t in range(len(inputs)):
            totals, x = np.zeros(PANEL, np.float32), inputs[t]
            for start in range(0, groups, RUN):
                stop, sums = min(start + RUN, groups), np.zeros(PANEL, np.float32)
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
                totals += sums
            out[t, p * PANEL : (p + 1) * PANEL] = totals


def _number(value):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_number)
def _number_overload(value):
    """One value as float32."""
    if value == numba.uint16:
        return lambda value: U(U(value) << U(16)).view(np.float32)
    return lambda value: np.float32(value)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def expand(codes, values, scales, layout, n, m, first, out):  # pragma: no cover (compiled)
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
