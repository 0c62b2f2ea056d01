"""The order of a model's channels: which order each weight has, how it is stored, and how a model is put into it.

The inputs of a projection may stand in any order, if whatever writes them stands in the same one. Blocks of four are
formed of neighbours, so another order is another choice of what competes. The model computes the same function.

``proxsparse.model.wiring`` finds what must move together, ``proxsparse.model.ordering`` chooses the order.
"""

import copy
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.model.wiring import Wiring
from proxsparse.record import atomic_path

# In folders of runs and of pruned checkpoints. No safetensors file: some programs read every one as weights.
ORDER_FILE = "channel_order.npz"
PERMUTE = ("none", "auto")
PERMUTE_HELP = (
    "auto: reorder channels first, so that fewer important weights share a block; the model computes the same "
    "function; none: keep the order"
)
DESCRIPTION, INDEX = "description", "index."  # names in that file
MARK = "_proxsparse_order"  # on a model whose channels have been moved
# In the configuration of such a model. Whoever saves the model saves it too, also where nobody writes ``ORDER_FILE``.
NOTE = "proxsparse_channel_order"


@dataclass(frozen=True)
class Move:
    """One dimension of a parameter that is reordered.

    Attributes:
        name: of the parameter in ``model.named_parameters()``.
        dim: of the parameter; of stacked experts, counted with the dimension of the experts.
        key: of the index in ``ChannelOrder.indices``.
    """

    name: str
    dim: int
    key: str


@dataclass
class ChannelOrder:
    """Another order of a model's channels, or only the digest of one, where nothing holds the order itself.

    Attributes:
        moves: what is reordered.
        indices: key -> (D,) int64: the old place of every new entry of a dimension; (E, D) for stacked experts.
        note: digest of an order that is not known here.
    """

    moves: list[Move] = field(default_factory=list)
    indices: dict[str, Tensor] = field(default_factory=dict)
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.moves or self.note)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelOrder):
            return NotImplemented
        return self.digest == other.digest

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's values in this order."""
        for move in self._by_name.get(name, ()):
            tensor = reordered(tensor, move.dim, self.indices[move.key])
        return tensor

    def inverse(self) -> "ChannelOrder":
        """The order that undoes this one, which must be known."""
        return ChannelOrder(self.moves[::-1], {key: index.argsort(-1) for key, index in self.indices.items()})

    def joined(self, other: "ChannelOrder") -> "ChannelOrder":
        """This order and another one of other dimensions."""
        return ChannelOrder(self.moves + other.moves, self.indices | other.indices)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Put the parameters of a model into this order, in place."""
        for name, parameter in model.named_parameters():
            if name in self._by_name:
                parameter.copy_(self.of(name, parameter.detach()))

    @cached_property
    def _by_name(self) -> dict[str, list[Move]]:
        found: dict[str, list[Move]] = {}
        for move in self.moves:
            found.setdefault(move.name, []).append(move)
        return found

    # As tensors and text, which is how files hold it

    def packed(self) -> dict[str, Tensor]:
        return {key: index.to(torch.int32) for key, index in self.indices.items()}

    def described(self) -> list[list[Any]]:
        return [[move.name, move.dim, move.key] for move in self.moves]

    @cached_property
    def digest(self) -> str:
        """What tells this order from others; empty where nothing is moved."""
        if not self.moves:
            return self.note
        found = hashlib.sha256(json.dumps(self.described()).encode())
        for key, index in sorted(self.packed().items()):
            found.update(key.encode() + index.numpy().tobytes())
        return found.hexdigest()[:16]

    @classmethod
    def unpacked(cls, moves: Any, tensors: Mapping[str, Tensor]) -> "ChannelOrder":
        """The inverse of ``packed`` and ``described``.

        Raises:
            ValueError: they are no order.
        """
        found = [Move(str(name), int(dim), str(key)) for name, dim, key in moves]
        indices = {key: tensor.to(torch.int64) for key, tensor in tensors.items()}
        if {move.key for move in found} != set(indices):
            raise ValueError("the moves and the indices of the channel order differ")
        for key, index in indices.items():
            if not torch.equal(index.sort(-1).values, torch.arange(index.shape[-1]).expand_as(index)):
                raise ValueError(f"the channel order {key} names channels twice")
        return cls(found, indices)


def reordered(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """A tensor with one dimension in another order; of stacked experts (index (E, D)), each in its own."""
    index = index.to(tensor.device)
    if index.dim() == 1:
        return tensor.index_select(dim, index)
    return torch.stack([own.index_select(dim - 1, places) for own, places in zip(tensor, index, strict=True)])


def order_of(model: PreTrainedModel) -> ChannelOrder:
    """The order that the channels of a model in memory stand in; perhaps only its digest."""
    return getattr(model, MARK, None) or ChannelOrder(note=getattr(model.config, NOTE, ""))


def put_into_order(model: PreTrainedModel, order: ChannelOrder) -> None:
    """Put the channels of a model into an order, once.

    Raises:
        UsageError: they are in another one, or the order belongs to a model with other weights.
    """
    recall_order(model, named=order)
    current = order_of(model)
    if current == order:
        return
    if current or not order.moves:
        raise UsageError(
            "The channels of the model stand in another order: give the model that the mask was made from.",
            "model",
        )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for move in order.moves:
        shape, index = shapes.get(move.name), order.indices[move.key]
        fits = shape is not None and len(shape) > move.dim and shape[move.dim] == index.shape[-1]
        if not fits or (index.dim() == 2 and shape is not None and shape[0] != len(index)):
            raise UsageError(f"The order of channels does not fit the model: {move.name} is {shape} there.", "mask")
    check_order(model, order)
    order.apply(model)
    mark(model, order)


def check_order(model: PreTrainedModel, order: ChannelOrder) -> None:
    """Refuse an order that was made for another model and would move some of what must move together.

    Args:
        model: it may be without values.

    Raises:
        UsageError: the model would not compute the same in this order.
    """
    moved = {(move.name, move.dim) for move in order.moves}
    groups = [group for own in Wiring(model).groups.values() for group in own] if moved else []
    for members in ([(member.name, member.dim) for member in group.members] for group in groups):
        left = [name for name, dim in members if (name, dim) not in moved]
        if left and len(left) < len(members):
            raise UsageError(
                f"The mask was made for another model: its order of channels leaves out {left[0]}, which this one has. "
                "Give the mask's own base model.",
                "mask",
            )


def mark(model: PreTrainedModel, order: ChannelOrder) -> None:
    """Remember that a model's channels have been put into an order."""
    setattr(model, MARK, order)
    if not order:
        vars(model.config).pop(NOTE, None)
    elif getattr(model.config, NOTE, "") != order.digest:
        shared, own = model.config, copy.copy(model.config)  # another model may share it, and is not moved
        setattr(own, NOTE, order.digest)
        for module in model.modules():
            if vars(module).get("config") is shared:
                module.config = own  # type: ignore[assignment]


def recall_order(model: PreTrainedModel, folder: Path | str | None = None, named: ChannelOrder | None = None) -> None:
    """Remember the order that a model stands in, where its folder has it or its configuration names it.

    Args:
        folder: the checkpoint's; None: the model's name, where that is a folder.
        named: an order that the configuration may name.
    """
    path = Path(folder or model.config._name_or_path or "") / ORDER_FILE
    current = order_of(model)
    if current.moves:
        return
    if path.is_file():
        found = load_order(path)
        if current and current != found:
            raise RunError(f"{path} is of another order of channels than its config.json names: get the model again.")
        mark(model, found)
    elif named and named.moves and current == named:
        mark(model, named)


def order_in(folder: Path, config: Mapping[str, Any]) -> ChannelOrder:
    """The order that the files of a checkpoint stand in; perhaps only its digest.

    Args:
        config: what config.json says.
    """
    return load_order(folder / ORDER_FILE) or ChannelOrder(note=str(config.get(NOTE, "")))


def save_order(order: ChannelOrder, path: Path, origin: Mapping[str, str] | None = None) -> None:
    """Write an order to a file of its own.

    Args:
        origin: what it was chosen for.
    """
    note = {"note": order.note} if order.note else {}
    described = np.array(json.dumps({"moves": order.described(), "origin": dict(origin or {})} | note))
    indices = {f"{INDEX}{key}": index.numpy() for key, index in order.packed().items()}
    with atomic_path(path) as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, **{DESCRIPTION: described}, **indices)  # type: ignore[arg-type]


def load_order(path: Path, origin: Mapping[str, str] | None = None) -> ChannelOrder:
    """Read an order; an empty one where there is no file.

    Args:
        origin: what it must have been chosen for; None: anything.

    Raises:
        UsageError: it was chosen for something else.
        RunError: the file is damaged.
    """
    if not path.is_file():
        return ChannelOrder()
    try:
        with np.load(path, allow_pickle=False) as file:
            described = json.loads(str(file[DESCRIPTION]))
            names = [name for name in file.files if name != DESCRIPTION]
            tensors = {name.removeprefix(INDEX): torch.from_numpy(file[name]) for name in names}
        order, found = ChannelOrder.unpacked(described["moves"], tensors), dict(described["origin"])
        order.note = str(described.get("note", ""))
    except (BadZipFile, EOFError, KeyError, NotImplementedError, TypeError, ValueError, zlib.error) as error:
        raise RunError(f"The file {path} is damaged ({error}): copy it again.") from error
    if origin is not None and found != dict(origin):
        what = "text" if found.get("model") == origin.get("model") else "model"
        raise UsageError(f"{path} was made for another {what}: give another `output_dir`, or delete it.")
    return order
