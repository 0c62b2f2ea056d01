"""Run a model's layers one at a time, each on the outputs of the one before it. A block is a layer here.

Shapes: N = windows, T = ctx_len, H = hidden size, B = windows at once.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from proxsparse.errors import RunError
from proxsparse.model.inputs import listen, note_unseen
from proxsparse.model.prunable import Prunable, decoder_blocks, decoder_of

logger = logging.getLogger(__name__)

Call = tuple[tuple, dict[str, Any]]  # arguments of a layer, without the hidden states

# The hidden states of all windows are kept: 128 windows of a model with 131,072 positions would not fit anywhere.
LONGEST_CONTEXT = 8192
TOKENS_AT_ONCE = 4096  # of as many windows as divide their number; more make nothing faster

TRIED = 64  # tokens that show whether the layers run one after the other


class _Reached(Exception):
    """The first layer has been reached; the rest of the forward pass is not needed."""


def first_inputs(
    model: PreTrainedModel, blocks: list, windows: Tensor, hidden_device: str, at_once: int | None = None
) -> tuple[list[Tensor], list[Call]]:
    """Hidden states that enter the first layer, in batches (B, T, H), and every layer's other arguments.

    The other arguments (positions, masks) depend on the shape of the batch only, and all batches have one shape. Layers
    of one model may differ in them (sliding and full attention), so each layer's own are kept.

    Args:
        at_once: most windows of a batch, which divide their number; None: as many as make it faster.
    """
    if windows.shape[1] > LONGEST_CONTEXT:
        raise RunError(
            f"Calibration windows of {windows.shape[1]} tokens need too much memory for the hidden states; "
            f"use at most `ctx_len={LONGEST_CONTEXT}`."
        )
    count, most = len(windows), at_once or max(1, TOKENS_AT_ONCE // windows.shape[1])
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

    Shared layers, layers that run several times, and code between the layers (RWKV, Zamba, BLT) break that. So do
    layers whose other arguments depend on the tokens (Gemma 3n).
    """
    inputs: list[Tensor] = []
    calls: list[Call] = []

    def remember(module: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        inputs.append((arguments[0] if arguments else keywords["hidden_states"]).detach().clone())
        calls.append((arguments[1:], {k: v for k, v in keywords.items() if k != "hidden_states"}))

    ids = windows[:1, :TRIED].to(model.device)
    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    decoder_of(model)(input_ids=ids.flip(1), use_cache=False)
    of_others = calls.copy()
    inputs.clear()
    calls.clear()
    decoder_of(model)(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    if len(calls) != len(blocks) or not _same(calls, of_others):
        return False
    try:
        return all(
            _alike(run_block(block, own, call, model.device), following)
            for block, own, call, following in zip(blocks, inputs, calls, inputs[1:], strict=False)
        )
    except (TypeError, RuntimeError):  # a layer that needs what another one made
        return False


def _same(calls: list[Call], others: list[Call]) -> bool:
    """Whether the other arguments of all layers are equal."""
    pairs = zip(tree_leaves(calls), tree_leaves(others), strict=False)
    return all(not torch.is_tensor(own) or torch.equal(own, other) for own, other in pairs)


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for sums in another order, as GPUs make them."""
    return found.shape == wanted.shape and bool((found - wanted).norm() <= 1e-2 * wanted.norm())


@torch.no_grad()
def runs_in_bf16(model: PreTrainedModel, windows: Tensor) -> bool:
    """Whether the model's own code runs under bfloat16 autocast (DBRX's adds bfloat16 to float32); says where not."""
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            decoder_of(model)(input_ids=windows[:1, :TRIED].to(model.device), use_cache=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        logger.warning("note: %s does not run in bfloat16 autocast (%s): float32", type(model).__name__, reason)
        return False
    return True


def run_block(block, states: Tensor, call: Call, device: torch.device | str) -> Tensor:
    """Output hidden states of one layer, which may return a tensor or a tuple that begins with it."""
    arguments, keywords = call
    output = block(states.to(device), *arguments, **keywords)
    return output if torch.is_tensor(output) else output[0]


def walk(
    model: PreTrainedModel,
    targets: list[Prunable],
    windows: Tensor,
    statistic: Callable[[Prunable], Any],
    *,
    hidden_device: str = "cpu",
    bf16: bool = False,
    progress: str | None = None,
    unseen_are: str = "compared by magnitude alone",
    dense: bool = False,
) -> Iterator[tuple[int, list[Prunable], dict[str, Any]]]:
    """Go through the layers, and give what was seen of the inputs of each one's weights.

    Call it under ``torch.no_grad``, on a model in eval mode. The caller may change a layer's weights: the layers after
    it see its new outputs, unless ``dense``. One layer's statistics and two copies of the hidden states exist at a
    time; all statistics, where the layers are no sequence.

    Args:
        targets: the weights that are looked at.
        windows: (N, T) calibration token ids.
        statistic: makes what collects a weight's inputs by ``add(expert, inputs)``; None where nothing is collected.
        hidden_device: where the hidden states are kept between layers.
        bf16: compute the layers in bfloat16 autocast.
        unseen_are: what becomes of the entries of weights whose inputs were not seen, for the note that says so.
        dense: layers see what the model gave them before the caller changed anything.

    Yields:
        (index of the layer, its weights, name -> statistic).
    """
    blocks = decoder_blocks(model)
    reads = statistic(targets[0]) is not None
    hidden: list[Tensor] = []
    calls: list[Call] = []
    unseen: list[Prunable] = []
    outputs: list[Tensor] = []
    early: dict[str, Any] = {}
    reduced = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16)
    if reads and in_sequence(model, blocks, windows):
        hidden, calls = first_inputs(model, blocks, windows, hidden_device)
    elif reads and dense:
        with reduced:
            early = _all_statistics(model, targets, windows, statistic, unseen)
    elif reads:
        logger.warning("note: the layers don't run one after the other, so the whole model is run for each of them")
    for index, block in enumerate(tqdm(blocks, desc=progress, disable=None if progress else True, leave=False)):
        own = [target for target in targets if target.block == index]
        statistics = {target.name: early.get(target.name) or statistic(target) for target in own}
        if reads and not early:
            with reduced, _listening(statistics, own, unseen):
                if calls:
                    outputs = _through(block, hidden, calls[index], model.device, hidden_device if dense else None)
                else:
                    _run_whole(model, windows)
        yield index, own, statistics
        statistics.clear()  # the caller holds it too
        if calls and index + 1 < len(blocks):
            with reduced:
                hidden = outputs or _through(block, hidden, calls[index], model.device, hidden_device)
    note_unseen(unseen, unseen_are)


def _all_statistics(
    model: PreTrainedModel,
    targets: list[Prunable],
    windows: Tensor,
    statistic: Callable[[Prunable], Any],
    unseen: list[Prunable],
) -> dict[str, Any]:
    """Of all layers at once, before the caller changes anything; see ``_listening`` for ``unseen``."""
    found = {target.name: statistic(target) for target in targets}
    with _listening(found, targets, unseen):
        _run_whole(model, windows)
    return found


def _through(
    block: Any, hidden: list[Tensor], call: Call, device: torch.device | str, kept_on: str | None
) -> list[Tensor]:
    """Outputs of one layer, in batches; empty where they are kept nowhere."""
    found = []
    for states in hidden:
        output = run_block(block, states, call, device)
        if kept_on is not None:
            found.append(output.to(kept_on))
    return found


@contextlib.contextmanager
def _listening(statistics: dict[str, Any], own: list[Prunable], unseen: list[Prunable]) -> Iterator[None]:
    """Fill the statistics of weights with what runs inside, and note in ``unseen`` whose inputs were not seen."""
    with listen(own, lambda target, expert, seen: statistics[target.name].add(expert, seen)) as visited:
        yield
    for statistic in statistics.values():
        if getattr(statistic, "skipped", 0):
            logger.warning("%s: %d tokens that were not finite were left out", statistic.name, statistic.skipped)
    unseen += [target for target in own if target.name not in visited]


def _run_whole(model: PreTrainedModel, windows: Tensor) -> None:
    for window in windows:
        decoder_of(model)(input_ids=window[None].to(model.device), use_cache=False)
