"""Upstream's operator, written plainly in torch from the published method: the benchmarks compare with it."""

import torch
from torch import Tensor

SWEEPS, TOLERANCE = 100, 1e-8


def original_(weight: Tensor, lam: float) -> None:
    """Upstream's method: sort, sweep three and four weights from zero, take the better result.

    At most 100 sweeps each, until the sum of all changes of the whole tensor is below 1e-8, in the weights' dtype.
    """
    blocks = weight.view(-1, 4)
    z, order = blocks.abs().sort(dim=1, descending=True)
    best = torch.cat((z[:, :2], torch.zeros_like(z[:, 2:])), 1)
    least = _objective(best, z, lam)
    for kept in (3, 4):
        x = torch.zeros_like(z)
        for _ in range(SWEEPS):
            before = x.clone()
            for i in range(kept):
                a, b, c = (x[:, j] for j in range(4) if j != i)
                x[:, i] = (z[:, i] - lam * (a * b + b * c + c * a)).clamp_min(0)
            if (x - before).abs().sum() < TOLERANCE:
                break
        value = _objective(x, z, lam)
        best = torch.where((value < least)[:, None], x, best)
        least = torch.minimum(value, least)
    restored = torch.empty_like(best).scatter_(1, order, best)
    blocks.copy_(restored * blocks.sign())


def _objective(x: Tensor, z: Tensor, lam: float) -> Tensor:
    a, b, c, d = x.unbind(1)
    return 0.5 * (x - z).square().sum(1) + lam * (a * b * (c + d) + c * d * (a + b))
