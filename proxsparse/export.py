"""Write a pruned model as an ordinary Hugging Face checkpoint that every runtime loads."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.model import quiet_bars
from proxsparse.record import atomic_path


def save_pruned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Save model and tokenizer in the dense layout, with exact zeros and no sparsity or quantisation config.

    The folder appears complete or not at all.
    """
    with quiet_bars(), atomic_path(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
