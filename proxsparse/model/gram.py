"""The Gram matrix of a weight's inputs, its inverse with a damping ladder, and how errors spread to later columns.

Shapes: I = in_features; T = tokens.
"""

import torch
from torch import Tensor

from proxsparse.errors import RunError
from proxsparse.model.prunable import Prunable

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
        """Mean of x x^T; the identity where no token was seen, so that all inputs count alike."""
        if not self.tokens.get(expert):
            return torch.eye(self.width, device=self.device)
        return self.grams[expert] / self.tokens[expert]


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


def spread_of(gram: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """How an error in a column is made up for by the columns after it (https://arxiv.org/abs/2210.17323, section 3.3).

    Args:
        gram: (I, I) mean of x x^T; columns whose inputs are always zero may be in it.
        damping: share of the diagonal's mean that is added to it.
        name: name of the weight, for the error.

    Returns:
        (upper Cholesky factor of the inverse, whose row j spreads an error in column j; (I,) bool, inputs always zero).

    Raises:
        RunError: the matrix can't be inverted.
    """
    dead = gram.diagonal() == 0
    gram = gram.clone()
    gram.diagonal()[dead] = 1
    _, inverse = invert(gram, damping, name)
    spread, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed:
        raise RunError(f"The inverse Gram matrix of {name} is not positive definite; give more calibration tokens.")
    return spread, dead
