"""What share of each layer is removed: OWL and AlphaPruning, instead of the same share everywhere.

Both give layers different shares, as unstructured patterns or as N of every 8. At 2:4 every layer has the same share,
so both are refused there.

Sources: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), https://arxiv.org/abs/2310.05175;
Lu et al., AlphaPruning, https://arxiv.org/abs/2410.10912.
Shapes: L = layers with something to prune. In the names of this module a block is a layer.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import UsageError
from proxsparse.model.inputs import input_norms
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.operator.pattern import Pattern
from proxsparse.operator.prox import expand_scale

ALLOCATIONS = ("uniform", "owl", "alphapruning")
SHORTEST_BLOCK = 8  # N:M patterns with shorter blocks leave no room between N-1, N and N+1
MOST_REMOVED, LEAST_REMOVED = 0.99, 0.01


def allocate(
    model: PreTrainedModel,
    pattern: Pattern,
    allocation: str,
    windows: Tensor,
    *,
    outlier: float = 5.0,
    spread: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> dict[int, Pattern]:
    """A pattern for every layer; on average they remove the share that is asked for.

    Args:
        pattern: what to reach on average over all prunable weights.
        allocation: 'uniform', 'owl' or 'alphapruning'.
        windows: (N, T) calibration token ids; OWL reads them, the others do not.
        outlier: OWL's M: a score counts as an outlier above M times its matrix's mean.
        spread: how far layers may move from the average share; default 0.08 for OWL, 0.3 for AlphaPruning.
        include, exclude: of ``find_prunable``.

    Returns:
        index of every layer that has something to prune -> its pattern.

    Raises:
        UsageError: an unknown allocation, or one that the pattern leaves no freedom for.
    """
    if allocation not in ALLOCATIONS:
        raise UsageError(f"`allocation` must be one of {', '.join(ALLOCATIONS)}; got {allocation!r}.")
    targets = find_prunable(model, include, exclude, multiple=pattern.m)
    blocks = sorted({target.block for target in targets})
    if allocation == "uniform":
        return dict.fromkeys(blocks, pattern)
    entries = [sum(t.weight.numel() for t in targets if t.block == block) for block in blocks]
    sizes = torch.tensor(entries, dtype=torch.float64)
    refuse_without_freedom(pattern, allocation)
    if allocation == "owl":
        shares = owl_shares(outlier_ratios(model, targets, windows, outlier), sizes, pattern.ratio, spread or 0.08)
    else:
        shares = alpha_shares(tail_exponents(targets), sizes, pattern.ratio, spread or 0.3)
    if not pattern.structured:
        return {block: Pattern(1, 1, share) for block, share in zip(blocks, shares.tolist(), strict=True)}
    kept = whole_numbers(shares, sizes, pattern)
    return {block: Pattern(n, pattern.m, 1 - n / pattern.m) for block, n in zip(blocks, kept, strict=True)}


def refuse_without_freedom(pattern: Pattern, allocation: str) -> None:
    if pattern.structured and pattern.m < SHORTEST_BLOCK:
        raise UsageError(
            f"`allocation={allocation}` gives layers different shares, and {pattern} fixes the share of every "
            f"one. Use it with `sparsity_type=unstructured` or with blocks of 8 or more, such as 4:8, or leave "
            "`allocation=uniform`."
        )


def outlier_ratios(model: PreTrainedModel, targets: list[Prunable], windows: Tensor, outlier: float) -> Tensor:
    """Percent of a layer's Wanda scores that lie above ``outlier`` times their mean: (L,) float64 (OWL's D)."""
    norms = input_norms(model, targets, windows)
    scores: dict[int, list[Tensor]] = {}
    ratios = []
    for place, target in enumerate(targets):
        rows = target.rows(target.weight.detach()).float()
        scores.setdefault(target.block, []).append((rows.abs() * expand_scale(norms[target.name], rows)).flatten())
        if place + 1 == len(targets) or targets[place + 1].block != target.block:
            pooled = torch.cat(scores.pop(target.block))
            ratios.append(100 * (pooled > outlier * pooled.mean()).double().mean())
    return torch.stack(ratios).cpu()


def owl_shares(ratios: Tensor, sizes: Tensor, share: float, spread: float) -> Tensor:
    """Share removed of every layer: layers with more outliers lose less, within 2 * ``spread`` of each other.

    Args:
        ratios: (L,) percent of outliers.
        sizes: (L,) weights per layer.
    """
    span = (ratios.max() - ratios.min()).clamp_min(1e-12)
    kept = 2 * spread * (ratios - ratios.min()) / span
    return _balanced(1 - kept, sizes, share)


def tail_exponents(targets: list[Prunable]) -> Tensor:
    """Mean power-law exponent of the spectra of a layer's matrices: (L,) float64 (AlphaPruning's alpha)."""
    exponents: dict[int, list[float]] = {}
    for target in targets:
        rows = target.rows(target.weight.detach())
        for matrix in rows if rows.dim() == 3 else (rows,):
            # On the CPU from here on: accelerators have no histograms, and some no float64.
            spectrum = torch.linalg.svdvals(matrix.float()).cpu().double().square()
            exponents.setdefault(target.block, []).append(tail_exponent(spectrum))
    return torch.tensor([sum(found) / len(found) for _, found in sorted(exponents.items())], dtype=torch.float64)


def tail_exponent(spectrum: Tensor) -> float:
    """Exponent alpha of the power law that fits the upper tail of a spectrum best ('alpha peak').

    The tail begins at a candidate near the fullest bin of the spectrum's logarithm; among the candidates the one with
    the least Kolmogorov-Smirnov distance between tail and fit wins.

    Args:
        spectrum: eigenvalues (squared singular values), in any order.
    """
    values = spectrum.double().sort().values
    values = values[values > 1e-12 * values[-1]]
    logs = values.log()
    count = len(values)
    if count < 3:
        return float("inf")
    edges = torch.linspace(logs[0].item(), logs[-1].item() + 1e-9, 101, dtype=torch.float64)
    peak = torch.histogram(logs, edges).hist.argmax()
    candidates = (logs <= edges[peak] + math.log(1.5)).nonzero().flatten()
    best = (float("inf"), 1.0)
    sums = logs.flip(0).cumsum(0).flip(0)
    for i in candidates[candidates < count - 1].tolist():
        n = count - i
        excess = sums[i] - n * logs[i]
        if excess <= 0:
            continue
        alpha = 1 + n / excess.item()
        fitted = 1 - ((logs[i:] - logs[i]) * (1 - alpha)).exp()
        distance = (fitted - torch.arange(n, dtype=torch.float64) / n).abs().max().item()
        best = min(best, (distance, alpha))
    return best[1]


def alpha_shares(exponents: Tensor, sizes: Tensor, share: float, spread: float) -> Tensor:
    """Share removed of every layer: a layer with a larger exponent (a lighter tail, less trained) loses more.

    Shares lie between (1 - spread) and (1 + spread) of a common factor.

    Args:
        exponents: (L,) of ``tail_exponents``.
        sizes: (L,) weights per layer.
    """
    span = (exponents.max() - exponents.min()).clamp_min(1e-12)
    relative = 1 - spread + 2 * spread * (exponents - exponents.min()) / span
    shares = relative * (share * sizes.sum() / (sizes * relative).sum())
    return shares if shares.max() <= MOST_REMOVED else _balanced(shares, sizes, share)


def whole_numbers(shares: Tensor, sizes: Tensor, pattern: Pattern) -> list[int]:
    """Weights kept of every m in each layer: rounded shares, corrected one by one until the average is the pattern's.

    A correction goes to the layer whose rounding error it reduces most.
    """
    wished = pattern.m * (1 - shares)
    kept = wished.round().clamp(1, pattern.m)
    target = (pattern.n * sizes.sum()).item()
    while abs(excess := (kept * sizes).sum().item() - target) > 0.5 * sizes.min().item():
        step = -1.0 if excess > 0 else 1.0
        error = torch.where((kept + step >= 1) & (kept + step <= pattern.m), (kept + step - wished).abs(), torch.inf)
        block = int(error.argmin())
        if abs(excess + step * sizes[block].item()) >= abs(excess):
            break  # layers of unequal size: nothing comes nearer
        kept[block] += step
    return [int(n) for n in kept]


def _balanced(shares: Tensor, sizes: Tensor, share: float) -> Tensor:
    """Shift shares by a constant until their mean, weighted by size, is ``share``. All stay in [0.01, 0.99]."""
    low, high = -1.0 - shares.max().item(), 1.0 - shares.min().item()
    for _ in range(60):
        middle = (low + high) / 2
        mean = ((shares + middle).clamp(LEAST_REMOVED, MOST_REMOVED) * sizes).sum() / sizes.sum()
        low, high = (low, middle) if mean > share else (middle, high)
    return (shares + (low + high) / 2).clamp(LEAST_REMOVED, MOST_REMOVED)
