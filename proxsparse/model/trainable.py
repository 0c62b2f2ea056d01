"""A model and a tokenizer as the trainers of transformers and TRL take them, whatever they are like."""

import logging
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What transformers refuses to save where generation does not use it.
ONLY_SAMPLING = ["temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff"]
ONLY_BEAMS = ["early_stopping", "length_penalty"]


def clean_generation_config(model: PreTrainedModel) -> None:
    """Make the generation config one that can be saved: published ones hold settings that greedy decoding ignores.

    What the model generates stays the same. The object is replaced and not changed, so that a caller can put it back.
    """
    if not hasattr(model, "generation_config"):  # code of its own, which only computes logits
        model.generation_config = GenerationConfig()  # TRL's trainer writes into it
    if model.generation_config is None or not _fault(model.generation_config):
        return
    found = type(model.generation_config).from_dict(model.generation_config.to_dict())
    unused = ([] if found.do_sample else ONLY_SAMPLING) + ([] if (found.num_beams or 1) > 1 else ONLY_BEAMS)
    for name in unused:
        setattr(found, name, None)
    if _fault(found):
        logger.info("the generation config is left out of checkpoints: %s", _fault(found))
        found = type(found).from_model_config(model.config)
    model.generation_config = found


def _fault(generation_config: Any) -> str | None:
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def window_collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Collator for windows of one length where TRL's own can't be made, which wants a padding token and never uses it.

    Returns:
        None where the tokenizer has such a token.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    padding = tokenizer.pad_token or tokenizer.eos_token
    return None if padding in tokenizer.get_vocab() else DataCollatorForLanguageModeling(pad_token_id=0)
