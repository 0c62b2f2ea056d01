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
from proxsparse.learning.transfers import Departures, pinned_rooms
from proxsparse.model.loading import parameter_readers
from proxsparse.model.prunable import Prunable
from proxsparse.model.sharding import reshard
from proxsparse.operator.masked import learned_mask, masked_product_, packed, unpacked
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

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
        rest = [target for target in targets if target.name not in self._read]
        rooms = {} if place == "device" else _host_rooms(rest)
        for target in rest:
            given = _narrow(target)
            self._kept[target.name] = rooms[target.name].copy_(given) if target.name in rooms else given.clone()
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
        return self._stored(target).to(target.stored, non_blocking=True)

    def put(self, target: Prunable) -> None:
        """Write W0 into the parameter."""
        # What is pinned never changes, so the host need not wait until it has been copied.
        target.stored.copy_(self._stored(target), non_blocking=True)

    def here(self, target: Prunable) -> Tensor | None:
        """W0 itself where it is kept on the weight's device in its dtype, to be read only; None: it is elsewhere."""
        kept, stored = self._kept.get(target.name), target.stored
        return kept if kept is not None and (kept.device, kept.dtype) == (stored.device, stored.dtype) else None

    def _stored(self, target: Prunable) -> Tensor:
        read = self._read.get(target.name)
        return read() if read else self._kept[target.name]


def _narrow(target: Prunable) -> Tensor:
    """A weight in the dtype to be kept: accelerate makes shards float32, which came from bfloat16 at half the size."""
    stored = target.stored
    if not isinstance(target.weight, DTensor) or stored.dtype != torch.float32:
        return stored
    low = stored.to(torch.bfloat16)
    return low if torch.equal(low.float(), stored) else stored


def _host_rooms(targets: list[Prunable]) -> dict[str, Tensor]:
    """Room on the CPU: pinned where an accelerator computes with weights of its own memory."""
    if not targets or targets[0].stored.device.type == "cpu":
        return {}
    # Only shapes and dtypes are read.
    return pinned_rooms({target.name: torch.empty_like(_narrow(target), device="meta") for target in targets})


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

    Nothing is copied where a parameter can be given other memory (``Tensor.data``): it holds the learned weight, W0
    itself, or room for the masked one. Shards and offloaded weights keep their memory, and values are copied. Offloaded
    weights cross the bus once per direction and turn (a step has one, and layer-wise steps another): what put_masked
    needs of them, the mask, stays behind; and those that step in the backward pass stay where they stepped.

    Args:
        model: the model whose weights they are.
        targets: the prunable weights.
        original: their W0.
        norms: name -> (I,) norms that turn a weight into its score, or None for plain magnitudes.
        offload: learned weights wait on the CPU.
        masked: ``put_masked`` will be called while they wait.
        pattern: of the mask.
        exchange: give parameters other memory where that is possible; compiled code may remember where they lay.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Prunable],
        original: OriginalWeights,
        norms: dict[str, Tensor] | None,
        offload: bool = False,
        masked: bool = True,
        pattern: Pattern = TWO_OF_FOUR,
        exchange: bool = True,
    ):
        self.model = model
        self.targets = targets
        self.original = original
        self.norms = norms
        self.pattern = pattern
        device = targets[0].stored.device
        self._departures = Departures(device) if offload and device.type != "cpu" else None
        self._keeps_masks = masked and self._departures is not None
        sharded = any(isinstance(target.weight, DTensor) for target in targets)
        self._exchange = exchange and self._departures is None and not sharded
        self._learned: dict[str, Tensor] = {}
        self._rooms: dict[str, Tensor] = {}  # where parameters are given other memory: for what is not kept elsewhere
        self._masks: dict[str, Tensor] = {}  # of offloaded weights, a bit per entry
        self._waiting: set[str] = set()  # whose parameter holds something else than its learned weight
        self._holds_original = False

    @staticmethod
    def on_device(offload: bool, on_cpu: bool) -> bool:
        """Whether learned weights that wait take memory of the device; ``on_cpu``: the device is the CPU."""
        return on_cpu or not offload

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Learned weights wait inside the block, and are back after it; what parameters hold is to be put there."""
        reshard(self.model)
        if not self._learned and not self._exchange:
            stored = {target.name: target.stored for target in self.targets}
            offloaded = self._departures is not None
            self._learned = pinned_rooms(stored) if offloaded else {n: torch.empty_like(w) for n, w in stored.items()}
        for target in self.targets:
            self._leave(target)
        try:
            yield
        finally:
            self.put_learned()

    def put_masked(self) -> None:
        """Parameters hold W0 under the mask of the learned scores from here on."""
        self._free()
        self._waiting = set(self._learned)  # before anything can fail
        for target in self.targets:
            if not self._holds_original:
                self._arrive(target)
            base = target.stored if self._holds_original else self.original.of(target)
            out = self._room(target)
            if self._keeps_masks:
                kept = unpacked(self._masks[target.name], target.rows(out))
                torch.mul(target.rows(base), kept, out=target.rows(out))
            else:
                learned = self._learned[target.name].to(out.device)
                rows = target.rows(out), target.rows(base), target.rows(learned)
                masked_product_(*rows, self.pattern, self._scale(target))
        self._holds_original = False

    def put_original(self) -> None:
        """Parameters hold W0 from here on."""
        self._free()
        self._waiting = set(self._learned)
        for target in self.targets:
            self._arrive(target)
            base = self.original.here(target) if self._exchange else None
            if base is None:
                self._room(target)
                self.original.put(target)
            else:
                target.weight.data = base
        self._holds_original = True

    def put_learned(self) -> None:
        """Parameters hold the learned weights from here on."""
        self._free()
        for target in self.targets:
            if target.name in self._waiting:
                self._arrive(target)
                self._put_back(target)
        self._holds_original = False
        self._waiting.clear()

    @contextlib.contextmanager
    def learned(self, parameter: nn.Parameter) -> Iterator[None]:
        """Once the backward pass is through with a parameter: it holds its learned weight from here on, to be moved."""
        target = next((t for t in self.targets if t.weight is parameter), None)
        if target is not None:
            self.put_learned_of(target)
        yield

    def put_learned_of(self, target: Prunable) -> None:
        """One parameter holds its learned weight from here on."""
        if target.name in self._waiting:
            self._put_back(target)
            self._waiting.discard(target.name)

    def _put_back(self, target: Prunable) -> None:
        if self._exchange:
            target.weight.data = self._learned[target.name]
        else:
            target.stored.copy_(self._learned[target.name], non_blocking=True)

    def _room(self, target: Prunable) -> Tensor:
        """Memory that the parameter holds from here on, to write into; W0 and the learned weight lie elsewhere."""
        if self._exchange:
            if target.name not in self._rooms:
                self._rooms[target.name] = torch.empty_like(target.stored)
            target.weight.data = self._rooms[target.name]
        return target.stored

    def _leave(self, target: Prunable) -> None:
        weight = target.stored
        if self._keeps_masks:
            self._masks[target.name] = packed(learned_mask(target.rows(weight), self.pattern, self._scale(target)))
        if self._exchange:
            self._learned[target.name] = weight
        elif self._departures is None:
            self._learned[target.name].copy_(weight)
        else:
            self._departures.send(target.name, weight, self._learned[target.name])

    def _arrive(self, target: Prunable) -> None:
        """The parameter may be overwritten: what was in it has left."""
        if self._departures is not None:
            self._departures.wait(target.name, target.stored.device)

    def _scale(self, target: Prunable) -> Tensor | None:
        return None if self.norms is None else self.norms[target.name]

    def _free(self) -> None:
        """Nothing computes with what the parameters hold any more."""
        reshard(self.model)
        # FSDP2 queues its copies of offloaded shards to the device and does not wait for them.
        if any(t.stored.device.type == "cpu" and computed_on(t.weight) != "cpu" for t in self.targets[:1]):
            torch.accelerator.synchronize()


def computed_on(weight: Tensor) -> str:
    """Type of the device that computes with a weight; an offloaded shard lies elsewhere."""
    return weight.device_mesh.device_type if isinstance(weight, DTensor) else weight.device.type
