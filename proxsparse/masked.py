"""Masked weights for the forward pass: the loss sees W0 under the current mask, the optimizer moves the scores.

While the model computes, each pruned parameter holds W0 * mask(W); before the optimizer step it holds the learned W
again. The gradient that reaches W is the one of the masked weight, dropped entries included (straight-through):
an entry that the loss wants larger in W0's direction grows until it is kept, one it wants gone shrinks.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from proxsparse.original import OriginalWeights
from proxsparse.prox_op import top2_product_
from proxsparse.prunable import Prunable
from proxsparse.sharding import reshard


class WeightSwaps:
    """The swap between the learned weights of a model, its original ones and the masked ones.

    Args:
        model: whose weights they are.
        targets: the prunable weights.
        original: their W0.
        norms: name -> (I,) norms that turn a weight into its score, or None for plain magnitudes.
        offload: learned weights wait on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Prunable],
        original: OriginalWeights,
        norms: dict[str, Tensor] | None,
        offload: bool = False,
    ):
        self.model = model
        self.targets = targets
        self.original = original
        self.norms = norms
        self.offload = offload
        self._learned: dict[str | None, Tensor] = {}
        self._inside = False

    @contextlib.contextmanager
    def masked(self) -> Iterator[None]:
        """Parameters hold W0 * top2(learned scores) inside the block."""
        with self._swapped():
            for target in self.targets:
                out = target.stored
                learned = self._learned[target.name].to(out.device)
                scale = None if self.norms is None else self.norms[target.name]
                base = self.original.of(target)
                top2_product_(target.rows(out), target.rows(base), target.rows(learned), scale)
            yield

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Parameters hold W0 inside the block."""
        with self._swapped():
            for target in self.targets:
                target.stored.copy_(self.original.of(target))
            yield

    @contextlib.contextmanager
    def learned(self, parameter: nn.Parameter) -> Iterator[None]:
        """Inside masked(), once the backward pass is through with a parameter: it holds its learned weight, to move."""
        name = next((t.name for t in self.targets if t.weight is parameter), None)
        buffer = self._learned.get(name) if self._inside else None
        if buffer is not None:
            parameter.detach().copy_(buffer)
        yield
        if buffer is not None:
            buffer.copy_(parameter.detach())

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        reshard(self.model)
        for target in self.targets:
            weight = target.stored
            if target.name not in self._learned:
                self._learned[target.name] = self._buffer(weight)
            self._learned[target.name].copy_(weight)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            reshard(self.model)
            for target in self.targets:
                target.stored.copy_(self._learned[target.name])

    def _buffer(self, weight: Tensor) -> Tensor:
        """Room for a learned weight: pinned where it is copied to and from an accelerator."""
        if not self.offload or weight.device.type == "cpu":
            return torch.empty_like(weight)
        return torch.empty_like(weight, device="cpu", pin_memory=True)
