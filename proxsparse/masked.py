"""Masked weights for the forward pass: the loss sees W0 under the current mask, the optimizer moves the scores.

While the model computes, each pruned parameter holds W0 * mask(W); before the optimizer step it holds the learned W
again. The gradient that reaches W is the one of the masked weight, dropped entries included (straight-through):
an entry that the loss wants larger in W0's direction grows until it is kept, one it wants gone shrinks.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from proxsparse.prox_op import top2_product_
from proxsparse.prunable import Prunable


class MaskedWeights:
    """Original weights W0 of a model, and the swap between them, the masked ones and the learned ones.

    Args:
        targets: the prunable weights; their values now are W0.
        norms: name -> (I,) norms that turn a weight into its score, or None for plain magnitudes.
        on_cpu: keep W0 on the CPU, and bring over one weight at a time.
    """

    def __init__(self, targets: list[Prunable], norms: dict[str, Tensor] | None, on_cpu: bool = False):
        self.targets = targets
        self.norms = norms
        self.base = {t.name: copy_of(t.weight, on_cpu) for t in targets}
        self._learned: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def masked(self) -> Iterator[None]:
        """Parameters hold W0 * top2(learned scores) inside the block."""
        with self._swapped():
            for target in self.targets:
                out, learned = target.weight.detach(), self._learned[target.name]
                base = self.base[target.name].to(out.device)
                scale = None if self.norms is None else self.norms[target.name]
                top2_product_(target.rows(out), target.rows(base), target.rows(learned), scale)
            yield

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Parameters hold W0 inside the block."""
        with self._swapped():
            for target in self.targets:
                target.weight.detach().copy_(self.base[target.name])
            yield

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        for target in self.targets:
            weight = target.weight.detach()
            buffer = self._learned.setdefault(target.name, torch.empty_like(weight))
            buffer.copy_(weight)
        try:
            yield
        finally:
            for target in self.targets:
                target.weight.detach().copy_(self._learned[target.name])


def copy_of(weight: Tensor, on_cpu: bool) -> Tensor:
    """A copy of a weight on its device, or on the CPU."""
    return weight.detach().to("cpu", copy=True) if on_cpu else weight.detach().clone()
