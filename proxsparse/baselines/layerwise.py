"""Prune with a one-shot method: layer after layer, each with the outputs of the ones before it, pruned or dense."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import RunError, check_switches
from proxsparse.mask import Mask
from proxsparse.model.channels import order_of
from proxsparse.model.prunable import Prunable, check_model, decoder_blocks, find_prunable
from proxsparse.model.restoring import evaluation_mode
from proxsparse.model.walk import walk
from proxsparse.model.windows import check_windows
from proxsparse.operator.pattern import Pattern


@torch.no_grad()
def prune_layerwise(
    model: PreTrainedModel,
    windows: Tensor,
    method: Any,
    pattern: Pattern | str | dict[int, Pattern],
    *,
    update: bool = True,
    include: str | None = None,
    exclude: str | None = None,
    hidden_device: str = "cpu",
    bf16: bool = False,
    progress: str | None = None,
    dense_inputs: bool = False,
) -> Mask:
    """Prune a model in place with a one-shot method.

    Args:
        windows: (N, T) calibration token ids.
        method: one of ``proxsparse.baselines.ONE_SHOT``.
        pattern: for all layers, or by index of the layer (see ``allocation.allocate``).
        include, exclude: of ``find_prunable``.
        update: keep the method's new weights. False keeps the original ones under the mask; later layers see these.
        hidden_device: where the hidden states are kept between layers.
        bf16: compute the layers in bfloat16 autocast; statistics and solves stay float32.
        dense_inputs: layers see the outputs of the dense ones before them, not of the pruned ones.

    Returns:
        The mask; the model holds the pruned (and, with ``update``, changed) weights.

    Raises:
        UsageError, RunError: nothing to prune, inputs that are not finite, or a solve that failed; names the layer.
    """
    check_model(model)
    check_windows(windows, model.config)
    check_switches(update=update, bf16=bf16, dense_inputs=dense_inputs)
    layers = range(len(decoder_blocks(model)))
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    patterns = pattern if isinstance(pattern, dict) else dict.fromkeys(layers, pattern)
    width = max(p.m for p in patterns.values())
    targets = find_prunable(model, include, exclude, multiple=width)
    masks: dict[str, Tensor] = {}
    options: dict[str, Any] = {"hidden_device": hidden_device, "bf16": bf16, "progress": progress}
    steps = walk(model, targets, windows, method.statistic, dense=dense_inputs, **options)
    with evaluation_mode(model):
        for index, own, statistics in steps:
            for target in own:
                masks[target.name] = _prune_one(target, method, statistics[target.name], patterns[index], update)
    used = {target.block: patterns[target.block] for target in targets}
    return Mask(masks, _common(used, width), model.config._name_or_path, order=order_of(model))


def _common(patterns: dict[int, Pattern], width: int) -> Pattern:
    """The pattern of all layers, or a mixed one where they differ."""
    kinds = {str(p): p for p in patterns.values()}
    return next(iter(kinds.values())) if len(kinds) == 1 else Pattern(0, width)


def _prune_one(target: Prunable, method: Any, statistic: Any, pattern: Pattern, update: bool) -> Tensor:
    rows = target.rows(target.weight.detach())
    if not rows.isfinite().all():
        raise RunError(f"{target.name} has NaN or infinite entries; the checkpoint is damaged.")
    mask, weight = method.prune(rows, statistic, pattern)
    if update and weight is not None:
        if not weight.isfinite().all():
            raise RunError(f"The update of {target.name} is not finite: its calibration inputs are degenerate.")
        rows.copy_(weight)
    else:
        rows.masked_fill_(~mask, 0.0)
    return mask.cpu()
