"""Which weights of a model are pruned: the one rule, for every decoder architecture.

Every linear weight inside the decoder layers is pruned (attention and MLP projections, also fused ones and the stacked
experts of mixture models). Embeddings, the LM head, norms, biases, convolutions and routers are not.
``coverage`` says in one sentence what share of a model's linear weights that is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from proxsparse.errors import UsageError
from proxsparse.model.linears import CONVOLUTION, Weight, expert_counts, weights_of
from proxsparse.model.sharding import local, total

# What activation checkpointing (FSDP's) and regional compilation put into the names of parameters.
WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")


@dataclass(frozen=True)
class Prunable:
    """One pruned weight.

    Attributes:
        name: name of the parameter in ``model.named_parameters()``.
        module: the module that holds it.
        attribute: name of the module's attribute that is the parameter.
        in_dim: dimension of the parameter that is the input: 1 for nn.Linear, 0 for Conv1D, 1 or 2 for experts.
        block: index of the layer.
    """

    name: str
    module: nn.Module
    attribute: str
    in_dim: int
    block: int

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def stored(self) -> Tensor:
        """What this process stores of the weight, detached: all of it, or its shard under FSDP2."""
        return local(self.weight.detach())

    @property
    def kind(self) -> str:
        return layer_kind(self.name)

    def rows(self, tensor: Tensor) -> Tensor:
        """View of a tensor shaped like the weight with the input dimension last, so that blocks are 4 neighbours."""
        return tensor.movedim(self.in_dim, -1)


def layer_kind(name: str) -> str:
    """Layer kind of a weight for statistics: 'model.layers.3.mlp.up_proj.weight' -> 'mlp.up_proj'."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model between its token ids and its last hidden states.

    ModernBERT's ``decoder`` is its LM head.
    """
    found = model.get_decoder()
    return model.base_model if found is None or isinstance(found, nn.Linear) else found


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model, in order.

    They are the modules for which transformers offers activation checkpointing. If there are none, they are those that
    the model's code forbids to split; if there are none either, the members of the decoder's ModuleLists that hold most
    of its weights (code written for version 4).

    Raises:
        UsageError: the model has none.
    """
    decoder = decoder_of(model)
    whole = set(getattr(model, "_no_split_modules", None) or ())
    blocks = (
        _outermost(decoder, lambda m: isinstance(m, GradientCheckpointingLayer))
        or _outermost(decoder, lambda m: type(m).__name__ in whole and m is not decoder)
        or _listed(decoder)
    )
    if not blocks:
        raise UsageError(f"The model {type(model).__name__} has no decoder layers to prune; give a decoder-only model.")
    return blocks


def _outermost(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Modules of a kind in the order of the model; those inside of another one are part of it."""
    found: dict[nn.Module, None] = {}

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if wanted(child):
                found[child] = None
            else:
                walk(child)

    walk(root)
    return list(found)


def _listed(decoder: nn.Module) -> list[nn.Module]:
    """Members of the decoder's ModuleLists that have as many members as the heaviest one.

    XLM keeps attention and MLPs in lists of their own.
    """
    lists = [m for m in _outermost(decoder, lambda m: isinstance(m, nn.ModuleList)) if isinstance(m, nn.ModuleList)]
    weights = {m: sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in lists}
    if not any(weights.values()):
        return []
    length = len(max(lists, key=weights.__getitem__))
    members = zip(*(m for m in lists if len(m) == length and weights[m]), strict=True)
    return [member for layer in members for member in layer]


def check_model(model: Any) -> None:
    """Refuse what is no model of transformers, or has more than its own weights.

    Raises:
        UsageError: with what was found.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    if not isinstance(model, PreTrainedModel):
        raise no_model(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            "The model has adapters, which would be pruned next to its own weights: merge them (merge_and_unload of "
            "peft), or take them off (delete_adapter).",
            "model",
        )


def no_model(given: Any) -> UsageError:
    return UsageError(f"`model` must be a model, as load_model returns it; got {type(given).__name__}.", "model")


def find_prunable(
    model: PreTrainedModel, include: str | None = None, exclude: str | None = None, multiple: int = 4
) -> list[Prunable]:
    """All weights to prune, in the order of the layers.

    Args:
        include: regular expression; only parameter names in which it is found are pruned.
        exclude: regular expression; parameter names in which it is found are left out.
        multiple: the input dimension must be a multiple of this (the block length).

    Raises:
        UsageError: a width is no multiple of ``multiple``, an expression is invalid, or nothing is left to prune; see
            also ``check_model``.
    """
    check_model(model)
    wanted, unwanted = _expression("include", include), _expression("exclude", exclude)
    found: list[Prunable] = []
    odd: list[Prunable] = []
    for name, weight, index in layer_weights(model):
        if weight.dense is not None or weight.in_dim is None:
            continue
        if (wanted and not wanted.search(name)) or (unwanted and unwanted.search(name)):
            continue
        fits = weight.parameter.shape[weight.in_dim] % multiple == 0
        (found if fits else odd).append(Prunable(name, weight.module, weight.attribute, weight.in_dim, index))
    if odd:
        raise UsageError(_without_blocks(odd, found, multiple))
    if not found:
        raise UsageError(
            f"No weight of {type(model).__name__} is left to prune (include={include!r}, exclude={exclude!r})."
        )
    return found


def _without_blocks(odd: list[Prunable], others: list[Prunable], multiple: int) -> str:
    """The sentence for weights whose inputs can't be dealt into blocks, with what leaves all of them out."""
    first, more = odd[0], f" (one of {len(odd)} such weights)" if len(odd) > 1 else ""
    width = first.weight.shape[first.in_dim]
    found = (
        f"The input width of {first.name} is {width}, not a multiple of {multiple}, so it has no blocks of "
        f"{multiple}{more}. "
    )
    if not others:
        return f"{found}No weight has such blocks: use another pattern."
    kinds, kept = ({_without_index(target.kind) for target in targets} for targets in (odd, others))
    names = {target.name for target in odd if _without_index(target.kind) in kept} | {
        re.escape(kind).replace(re.escape(".*"), r"\.\d+") for kind in kinds - kept
    }
    return f"{found}Leave {'them' if more else 'it'} out with `exclude={'|'.join(sorted(names))}`."


def _without_index(kind: str) -> str:
    """A layer kind without the numbers of experts: 'mlp.experts.3.up_proj' -> 'mlp.experts.*.up_proj'."""
    return re.sub(r"\.\d+(?=\.)", ".*", kind)


def layer_weights(model: PreTrainedModel) -> Iterator[tuple[str, Weight, int]]:
    """Name, weight and index of the layer, of every matrix in the layers; shared ones once."""
    names = {id(p): WRAPPERS.sub("", name) for name, p in model.named_parameters()}
    counts = expert_counts(model)
    for index, block in enumerate(decoder_blocks(model)):
        for weight in weights_of(block, counts):
            name = names.pop(id(weight.parameter), None)
            if name is not None:
                yield name, weight, index


@dataclass(frozen=True)
class Coverage:
    """What is pruned of the linear weights inside the layers. ``str`` of it is one sentence.

    Attributes:
        pruned: weights that are pruned, counted by entries.
        linear: all linear weights, with routers and with what may be linear, counted by entries.
        layers: number of decoder layers.
        dense: reason -> kinds of weights that stay dense because of it.
        word: what the sentence begins with: 'pruned', or 'prunable' where nothing is pruned now.
    """

    pruned: int
    linear: int
    layers: int
    dense: dict[str, list[str]] = field(default_factory=dict)
    word: str = "pruned"

    @property
    def share(self) -> float:
        return self.pruned / max(self.linear, 1)

    def __str__(self) -> str:
        # Rounded down, so that 100 % is said of all weights only.
        head = f"{self.word}: {int(1000 * self.share) / 10:.1f} % of the linear weights in {self.layers} layers"
        kinds = [f"{', '.join(kinds)} ({reason})" for reason, kinds in self.dense.items()]
        if kinds:
            return f"{head}; left dense: {', '.join(kinds)}"
        return head if self.word == "prunable" else f"{head}; none is left dense"


def coverage(model: PreTrainedModel, targets: Iterable[Prunable], multiple: int = 4, word: str = "pruned") -> Coverage:
    """What share of the linear weights is pruned, and which kinds stay dense, with the reason.

    Every matrix in the layers is a target or is named, except embeddings, norms and biases.

    Args:
        targets: the result of ``find_prunable``.
        multiple: the block length, which a weight's inputs must be a multiple of.
        word: of ``Coverage``.
    """
    chosen = {target.name for target in targets}
    pruned = linear = 0
    dense: dict[str, list[str]] = {}
    for name, weight, _ in layer_weights(model):
        size = weight.parameter.numel()
        linear += size if weight.dense != CONVOLUTION else 0
        if name in chosen:
            pruned += size
            continue
        fits = weight.parameter.shape[weight.in_dim or 0] % multiple == 0
        reason = weight.dense or ("excluded" if fits else f"input width no multiple of {multiple}")
        kind = _without_index(layer_kind(name))
        if kind not in dense.setdefault(reason, []):
            dense[reason].append(kind)
    return Coverage(pruned, linear, len(decoder_blocks(model)), dense, word)


def sparsity_by_kind(weights: Mapping[str, Tensor], targets: list[Prunable], m: int = 4) -> dict[str, list[float]]:
    """Share of blocks of m weights with 0, 1, ... m zeros, by layer kind and over 'all'.

    Args:
        weights: name -> weight in the parameter's own layout; under FSDP2 every process takes part.
    """
    counts: dict[str, Tensor] = {}
    for target in targets:
        weight = weights[target.name]
        zeros = (target.rows(local(weight)) == 0).unflatten(-1, (-1, m)).sum(-1)
        histogram = total(torch.bincount(zeros.flatten(), minlength=m + 1), weight).cpu()
        counts[target.kind] = counts[target.kind] + histogram if target.kind in counts else histogram
    counts["all"] = torch.stack(list(counts.values())).sum(0)
    return {kind: (histogram / histogram.sum()).tolist() for kind, histogram in counts.items()}


def _expression(argument: str, pattern: str | None) -> re.Pattern | None:
    if pattern is not None and not isinstance(pattern, str):
        raise UsageError(f"`{argument}` must be a regular expression; got {pattern!r}.", argument)
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UsageError(f"`{argument}` must be a regular expression, got {pattern!r}: {error}.") from error
