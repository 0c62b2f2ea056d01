"""Sparsity patterns: parse one, make a mask from scores, find violations, check a mask.

Shapes: (..., I) rows with the input dimension last; a block is m neighbours along it.
"""

import contextlib
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from proxsparse.errors import RunError, UsageError


@dataclass(frozen=True)
class Pattern:
    """A pattern: N:M (n kept of every m), mixed N:M (every weight has its own n), or unstructured with a ratio.

    Attributes:
        n: entries kept of every m; 0 for a mixed pattern.
        m: block length; 1 for an unstructured pattern.
        ratio: share of weights removed; 0.5 for a mixed pattern, whose share is not known.
    """

    n: int
    m: int
    ratio: float = 0.5

    @classmethod
    def parse(cls, text: str, ratio: float = 0.5) -> "Pattern":
        """Read '2:4', '4:8', any other 'N:M', 'mixed N:8', or 'unstructured' with a ratio.

        Raises:
            UsageError: the text is no pattern, or the ratio contradicts it.
        """
        if not isinstance(text, str):
            raise UsageError(f"The pattern must be text such as 2:4; got {text!r}.", "sparsity_type")
        if text == "unstructured":
            if not 0 < ratio < 1:
                raise UsageError(
                    f"`sparsity_ratio` must be between 0 and 1 for an unstructured pattern; got {ratio}.",
                    "sparsity_ratio",
                )
            return cls(1, 1, ratio)
        found = re.fullmatch(r"(mixed N|[1-9]\d{0,3}):([1-9]\d{0,3})", text, re.ASCII)
        n = 0 if found is None or found[1] == "mixed N" else int(found[1])
        m = 0 if found is None else int(found[2])
        if found is None or n >= m or m < 2:
            raise UsageError(
                f"The pattern must be N:M with N < M, as 2:4, or 'unstructured'; got {text!r}.", "sparsity_type"
            )
        if not n:
            return cls(0, m)
        if ratio != 0.5 and not math.isclose(ratio, 1 - n / m, abs_tol=1e-3):
            raise UsageError(
                f"`sparsity_ratio={ratio}` contradicts `sparsity_type={text}`, which removes {1 - n / m:.3g}.",
                "sparsity_ratio",
            )
        return cls(n, m, 1 - n / m)

    @classmethod
    def of_blocks(cls, text: "str | Pattern") -> "Pattern":
        """Read 'N:M', and nothing else; a pattern is read as its text.

        Raises:
            UsageError: the text is another pattern, or none.
        """
        text = str(text) if isinstance(text, cls) else text
        if isinstance(text, str) and text != "unstructured":
            with contextlib.suppress(UsageError):
                found = cls.parse(text)
                if found.is_nm:
                    return found
        raise UsageError(f"`pattern` must be N:M with N < M, as 2:4 or 4:8; got {text!r}.", "pattern")

    @property
    def structured(self) -> bool:
        return self.m > 1

    @property
    def is_nm(self) -> bool:
        """Whether every weight keeps the same n of every m."""
        return self.structured and self.n > 0

    def __str__(self) -> str:
        return f"{self.n or 'mixed N'}:{self.m}" if self.structured else "unstructured"

    def mask(self, scores: Tensor) -> Tensor:
        """Mask of the largest scores of every block, or of every row if unstructured. Ties: the earlier one is kept.

        Args:
            scores: (..., I), at least zero.

        Returns:
            bool, True = keep.

        Raises:
            ValueError: I is no multiple of m, or the pattern is mixed.

        Source: unstructured masks compare within a row, as Wanda does (https://arxiv.org/abs/2306.11695).
        """
        if self.structured:
            if not self.n:
                raise ValueError(f"{self} is no pattern to prune to: give one n for every weight.")
            return nm_mask(scores, self.n, self.m)
        removed = int(scores.shape[-1] * self.ratio)
        order = scores.sort(dim=-1, stable=True).indices[..., :removed]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order, False)

    def violations(self, rows: Tensor) -> Tensor:
        """Blocks with more than n non-zeros: (..., I) -> (..., I / m) bool. Unstructured and mixed patterns have none.

        Raises:
            ValueError: I is no multiple of m.
        """
        most = self.n if self.n and self.structured else self.m
        return (rows.unflatten(-1, (-1, self.m)) != 0).sum(-1) > most

    def check(self, mask: Tensor, name: str) -> None:
        """Check that every block of a mask keeps exactly n of m; in a mixed pattern, the same number of m everywhere.

        Args:
            mask: (..., I) bool.
            name: name of the weight, for the error.

        Raises:
            RunError: a block keeps another number; the message names the first one.
        """
        if not self.structured:
            return
        if mask.shape[-1] % self.m:
            raise RunError(
                f"The mask of {name} has width {mask.shape[-1]}, which has no blocks of {self.m}; it is not {self}."
            )
        kept = mask.unflatten(-1, (-1, self.m)).sum(-1).flatten()
        wrong = kept != (self.n or kept[0])
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise RunError(
                f"The mask of {name} is not {self}: {int(wrong.sum())} blocks differ, the first is block {first}."
            )


TWO_OF_FOUR = Pattern(2, 4)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Boolean mask of the n largest |score| of every m consecutive entries; ties go to the earlier entry.

    Args:
        scores: (..., I), I a multiple of m.
        n: entries kept of every m, 1 <= n <= m.
        m: block length.

    Raises:
        ValueError: I is no multiple of m, or n is not in 1..m.
    """
    if scores.dim() == 0 or scores.shape[-1] % m:
        raise ValueError(f"The last dimension must be a multiple of {m} for {n}:{m} blocks, got {tuple(scores.shape)}.")
    if not 1 <= n <= m:
        raise ValueError(f"n must be between 1 and {m} in an n:{m} pattern, got {n}.")
    blocks = scores.detach().abs().unflatten(-1, (-1, m))
    kept = blocks.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)
