"""Adafactor's three passes over a gradient in plain torch operations, some rows at a time: the reference.

``proxsparse/operator/adafactor.py`` says what they compute.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from proxsparse.operator.rounding import Noise, round_stochastically, widest

CHUNK, CHUNK_OF_A_GPU = 1 << 20, 1 << 24  # entries at a time


def _rows(gradient: Tensor) -> Iterator[tuple[int, slice]]:
    """Matrix and rows of every chunk."""
    matrices, height, width = gradient.shape
    step = max(1, (CHUNK if gradient.device.type == "cpu" else CHUNK_OF_A_GPU) // width)
    for matrix in range(matrices):
        for start in range(0, height, step):
            yield matrix, slice(start, min(height, start + step))


def square_sums(gradient: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    options: dict = {"dtype": widest(gradient.device), "device": gradient.device}
    rows = torch.empty(gradient.shape[:2], **options)
    columns = torch.zeros(gradient.shape[0], gradient.shape[2], **options)
    for matrix, part in _rows(gradient):
        squares = gradient[matrix, part].float().square().add_(epsilon).to(rows.dtype)
        rows[matrix, part] = squares.sum(1)
        columns[matrix] += squares.sum(0)
    return rows, columns


def _update(gradient: Tensor, row: Tensor, column: Tensor, matrix: int, part: slice) -> Tensor:
    height, width = gradient.shape[1:]
    own = row.view(-1, height)[matrix, part, None]
    return gradient[matrix, part].float() * own * column.view(-1, width)[matrix]


def update_square_sum(gradient: Tensor, row: Tensor, column: Tensor) -> Tensor:
    sums = [
        _update(gradient, row, column, *chunk).square_().to(widest(gradient.device)).sum() for chunk in _rows(gradient)
    ]
    return torch.stack(sums).sum()


def apply_(
    weight: Tensor, gradient: Tensor, row: Tensor, column: Tensor, rate: Tensor, keep: float, noise: Noise | None
) -> None:
    height, width = gradient.shape[1:]
    for matrix, part in _rows(gradient):
        value = weight[matrix, part].float() * keep - _update(gradient, row, column, matrix, part) * rate
        if noise is not None:
            value = round_stochastically(value, noise.after((matrix * height + part.start) * width))
        weight[matrix, part] = value.to(weight.dtype)
