"""The LM head by itself, where a model is one: its logits are then a product of the last hidden states alone."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxsparse.model.prunable import decoder_of
from proxsparse.model.restoring import evaluation_mode


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The LM head, if the model's logits are ``head(last hidden states)`` and nothing else.

    Others scale their logits or cap them. The model says so itself: it computes two tokens, and logits are compared.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    try:
        ids = torch.tensor([[1, 2]], device=model.device)
        with torch.no_grad(), evaluation_mode(model), watched(model) as states:
            logits = model(input_ids=ids, use_cache=False).logits
            same = len(states) == 1 and torch.equal(head(states[0]), logits)
    except Exception:  # whatever a model's own code does not expect
        same = False
    return head if same else None


@contextlib.contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The last hidden states (B, T, H) of each forward pass inside the block, as they come."""
    states: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple, out: Any) -> None:
        states.append(out[0])

    handle = decoder_of(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def last_states(model: PreTrainedModel, call: Callable[..., Any], **inputs: Any) -> Tensor:
    """Last hidden states (B, T, H) of a forward pass that makes logits of one position only.

    Args:
        call: the model, or what it is wrapped in.
    """
    with watched(model) as states:
        call(**inputs, use_cache=False, logits_to_keep=1)
    return states[0]
