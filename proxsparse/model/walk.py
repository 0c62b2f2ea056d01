"""Run a model's layers one at a time, each on the outputs of the one before it. A block is a layer here.

Shapes: N = windows, T = ctx_len, H = hidden size, B = windows at once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from proxsparse.errors import RunError
from proxsparse.model.prunable import decoder_of

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


def run_block(block, states: Tensor, call: Call, device: torch.device | str) -> Tensor:
    """Output hidden states of one layer, which may return a tensor or a tuple that begins with it."""
    arguments, keywords = call
    output = block(states.to(device), *arguments, **keywords)
    return output if torch.is_tensor(output) else output[0]
