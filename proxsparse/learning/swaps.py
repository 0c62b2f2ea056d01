"""What parameters hold: the loss sees W0 under the current mask, the teacher W0, the optimizer the learned weights.

While the model computes, each pruned parameter holds W0 * mask(W); before the optimizer step it holds the learned W
again. The gradient that reaches W is the one of the masked weight, dropped entries included (straight-through):
an entry that the loss wants larger in W0's direction grows until it is kept, one it wants gone shrinks.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from proxsparse.learning.original import OriginalWeights
from proxsparse.model.prunable import Prunable
from proxsparse.model.sharding import reshard
from proxsparse.operator.prox import top2_product_


class WeightSwaps:
    """The swap between the learned weights of a model, its original ones and the masked ones.

        with swaps.away():
            swaps.put_masked()
            ...  # compute with them

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
        self._away = False

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Learned weights wait inside the block, and are back after it; what parameters hold is to be put there."""
        reshard(self.model)
        for target in self.targets:
            weight = target.stored
            if target.name not in self._learned:
                self._learned[target.name] = self._buffer(weight)
            self._learned[target.name].copy_(weight)
        self._away = True
        try:
            yield
        finally:
            self._away = False
            self.put_learned()

    def put_masked(self) -> None:
        """Parameters hold W0 * top2(learned scores) from here on."""
        reshard(self.model)
        for target in self.targets:
            out = target.stored
            learned = self._learned[target.name].to(out.device)
            scale = None if self.norms is None else self.norms[target.name]
            base = self.original.of(target)
            top2_product_(target.rows(out), target.rows(base), target.rows(learned), scale)

    def put_original(self) -> None:
        """Parameters hold W0 from here on."""
        reshard(self.model)
        for target in self.targets:
            target.stored.copy_(self.original.of(target))

    def put_learned(self) -> None:
        """Parameters hold the learned weights from here on."""
        reshard(self.model)
        for target in self.targets:
            target.stored.copy_(self._learned[target.name])

    @contextlib.contextmanager
    def learned(self, parameter: nn.Parameter) -> Iterator[None]:
        """Once the backward pass is through with a parameter: it holds its learned weight inside the block, to move."""
        name = next((t.name for t in self.targets if t.weight is parameter), None)
        buffer = self._learned.get(name) if self._away else None
        if buffer is not None:
            parameter.detach().copy_(buffer)
        yield
        if buffer is not None:
            buffer.copy_(parameter.detach())

    def _buffer(self, weight: Tensor) -> Tensor:
        """Room for a learned weight: pinned where it is copied to and from an accelerator."""
        if not self.offload or weight.device.type == "cpu":
            return torch.empty_like(weight)
        return torch.empty_like(weight, device="cpu", pin_memory=True)
