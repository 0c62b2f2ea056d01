"""What SparseGPT and ADMM share: one matrix at a time is solved with the Gram matrix of its inputs.

Shapes: O = out_features, I = in_features.
"""

import torch
from torch import Tensor

from proxsparse.baselines.method import OneShot
from proxsparse.model.gram import GramStatistic
from proxsparse.model.prunable import Prunable
from proxsparse.operator.pattern import Pattern


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
