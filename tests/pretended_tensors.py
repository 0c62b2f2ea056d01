"""Tensors of the pretended GPU (tests/pretended.py), and what says "meta" to C++ where Python says "cuda"."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CARD = torch.device("cuda:0")


class WrongDevice(RuntimeError):
    """What torch would raise on a GPU."""


class OnCard(Tensor):
    """A tensor on the card.

    Attributes:
        inner: the CPU tensor with its values.
        card: the ``pretended.Card`` that is there, or None.
    """

    inner: Tensor
    card: ClassVar[Any] = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False):
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta", requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if OnCard.card is None:
            raise WrongDevice(f"{func} on a tensor of a card that is no longer there")
        return OnCard.card.run(func, types, args, kwargs or {})

    @property
    def device(self):
        return CARD

    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def to(self, *args, **kwargs):
        """As torch's, which would find this tensor on another device than the card."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **_plain(kwargs))
        if device is not None and device.type == "meta":  # of another tensor of the card
            device = CARD
        moves = device is not None and device != CARD and device.type != CARD.type
        if moves or kwargs.get("copy"):
            return Tensor.to(
                self, device=device or CARD, dtype=dtype or self.dtype, non_blocking=non_blocking, copy=True
            )
        return self if dtype in (None, self.dtype) else Tensor.to(self, dtype=dtype)

    def cuda(self, *args, **kwargs):
        return self

    def numpy(self, *args, **kwargs):
        raise OnCard.card.fault("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)  # a file holds plain tensors

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = OnCard(self.inner.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = memo[id(self)] = torch.nn.Parameter(copied.detach(), self.requires_grad)
        return copied

    def __repr__(self, **options):
        return f"OnCard({self.inner!r})"


def _plain(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name != "copy"}


class Generator(torch.Generator):
    """A generator that knows for which device it was made."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_card = torch.device(device).type == CARD.type
        return made

    @property
    def device(self):
        return CARD if self.on_card else torch.device("cpu")


class Translation(TorchFunctionMode):
    """Says "meta" to C++ where Python says "cuda", which a CPU build can't do anything with.

    Attributes:
        means_meta: the call at work said "meta" by itself.
    """

    means_meta = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, before = kwargs or {}, self.means_meta
        if func in (torch.device, torch._C._nn._parse_to):  # which say it to Python
            return func(*args, **kwargs)
        if func is Tensor.cuda:
            func, args, kwargs = Tensor.to, (args[0], CARD), {}
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")).startswith(CARD.type):
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")  # C++ would drop the values
        said = [value for value in (*args, kwargs.get("device")) if isinstance(value, (torch.device, str))]
        try:
            if said:
                self.means_meta = any(str(value) == "meta" for value in said)
                args = tuple(self._translated(value) for value in args)
                kwargs = {name: self._translated(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)
        finally:
            self.means_meta = before

    @staticmethod
    def _translated(value):
        named = isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda"))
        return torch.device("meta") if named and torch.device(value).type == CARD.type else value
