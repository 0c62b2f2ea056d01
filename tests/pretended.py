"""A pretended GPU under a CPU build of torch, so that what is written for GPUs runs in every test.

Its tensors say that they are on cuda:0, and hold a CPU tensor. Every operation is checked as a GPU would check it:
tensors of two devices may not meet, ``numpy`` is refused, generators belong to a device. And it is counted, together
with the line of proxsparse that asked for it: waits of the host for the device, copies between them, launches, bytes.

    with pretended.Card() as card:
        model.to("cuda")
        ...
    card.waits["item", "learning/trainer.py:150"]

To C++ the tensors say "meta": no guard of that device is missing in a CPU build, and autograd runs its backward pass in
the thread that asks for it. So autocast casts nothing, and attention has no fused kernel; speed is not to be seen here.
Triton's kernels run in its interpreter.
"""

import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended_tensors import CARD, OnCard, Translation, WrongDevice
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

aten = torch.ops.aten
PACKAGE = "/proxsparse/"
# What waits for the device, because the host needs an answer.
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "nonzero",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Operators without a kernel for CUDA.
ON_THE_CPU_ONLY = {aten.histogram.bins_tensor, aten.histogram.bin_ct}
VIEWS = ("view", "_unsafe_view", "expand", "t.", "transpose", "permute", "detach", "slice", "select", "unsqueeze",
         "squeeze", "as_strided", "alias", "split", "unbind", "diagonal", "unfold", "lift",
         "_reshape_alias")  # fmt: skip


class Counts:
    """What was asked of the card. Keys of the counters: (what, place in proxsparse)."""

    def __init__(self) -> None:
        self.waits: Counter = Counter()
        self.copies: Counter = Counter()  # (to_card or to_host, place) -> times
        self.bytes: Counter = Counter()  # the same -> bytes
        self.launches: Counter = Counter()
        self.faults: list[str] = []
        self.largest = 0  # bytes of the largest tensor that was made on the card

    def total_bytes(self, direction: str) -> int:
        return sum(size for (way, _), size in self.bytes.items() if way == direction)


class Card(TorchDispatchMode):
    """The card, which is there inside the block; see the module's docstring.

    Args:
        native_bf16: whether it multiplies bfloat16 by itself, as GPUs since Ampere do.
        memory: bytes of it.
    """

    def __init__(self, native_bf16: bool = True, memory: int = 80 << 30):
        super().__init__()
        self.native_bf16, self.memory = native_bf16, memory
        self.count = Counts()
        self._pinned: dict[int, Any] = {}  # address -> storage, kept so that the address stays its own
        self._patches = pytest.MonkeyPatch()
        self._translation = Translation()

    def __enter__(self):
        from pretended_surroundings import patch

        patch(self._patches, self)
        OnCard.card = self
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes CPU tensors and then copies them, seen
        self._translation.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._translation.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        OnCard.card = None
        self._patches.undo()
        from pretended_surroundings import forget

        forget()

    def fresh(self) -> Counts:
        """Counts from here on."""
        self.count = Counts()
        return self.count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, types, args, kwargs or {})

    # What is asked of the card

    def _wants_meta(self, leaves: list, here: list) -> bool:
        """Whether "meta" means torch's meta device, and is not what C++ calls the card."""
        others = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves)
        return not here and (others or self._translation.means_meta)

    def run(self, func, types, args: tuple, kwargs: dict):
        """One operator, on whichever tensors."""
        if any(issubclass(kind, torch.sparse.SparseSemiStructuredTensor) for kind in types):
            return NotImplemented  # its own lines ask for operators that are seen here
        leaves = tree_leaves((args, kwargs))
        here = [leaf for leaf in leaves if isinstance(leaf, OnCard)]
        device, asked = kwargs.get("device"), False
        if device is not None:
            device = torch.device(device)
            asked = device.type == CARD.type or (device.type == "meta" and not self._wants_meta(leaves, here))
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return self._pin(args[0].clone())
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._to_copy.default:
            return self._to_copy(args[0], kwargs, asked or (device is None and bool(here)))
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False) if kwargs.get("pin_memory") else False
        if not (asked or (here and device is None)):
            if here and device is not None:  # a tensor like one on the card, but elsewhere
                args = tree_map_only(OnCard, lambda t: t.inner, args)
            out = func(*args, **kwargs)
            return self._pin(out) if pinned else out
        self._check(func, args, leaves, here)
        if func in WAITS:
            self.wait(WAITS[func])
        return self._compute(func, args, {**kwargs, "device": torch.device("cpu")} if asked else kwargs, here)

    def _compute(self, func, args, kwargs, here):
        from pretended_surroundings import EMULATED

        known: dict[int, OnCard] = {}

        def bare(value):
            if isinstance(value, OnCard):
                known[id(value.inner)] = value
                return value.inner
            return value

        args, kwargs = tree_map(bare, args), tree_map(bare, kwargs)
        with _disable_current_modes():
            out = EMULATED.get(str(func), func)(*args, **kwargs)
        result = tree_map_only(Tensor, lambda t: known.get(id(t)) if id(t) in known else OnCard(t), out)
        if not str(func).removeprefix("aten.").startswith(VIEWS):
            self.launch(str(func), [t for t in tree_leaves(result) if isinstance(t, OnCard)])
        return result

    def _check(self, func, args, leaves, here) -> None:
        """Refuse what a GPU would refuse."""
        generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
        if generator is not None and not getattr(generator, "on_card", False):
            raise self.fault(f"{func}: expected a 'cuda' device type for generator")
        if func in ON_THE_CPU_ONLY:
            raise self.fault(f"{func} has no kernel for CUDA")
        host = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnCard)]
        host = [leaf for leaf in host if leaf.layout == torch.strided]
        if func in INDEXING:
            indices = [i for i in tree_leaves(args[1]) if isinstance(i, Tensor)]
            if not isinstance(args[0], OnCard):
                raise self.fault(f"{func}: a CPU tensor is indexed by one on the card")
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("boolean index")
                if not isinstance(index, OnCard):
                    self._moved("to_card", index, pinned=False, non_blocking=False)
            host = [leaf for leaf in host if not any(leaf is index for index in indices)]
        if any(leaf.dim() for leaf in host) or (
            host and all(t.dim() == 0 for t in here) and func is aten.copy_.default
        ):
            shapes = [tuple(leaf.shape) for leaf in host]
            raise self.fault(f"{func} with tensors of shapes {shapes} on the CPU and {[tuple(t.shape) for t in here]}")

    # Copies

    def _to_copy(self, source, kwargs, to_card):
        options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        non_blocking, pinned = kwargs.get("non_blocking", False), bool(kwargs.get("pin_memory"))
        with _disable_current_modes():
            if not isinstance(source, OnCard):
                if not to_card:
                    out = aten._to_copy.default(source, device=kwargs.get("device"), **options)
                    return self._pin(out) if pinned else out
                self._moved("to_card", source, self.is_pinned(source), non_blocking)
                return OnCard(aten._to_copy.default(source, **options))
            out = aten._to_copy.default(source.inner, **options)
        if to_card:
            self.launch("aten._to_copy", [made := OnCard(out)])
            return made
        self._moved("to_host", source, pinned, non_blocking)
        return self._pin(out) if pinned else out

    def _copy(self, destination, source, non_blocking=False):
        bare = [t.inner if isinstance(t, OnCard) else t for t in (destination, source)]
        with _disable_current_modes():
            bare[0].copy_(bare[1])
        match isinstance(destination, OnCard), isinstance(source, OnCard):
            case True, True:
                self.launch("aten.copy_", [destination])
            case True, False:
                self._moved("to_card", source, self.is_pinned(source), non_blocking)
            case False, True:
                self._moved("to_host", source, self.is_pinned(destination), non_blocking)
        return destination

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, OnCard) and tensor.untyped_storage().data_ptr() in self._pinned

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    # Counting

    def _moved(self, direction: str, tensor: Tensor, pinned: bool, non_blocking: bool) -> None:
        key = direction, place()
        self.count.copies[key] += 1
        self.count.bytes[key] += tensor.numel() * tensor.element_size()
        if not (pinned and non_blocking):
            self.wait(f"copy {direction}")

    def wait(self, what: str) -> None:
        self.count.waits[what, place()] += 1

    def launch(self, name: str, made: list) -> None:
        self.count.launches[name, place()] += 1
        self.count.largest = max([self.count.largest, *(t.numel() * t.element_size() for t in made)])

    def fault(self, text: str) -> WrongDevice:
        text = f"Expected all tensors to be on the same device: {text}, at {place()}"
        self.count.faults.append(text)
        return WrongDevice(text)


def place() -> str:
    """The innermost line of proxsparse that is at work."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            return f"{name.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def launch_interpreted(real: Callable) -> Callable:
    """Triton's interpreter for tensors of the card: those of the host are refused, as a GPU's pointers are."""

    def call(executor, *args, **kwargs):
        card = OnCard.card
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if card is not None and any(isinstance(t, OnCard) for t in tensors):
            if not all(isinstance(t, OnCard) for t in tensors):
                raise card.fault("a Triton kernel was given a tensor on the CPU")
            card.launch(f"triton.{executor.fn.__name__}", [])
            args, kwargs = tree_map_only(OnCard, lambda t: t.inner, (args, kwargs))
        with _disable_current_modes():
            return real(executor, *args, **kwargs)

    return call
