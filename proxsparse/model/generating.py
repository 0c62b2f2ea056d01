"""Text that a model writes itself, as tokens."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from proxsparse.errors import UsageError
from proxsparse.model.restoring import evaluation_mode

TOKENS_AT_ONCE = 1 << 14  # sequences are written together up to this many tokens, which bounds the cache


def sample_tokens(model: PreTrainedModel, first: Tensor, length: int, seed: int) -> Tensor:
    """Sequences sampled from a model at temperature 1, from all of its vocabulary; an end token does not end them.

    Sequences are written in batches with the model's cache, on its device. The same seed gives the same tokens on the
    same kind of device; the state of torch's generators stays as it is.

    Args:
        first: (N, 1) token ids that the sequences begin with.
        length: tokens per sequence, the first included.
        seed: seed of the sampling.

    Returns:
        (N, length) int64 on the CPU.

    Raises:
        UsageError: the model can't generate.
    """
    # An end token would fill the rest with padding. Without one here generate() asks the model's own configuration.
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=0, use_cache=True)
    if not model.can_generate():  # code of its own that computes logits only
        raise UsageError(
            f"The {type(model).__name__} can't write text by itself: give another text than self.", "dataset"
        )
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    own = model.generation_config
    kind, index = model.device.type, model.device.index or 0
    with torch.random.fork_rng([] if kind == "cpu" else [index], device_type="cuda" if kind == "cpu" else kind):
        torch.default_generator.manual_seed(seed)  # not manual_seed, which seeds every device there is
        if kind != "cpu":
            torch.get_device_module(kind).manual_seed(seed)
        model.generation_config = settings
        try:
            batches = first.to(model.device).split(max(1, TOKENS_AT_ONCE // length))
            with evaluation_mode(model):
                found = [generate(batch, attention_mask=torch.ones_like(batch)).cpu() for batch in batches]
        finally:
            model.generation_config = own
    return torch.cat(found)
