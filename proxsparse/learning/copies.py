"""The copies of a model's weights that take turns in its parameters: original, masked and learned.

While the model computes, each pruned parameter holds W0 * mask(W); before the optimizer step it holds the learned W
again. The gradient that reaches W is the one of the masked weight, dropped entries included (straight-through):
an entry that the loss wants larger in W0's direction grows until it is kept, one it wants gone shrinks.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from proxsparse.errors import UsageError
from proxsparse.model.loading import parameter_readers
from proxsparse.model.prunable import Prunable
from proxsparse.model.sharding import reshard
from proxsparse.operator.prox import top2_product_

logger = logging.getLogger(__name__)
PLACES = ("device", "cpu", "checkpoint")


class OriginalWeights:
    """W0 of every prunable weight; under FSDP2, the shard stored in this process.

    Args:
        targets: the prunable weights; their values now are W0.
        place: device; cpu (one weight at a time is brought over); or checkpoint (no copy: one weight at a time is read
            again from the files it came from).
        model: name or folder of the checkpoint.
        revision: revision of a Hub model.

    Raises:
        UsageError: the checkpoint has no safetensors files here.
    """

    def __init__(self, targets: list[Prunable], place: str, model: str = "", revision: str | None = None):
        self._kept: dict[str, Tensor] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        readers = _readers(model, revision) if place == "checkpoint" else {}
        for target in targets:
            read = readers.get(target.name)
            if read is not None and torch.equal(read().to(target.stored), target.stored):
                self._read[target.name] = read
            else:
                kept = target.stored.clone() if place == "device" else target.stored.to("cpu", copy=True)
                self._kept[target.name] = kept
        if place == "checkpoint" and self._kept:
            # Stacked experts, which the files hold one by one; weights that were changed after loading.
            logger.warning(
                "%d of %d original weights are not in the files of %s as the model has them, the first is %s: "
                "they are kept on the CPU",
                len(self._kept), len(targets), model, next(iter(self._kept)),
            )  # fmt: skip

    @staticmethod
    def on_device(place: str, on_cpu: bool) -> bool:
        """Whether W0 takes memory of the device; ``on_cpu``: the device is the CPU."""
        return place == "device" or (place == "cpu" and on_cpu)

    def of(self, target: Prunable) -> Tensor:
        """W0 of one weight, on its device and in its dtype."""
        read = self._read.get(target.name)
        return (read() if read else self._kept[target.name]).to(target.stored)


def _readers(model: str, revision: str | None) -> dict[str, Callable[[], Tensor]]:
    found = parameter_readers(model, revision) if model else None
    if found is None:
        raise UsageError(
            f"`keep_base=checkpoint` reads the original weights from safetensors files, and {model or 'the model'} has "
            "none here; use `keep_base=cpu`."
        )
    return found


class TakingTurns:
    """The parameters of a model, which hold the learned weights, the original ones or the masked ones.

        with turns.away():
            turns.put_masked()
            ...  # compute with them

    Args:
        model: the model whose weights they are.
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

    @staticmethod
    def on_device(offload: bool, on_cpu: bool) -> bool:
        """Whether learned weights that wait take memory of the device; ``on_cpu``: the device is the CPU."""
        return on_cpu or not offload

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
        self._free()
        for target in self.targets:
            out = target.stored
            learned = self._learned[target.name].to(out.device)
            scale = None if self.norms is None else self.norms[target.name]
            base = self.original.of(target)
            top2_product_(target.rows(out), target.rows(base), target.rows(learned), scale)

    def put_original(self) -> None:
        """Parameters hold W0 from here on."""
        self._free()
        for target in self.targets:
            target.stored.copy_(self.original.of(target))

    def put_learned(self) -> None:
        """Parameters hold the learned weights from here on."""
        self._free()
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

    def _free(self) -> None:
        """Nothing computes with what the parameters hold any more."""
        reshard(self.model)
        # FSDP2 queues its copies of offloaded shards to the device and does not wait for them.
        if any(t.stored.device.type == "cpu" and computed_on(t.weight) != "cpu" for t in self.targets[:1]):
            torch.accelerator.synchronize()

    def _buffer(self, weight: Tensor) -> Tensor:
        """Room for a learned weight: pinned where it is copied to and from an accelerator."""
        if not self.offload or weight.device.type == "cpu":
            return torch.empty_like(weight)
        return torch.empty_like(weight, device="cpu", pin_memory=True)


def computed_on(weight: Tensor) -> str:
    """Type of the device that computes with a weight; an offloaded shard lies elsewhere."""
    return weight.device_mesh.device_type if isinstance(weight, DTensor) else weight.device.type
