"""nn.Linear with a compact N:M weight, for inference on the CPU.

Few tokens (decoding) go through a kernel that reads the compact weight, because reading limits them. Many tokens
(prefill) go through the same kernel, or, where dense products are faster, through dense products with a few rows of the
weight at a time. These are expanded into a buffer that stays in the cache.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.deploy import decode_loops
from proxsparse.deploy.decode import Panels
from proxsparse.errors import RunError
from proxsparse.model.compact import check_kind, compress, quantise_rows
from proxsparse.model.loading import native_bf16
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

FEW_TOKENS = 12  # beyond, to expand the weight and multiply densely is faster than the plain loop
SOME_TOKENS = 96  # beyond, it is faster than the shuffles too, where the processor has wider registers than these use
BUFFER = 2 * 1024 * 1024  # weights that are expanded at once, 8 MB
ROWS = 384  # but so many rows at least: products with fewer take longer


_own = threading.local()


def _buffer(size: int) -> Tensor:
    """Memory of this thread's own, kept from call to call: new memory takes the system longer than us to fill it."""
    if getattr(_own, "buffer", None) is None or len(_own.buffer) < size:
        _own.buffer = torch.empty(size)
    return _own.buffer[:size]


class _ForwardOnly(torch.autograd.Function):
    """A computation without a derivative. If its output were detached, a training loop would run and learn nothing."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        return compute(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RunError("Compact layers compute no gradients: to train, load the model without `sparse=True`.")


class CompactLinear(nn.Module):
    """nn.Linear with a compact N:M weight, for inference on the CPU.

    A few tokens read 0.56 of the dense bytes of a 2:4 weight (float32: 0.53, int8: 0.31 of 16-bit), and 0.63 of a 4:8
    or 8:16 weight (float32: 0.56, int8: 0.38), whose places take 4 bits here. Sums are float32.

    Args:
        linear: its weight has at most N non-zeros in every block of M; float32 or bfloat16, on the CPU.
        quantize: int8: the kept values are rounded to int8, with one scale per output.
        pattern: N:M, where M is 2, 4, 8 or 16.

    Raises:
        ValueError: the weight is not N:M, or of another dtype or device.
        UsageError: another kind of quantisation, or another M.
        RunError: in the backward pass.
    """

    def __init__(self, linear: nn.Linear, quantize: str | None = None, pattern: Pattern = TWO_OF_FOUR):
        super().__init__()
        check_kind(quantize)
        weight = linear.weight.detach()
        if weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
            raise ValueError(
                f"compact weights are float32 or bfloat16 on the CPU, not {str(weight.dtype)[6:]} on {weight.device}; "
                "load the model with `dtype=float32`"
            )
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.quantize = quantize
        # Processors without products of bfloat16 take several times as long for them as for float32.
        self.wide = self.dtype if native_bf16("cpu") else torch.float32
        self.few: int | None = FEW_TOKENS
        if decode_loops.has_shuffles():
            self.few = SOME_TOKENS if native_bf16("cpu") else None
        values, positions = compress(weight, pattern)
        codes, scales = (values, None) if quantize is None else quantise_rows(values)
        self.panels = Panels(codes, positions, scales, pattern)
        self.bias = linear.bias
        self.read = False

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that multiplies with it by itself; ``read`` remembers that somebody asked."""
        self.read = True
        return self.dense()

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def dense(self) -> Tensor:
        """(O, I) dense weight, made afresh."""
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        for first, rows in self._expanded(torch.float32):
            out[first : first + len(rows)] = rows
        return out

    def _expanded(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Consecutive rows of the dense weight: the number of the first, and the rows, which the next ones replace."""
        count = max(ROWS, BUFFER // self.in_features)
        buffer = _buffer(count * self.in_features).view(count, self.in_features)
        for first in range(0, self.out_features, count):
            rows = buffer[: min(count, self.out_features - first)]
            self.panels.expand(first, rows)
            yield first, rows.to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and inputs.requires_grad:
            return _ForwardOnly.apply(inputs, self._product)
        return self._product(inputs)

    def _product(self, inputs: Tensor) -> Tensor:
        flat = inputs.detach().reshape(-1, self.in_features)
        if self.few is None or len(flat) <= self.few:
            out = self.panels.multiply(flat.float()).to(inputs.dtype)
        else:
            flat = flat.to(self.wide)
            out = torch.empty(len(flat), self.out_features, dtype=self.wide)
            for first, rows in self._expanded(self.wide):
                torch.mm(flat, rows.T, out=out[:, first : first + len(rows)])
            out = out.to(inputs.dtype)
        out = out if self.bias is None else out + self.bias
        return out.reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kind = "" if self.quantize is None else f", {self.quantize}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.panels.pattern}{kind}"
