"""Sparsity patterns, and the masks they make of scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from proxsparse.errors import UsageError
from proxsparse.mask import parse_pattern
from proxsparse.prox_op import nm_mask


@dataclass(frozen=True)
class Pattern:
    """N:M (n kept of every m), or unstructured with a ratio.

    Attributes:
        n, m: block pattern; m = 1 means unstructured.
        ratio: share of weights removed.
    """

    n: int
    m: int
    ratio: float

    @classmethod
    def parse(cls, text: str, ratio: float = 0.5) -> "Pattern":
        """From '2:4', '4:8', any 'N:M', or 'unstructured' with a ratio.

        Raises:
            UsageError: not a pattern, or a ratio that the pattern contradicts.
        """
        nm = parse_pattern(text)
        if nm is None:
            if not 0 < ratio < 1:
                raise UsageError(f"--sparsity_ratio must be between 0 and 1 for an unstructured pattern; got {ratio}.")
            return cls(1, 1, ratio)
        n, m = nm
        if ratio not in (0.5, 1 - n / m):
            raise UsageError(
                f"--sparsity_ratio {ratio} contradicts --sparsity_type {text}, which removes {1 - n / m:.3g}."
            )
        return cls(n, m, 1 - n / m)

    @property
    def structured(self) -> bool:
        return self.m > 1

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else "unstructured"

    def mask(self, scores: Tensor) -> Tensor:
        """Mask of the largest scores: of every block, or of every row (as Wanda compares).

        Args:
            scores: (..., I), at least zero.

        Returns:
            bool, True = keep.
        """
        if self.structured:
            return nm_mask(scores, self.n, self.m)
        removed = int(scores.shape[-1] * self.ratio)
        order = scores.sort(dim=-1, stable=True).indices[..., :removed]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, False)
