"""Adafactor's arithmetic on a matrix: three passes over the gradient, on every device the same.

    sums of squares     s_ij = g_ij^2 + epsilon, summed per row and per column
    size                u_ij = (g_ij * row_i) * column_j, the sum of squares
    step                w_ij <- w_ij * keep - u_ij * rate, rounded

What is between them, averages over time, inverse roots and the rate, concerns vectors and is left to the caller. Every
product and sum is one of float32, rounded; sums over a row, a column or a matrix are made in float64. Their order then
does not show in float32, so that the kernels agree in every bit.

Source: Shazeer and Stern, https://arxiv.org/abs/1804.04235.
Shapes: (O, I) matrices, or (E, O, I) with factors of their own for each; E = 1 of a plain matrix.
"""

from types import ModuleType

import torch
from torch import Tensor

from proxsparse.operator.kernels import eager_adafactor
from proxsparse.operator.prox import kernel_for
from proxsparse.operator.rounding import Noise

_KERNELS: dict[str, ModuleType] = {"eager": eager_adafactor}
try:
    from proxsparse.operator.kernels import cpu_adafactor

    _KERNELS["cpu"] = cpu_adafactor
except ImportError:  # no numba
    pass
try:
    from proxsparse.operator.kernels import triton_adafactor

    _KERNELS["triton"] = triton_adafactor
except ImportError:  # no triton
    pass


class Passes:
    """The three passes for one weight and its gradient.

    Args:
        weight: (O, I) or (E, O, I), any float dtype.
        gradient: of the same shape.
        kernel: 'cpu', 'triton' or 'eager'; None picks the fastest that takes both.
    """

    def __init__(self, weight: Tensor, gradient: Tensor, kernel: str | None = None):
        alike = weight.is_contiguous() and weight.dtype == gradient.dtype
        self.module = _KERNELS[kernel or (kernel_for(weight) if alike else "eager")]
        self.weight, self.shape = weight, (-1, *weight.shape[-2:])
        self.gradient = gradient.contiguous().view(self.shape)

    def square_sums(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """Sums of g^2 + epsilon, float64: (..., O) of rows and (..., I) of columns."""
        rows, columns = self.module.square_sums(self.gradient, epsilon)
        outer = self.weight.shape[:-2]
        return rows.view(*outer, -1), columns.view(*outer, -1)

    def update_square_sum(self, row: Tensor, column: Tensor) -> Tensor:
        """Sum of u^2, a float64 scalar; ``row`` (..., O) and ``column`` (..., I) are float32."""
        return self.module.update_square_sum(self.gradient, row.contiguous(), column.contiguous())

    def step_(self, row: Tensor, column: Tensor, rate: Tensor, keep: float, noise: Noise | None) -> None:
        """Move the weight.

        Args:
            rate: float32 scalar on the weight's device.
            noise: of stochastic rounding to bfloat16, or None to round to nearest.
        """
        target = self.weight if self.weight.is_contiguous() else self.weight.contiguous()
        own = noise if self.weight.dtype == torch.bfloat16 else None
        self.module.apply_(
            target.view(self.shape), self.gradient, row.contiguous(), column.contiguous(), rate, keep, own
        )
        if target is not self.weight:
            self.weight.copy_(target)
