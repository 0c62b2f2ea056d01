"""Weights that wait in the host's memory while a GPU computes with others: room for them, and how they get there.

Memory that a GPU copies to and from by itself is pinned. torch rounds each block of it up to a power of two, which
costs up to twice the size for a block per weight; so weights lie behind one another in slabs that are powers of two.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

SLAB = 2**30  # bytes; a weight's room lies in one slab, so smaller slabs would leave more of their ends unused
ALIGNED = 64  # bytes


def pinned_rooms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pinned tensor for each weight, of its shape and dtype; the values are whatever was there.

    Args:
        weights: name -> a weight on an accelerator.
    """
    names = list(weights)
    sizes = [_aligned(weights[name].numel() * weights[name].element_size()) for name in names]
    rooms: dict[str, Tensor] = {}
    for first, last, size in _slabs(sizes):
        slab, start = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True), 0
        for name, room in zip(names[first:last], sizes[first:last], strict=True):
            weight = weights[name]
            flat = slab[start : start + weight.numel() * weight.element_size()].view(weight.dtype)
            rooms[name] = flat.view(weight.shape)
            start += room
    return rooms


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the host's memory that ``pinned_rooms`` takes for weights of these sizes in bytes."""
    return sum(size for _, _, size in _slabs([_aligned(size) for size in sizes]))


def _slabs(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(first weight, weight after the last, bytes) of each slab."""
    limit = max(SLAB, _power_of_two(max(sizes, default=1)))
    slabs, first, used = [], 0, 0
    for place, size in enumerate(sizes):
        if used + size > limit:
            slabs.append((first, place, limit))
            first, used = place, 0
        used += size
    return [*slabs, (first, len(sizes), _power_of_two(used))] if sizes else []


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


class Departures:
    """Copies to pinned memory on a stream of their own: the bus carries both directions at once.

    The device's own stream may overwrite a weight only after ``wait``; the host never waits.

    Args:
        device: where the weights are. One without streams copies in its only one.
    """

    def __init__(self, device: torch.device):
        module = torch.get_device_module(device)
        self._module = module if hasattr(module, "Stream") else None
        self._stream = self._module.Stream(device) if self._module else None
        self._left: dict[str, object] = {}

    def send(self, name: str, weight: Tensor, room: Tensor) -> None:
        """Copy a weight as what was queued before leaves it."""
        if self._module is None:
            room.copy_(weight)
            return
        assert self._stream is not None
        self._stream.wait_stream(self._module.current_stream(weight.device))
        with self._module.stream(self._stream):
            room.copy_(weight, non_blocking=True)
            self._left[name] = event = self._module.Event()
            event.record(self._stream)

    def wait(self, name: str, device: torch.device) -> None:
        """What is queued on the device from here on runs after the weight has left."""
        if event := self._left.pop(name, None):
            assert self._module is not None
            self._module.current_stream(device).wait_event(event)
