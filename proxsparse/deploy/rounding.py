"""Round weights to few bits so that later inputs make up for the error of earlier ones; zeros stay zeros.

Source: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323, with the zeros of a mask as in SparseGPT
(https://arxiv.org/abs/2301.00774, section 3.5): a pruned entry takes no correction, and its share goes on to the
columns after it. Scales are fixed before any correction, from the pruned weights.
Shapes: O = out_features, I = in_features, G = groups of neighbouring inputs that share a scale.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.deploy.quantise import scales_of
from proxsparse.errors import RunError
from proxsparse.mask import Mask
from proxsparse.model.gram import GramStatistic, spread_of
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.restoring import evaluation_mode
from proxsparse.model.walk import walk

DAMPING = 0.01
UNSEEN = "rounded to nearest"
COLUMNS = 128  # updated together; the result does not depend on it


@torch.no_grad()
def round_layers(model: PreTrainedModel, mask: Mask, windows: Tensor, settings: Any) -> dict[str, Tensor]:
    """Round the linear weights in the layers of a pruned model, in place, each to multiples of its scales.

    Args:
        model: every linear weight in its layers is an nn.Linear.
        mask: its kept weights are rounded, the others become +0.0.
        windows: (N, T) calibration token ids.
        settings: QuantizationArgs of compressed-tensors, with ``num_bits`` and ``group_size``.

    Returns:
        Name of a weight -> (O, G) scales, in the weight's dtype.

    Raises:
        RunError: a weight or all its inputs are not finite, or the inputs make no matrix that can be inverted.
    """
    scales: dict[str, Tensor] = {}
    targets = find_prunable(model, multiple=1)
    with evaluation_mode(model):
        for _, own, statistics in walk(model, targets, windows, GramStatistic, progress="rounding", unseen_are=UNSEEN):
            for target in own:
                kept = mask.tensors.get(target.name)
                scales[target.name] = _round_one(target, kept, statistics[target.name], settings)
    return scales


def _round_one(target: Prunable, kept: Tensor | None, statistic: GramStatistic, settings: Any) -> Tensor:
    """Round a weight in place, and return its scales."""
    weight = target.weight.detach()
    if not weight.isfinite().all():
        raise RunError(f"{target.name} has NaN or infinite entries; the checkpoint is damaged.")
    kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept.to(weight.device)
    weight.masked_fill_(~kept, 0.0)
    scale = scales_of(weight, settings)
    spread, _ = spread_of(statistic.gram(None), DAMPING, target.name)
    rounded = round_columns(weight.float(), kept, scale.float(), spread, settings.num_bits)
    if (statistic.skipped and not statistic.tokens.get(None)) or not rounded.isfinite().all():
        raise RunError(f"{target.name} can't be rounded: its inputs are not finite, or degenerate.")
    weight.copy_(rounded)
    return scale.cpu()


def round_columns(weight: Tensor, kept: Tensor, scale: Tensor, spread: Tensor, bits: int) -> Tensor:
    """Round the columns of a weight from left to right, and let the ones to the right make up for the error.

    Args:
        weight: (O, I) float32; overwritten.
        kept: (O, I) bool; the others become zero.
        scale: (O, G) float32.
        spread: (I, I), see ``spread_of``.
        bits: codes lie between -2^(bits - 1) and 2^(bits - 1) - 1.

    Returns:
        (O, I) float32 multiples of the scales.
    """
    width, least, most = weight.shape[1] // scale.shape[1], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        own = spread[start:stop, start:stop]
        errors = torch.zeros_like(weight[:, start:stop])
        for column in range(stop - start):
            j = start + column
            step = scale[:, j // width]
            rounded = (weight[:, j] / step).round().clamp(least, most) * step
            rounded = torch.where(kept[:, j], rounded, 0.0)
            errors[:, column] = (weight[:, j] - rounded) / own[column, column]
            weight[:, j + 1 : stop] -= errors[:, column, None] * own[column, column + 1 :]
            weight[:, j] = rounded
        weight[:, stop:] -= errors @ spread[start:stop, stop:]
    return weight
