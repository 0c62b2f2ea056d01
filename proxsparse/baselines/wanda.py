"""Wanda: keep the largest |w_ij| * ||x_j||. No update.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, https://arxiv.org/abs/2306.11695.
"""

from torch import Tensor

from proxsparse.baselines.method import OneShot
from proxsparse.model.inputs import NormStatistic
from proxsparse.model.prunable import Prunable
from proxsparse.operator.pattern import Pattern
from proxsparse.operator.prox import expand_scale


class Wanda(OneShot):
    def statistic(self, target: Prunable) -> NormStatistic:
        return NormStatistic(target)

    def prune(self, rows: Tensor, statistic: NormStatistic, pattern: Pattern) -> tuple[Tensor, None]:
        return pattern.mask(rows.abs() * expand_scale(statistic.norm(), rows)), None
