"""Adafactor's three passes over a gradient as Triton kernels, without a temporary of its size.

``proxsparse/operator/adafactor.py`` says what they compute. Sums are made per tile and then by torch, in a fixed order.
Floating-point fusion is off, so that every product and sum of float32 is rounded as torch rounds it; the passes wait
for memory anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from proxsparse.operator.kernels.triton_tiles import bits, on_device, read, write
from proxsparse.operator.rounding import Noise, signed

ROWS, COLUMNS, WARPS = 32, 128, 4  # of a tile


@triton.jit
def _tile(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: rows within all matrices, columns, entries, and which of each there are."""
    tiles = tl.cdiv(height, ROWS)
    matrix = tl.program_id(0) // tiles
    own = (tl.program_id(0) - matrix * tiles) * ROWS + tl.arange(0, ROWS)
    row, column = matrix * height + own, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here, there = own < height, column < width
    return row, column, row.to(tl.int64)[:, None] * width + column[None, :], here, there, matrix


@triton.jit
def _update(gradient, rows, columns, height, width, BFLOAT16: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The update before its size is bounded, and where it is."""
    row, column, place, here, there, matrix = _tile(height, width, R, C)
    inside = here[:, None] & there[None, :]
    r = tl.load(rows + row, mask=here, other=0.0)
    c = tl.load(columns + matrix.to(tl.int64) * width + column, mask=there, other=0.0)
    return read(gradient, place, inside, BFLOAT16) * r[:, None] * c[None, :], place, inside


@triton.jit
def _squares(gradient, by_row, by_column, height, width, all_rows, epsilon,
             BFLOAT16: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row, column, place, here, there, _ = _tile(height, width, R, C)
    inside = here[:, None] & there[None, :]
    g = read(gradient, place, inside, BFLOAT16)
    squares = tl.where(inside, g * g + epsilon, 0.0).to(tl.float64)
    tl.store(by_row + tl.program_id(1).to(tl.int64) * all_rows + row, tl.sum(squares, 1), mask=here)
    tl.store(by_column + tl.program_id(0).to(tl.int64) * width + column, tl.sum(squares, 0), mask=there)


@triton.jit
def _size(gradient, rows, columns, sums, height, width, BFLOAT16: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    u, _, _ = _update(gradient, rows, columns, height, width, BFLOAT16, R, C)
    found = tl.sum(tl.sum((u * u).to(tl.float64), 1), 0)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), found)


@triton.jit(do_not_specialize=["seed", "origin"])
def _apply(weights, gradient, rows, columns, rate, keep, height, width, seed, origin,
           BFLOAT16: tl.constexpr, STOCHASTIC: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    u, place, inside = _update(gradient, rows, columns, height, width, BFLOAT16, R, C)
    # The rate comes from the device: nothing is waited for.
    value = read(weights, place, inside, BFLOAT16) * keep - u * tl.load(rate)
    write(weights, place, value, inside, seed, origin, BFLOAT16, STOCHASTIC)


def _grid(gradient: Tensor) -> tuple[int, int]:
    matrices, height, width = gradient.shape
    return matrices * triton.cdiv(height, ROWS), triton.cdiv(width, COLUMNS)


def _options(gradient: Tensor) -> dict:
    low = gradient.dtype == torch.bfloat16
    return {"BFLOAT16": low, "R": ROWS, "C": COLUMNS, "enable_fp_fusion": False, "num_warps": WARPS}


def square_sums(gradient: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    matrices, height, width = gradient.shape
    down, across = _grid(gradient)
    by_row = torch.empty(across, matrices * height, dtype=torch.float64, device=gradient.device)
    by_column = torch.empty(down, width, dtype=torch.float64, device=gradient.device)
    with on_device(gradient):
        _squares[(down, across)](
            bits(gradient), by_row, by_column, height, width, matrices * height, epsilon, **_options(gradient)
        )
    return by_row.sum(0).view(matrices, height), by_column.view(matrices, -1, width).sum(1)


def update_square_sum(gradient: Tensor, row: Tensor, column: Tensor) -> Tensor:
    _, height, width = gradient.shape
    grid = _grid(gradient)
    sums = torch.empty(grid[0] * grid[1], dtype=torch.float64, device=gradient.device)
    with on_device(gradient):
        _size[grid](bits(gradient), row, column, sums, height, width, **_options(gradient))
    return sums.sum()


def apply_(
    weight: Tensor, gradient: Tensor, row: Tensor, column: Tensor, rate: Tensor, keep: float, noise: Noise | None
) -> None:
    _, height, width = gradient.shape
    seed, origin = noise or (0, 0)
    with on_device(weight):
        _apply[_grid(gradient)](
            bits(weight), bits(gradient), row, column, rate, keep, height, width, signed(seed), signed(origin),
            STOCHASTIC=noise is not None, **_options(gradient),
        )  # fmt: skip
