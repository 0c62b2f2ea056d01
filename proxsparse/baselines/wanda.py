"""Wanda: keep the largest |w_ij| * ||x_j||. No update.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, https://arxiv.org/abs/2306.11695.
"""

from torch import Tensor

from proxsparse.baselines.method import OneShot, Wanted
from proxsparse.model.inputs import NormStatistic
from proxsparse.model.prunable import Prunable
from proxsparse.operator.pattern import Pattern
from proxsparse.operator.prox import expand_scale


class Wanda(OneShot):
    def inputs_of(self, wanted: Wanted, reordered: bool) -> str:
        """Dense where the channels were reordered: the order was chosen by these scores, and others fit it worse."""
        return wanted.inputs or ("dense" if reordered else "pruned")

    def statistic(self, target: Prunable) -> NormStatistic:
        return NormStatistic(target)

    def prune(self, rows: Tensor, statistic: NormStatistic, pattern: Pattern) -> tuple[Tensor, None]:
        return pattern.mask(rows.abs() * expand_scale(statistic.norm(), rows)), None
