"""One-shot baselines: magnitude, Wanda, SparseGPT and ADMM, on one calibration walk for every architecture.

A method is a class with two members: ``statistic(target)`` makes what it collects of a weight's inputs (or None), and
``prune(rows, statistic, pattern)`` returns (mask, new weights or None).
"""

from typing import Any

from proxsparse.baselines.admm import ADMM
from proxsparse.baselines.magnitude import Magnitude
from proxsparse.baselines.sparsegpt import SparseGPT
from proxsparse.baselines.wanda import Wanda
from proxsparse.operator.pattern import Pattern

METHODS: dict[str, type[Any]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "admm": ADMM}

__all__ = ["ADMM", "METHODS", "Magnitude", "Pattern", "SparseGPT", "Wanda"]
