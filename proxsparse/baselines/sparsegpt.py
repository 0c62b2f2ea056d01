"""SparseGPT: remove columns from left to right, and let the columns to the right make up for the error.

Source: Frantar and Alistarh, SparseGPT, https://arxiv.org/abs/2301.00774.
Shapes: O = out_features, I = in_features.
"""

import torch
from torch import Tensor

from proxsparse.baselines.hessian import GramMethod
from proxsparse.model.gram import spread_of
from proxsparse.operator.pattern import Pattern


class SparseGPT(GramMethod):
    """SparseGPT: the mask and new values of the kept weights.

    Args:
        damping: added to the diagonal of the Hessian, as a share of its mean.
        block_size: columns updated together; the result does not depend on it for N:M patterns.
    """

    def __init__(self, damping: float = 0.01, block_size: int = 128):
        self.damping = damping
        self.block_size = block_size

    def _prune(self, rows: Tensor, gram: Tensor, pattern: Pattern, name: str) -> tuple[Tensor, Tensor]:
        weight = rows.float().clone()
        spread, dead = spread_of(gram, self.damping, name)
        weight[:, dead] = 0
        keep = torch.ones_like(weight, dtype=torch.bool)
        size = self.block_size
        if pattern.structured:
            size = max(pattern.m, size - size % pattern.m)
        for start in range(0, weight.shape[1], size):
            stop = min(start + size, weight.shape[1])
            own = spread[start:stop, start:stop]
            errors = torch.zeros_like(weight[:, start:stop])
            if not pattern.structured:
                score = weight[:, start:stop].square() / own.diagonal().square()
                removed = int(score.numel() * pattern.ratio)
                threshold = score.flatten().kthvalue(max(1, removed)).values
                keep[:, start:stop] = score > threshold
            for column in range(stop - start):
                j = start + column
                if pattern.structured and column % pattern.m == 0:
                    group = slice(column, column + pattern.m)
                    score = weight[:, j : j + pattern.m].square() / own.diagonal()[group].square()
                    keep[:, j : j + pattern.m] = pattern.mask(score)
                error = torch.where(keep[:, j], 0.0, weight[:, j]) / own[column, column]
                weight[:, j:stop] -= error[:, None] * own[column, column:]
                errors[:, column] = error
            weight[:, stop:] -= errors @ spread[start:stop, stop:]
        return keep, (weight * keep).to(rows.dtype)
