"""The weights inside a decoder's layers: which are linear, where their inputs lie, and which must stay dense.

Nothing here runs the model. Roles come from classes, shapes and the model's own code, so that a model on the meta
device gives the same answer as a loaded one.
"""

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

FEWEST_OUTPUTS = 8  # smaller matrices are gates, and 2:4 kernels have no use for them

# Why a weight stays dense.
ROUTER = "router"
UNCALLED = "its inputs are never seen"
NARROW = f"fewer than {FEWEST_OUTPUTS} outputs"
CONVOLUTION = "convolution"
LAYOUT = "experts of an unknown layout"
OTHER = "no linear layer"

COUNT = re.compile(r"(^|_)(num|n|nb)_(\w+_)?experts$|^num_experts$")  # settings that are a number of experts
SECOND = re.compile(r"down|w2|output|out_proj|fc2|wo$")  # the projection of an expert that comes last
NAMED_ROUTER = re.compile(r"(^|[._])router([._]|$)")
ROUTING_CLASS = re.compile(r"Router|Top[kK]Gat(e|ing)")
GATE_CLASS = re.compile(r"Gate$")


@dataclass(frozen=True)
class Weight:
    """One matrix, or one stack of matrices, of a decoder layer.

    Attributes:
        module: the module that holds the parameter.
        attribute: name of the module's attribute that is the parameter.
        in_dim: dimension of the parameter that is the input; None where it is no linear weight.
        dense: why it must stay dense; None where it can be pruned.
    """

    module: nn.Module
    attribute: str
    in_dim: int | None
    dense: str | None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing more."""
    return isinstance(module, nn.Linear | Conv1D)


def expert_counts(model: PreTrainedModel) -> set[int]:
    """How many experts there may be in a layer: every number of experts in the configuration, and their sums."""
    config = model.config.get_text_config()
    owners = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    named = {k: v for owner in owners for k, v in vars(owner).items() if COUNT.search(k) and type(v) is int}
    mapped = {getattr(config, k, None) for k in getattr(config, "attribute_map", {}) if COUNT.search(k)}
    # DeepSeek's zero experts and Inkling's shared ones have a row in the router too.
    extra = {v for k, v in vars(config).items() if k in ("zero_expert_num", "n_shared_experts") and type(v) is int}
    counts = {n for n in (*named.values(), *mapped) if isinstance(n, int) and n > 1}
    return counts | {n + more for n in counts for more in extra}


def weights_of(layer: nn.Module, counts: set[int]) -> Iterator[Weight]:
    """Every parameter of a layer that is a matrix or a stack of matrices, except embeddings, norms and biases.

    Args:
        counts: the result of ``expert_counts``.
    """
    modules = dict(layer.named_modules())
    for path, module in modules.items():
        parent_path, _, name = path.rpartition(".")
        parent = modules[parent_path] if path else None
        layout = expert_layout(module) if is_stack(path, module, counts) else {}
        for attribute, parameter in module.named_parameters(recurse=False):
            if _is_vector(parameter) or _is_no_product(module, attribute):
                continue
            if attribute in layout:
                in_dim = layout[attribute]
                yield Weight(module, attribute, in_dim, LAYOUT if in_dim is None else _too_narrow(parameter, in_dim))
            elif isinstance(module, nn.modules.conv._ConvNd):
                yield Weight(module, attribute, None, CONVOLUTION)
            elif is_router(path, module, parent, parameter, counts):
                yield Weight(module, attribute, 0 if isinstance(module, Conv1D) else 1, ROUTER)
            elif attribute == "weight" and isinstance(module, nn.Linear | Conv1D):
                in_dim = 0 if isinstance(module, Conv1D) else 1
                called = parent is None or not only_read(type(parent), name)
                yield Weight(module, attribute, in_dim, _too_narrow(parameter, in_dim) if called else UNCALLED)
            else:
                yield Weight(module, attribute, None, OTHER)


def _is_vector(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) < 2


def _is_no_product(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter is looked up, added or multiplied by entries: embeddings, biases, norms."""
    kind = type(module).__name__
    return isinstance(module, nn.Embedding) or "Norm" in kind or "Embedding" in kind or "bias" in attribute.lower()


def _too_narrow(parameter: Tensor, in_dim: int) -> str | None:
    return NARROW if parameter.numel() // parameter.shape[in_dim] < FEWEST_OUTPUTS else None


def is_router(path: str, module: nn.Module, parent: nn.Module | None, parameter: Tensor, counts: set[int]) -> bool:
    """Whether a matrix chooses experts: its class or name says so, or it has a row per expert next to the experts."""
    if parameter.dim() != 2:
        return False
    owners = [type(owner).__name__ for owner in (module, parent) if owner is not None]
    if NAMED_ROUTER.search(path) or re.search(r"(^|[._])router_", path) or any(map(ROUTING_CLASS.search, owners)):
        return True
    outputs = parameter.shape[1] if isinstance(module, Conv1D) else parameter.shape[0]
    rows = set(counts)
    neighbours = list(parent.children()) if parent is not None else []
    lists = [m for m in neighbours if isinstance(m, nn.ModuleList) and len(m) > 1]
    beside_experts = bool(lists) or any("Expert" in type(m).__name__ for m in neighbours)
    rows |= {len(experts) for experts in lists}
    gate_class = any(map(GATE_CLASS.search, owners))
    gate_name = path.rpartition(".")[2] in ("gate", "wg", "classifier")
    return outputs in rows and (beside_experts or gate_class or gate_name)


def is_stack(path: str, module: nn.Module, counts: set[int]) -> bool:
    """Whether a module holds the weights of several experts in one parameter."""
    if isinstance(module, nn.Linear | Conv1D | nn.ModuleList | nn.ModuleDict | nn.Embedding):
        return False
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # set by transformers on expert modules
        return True
    own = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    number = {v for k, v in vars(module).items() if "expert" in k and type(v) is int}
    says = "Expert" in type(module).__name__ or "experts" in path.split(".")
    if own:
        return says or any(p.shape[0] in number & counts for p in own)
    return says and bool(_flat_stacks(module, number))


def _flat_stacks(module: nn.Module, number: set[int]) -> list[str]:
    """Parameters (E * F, H) that hold E experts one under another, as DBRX has them."""
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 2 and any(n > 1 and p.shape[0] % n == 0 and p.shape[0] // n >= FEWEST_OUTPUTS for n in number)
    ]


def expert_layout(module: Any) -> dict[str, int | None]:
    """Input dimension of every stacked expert weight of a module; None where nothing tells it.

    Transformers says ``is_transposed``. Without it the shapes decide: what the last projection reads is as wide as
    what the first one writes. Square weights are decided by the module's code.
    """
    stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and "bias" not in n}
    if not stacks:  # one under another: the first projections read the hidden states, the last is stored transposed
        number = {v for k, v in vars(module).items() if "expert" in k and type(v) is int}
        return {name: 0 if SECOND.search(name) else 1 for name in _flat_stacks(module, number)}
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return dict.fromkeys(stacks, 1 if transposed else 2)
    firsts = [p for name, p in stacks.items() if not SECOND.search(name)]
    seconds = [p for name, p in stacks.items() if SECOND.search(name)]
    if firsts and len(seconds) == 1:
        fits = [_fits(first, seconds[0], dim) for dim in (1, 2) for first in firsts]
        as_input = [all(fits[: len(firsts)]), all(fits[len(firsts) :])]
        if sum(as_input) == 1:
            return dict.fromkeys(stacks, 1 if as_input[0] else 2)
    return {name: _dim_in_code(type(module), name) for name in stacks}


def _fits(first: Tensor, second: Tensor, in_dim: int) -> bool:
    """Whether two projections with this input dimension make an MLP, its first one with or without a gate."""
    out_dim = 3 - in_dim
    narrow = second.shape[in_dim]
    return first.shape[in_dim] == second.shape[out_dim] and first.shape[out_dim] in (narrow, 2 * narrow)


def _dim_in_code(kind: type, name: str) -> int | None:
    """Input dimension by how the code multiplies: the last in linear(x, self.w), the middle one in bmm(x, self.w)."""
    code = _source(kind)
    flipped = r"(\.mT\b|\.T\b|\.t\(\)|\.transpose\()"
    weight = rf"self\.{re.escape(name)}(\[[^\]]*\])?"
    if re.search(rf"linear\([^()]*(\([^()]*\)[^()]*)*{weight}\s*[,)]", code) or re.search(rf"{weight}{flipped}", code):
        return 2
    return 1 if re.search(rf"(bmm|matmul)\(.*,\s*{weight}\s*\)|@\s*{weight}", code) else None


def only_read(owner: type, name: str) -> bool:
    """Whether the code of a module multiplies with the weight of its part ``name`` by itself, without calling the part.

    Mamba multiplies with ``self.dt_proj.weight``: hooks on the part see nothing, and another class in its place breaks.
    """
    code = _source(owner)
    part = rf"self\.{re.escape(name)}"
    weight = rf"{part}\.weight\b"
    if not re.search(weight, code):
        return False
    multiplied = rf"{weight}\s*@|@\s*{weight}|(linear|matmul|bmm)\([^()]*{weight}"
    return bool(re.search(multiplied, code)) or not re.search(rf"{part}\(", code)


@functools.cache
def _source(kind: type) -> str:
    """Code of a class; nothing where there is none to read."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
