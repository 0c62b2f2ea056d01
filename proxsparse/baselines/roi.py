"""RoI: learn an N:M mask with one logit per weight, sampled by the Gumbel top-N; weights are frozen.

    mask = learn_mask(model, tokenizer, windows, output_dir="runs/roi")

MaskLLM has a logit for every mask of a block, so six per block of 2:4 and 70 per block of 4:8. RoI has one per weight,
M per block, for any N:M. The forward pass sees W0 times the sum of N softmaxes of (kappa p + g) / tau, where each
lowers what those before it chose. A block sums to N, but a weight may be chosen more than once, the more so the larger
N is (benchmarks/LOG.md). tau and kappa cool exponentially. The mask keeps the N largest p of every block.

Sources: RoI, https://arxiv.org/abs/2608.23048, for the logits and the cooling; Xie and Ermon, Reparameterizable Subset
Sampling via Continuous Relaxations, https://arxiv.org/abs/1901.10517, for the relaxed top-N. Implemented from
descriptions of the method: kappa and the term that keeps large weights are MaskLLM's; tau's end, the prior's strength
and the missing clipping were chosen by measurement (benchmarks/LOG.md). The trainer is that of ``sampling``. Shapes are
its, too, with M logits per block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from proxsparse.baselines.sampling import INITIAL_STD, SampledConfig, SampledTrainer


@dataclass
class RoIConfig(SampledConfig):
    """A learning rate from 1e-3 to 1e-4, and tau from 1 to 0.2 over the first three quarters of the steps.

    The prior counts twice as much as in MaskLLM, else the first logits' noise turns over entries that matter. Gradients
    are not clipped: near-ties have such large ones that a common norm leaves nothing for the rest.
    """

    learning_rate: float = 1e-3
    tau: tuple[float, float] = (1.0, 0.2)
    cooling: str = "exponential"
    cooled_by: float = 0.75
    prior_strength: float = 6.0
    max_grad_norm: float = 0.0


class RoITrainer(SampledTrainer):
    """One logit per weight: the soft mask is a relaxed choice of the N largest of every block."""

    method = "roi"
    config_class = RoIConfig

    def initial_logits(self, shape: tuple[int, ...], prior: Tensor | None, generator: torch.Generator) -> Tensor:
        """Normal logits, moved towards a prior mask: p += (m0 - N / M) * std * strength.

        With the same strength, the sum over the N weights of a mask moves by as much as MaskLLM's logit of this mask.
        """
        logits = torch.randn(self.pattern.m, *shape[:-1], shape[-1] // self.pattern.m, generator=generator)
        if prior is not None:
            logits += (self._blocks(prior.cpu().float()) - self.pattern.n / self.pattern.m) * self.args.prior_strength
        return logits * INITIAL_STD

    def soft_mask(self, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        perturbed = perturbed.clamp_min_(-1e6)  # noise is -inf where the generator gave zero
        return _rows(relaxed_top(perturbed, self.pattern.n, self.tau)), perturbed

    def of_perturbed(self, of_mask: Tensor, kept: Tensor) -> Tensor:
        with torch.enable_grad():
            kept.requires_grad_()
            soft = relaxed_top(kept, self.pattern.n, self.tau)
        return torch.autograd.grad(soft, kept, self._blocks(of_mask))[0]

    def hard_mask(self, logits: Tensor) -> Tensor:
        return top_mask(logits, self.pattern.n)

    @property
    def tau(self) -> float:
        return self.args.heat(self.state.global_step / self.state.max_steps)[0]

    def _blocks(self, rows: Tensor) -> Tensor:
        """(..., I) -> (M, ..., I / M)."""
        return rows.unflatten(-1, (-1, self.pattern.m)).movedim(-1, 0).contiguous()


learn_mask = RoITrainer.learn_mask


def relaxed_top(scaled: Tensor, n: int, tau: float) -> Tensor:
    """Sum of n softmaxes along the first dimension, of which each lowers what those before it chose.

    After p = softmax(s) the next s is s + log(1 - p) / tau (Xie and Ermon's algorithm 2, with s = a / tau). Every block
    sums to n, but an entry may be above one: what was chosen falls by its lead over the rest divided by tau, and may
    stay above entries that are far below.

    Args:
        scaled: (M, ...) finite.
        n: 1 <= n < M.
        tau: temperature by which ``scaled`` was divided.
    """
    total = torch.zeros_like(scaled)
    for left in reversed(range(n)):
        logs = scaled.log_softmax(0)
        chosen = logs.exp()
        total = total + chosen
        if left:
            scaled = scaled + _log_rest(logs, chosen) / tau
    return total


def top_mask(logits: Tensor, n: int) -> Tensor:
    """Mask of the n largest logits of every block, the earlier one of equals: (M, ..., I / M) -> (..., I) bool."""
    kept = logits.sort(dim=0, descending=True, stable=True).indices[:n]
    return _rows(torch.zeros_like(logits, dtype=torch.bool).scatter_(0, kept, True))


def _log_rest(logs: Tensor, chosen: Tensor) -> Tensor:
    """log(1 - p) of p = ``chosen``, whose logarithms are ``logs``.

    Where p is nearly one the difference has no digits left, so there it is the sum of the others.
    """
    likely = chosen > 0.5  # one of a block at most
    others = logs.masked_fill(likely, -torch.inf).logsumexp(0)
    return torch.where(likely, others, torch.log1p(-chosen.masked_fill(likely, 0.0)))


def _rows(blocks: Tensor) -> Tensor:
    """(M, ..., I / M) -> (..., I)."""
    return blocks.movedim(0, -1).flatten(-2)
