"""MaskLLM: learn which of the six 2:4 masks each block takes, by sampling with the Gumbel softmax; weights are frozen.

    mask = learn_mask(model, tokenizer, windows, output_dir="runs/maskllm")

Every block of four has six logits p. The forward pass sees W0 * sum_k y_k M_k with y = softmax((kappa p + g) / tau),
g Gumbel noise; over the run tau falls and kappa rises, so that the choice hardens. The mask is the argmax of p.

Source: Fang et al., MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models,
https://arxiv.org/abs/2409.17481; implemented from the paper's mathematics.
The trainer is that of ``sampling``. Shapes are its, too, with six logits per block of four.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from proxsparse.baselines.sampling import INITIAL_STD, SampledConfig, SampledTrainer
from proxsparse.operator.pattern import TWO_OF_FOUR

# The six ways to keep two of four.
MASKS = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.float32
)


@dataclass
class MaskLLMConfig(SampledConfig):
    """The paper's settings."""


class MaskLLMTrainer(SampledTrainer):
    """One logit per mask: the soft mask is sum_k y_k M_k."""

    method = "maskllm"
    config_class = MaskLLMConfig
    only = TWO_OF_FOUR

    def initial_logits(self, shape: tuple[int, ...], prior: Tensor | None, generator: torch.Generator) -> Tensor:
        return initial_logits(shape, prior, self.args.prior_strength, generator)

    def soft_mask(self, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        choice = perturbed.softmax(0)
        return _mixed(choice), choice

    def of_perturbed(self, of_mask: Tensor, kept: Tensor) -> Tensor:
        """In closed form, that of the softmax."""
        of_choice = _overlap(of_mask)
        return of_choice.sub_((kept * of_choice).sum(0)).mul_(kept)

    def hard_mask(self, logits: Tensor) -> Tensor:
        return hard_mask(logits)


learn_mask = MaskLLMTrainer.learn_mask


def initial_logits(shape: tuple[int, ...], prior: Tensor | None, strength: float, generator: torch.Generator) -> Tensor:
    """Normal logits, moved towards a prior mask: p_k += (<M_k, m0> - 1) * std * strength.

    Args:
        shape: (..., I) of the weight with the input dimension last.
        prior: bool of that shape, or None.

    Returns:
        (6, ..., I / 4) float32.
    """
    logits = torch.randn(6, *shape[:-1], shape[-1] // 4, generator=generator) * INITIAL_STD
    if prior is not None:
        logits += (_overlap(prior.cpu().float()) - 1) * INITIAL_STD * strength
    return logits


def hard_mask(logits: Tensor) -> Tensor:
    """Mask of the largest logits: (6, ..., I / 4) -> (..., I) bool."""
    return MASKS.to(logits.device)[logits.argmax(0)].flatten(-2).bool()


def _mixed(choice: Tensor) -> Tensor:
    """sum_k y_k M_k of every block: (6, ..., I / 4) -> (..., I)."""
    return (choice.flatten(1).T @ MASKS.to(choice.device)).view(*choice.shape[1:-1], -1)


def _overlap(rows: Tensor) -> Tensor:
    """<M_k, block> of every block: (..., I) -> (6, ..., I / 4)."""
    overlap = MASKS.to(rows.device) @ rows.reshape(-1, 4).T
    return overlap.view(6, *rows.shape[:-1], -1)
