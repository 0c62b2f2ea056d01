"""Perplexity of a model on windows of text, measured as in papers.

    perplexity = exp(mean over windows of the mean cross-entropy of the window's tokens, each given those before it)

A window of ctx_len tokens has ctx_len - 1 predictions. Logits are compared in float32.
"""

import logging
import math
import time
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from proxsparse.errors import RunError, doing
from proxsparse.model.prunable import no_model
from proxsparse.model.restoring import evaluation_mode
from proxsparse.model.windows import check_whole, check_windows

logger = logging.getLogger(__name__)

POSITIONS_AT_ONCE = 1024  # float32 copies of the logits of this many positions, of all windows, exist at a time
TOKENS_AT_ONCE = {"cuda": 32768, "cpu": 2048}


class Perplexity(NamedTuple):
    """Perplexity of one text.

    Attributes:
        perplexity: exp(nll); infinity where that is above the largest float (nll above 709).
        standard_error: standard error of the perplexity, from the spread over windows (delta method).
        nll: mean negative log-likelihood per token, in nats.
        windows: number of windows.
        ctx_len: tokens per window.
        seconds: wall time.
    """

    perplexity: float
    standard_error: float
    nll: float
    windows: int
    ctx_len: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.windows * self.ctx_len / self.seconds


def fitting_batch_size(model: PreTrainedModel, ctx_len: int) -> int:
    """Windows that the device computes together with room to spare.

    More than ``TOKENS_AT_ONCE`` tokens make nothing faster; a batch takes at most a quarter of the free memory.
    """
    config = model.config.get_text_config()
    width = getattr(config, "hidden_size", None) or next(model.get_input_embeddings().parameters()).shape[-1]
    # Logits in the model's dtype and one chunk in float32; about twenty hidden states of a layer in flight.
    token = config.vocab_size * model.dtype.itemsize + 20 * width * model.dtype.itemsize
    chunk = POSITIONS_AT_ONCE * config.vocab_size * 8
    accelerated = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if accelerated else psutil.virtual_memory().available
    fitting = int((free / 4 - chunk) / (token * ctx_len))
    return max(1, min(fitting, TOKENS_AT_ONCE["cuda" if accelerated else "cpu"] // ctx_len))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Tensor, batch_size: int | None = 1, *, progress: str | None = None
) -> Perplexity:
    """Measure the perplexity of ``model`` on ``windows``.

    Args:
        model: a causal language model.
        windows: (n, ctx_len) token ids, on any device.
        batch_size: windows computed together; the result does not depend on it beyond rounding. None: as many as fit.
        progress: label of a progress bar, or None for none.

    Raises:
        UsageError: that is no model, or these are no windows of it.
        RunError: the model's output is not finite.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise no_model(model)
    check_windows(windows, model.config)
    if batch_size is not None:
        check_whole("batch_size", batch_size)
    start = time.perf_counter()
    with doing(f"measuring the perplexity on {progress or f'{len(windows)} windows'}"):
        nll = _all_losses(model, windows, batch_size, progress)
    if not nll.isfinite().all():
        bad = int((~nll.isfinite()).nonzero()[0])
        raise RunError(
            f"The model's loss is not finite on window {bad}: its weights are damaged, or its dtype overflows."
        )
    mean = nll.mean().item()
    error = nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else 0.0
    value = _exponential(mean)
    if math.isinf(value):
        logger.warning("the mean loss is %.1f nats per token: its exponential is written as infinity", mean)
        error = math.inf
    else:
        error *= value
    return Perplexity(value, error, mean, len(nll), windows.shape[1], time.perf_counter() - start)


def _all_losses(model: PreTrainedModel, windows: Tensor, batch_size: int | None, progress: str | None) -> Tensor:
    """Mean loss of every window, (n,) float64 on the CPU; the model's mode is as before when this ends."""
    with evaluation_mode(model):
        batches = windows.split(batch_size or fitting_batch_size(model, windows.shape[1]))
        shown = tqdm(batches, desc=progress, disable=None if progress else True, leave=False)
        return torch.cat([window_losses(model, batch.to(model.device)).double().cpu() for batch in shown])


def _exponential(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def window_losses(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each window: (n, ctx_len) ids -> (n,) float32."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    targets = batch[:, 1:]
    total = torch.zeros(len(batch), device=logits.device)
    step = max(1, POSITIONS_AT_ONCE // len(batch))
    for start in range(0, targets.shape[1], step):
        part = slice(start, start + step)
        losses = cross_entropy(logits[:, part].float().transpose(1, 2), targets[:, part], reduction="none")
        total += losses.sum(1)
    return total / targets.shape[1]
