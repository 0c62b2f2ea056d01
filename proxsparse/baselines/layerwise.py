"""The calibration walk of all one-shot methods: layer after layer, each with the outputs of the pruned ones before it.

One layer's statistics and two copies of the hidden states exist at a time. In the names of this module a block is a
layer.
Shapes: N = windows, T = ctx_len, H = hidden size.
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
from proxsparse.operator.pattern import Pattern

Call = tuple[tuple, dict[str, Any]]  # arguments of a layer, without the hidden states
logger = logging.getLogger(__name__)

# The hidden states of all windows are kept: 128 windows of a model with 131,072 positions would not fit anywhere.
LONGEST_CONTEXT = 8192
TOKENS_AT_ONCE = 4096  # of as many windows as divide their number; more make nothing faster

TRIED = 64  # tokens that show whether the layers run one after the other


class _Reached(Exception):
    """The first layer has been reached; the rest of the forward pass is not needed."""


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


def first_inputs(
    model: PreTrainedModel, blocks: list, windows: Tensor, hidden_device: str
) -> tuple[list[Tensor], list[Call]]:
    """Hidden states that enter the first layer, in batches (B, T, H), and every layer's other arguments.

    The other arguments (positions, masks) depend on the shape of the batch only, and all batches have one shape. Layers
    of one model may differ in them (sliding and full attention), so each layer's own are kept.
    """
    if windows.shape[1] > LONGEST_CONTEXT:
        raise RunError(
            f"Calibration windows of {windows.shape[1]} tokens need too much memory for the hidden states; "
            f"use at most `ctx_len={LONGEST_CONTEXT}`."
        )
    count, most = len(windows), max(1, TOKENS_AT_ONCE // windows.shape[1])
    batches = windows.split(max(size for size in range(1, min(most, count) + 1) if count % size == 0))
    calls: list[Call] = []
    hidden: list[Tensor] = []

    def remember_call(module, arguments, keywords):
        calls.append((arguments[1:], {k: v for k, v in keywords.items() if k != "hidden_states"}))

    def remember_states(module, arguments, keywords):
        hidden.append((arguments[0] if arguments else keywords["hidden_states"]).to(hidden_device))
        raise _Reached

    decoder = decoder_of(model)
    handles = [block.register_forward_pre_hook(remember_call, with_kwargs=True) for block in blocks]
    decoder(input_ids=batches[0].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    handle = blocks[0].register_forward_pre_hook(remember_states, with_kwargs=True)
    try:
        for batch in batches:
            try:
                decoder(input_ids=batch.to(model.device), use_cache=False)
            except _Reached:
                continue
    finally:
        handle.remove()
    return hidden, calls


def in_sequence(model: PreTrainedModel, blocks: list, windows: Tensor) -> bool:
    """Whether each layer reads what the one before it wrote, so that they can be run one at a time.

    Shared layers, layers that run several times, and code between the layers (RWKV, Zamba, BLT) break that.
    """
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def remember(module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        inputs.append((arguments[0] if arguments else keywords["hidden_states"]).detach().clone())
        calls.append((arguments[1:], {k: v for k, v in keywords.items() if k != "hidden_states"}))

    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    decoder_of(model)(input_ids=windows[:1, :TRIED].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    if len(calls) != len(blocks):
        return False
    try:
        return all(
            _alike(run_block(block, own, call, model.device), following)
            for block, own, call, following in zip(blocks, inputs, calls, inputs[1:], strict=False)
        )
    except (TypeError, RuntimeError):  # a layer that needs what another one made
        return False


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for sums in another order, as GPUs make them."""
    return found.shape == wanted.shape and bool((found - wanted).norm() <= 1e-2 * wanted.norm())


def run_block(block, states: Tensor, call: Call, device: torch.device | str) -> Tensor:
    """Output hidden states of one layer, which may return a tensor or a tuple that begins with it."""
    arguments, keywords = call
    output = block(states.to(device), *arguments, **keywords)
    return output if torch.is_tensor(output) else output[0]


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
