"""Run a pruned model sparse: on the CPU with compact weights, on a GPU with torch's semi-structured tensors.

Neither is faster everywhere. Reading the weights from memory limits decoding, and compact weights have fewer bytes.
Arithmetic limits prefill. On a GPU every shape is measured, and only those that gain are converted. What a machine
gains is shown by ``proxsparse bench``.
"""

import dataclasses
import logging
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from transformers import PreTrainedModel

from proxsparse.deploy.compact_linear import CompactLinear as CompactLinear
from proxsparse.deploy.timing import device_seconds
from proxsparse.errors import RunError, UsageError, check_switches
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.compact import check_kind, pattern_of
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.source import name_of
from proxsparse.operator.pattern import TWO_OF_FOUR

logger = logging.getLogger(__name__)

WORTHWHILE = 1.05  # a sparse product must be so many times faster than the dense one
FIRST_ROWS = 256  # of each weight, which tell the pattern
MEASURED = 8  # weights of a shape: of a large model, together more than a GPU's cache


def load(folder: str | os.PathLike, *, sparse: bool = False, **options: Any) -> PreTrainedModel:
    """Load a pruned model, ready to generate.

    Args:
        folder: compact folder, checkpoint folder, or Hub id.
        sparse: compact weights on a CPU (int8 ones where the folder holds int8 values), semi-structured tensors on a
            GPU where they are faster.
        options: arguments of ``proxsparse.model.loading.load_model``: dtype, device, revision, ...

    Raises:
        UsageError, RunError: one sentence on what is missing.
    """
    folder = name_of(folder)
    check_switches(sparse=sparse)
    model = load_model(folder, **options).eval()
    if sparse and model.device.type == "cuda":
        use_semi_structured(model)
    elif sparse:
        use_compact(model, quantize=stored_kind(folder, options.get("revision")))
    return model


def stored_kind(name: str, revision: str | None = None) -> str | None:
    """How the values of a model's compact weights are quantised in its files; None: they are not, or are not here."""
    found = Checkpoint.find(name, revision)
    return "int8" if found is not None and found.is_rounded else None


def use_compact(model: PreTrainedModel, quantize: str | None = None) -> int:
    """Replace every pruned nn.Linear of a model on the CPU by a CompactLinear, in place.

    Args:
        quantize: int8: the kept values are rounded to int8.

    Returns:
        how many were replaced, each by the pattern that its own zeros have. Conv1D, stacked experts, layers that were
        left out of the pruning, and layers whose weight the model's code reads stay dense.

    Raises:
        UsageError: no weight is N:M; another kind of quantisation.
    """
    check_kind(quantize)
    replaced: list[tuple[Prunable, CompactLinear]] = []
    # A target that is named anywhere keeps its dense weight alive.
    targets = [target for target in find_prunable(model, multiple=1)[::-1] if type(target.module) is nn.Linear]
    some = bool(targets)
    while targets:
        target = targets.pop()
        assert isinstance(target.module, nn.Linear)
        weight = target.weight.detach()
        pattern = pattern_of(weight[:FIRST_ROWS])
        if pattern is not None and pattern.violations(weight).any():
            pattern = pattern_of(weight)
        if pattern is None:
            continue
        try:
            compact = CompactLinear(target.module, quantize, pattern)
        except ValueError as error:
            raise UsageError(f"{target.name} can't be made compact: {error}.") from error
        _replace(model, target, compact)
        replaced.append((dataclasses.replace(target, module=compact), compact))
        del target, weight
    if some and not replaced:
        raise UsageError("The model can't be made compact: no linear layer is N:M with an N of at most 3/4 of M.")
    runs(model)
    unread = 0
    for target, compact in replaced:
        if compact.read:
            _replace(model, target, _dense_linear(compact))
        unread += not compact.read
    return unread


@torch.no_grad()
def runs(model: PreTrainedModel) -> bool:
    """Whether the model computes one token with the weights it has now."""
    try:
        model(input_ids=torch.ones(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # whatever code that comes with a model raises
        return False
    return True


def _dense_linear(compact: CompactLinear) -> nn.Linear:
    linear = nn.Linear(compact.in_features, compact.out_features, bias=compact.bias is not None, device="meta")
    linear.weight = nn.Parameter(compact.dense(), requires_grad=False)
    linear.bias = compact.bias
    return linear


@torch.no_grad()
def use_semi_structured(model: PreTrainedModel, tokens: int = 1, graph: bool = False) -> dict[str, int]:
    """Turn pruned linear weights on a GPU into torch's semi-structured tensors where that is faster, in place.

    Weights that are semi-structured already are made dense first, so that each call decides anew.

    Args:
        tokens: rows of the input that each shape is measured with: 1 for decoding, the prompt's for prefill.
        graph: measure products in a CUDA graph, for a model that runs in one.

    Returns:
        {"sparse": number converted, "dense": number left dense}.

    Raises:
        UsageError: no weight is 2:4.
        RunError: no CUDA device, or torch refuses the conversion.
    """
    if model.device.type != "cuda":
        raise RunError(f"Semi-structured tensors need a CUDA device; the model is on {model.device}.")
    use_dense(model)
    targets = _halved(model)  # torch would drop the smaller weights of other blocks without a word
    shapes: dict[tuple[int, ...], list[Prunable]] = {}
    for target in targets:
        if type(target.module) is nn.Linear and semi_structured_fits(tuple(target.weight.shape), target.weight.dtype):
            shapes.setdefault(tuple(target.weight.shape), []).append(target)
    converted: dict[str, list[Prunable]] = {}
    for shape, members in shapes.items():
        some = members[:MEASURED]
        sparse = [_semi_structured(target) for target in some]
        x = torch.randn(tokens, shape[1], device=model.device, dtype=some[0].weight.dtype)
        with torch.cuda.device(model.device):
            dense_time, sparse_time = (
                device_seconds([partial(_product, x, weight) for weight in weights], graph=graph)
                for weights in ([target.weight for target in some], sparse)
            )
        if dense_time <= WORTHWHILE * sparse_time:
            continue
        for place, target in enumerate(members):
            weight = sparse[place] if place < len(sparse) else _semi_structured(target)
            target.module.weight = nn.Parameter(weight, requires_grad=False)
            target.module.register_forward_hook(_row_major)
            converted.setdefault(target.kind, []).append(target)
    # Code that reads a weight by itself can't do with a sparse one what it does with a dense one.
    while converted and not runs(model):
        kind, members = converted.popitem()
        logger.warning("note: the model's code does not run with a sparse %s, which stays dense", kind)
        for target in members:
            _make_dense(target.module)
    count = sum(map(len, converted.values()))
    return {"sparse": count, "dense": len(targets) - count}


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(x, weight).contiguous()


def _row_major(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The hook of a semi-structured layer: torch 2.11 gives its products column by column, torch 2.13 row by row.

    What follows reads rows, and takes far longer to gather them than this copy does: without it a prefill of Llama-2-7B
    took twice its time (BENCHMARKS.md). Rows are not copied.
    """
    return output.contiguous()


def _halved(model: PreTrainedModel) -> list[Prunable]:
    """The 2:4 weights of a model; others were left out of the pruning, and stay dense.

    Raises:
        UsageError: there are none.
    """
    blocks = [t for t in find_prunable(model, multiple=1) if t.rows(t.weight).shape[-1] % 4 == 0]
    found = [t for t in blocks if not TWO_OF_FOUR.violations(t.rows(t.weight.detach())).any()]
    if blocks and not found:
        raise UsageError(f"{blocks[0].name} can't be made sparse: a block has more than two non-zeros.")
    return found


@torch.no_grad()
def use_dense(model: PreTrainedModel) -> None:
    """Undo ``use_semi_structured``, in place; the values are the same, bit for bit."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and isinstance(weight.data, SparseSemiStructuredTensor):
            _make_dense(module)


def _make_dense(module: nn.Module) -> None:
    module.register_parameter("weight", nn.Parameter(module.weight.detach().to_dense(), requires_grad=False))  # type: ignore[operator]
    for key, hook in list(module._forward_hooks.items()):
        if hook is _row_major:
            del module._forward_hooks[key]


def semi_structured_fits(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether torch makes weights of this kind semi-structured: 16-bit, rows a multiple of 32, columns of 64."""
    return dtype in (torch.float16, torch.bfloat16) and not (shape[0] % 32 or shape[1] % 64)


def _semi_structured(target: Prunable) -> Tensor:
    """A pruned weight for sparse tensor cores, by cuSPARSELt.

    Where torch was built without it, CUTLASS serves; torch has its product for compute capability 8.x alone.
    """
    weight = target.weight.detach()
    try:
        try:
            return to_sparse_semi_structured(weight)
        except RuntimeError:
            if SparseSemiStructuredTensor._FORCE_CUTLASS or torch.cuda.get_device_capability(weight.device)[0] != 8:
                raise
            SparseSemiStructuredTensor._FORCE_CUTLASS = True
            return to_sparse_semi_structured(weight)
    except RuntimeError as error:
        raise RunError(f"torch can't make {target.name} semi-structured: {str(error).splitlines()[0]}") from error


def _replace(model: PreTrainedModel, target: Prunable, module: nn.Module) -> None:
    path = target.name.removesuffix(f".{target.attribute}")
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
