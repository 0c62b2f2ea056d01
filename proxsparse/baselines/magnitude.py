"""Magnitude pruning: keep the largest |w|. No data, no update."""

from torch import Tensor

from proxsparse.baselines.method import OneShot
from proxsparse.model.prunable import Prunable
from proxsparse.operator.pattern import Pattern


class Magnitude(OneShot):
    reads_text = False

    def statistic(self, target: Prunable) -> None:
        return None

    def prune(self, rows: Tensor, statistic: None, pattern: Pattern) -> tuple[Tensor, None]:
        return pattern.mask(rows.abs()), None
