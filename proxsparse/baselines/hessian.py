"""The Gram matrix of a weight's inputs, and its inverse with a damping ladder; shared by SparseGPT and ADMM.

Shapes: I = in_features; T = tokens.
"""

import torch
from torch import Tensor

from proxsparse.baselines.method import OneShot
from proxsparse.errors import RunError
from proxsparse.model.prunable import Prunable
from proxsparse.operator.pattern import Pattern

DAMPING_STEPS = 6


class GramStatistic:
    """Running mean of X^T X over tokens: (I, I) float32, one per expert. Non-finite tokens are skipped and counted."""

    def __init__(self, target: Prunable):
        self.name = target.name
        self.width = target.weight.shape[target.in_dim]
        self.device = target.weight.device
        self.grams: dict[int | None, Tensor] = {}
        self.tokens: dict[int | None, int] = {}
        self.skipped = 0

    def add(self, expert: int | None, inputs: Tensor) -> None:
        finite = inputs.isfinite().all(-1)
        if not finite.all():
            self.skipped += int((~finite).sum())
            inputs = inputs[finite]
        gram = self.grams.setdefault(expert, torch.zeros(self.width, self.width, device=self.device))
        gram.addmm_(inputs.T, inputs)
        self.tokens[expert] = self.tokens.get(expert, 0) + len(inputs)

    def gram(self, expert: int | None) -> Tensor:
        """Mean of x x^T; the identity where an expert saw no token, so that it is pruned by magnitude."""
        if not self.tokens.get(expert):
            return torch.eye(self.width, device=self.device)
        return self.grams[expert] / self.tokens[expert]


class GramMethod(OneShot):
    """A method that solves one matrix at a time with the Gram matrix of its inputs, and changes weights."""

    updates_weights = True

    def statistic(self, target: Prunable) -> GramStatistic:
        return GramStatistic(target)

    def prune(self, rows: Tensor, statistic: GramStatistic, pattern: Pattern) -> tuple[Tensor, Tensor]:
        if rows.dim() == 3:
            parts = [self._prune(w, statistic.gram(e), pattern, statistic.name) for e, w in enumerate(rows)]
            masks, weights = zip(*parts, strict=True)
            return torch.stack(masks), torch.stack(weights)
        return self._prune(rows, statistic.gram(None), pattern, statistic.name)

    def _prune(self, rows: Tensor, gram: Tensor, pattern: Pattern, name: str) -> tuple[Tensor, Tensor]:
        """(mask, new weights) of one (O, I) matrix."""
        raise NotImplementedError


def invert(gram: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """Inverse of gram + damping * mean(diag) * I, with ten times the damping wherever Cholesky fails.

    Args:
        gram: (I, I) symmetric, diagonal > 0.
        name: name of the weight, for the error.

    Returns:
        (damped gram, its inverse).

    Raises:
        RunError: not positive definite even with 10^5 times the damping.
    """
    mean = gram.diagonal().mean()
    for attempt in range(DAMPING_STEPS):
        damped = gram.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            inverse = torch.cholesky_inverse(factor)
            if inverse.isfinite().all():
                return damped, inverse
    raise RunError(f"The inputs of {name} have no positive definite Gram matrix: too few or broken calibration tokens.")
