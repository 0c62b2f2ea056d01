"""The original weights W0 during learning: kept on the device, on the CPU, or left in the checkpoint's files."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from proxsparse.errors import UsageError
from proxsparse.model.loading import parameter_readers
from proxsparse.model.prunable import Prunable

logger = logging.getLogger(__name__)
PLACES = ("device", "cpu", "checkpoint")


class OriginalWeights:
    """W0 of every prunable weight; under FSDP2, the shard stored in this process.

    Args:
        targets: the prunable weights; their values now are W0.
        place: device; cpu (one weight at a time is brought over); or checkpoint (no copy: one weight at a time is read
            again from the files it came from).
        model: name or folder of the checkpoint.
        revision: of a Hub model.

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
                self._kept[target.name] = copy_of(target.stored, on_cpu=place != "device")
        if place == "checkpoint" and self._kept:
            # Weights that were changed after loading.
            logger.warning(
                "%d of %d original weights are not in the files of %s as the model has them, the first is %s: "
                "they are kept on the CPU",
                len(self._kept), len(targets), model, next(iter(self._kept)),
            )  # fmt: skip

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


def copy_of(weight: Tensor, on_cpu: bool) -> Tensor:
    """A copy of a weight on its device, or on the CPU."""
    return weight.detach().to("cpu", copy=True) if on_cpu else weight.detach().clone()
