"""Adafactor's three passes over a gradient for the CPU: read, sum, and step, without a temporary of its size.

``proxsparse/operator/adafactor.py`` says what they compute. Fast-math is off but for the order of float64 sums, so that
every product and sum of float32 is rounded as torch rounds it.
"""

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from proxsparse.operator.kernels.cpu import _bfloat16_bits, _hash, flat
from proxsparse.operator.kernels.threads import match_torch
from proxsparse.operator.rounding import Noise

ROWS = 64  # of a part, the same for every number of threads, which therefore changes no bit
_ANY_ORDER = {"reassoc", "nsz"}
_compiled = {"error_model": "numpy", "cache": True}


def _read(tensor, start, row):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_read)
def _read_overload(tensor, start, row):
    """Copy a row of float32, or of bfloat16 as uint16 bits, into the uint32 bits of a float32 buffer."""
    if tensor.dtype == numba.float32:

        def read(tensor, start, row):
            piece = tensor[start : start + row.size].view(np.uint32)
            for j in range(row.size):
                row[j] = piece[j]
    else:

        def read(tensor, start, row):
            piece = tensor[start : start + row.size]
            for j in range(row.size):
                row[j] = np.uint32(piece[j]) << np.uint32(16)

    return read


def _write(tensor, start, row, stochastic, seed, origin):  # pragma: no cover (compiled)
    raise NotImplementedError


@overload(_write)
def _write_overload(tensor, start, row, stochastic, seed, origin):
    """Store a row of float32, given as its uint32 bits, rounded to the dtype of the tensor."""
    if tensor.dtype == numba.float32:

        def write(tensor, start, row, stochastic, seed, origin):
            piece = tensor[start : start + row.size].view(np.uint32)
            for j in range(row.size):
                piece[j] = row[j]
    else:

        def write(tensor, start, row, stochastic, seed, origin):
            piece = tensor[start : start + row.size]
            for j in range(row.size):
                if stochastic:
                    noise = _hash(np.uint32(origin + start + j) ^ seed) & np.uint32(0xFFFF)
                else:
                    noise = np.uint32(0x7FFF) + ((row[j] >> np.uint32(16)) & np.uint32(1))
                piece[j] = _bfloat16_bits(row[j], noise)

    return write


@numba.njit(parallel=True, fastmath=_ANY_ORDER, **_compiled)
def _squares(gradient, height, width, epsilon, rows, columns):
    """Sums of squares of rows (matrices * height,) and, per part, of columns (matrices * parts, width), in float64."""
    parts = (height + ROWS - 1) // ROWS
    for part in numba.prange(columns.shape[0]):
        bits = np.empty(width, np.uint32)
        row = bits.view(np.float32)
        matrix, column = part // parts, columns[part]
        first = part % parts * ROWS
        for i in range(matrix * height + first, matrix * height + min(height, first + ROWS)):
            _read(gradient, i * width, bits)
            total = 0.0
            for j in range(width):
                square = np.float64(np.float32(row[j] * row[j] + epsilon))
                total += square
                column[j] += square
            rows[i] = total


@numba.njit(parallel=True, fastmath=_ANY_ORDER, **_compiled)
def _size(gradient, height, width, row_factors, column_factors, sums):
    """Per part, the sum of squares of the update, in float64."""
    parts = (height + ROWS - 1) // ROWS
    for part in numba.prange(sums.size):
        bits = np.empty(width, np.uint32)
        row = bits.view(np.float32)
        matrix, first, total = part // parts, part % parts * ROWS, 0.0
        columns = column_factors[matrix * width : (matrix + 1) * width]
        for i in range(matrix * height + first, matrix * height + min(height, first + ROWS)):
            _read(gradient, i * width, bits)
            factor = row_factors[i]
            for j in range(width):
                update = np.float32(np.float32(row[j] * factor) * columns[j])
                total += np.float64(np.float32(update * update))
        sums[part] = total


@numba.njit(parallel=True, **_compiled)
def _apply(weight, gradient, height, width, row_factors, column_factors, rate, keep, stochastic, seed, origin):
    """weight * keep - rate * update, rounded."""
    parts = (height + ROWS - 1) // ROWS
    for part in numba.prange(weight.size // (height * width) * parts):
        bits, own_bits = np.empty(width, np.uint32), np.empty(width, np.uint32)
        row, own = bits.view(np.float32), own_bits.view(np.float32)
        matrix, first = part // parts, part % parts * ROWS
        columns = column_factors[matrix * width : (matrix + 1) * width]
        for i in range(matrix * height + first, matrix * height + min(height, first + ROWS)):
            _read(gradient, i * width, bits)
            _read(weight, i * width, own_bits)
            factor = row_factors[i]
            for j in range(width):
                update = np.float32(np.float32(row[j] * factor) * columns[j])
                own[j] = np.float32(own[j] * keep) - np.float32(update * rate)
            _write(weight, i * width, own_bits, stochastic, seed, origin)


def square_sums(gradient: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    matrices, height, width = gradient.shape
    match_torch()
    rows, columns = np.empty(matrices * height), np.zeros((matrices * -(-height // ROWS), width))
    _squares(flat(gradient), height, width, np.float32(epsilon), rows, columns)
    by_column = columns.reshape(matrices, -1, width).sum(1)
    return torch.from_numpy(rows).view(matrices, height), torch.from_numpy(by_column)


def update_square_sum(gradient: Tensor, row: Tensor, column: Tensor) -> Tensor:
    matrices, height, width = gradient.shape
    match_torch()
    sums = np.empty(matrices * -(-height // ROWS))
    _size(flat(gradient), height, width, flat(row), flat(column), sums)
    return torch.tensor(sums.sum())


def apply_(
    weight: Tensor, gradient: Tensor, row: Tensor, column: Tensor, rate: Tensor, keep: float, noise: Noise | None
) -> None:
    _, height, width = gradient.shape
    match_torch()
    seed, first = noise or (0, 0)
    _apply(
        flat(weight), flat(gradient), height, width, flat(row), flat(column), np.float32(rate.item()),
        np.float32(keep), noise is not None, np.uint32(seed & 0xFFFFFFFF), first,
    )  # fmt: skip
