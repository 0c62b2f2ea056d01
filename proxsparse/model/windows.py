"""What goes with a model: windows of its tokens, and the tokenizer that they come from."""

import numbers
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import UsageError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # of token ids in a tensor


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer.

    Raises:
        UsageError: with what was found.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        found = type(tokenizer).__name__
        raise UsageError(f"`tokenizer` must be a tokenizer, as load_tokenizer returns it; got {found}.", "tokenizer")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        UsageError: names the argument.
    """
    if not isinstance(value, numbers.Integral) or value < least:
        raise UsageError(f"`{name}` must be a whole number of at least {least}; got {value!r}.", name)


def check_ctx_len(ctx_len: int, config) -> None:
    """Refuse a context longer than the model's positions.

    Raises:
        UsageError: with both numbers.
    """
    longest = _positions(config) or ctx_len
    if not 8 <= ctx_len <= longest:
        raise UsageError(f"`ctx_len` must be between 8 and {longest}, the positions this model has; got {ctx_len}.")


def _positions(config) -> int | None:
    """How many a model has; None: it has no limit, as XLNet, which says -1."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None) or -1
    return None if found < 0 else found


def check_windows(windows: Any, config, name: str = "windows") -> None:
    """Refuse what is no tensor of a model's tokens, and windows that are longer than its positions.

    Args:
        name: of the argument.

    Raises:
        UsageError: with what was found.
    """
    plain = torch.is_tensor(windows) and windows.layout == torch.strided and not windows.is_meta
    if not plain or windows.dtype not in INTEGERS or windows.dim() != 2 or not windows.numel() or windows.shape[1] < 2:
        found = f"{windows.dtype} of shape {tuple(windows.shape)}" if plain else type(windows).__name__
        raise UsageError(f"`{name}` must be an int64 tensor of token ids of shape (N, T >= 2); got {found}.", name)
    if windows.shape[1] > (_positions(config) or windows.shape[1]):
        raise UsageError(
            f"`{name}` have {windows.shape[1]} tokens each, and this model has {_positions(config)} positions.", name
        )
    check_tokens(windows, config, name)


def check_tokens(windows: Tensor, config, name: str = "windows") -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        windows: (N, T) token ids.
        config: of the model.
        name: name of the argument.

    Raises:
        UsageError: with the token, and the size of the vocabulary.
    """
    least, largest = int(windows.min()), int(windows.max())
    if least < 0:
        raise UsageError(f"`{name}` must hold token ids of at least 0; got {least}.", name)
    known = getattr(config.get_text_config(), "vocab_size", None)
    if known and largest >= known:
        raise UsageError(
            f"The text has token {largest}, and the model has embeddings for {known} tokens: give a model and a "
            "tokenizer that belong together.",
            "model",
        )
