"""How the tensors of a checkpoint become a model's parameters, as transformers decides while it loads: both ways.

Many architectures are stored under other names than the model has, and some in other pieces: the experts of a mixture
model one by one on disk and stacked in memory, or two projections fused. transformers describes this by rules
(``transformers.conversion_mapping``), which are followed here for one piece at a time: a ``Group`` is a set of stored
tensors that become a set of parameters together.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from proxsparse.errors import RunError
from proxsparse.model.checkpoint import Stored

Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass
class Group:
    """Stored tensors that become parameters together.

    Attributes:
        shapes: name in the files -> shape.
        convert: tensors by name in the files -> parameters by name, as the loader makes them.
        renamed: whether it is one tensor that only has another name, or the same.
    """

    shapes: dict[str, tuple[int, ...]]
    convert: Convert
    renamed: bool

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name of every parameter -> its shape."""
        empty = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.convert(empty).items()}

    def stored(self, values: Mapping[str, Tensor], missing: float | bool) -> dict[str, Tensor]:
        """Values of the parameters, as the tensors of the files hold them: the inverse of ``convert``.

        Every entry of the stored tensors is numbered, and the numbers go through ``convert``: where a number ends up,
        the entry's value is.

        Args:
            values: parameter -> tensor of its shape; missing ones are filled with ``missing``.

        Raises:
            RunError: loading computes with the entries instead of moving them.
        """
        first = next(iter(values.values()))
        if self.renamed:
            return {next(iter(self.shapes)): first}
        total = sum(prod(shape) for shape in self.shapes.values())
        flat = torch.full((total,), missing, dtype=first.dtype)
        for name, places in self._numbered().items():
            if name in values:
                flat[places.flatten()] = values[name].flatten().to(flat.dtype)
        parts = flat.split([prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _numbered(self) -> dict[str, Tensor]:
        """Parameter -> for each of its entries, the number of the stored entry that it is."""
        numbers, start = {}, 0
        for name, shape in self.shapes.items():
            numbers[name] = torch.arange(start, start + prod(shape)).view(shape)
            start += prod(shape)
        found = self.convert(numbers)
        seen = torch.zeros(start, dtype=torch.bool)
        for places in found.values():
            if places.dtype != torch.int64 or places.min() < 0 or places.max() >= start:
                break
            seen[places.flatten()] = True
        if int(seen.sum()) != sum(places.numel() for places in found.values()):
            raise RunError(
                f"Loading changes the values of {next(iter(self.shapes))}, so its file can't be written again as it is."
            )
        return found


class Layout:
    """The groups of a checkpoint.

    Args:
        tensors: name in the files -> tensor.
        model: a model of the checkpoint's class and configuration; it may have no values (device meta).
    """

    def __init__(self, tensors: Mapping[str, Stored], model: PreTrainedModel):
        self.tensors = tensors
        self.groups = _groups({name: stored.shape for name, stored in tensors.items()}, model)
        self.of_stored = {name: group for group in self.groups for name in group.shapes}

    @cached_property
    def of_parameter(self) -> dict[str, Group]:
        return {name: group for group in self.groups for name in group.parameters}

    def read(self, group: Group) -> dict[str, Tensor]:
        """Parameter -> its value in the files."""
        return group.convert({name: self.tensors[name].read() for name in group.shapes})

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """Parameter -> a function that reads it."""

        def reading(name: str, group: Group) -> Callable[[], Tensor]:
            return lambda: self.read(group)[name]

        return {name: reading(name, group) for name, group in self.of_parameter.items()}


def _groups(shapes: dict[str, tuple[int, ...]], model: PreTrainedModel) -> list[Group]:
    """The same decisions as transformers' ``convert_and_load_state_dict_in_model`` makes, name by name."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = model.state_dict()
    prefix = model.base_model_prefix
    members: dict[str, list[tuple[str, str]]] = {}  # first parameter -> (name in the files, pattern that it matched)
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if renamed in known:  # others are of parts that this model's class lacks, as a vision tower
            members.setdefault(renamed, []).append((name, pattern or ""))
    found = []
    for parameter, parts in members.items():
        names = {name: shapes[name] for name, _ in parts}
        rule = of_pattern.get(parts[0][1])
        if rule is None:
            # Two files may hold the same parameter under two names; transformers takes the first.
            first = next(iter(names))
            found.append(Group({first: names[first]}, _renaming(first, parameter), True))
        else:
            found.append(Group(names, _conversion(rule, parameter, parts, model), False))
    return found


def _renaming(name: str, parameter: str) -> Convert:
    return lambda tensors: {parameter: tensors[name]}


def _conversion(rule: WeightConverter, parameter: str, parts: list[tuple[str, str]], model: PreTrainedModel) -> Convert:
    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        once = deepcopy(rule)
        for name, pattern in parts:
            once.add_tensor(parameter, name, pattern, tensors[name])  # type: ignore[arg-type]  # as when it saves
        found = once.convert(parameter, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}

    return convert
