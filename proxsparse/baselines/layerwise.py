"""The calibration walk of all one-shot methods: layer after layer, each with the outputs of the pruned ones before it.

One layer's statistics and two copies of the hidden states exist at a time. In the names of this module a block is a
layer.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from proxsparse.errors import RunError
from proxsparse.mask import Mask
from proxsparse.model.inputs import listen, note_unseen
from proxsparse.model.prunable import Prunable, decoder_blocks, decoder_of, find_prunable
from proxsparse.model.walk import Call, first_inputs, in_sequence, run_block
from proxsparse.operator.pattern import Pattern

logger = logging.getLogger(__name__)


@torch.no_grad()
def prune_layerwise(
    model: PreTrainedModel,
    windows: Tensor,
    method: Any,
    pattern: Pattern | dict[int, Pattern],
    *,
    update: bool = True,
    include: str | None = None,
    exclude: str | None = None,
    hidden_device: str = "cpu",
    bf16: bool = False,
    progress: str | None = None,
) -> Mask:
    """Prune a model in place with a one-shot method.

    Args:
        windows: (N, T) calibration token ids.
        method: one of ``proxsparse.baselines.ONE_SHOT``.
        pattern: for all layers, or by index of the layer (see ``allocation.allocate``).
        update: keep the method's new weights. False keeps the original ones under the mask; later layers see these.
        hidden_device: where the hidden states are kept between layers.
        bf16: compute the layers in bfloat16 autocast; statistics and solves stay float32.

    Returns:
        The mask; the model holds the pruned (and, with ``update``, changed) weights.

    Raises:
        UsageError, RunError: nothing to prune, inputs that are not finite, or a solve that failed; names the layer.
    """
    blocks = decoder_blocks(model)
    patterns = pattern if isinstance(pattern, dict) else dict.fromkeys(range(len(blocks)), pattern)
    width = max(p.m for p in patterns.values())
    targets = find_prunable(model, include, exclude, multiple=width)
    training = model.training
    model.eval()
    masks: dict[str, Tensor] = {}
    needs_data = method.statistic(targets[0]) is not None
    hidden: list[Tensor] = []
    calls: list[Call] = []
    if needs_data and in_sequence(model, blocks, windows):
        hidden, calls = first_inputs(model, blocks, windows, hidden_device)
    elif needs_data:
        logger.warning("note: the layers don't run one after the other, so the whole model is run for each of them")
    unseen: list[Prunable] = []
    reduced = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16)
    for index, block in enumerate(tqdm(blocks, desc=progress, disable=None if progress else True, leave=False)):
        own = [t for t in targets if t.block == index]
        statistics = {t.name: method.statistic(t) for t in own}
        if needs_data:
            with reduced:
                unseen += _look(model, block, statistics, own, (hidden, calls[index]) if calls else windows)
        for target in own:
            masks[target.name] = _prune_one(target, method, statistics[target.name], patterns[index], update)
        del statistics
        if calls and index + 1 < len(blocks):
            with reduced:
                hidden = [run_block(block, states, calls[index], model.device).to(hidden_device) for states in hidden]
    note_unseen(unseen)
    model.train(training)
    return Mask(masks, _common(patterns, width), model.config._name_or_path)


def _look(
    model: PreTrainedModel,
    block: Any,
    statistics: dict[str, Any],
    own: list[Prunable],
    inputs: Tensor | tuple[list[Tensor], Call],
) -> list[Prunable]:
    """Fill the statistics of a layer's weights, and return the weights whose inputs were not seen.

    Args:
        inputs: the hidden states that enter the layer, in batches, with its other arguments; or windows of token ids,
            with which the whole model is run.
    """
    with listen(own, lambda target, expert, seen: statistics[target.name].add(expert, seen)) as visited:
        if isinstance(inputs, tuple):
            for states in inputs[0]:
                run_block(block, states, inputs[1], model.device)
        else:
            for window in inputs:
                decoder_of(model)(input_ids=window[None].to(model.device), use_cache=False)
    for statistic in statistics.values():
        if getattr(statistic, "skipped", 0):
            logger.warning("%s: %d tokens that were not finite were left out", statistic.name, statistic.skipped)
    return [target for target in own if target.name not in visited]


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
