"""Accuracy of the last word of sentences, given all of the text before it: LAMBADA's idea on any held-out text.

The last word is often the one that needs the whole sentence. A word counts as right where the likeliest token is the
right one at each of its tokens.

Source: Paperno et al., LAMBADA, https://arxiv.org/abs/1606.06031.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

LAST_WORD = re.compile(r"\b[^\W\d_]{2,}(?=[.!?][\"')]*(?:\s|$))")
CONTEXT = 300  # characters that must stand before a word: some fifty words


@torch.no_grad()
def last_word_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor
) -> tuple[float, int]:
    """Share of last words that the model finds, and how many there were.

    Args:
        model: on the device to compute on.
        tokenizer: a fast one, which knows where its tokens stand in the text.
        windows: (N, T) held-out token ids.
    """
    right = words = 0
    for window in windows:
        ids, spans = last_words(tokenizer, str(tokenizer.decode(window, skip_special_tokens=True)))
        if not spans:
            continue
        best = model(input_ids=ids[None].to(model.device)).logits[0].argmax(-1).cpu()
        right += sum(torch.equal(best[start - 1 : end - 1], ids[start:end]) for start, end in spans)
        words += len(spans)
    return (right / words if words else float("nan")), words


def last_words(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Token ids of a text, and where the last words of its sentences are: [start, end) of their tokens."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return torch.tensor(found["input_ids"]), list(_spans(text, found["offset_mapping"]))


def _spans(text: str, offsets: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for word in LAST_WORD.finditer(text):
        places = [place for place, (start, end) in enumerate(offsets) if start < word.end() and end > word.start()]
        if word.start() >= CONTEXT and places and places[0] > 0:
            yield places[0], places[-1] + 1
