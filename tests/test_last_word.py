"""The accuracy of sentences' last words."""

import torch
from conftest import byte_tokenizer

from proxsparse.evaluation.last_word import CONTEXT, last_word_accuracy, last_words

TEXT = "x" * CONTEXT + " and so it goes. Numbers such as 3.14 end nothing, but this one does! Is that all?"


class Oracle:
    """Knows every next token but those of one word."""

    device = torch.device("cpu")

    def __init__(self, ids, unknown):
        self.ids, self.unknown = ids, unknown

    def __call__(self, input_ids):
        following = self.ids.roll(-1).clone()
        following[self.unknown - 1] = 0
        logits = torch.nn.functional.one_hot(following, 257).float()[None]
        return type("Output", (), {"logits": logits})


def test_the_last_word_of_every_sentence_is_found_and_counts_whole():
    tokenizer = byte_tokenizer()
    ids, spans = last_words(tokenizer, TEXT)
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == ["goes", "does", "all"]
    oracle = Oracle(ids, spans[1][0] + 1)  # one letter of the second word
    assert last_word_accuracy(oracle, tokenizer, ids[None]) == (2 / 3, 3)
