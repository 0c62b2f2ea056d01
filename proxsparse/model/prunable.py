"""Which weights of a model are pruned: the one rule, for every decoder architecture.

Every linear weight inside the decoder blocks is pruned (attention and MLP projections, fused ones and the stacked
experts of mixture models too). Embeddings, the LM head, norms, biases, convolutions and routers are not.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from proxsparse.errors import UsageError
from proxsparse.model.sharding import local

ROUTER = re.compile(r"(^|[._])(router|gate|shared_expert_gate)$")  # does not match gate_proj
FEWEST_OUTPUTS = 8  # smaller matrices are gates, and 2:4 kernels have no use for them


@dataclass(frozen=True)
class Prunable:
    """One pruned weight.

    Attributes:
        name: of the parameter in ``model.named_parameters()``.
        module: that holds it.
        attribute: of the module that is the parameter.
        in_dim: dimension of the parameter that is the input: 1 for nn.Linear, 0 for Conv1D, 1 or 2 for experts.
        block: index of the decoder block.
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


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks of a model, in order.

    Raises:
        UsageError: the model has none.
    """
    decoder = model.get_decoder()
    modules = decoder.modules() if decoder is not None else []
    blocks: list[nn.Module] = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise UsageError(f"The model {type(model).__name__} has no decoder blocks to prune; give a decoder-only model.")
    return blocks


def find_prunable(
    model: PreTrainedModel, include: str | None = None, exclude: str | None = None, multiple: int = 4
) -> list[Prunable]:
    """All weights to prune, in the order of the decoder blocks.

    Args:
        include: regular expression; only parameter names in which it is found are pruned.
        exclude: regular expression; parameter names in which it is found are left out.
        multiple: the input dimension must be a multiple of this (the block length).

    Raises:
        UsageError: a width is no multiple of ``multiple``, an expression is invalid, or nothing is left to prune.
    """
    wanted, unwanted = _expression("include", include), _expression("exclude", exclude)
    names = {id(p): name for name, p in model.named_parameters()}
    found: list[Prunable] = []
    seen: set[int] = set()
    for index, block in enumerate(decoder_blocks(model)):
        for path, module in block.named_modules():
            for attribute, in_dim in _weights(module):
                weight = getattr(module, attribute)
                if ROUTER.search(path) or id(weight) in seen or id(weight) not in names:
                    continue
                name = names[id(weight)]
                if (wanted and not wanted.search(name)) or (unwanted and unwanted.search(name)):
                    continue
                if weight.numel() // weight.shape[in_dim] < FEWEST_OUTPUTS:
                    continue
                if weight.shape[in_dim] % multiple:
                    raise UsageError(
                        f"The input width of {name} is {weight.shape[in_dim]}, not a multiple of {multiple}, so it "
                        f"has no blocks of {multiple}. Leave it out with `exclude={re.escape(name)}`."
                    )
                seen.add(id(weight))
                found.append(Prunable(name, module, attribute, in_dim, index))
    if not found:
        raise UsageError(
            f"No weight of {type(model).__name__} is left to prune (include={include!r}, exclude={exclude!r})."
        )
    return found


def _weights(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Attribute and input dimension of each prunable parameter that belongs to this module itself."""
    if isinstance(module, nn.Linear):
        yield "weight", 1
    elif isinstance(module, Conv1D):
        yield "weight", 0
    elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # set by transformers on expert modules
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                yield attribute, 1 if module.is_transposed else 2


def _expression(argument: str, pattern: str | None) -> re.Pattern | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UsageError(f"`{argument}` must be a regular expression, got {pattern!r}: {error}.") from error
