"""Baselines for every architecture: magnitude, Wanda, SparseGPT and ADMM are one-shot, MaskLLM and RoI learn."""

from proxsparse.baselines.admm import ADMM
from proxsparse.baselines.magnitude import Magnitude
from proxsparse.baselines.method import MaskLLM, Method, OneShot, RoI, Wanted
from proxsparse.baselines.sparsegpt import SparseGPT
from proxsparse.baselines.wanda import Wanda
from proxsparse.operator.pattern import Pattern

ONE_SHOT: dict[str, type[OneShot]] = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT, "admm": ADMM}
METHODS: dict[str, type[Method]] = {**ONE_SHOT, "maskllm": MaskLLM, "roi": RoI}

__all__ = [
    "ADMM",
    "METHODS",
    "ONE_SHOT",
    "Magnitude",
    "MaskLLM",
    "Method",
    "Pattern",
    "RoI",
    "SparseGPT",
    "Wanda",
    "Wanted",
]
