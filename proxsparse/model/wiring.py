"""Which channels of a model must stand in the same order: what writes them, and what reads them.

Three kinds of channels can be reordered for free, because a reader's inputs and a writer's outputs move together:

    mlp       inputs of the last projection of an MLP, with the outputs of the first ones; each expert its own
    heads     inputs of the attention's output projection inside a key-value head, with the outputs of the values
    residual  the residual stream: embeddings, norms, what reads it and what writes it, one order for the whole model

Roles come from classes, names and shapes. A guess may be wrong, so that ``proxsparse.model.ordering`` checks every
order on the model itself. What is not understood here keeps its order.
Shapes: H = hidden size; I = width of an MLP; n = channels that change places; E = experts.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from proxsparse.model.linears import SECOND, is_plain
from proxsparse.model.prunable import Prunable, decoder_blocks, find_prunable

ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
OUTPUT = re.compile(r"^(o_proj|out_proj|dense|c_proj|wo|proj_out)$")
VALUE = re.compile(r"^(v_proj|value|wv)$")
FUSED = re.compile(r"^(qkv_proj|query_key_value|c_attn|Wqkv)$")
BY_HEAD = "query_key_value"  # a head's query, key and value stand one after another


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter that moves with a group.

    Attributes:
        name: of the parameter.
        dim: of the parameter.
        places: (copies, n) where the group's channels stand in that dimension.
    """

    name: str
    dim: int
    places: Tensor


@dataclass
class Group:
    """Channels that stand in one order wherever they are.

    Attributes:
        size: n.
        members: all that moves.
        readers: prunable weights whose blocks the order forms, with their places (copies, n).
        experts: E where every expert has an order of its own, else 0.
    """

    size: int
    members: list[Member] = field(default_factory=list)
    readers: list[tuple[Prunable, Tensor]] = field(default_factory=list)
    experts: int = 0


class Wiring:
    """The groups of a model, by kind.

    Args:
        model: of any decoder architecture; it may be without values.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.hidden = int(cast(Tensor, model.get_input_embeddings().weight).shape[1])
        self.targets = {t.name: t for t in find_prunable(model, multiple=1)}
        self.modules = dict(model.named_modules())
        self.own_names = {module: path.rpartition(".")[2] for path, module in self.modules.items()}
        self.reading: dict[str, int] = {}  # parameter -> dimension along which it reads the residual stream
        self.writing: dict[str, int] = {}  # ... writes it
        self.groups: dict[str, list[Group]] = {"mlp": [], "heads": [], "residual": []}
        for layer in decoder_blocks(model):
            self._layer(layer)
        residual = self._residual()
        self.groups["residual"] = [residual] if residual else []

    def _layer(self, layer: nn.Module) -> None:
        for module in layer.modules():
            attention = bool(ATTENTION.search(self.own_names[module]) or ATTENTION.search(type(module).__name__))
            linears = {n: m for n, m in module.named_children() if is_plain(m) and self._target(m) is not None}
            if attention and linears:
                self._attention(module, linears)
            elif linears:
                self._mlp(module, linears)
            self._experts(module)

    def _target(self, module: nn.Module) -> Prunable | None:
        return self.targets.get(self.names.get(id(getattr(module, "weight", None)), ""))

    # MLPs

    def _mlp(self, module: nn.Module, linears: dict[str, nn.Module]) -> None:
        shapes = {name: _in_out(linear) for name, linear in linears.items()}
        lasts = [name for name, (_, outputs) in shapes.items() if outputs == self.hidden]
        firsts = [name for name in shapes if name not in lasts]
        if len(lasts) != 1 or not firsts:
            return
        width = shapes[lasts[0]][0]
        if any(shapes[name][0] != self.hidden or shapes[name][1] not in (width, 2 * width) for name in firsts):
            return
        last = linears[lasts[0]]
        group = Group(width)
        for name in firsts:
            first = linears[name]
            group.members += self._outputs(first, _halves(shapes[name][1], width, _interleaved(module)))
            self._reads(first)
        inner = (m for m in module.children() if not is_plain(m))
        group.members += [
            Member(self.names[id(p)], 0, torch.arange(width)[None])
            for m in inner
            for p in m.parameters()
            if p.shape == (width,) and id(p) in self.names
        ]  # a norm between the projections
        self._add("mlp", group, last, torch.arange(width)[None])
        self._writes(last)

    def _experts(self, module: nn.Module) -> None:
        """Stacked experts: (E, I, O) or (E, O, I)."""
        own = {n: self.targets.get(self.names[id(p)]) for n, p in module.named_parameters(recurse=False)}
        stacks = {n: t for n, t in own.items() if t is not None and t.weight.dim() == 3}
        lasts = [name for name in stacks if SECOND.search(name)]
        if len(lasts) != 1 or len(stacks) < 2:
            return
        last = stacks.pop(lasts[0])
        count, width = last.weight.shape[0], last.weight.shape[last.in_dim]
        if any(first.weight.shape[0] != count for first in stacks.values()):
            return  # some experts have one of the weights only
        group = Group(width, experts=count)
        for name, first in stacks.items():
            out_dim, places = 3 - first.in_dim, first.weight.shape[3 - first.in_dim]
            if places not in (width, 2 * width):
                return
            halves = _halves(places, width, _interleaved(module))
            group.members.append(Member(first.name, out_dim, halves))
            bias = getattr(module, f"{name}_bias", None)
            if bias is not None:
                group.members.append(Member(self.names[id(bias)], 1, halves))
            self.reading[first.name] = first.in_dim
        group.members.append(Member(last.name, last.in_dim, torch.arange(width)[None]))
        group.readers.append((last, torch.arange(width)[None]))
        if width % 4 == 0:
            self.groups["mlp"].append(group)
        self.writing[last.name] = 3 - last.in_dim
        bias = getattr(module, f"{lasts[0]}_bias", None)
        if bias is not None:
            self.writing[self.names[id(bias)]] = 1

    # Attention

    def _attention(self, module: nn.Module, linears: dict[str, nn.Module]) -> None:
        last = next((m for name, m in linears.items() if OUTPUT.search(name) and _in_out(m)[1] == self.hidden), None)
        if last is None:
            return
        rest = {name: m for name, m in linears.items() if m is not last}
        if any(_in_out(m)[0] != self.hidden for m in rest.values()):
            return
        for linear in rest.values():
            self._reads(linear)
        self._writes(last)
        inputs = _in_out(last)[0]
        size = self._head_size(module, inputs)
        if not size or inputs % size or size % 4:
            return
        queries = inputs // size
        for kv, (value, start) in enumerate(found := self._values(rest, queries, size)):
            group = Group(size)
            own = torch.arange(size)
            group.members += self._outputs(value, (start + own)[None])
            copies = queries // len(found)
            places = torch.stack([(kv * copies + copy) * size + own for copy in range(copies)])
            self._add("heads", group, last, places)

    def _head_size(self, module: nn.Module, inputs: int) -> int:
        """0 where it is not known. Layers may have heads of different sizes, so the layer is asked first."""
        own = getattr(module, "head_dim", None)
        if isinstance(own, int):
            return own
        try:
            config = self.model.config.get_text_config()
            heads = getattr(config, "num_attention_heads", None)
            return getattr(config, "head_dim", None) or (inputs // heads if heads else 0)
        except RuntimeError:  # transformers, of a setting that differs from layer to layer
            return 0

    def _values(self, linears: dict[str, nn.Module], queries: int, size: int) -> list[tuple[nn.Module, int]]:
        """For every key-value head: the projection that writes its values, and their first row there."""
        for name, linear in linears.items():
            outputs = _in_out(linear)[1]
            if VALUE.search(name) and outputs % size == 0 and queries % (outputs // size) == 0:
                return [(linear, head * size) for head in range(outputs // size)]
            if FUSED.search(name):
                heads = (outputs // size - queries) // 2
                if heads < 1 or (queries + 2 * heads) * size != outputs or queries % heads:
                    return []
                if name == BY_HEAD:
                    return [(linear, (3 * head + 2) * size) for head in range(heads)] if heads == queries else []
                return [(linear, (queries + heads + head) * size) for head in range(heads)]
        return []

    # The residual stream

    def _residual(self) -> Group | None:
        """One group of the whole model; None where a weight is not understood."""
        group = Group(self.hidden)
        own = torch.arange(self.hidden)[None]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        outside = {id(m.weight): 1 for m in (embedding, head) if m is not None}
        for module in self.modules.values():
            for attribute, parameter in module.named_parameters(recurse=False):
                name = self.names.pop(id(parameter), None)  # shared ones once
                if name is None or self.hidden not in parameter.shape:
                    continue
                dim = self._residual_dim(name, module, attribute, parameter, outside)
                if dim is None:
                    return None
                if dim >= 0:
                    group.members.append(Member(name, dim, own))
        group.readers = [(t, own) for n, t in self.targets.items() if n in self.reading]
        unknown = [name for name in self.targets if name not in self.reading and name not in self.writing]
        return group if group.readers and not unknown and self.hidden % 4 == 0 else None

    def _residual_dim(
        self, name: str, module: nn.Module, attribute: str, parameter: Tensor, outside: dict[int, int]
    ) -> int | None:
        """Which dimension of a parameter is the residual stream: -1 for none, None where that is not clear."""
        known = self.reading.get(name, self.writing.get(name, outside.get(id(parameter))))
        if known is not None:
            return known
        inside = any(ATTENTION.search(part) for part in name.split(".")[-3:-2])
        if parameter.dim() == 1:
            written = f"{name.rpartition('.')[0]}.weight" in self.writing and attribute == "bias"
            read = f"{name.rpartition('.')[0]}.weight" in self.reading
            if written:
                return 0
            if read or (inside and "Norm" in type(module).__name__):
                return -1  # a bias of what comes out; a norm of queries or keys
            return 0 if "Norm" in type(module).__name__ else None
        if isinstance(module, nn.Embedding):
            return 1
        router = isinstance(module, nn.Linear) or "Router" in type(module).__name__ or "Gate" in type(module).__name__
        return 1 if router and parameter.dim() == 2 and parameter.shape[1] == self.hidden else None

    # What members are made of

    def _outputs(self, linear: nn.Module, places: Tensor) -> Iterator[Member]:
        dim = 1 if isinstance(linear, Conv1D) else 0
        yield Member(self.names[id(linear.weight)], dim, places)
        bias = getattr(linear, "bias", None)
        if bias is not None:
            yield Member(self.names[id(bias)], 0, places)

    def _add(self, kind: str, group: Group, last: nn.Module, places: Tensor) -> None:
        target = self._target(last)
        if target is None or group.size % 4:
            return
        group.members.append(Member(target.name, target.in_dim, places))
        group.readers.append((target, places))
        self.groups[kind].append(group)

    def _reads(self, linear: nn.Module) -> None:
        target = self._target(linear)
        if target is not None:
            self.reading[target.name] = target.in_dim

    def _writes(self, linear: nn.Module) -> None:
        target = self._target(linear)
        if target is not None:
            self.writing[target.name] = 1 - target.in_dim


def _in_out(linear: nn.Module) -> tuple[int, int]:
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(linear, Conv1D) else (int(columns), int(rows))


def _halves(outputs: int, width: int, interleaved: bool) -> Tensor:
    """(copies, width) places of an MLP's channels in the outputs of its first projection, gate and value or one."""
    if outputs == width:
        return torch.arange(width)[None]
    return torch.arange(outputs).view(width, 2).T if interleaved else torch.arange(outputs).view(2, width)


def _interleaved(module: nn.Module) -> bool:
    """Whether gate and value take turns in the outputs of a fused projection, as gpt-oss has them."""
    try:
        return "::2" in inspect.getsource(type(module))
    except (OSError, TypeError):
        return False
