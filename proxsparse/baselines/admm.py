"""ADMM pruning: alternate between a least-squares solution and its projection onto a tightening pattern.

Source: Boza, Fast and Effective Weight Update for Pruned Large Language Models, https://arxiv.org/abs/2401.02938.
Shapes: O = out_features, I = in_features.
"""

import torch
from torch import Tensor

from proxsparse.baselines.hessian import GramMethod
from proxsparse.model.gram import invert
from proxsparse.operator.pattern import Pattern


class ADMM(GramMethod):
    """ADMM: the mask and new values of the kept weights.

    Args:
        damping: added to the diagonal of the normalised Gram matrix, as a share of its mean.
        iterations: number of ADMM iterations in all.
        pruning_iterations: how many of them, from the first, tighten the mask on a cubic schedule; then it is fixed.
    """

    def __init__(self, damping: float = 0.1, iterations: int = 20, pruning_iterations: int = 15):
        self.damping = damping
        self.iterations = iterations
        self.pruning_iterations = min(pruning_iterations, iterations)  # else the mask would not reach its pattern

    def _prune(self, rows: Tensor, gram: Tensor, pattern: Pattern, name: str) -> tuple[Tensor, Tensor]:
        # In units of the inputs' norms the Gram matrix has a unit diagonal and |w| is Wanda's score.
        norm = gram.diagonal().sqrt() + 1e-8
        weight = rows.float() * norm
        gram = gram / norm / norm[:, None]
        gram.diagonal()[gram.diagonal() == 0] = 1  # dead inputs
        damped, _ = invert(gram, self.damping, name)
        identity = torch.eye(len(gram), device=gram.device)
        inverse = torch.linalg.inv(damped + identity)  # penalty parameter rho = 1
        target = weight @ damped
        dual = torch.zeros_like(weight)
        mask = torch.ones_like(weight, dtype=torch.bool)
        for iteration in range(self.iterations):
            if iteration < self.pruning_iterations:
                share = pattern.ratio * (1 - (1 - (iteration + 1) / self.pruning_iterations) ** 3)
                mask = _tightened(weight + dual, pattern, share)
            projected = (weight + dual) * mask
            dual += weight - projected
            weight = (target + projected - dual) @ inverse
        return mask, ((weight + dual) * mask / norm).to(rows.dtype)


def _tightened(weight: Tensor, pattern: Pattern, share: float) -> Tensor:
    """Mask that removes ``share`` of the weights, the smallest ones, but none that the pattern keeps."""
    score = weight.abs()
    if not pattern.structured:
        return Pattern(1, 1, share).mask(score)
    protected = score.masked_fill(pattern.mask(score), torch.inf)
    removed = int(score.numel() * share)
    if removed == 0:
        return torch.ones_like(protected, dtype=torch.bool)
    if share >= pattern.ratio:
        return pattern.mask(score)
    order = protected.flatten().argsort()[:removed]
    return torch.ones_like(protected, dtype=torch.bool).flatten().scatter_(0, order, False).view_as(protected)
