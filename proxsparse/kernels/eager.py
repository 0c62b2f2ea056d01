"""The 2:4 proximal operator in plain torch operations, for any device.

The algorithm and its derivation are in ``proxsparse/kernels/__init__.py``.
Shapes: G = blocks of four; magnitudes are stored as four columns of G values each.
"""

import torch
from torch import Tensor

CHUNK_BLOCKS = 1 << 16  # about 60 live temporaries of 256 KiB: well below 64 MiB beside the weight
MILD_STEPS = 4
MAX_STEPS = 32  # near a double root Newton halves its error, and 2^-32 is below float32's resolution
TINY = 1e-30
SETTLED = 1e-7


def _three(z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Best point with three weights: x of (4, G), and where it exists, of (G,)."""
    z1, z2, z3 = z[0], z[1], z[2]
    t = z3
    exists = torch.ones_like(t, dtype=torch.bool)

    def point(t: Tensor) -> tuple[Tensor, ...]:
        product = 4 * t * (z3 - t)
        s1 = (z1 * z1 - product).clamp_min(0).sqrt()
        s2 = (z2 * z2 - product).clamp_min(0).sqrt()
        return (z1 + s1) / 2, (z2 + s2) / 2, s1.clamp_min(TINY), s2.clamp_min(TINY)

    for _ in range(MAX_STEPS):
        x1, x2, s1, s2 = point(t)
        slope = 1 + lam * (2 * t - z3) * (x2 / s1 + x1 / s2)
        new = t - (lam * x1 * x2 - (z3 - t)) / slope
        exists &= (slope > 0) & (new >= 0)
        new = torch.where(exists, torch.minimum(new, t), t)
        settled = not torch.any(t - new > SETTLED * z3)
        t = new
        if settled:
            break
    x1, x2, _, _ = point(t)
    return torch.stack((x1, x2, t, torch.zeros_like(t))), exists


def _four_mild(z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Best point with four weights where 2 lam (z1 + z2 + z3 - z4) < 1."""
    gaps = z[:3] - z[3]
    y = z[:3].sum(0) - z[3]
    x = z
    for step in range(MILD_STEPS + 1):
        q = 1 - lam * y
        root = (q * q + 4 * lam * gaps).sqrt()
        d = 2 * gaps / (root + q)
        x4 = (y - d.sum(0)) / 2
        x = torch.cat((x4 + d, x4[None]))
        if step == MILD_STEPS:
            break
        residual = x4 - z[3] + lam * (x[0] * x[1] + x[1] * x[2] + x[2] * x[0])
        dd = lam * d / root
        dx4 = (1 - dd.sum(0)) / 2
        dx = dx4 + dd
        cross = dx[0] * (x[1] + x[2]) + dx[1] * (x[2] + x[0]) + dx[2] * (x[0] + x[1])
        y = y - residual / (dx4 + lam * cross)
    return x, x[3] >= 0


def _four_strong(z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Best point with four weights where 2 lam (z1 + z2 + z3 - z4) >= 1."""
    spread = 4 * lam * (z[:3] - z[3])
    k = 1 - 2 * lam * (z[:3].sum(0) - z[3])
    q = torch.ones_like(lam)
    exists = torch.ones_like(lam, dtype=torch.bool)
    for _ in range(MAX_STEPS):
        root = (q * q + spread).sqrt()
        r = (q * q - k).sqrt()
        value = 2 - (q + root.sum(0)) / 2 - r
        slope = -(1 + (q / root.clamp_min(TINY)).sum(0)) / 2 - q / r.clamp_min(TINY)
        exists &= slope < 0
        new = torch.where(exists, torch.minimum(q - value / slope, q), q)
        settled = not torch.any(q - new > SETTLED)
        q = new
        if settled:
            break
    root = (q * q + spread).sqrt()
    a = (q + root.sum(0)) / 2 - 1
    x = (torch.cat((root, q[None])) - a) / (2 * lam)
    return x, exists & (x[3] >= 0)


def _e2_of_others(x: Tensor) -> Tensor:
    """Derivative of e3: for each i, the sum of products of pairs of the other three. (4, G) -> (4, G)."""
    a, b, c, d = x
    return torch.stack((b * c + c * d + d * b, a * c + c * d + d * a, a * b + b * d + d * a, a * b + b * c + c * a))


def _objective(x: Tensor, z: Tensor, lam: Tensor) -> Tensor:
    a, b, c, d = x
    return 0.5 * (z - x).square().sum(0) + lam * (a * b * (c + d) + c * d * (a + b))


def solve_sorted(z: Tensor, lam: Tensor) -> Tensor:
    """Shrinkage of each sorted block: how much smaller its minimiser is.

    Args:
        z: (4, G) float32, magnitudes in descending order, z[0] == 1.
        lam: (G,) float32, lam * (largest magnitude before scaling), in (0, 3).

    Returns:
        (4, G): z - x, where x is the global minimiser; equal to z where a weight becomes zero.
    """
    best_shrink = torch.cat((torch.zeros_like(z[:2]), z[2:]))
    best = 0.5 * z[2:].square().sum(0)
    strong = 2 * lam * (z[:3].sum(0) - z[3]) >= 1
    candidates = [_three(z, lam)]
    if not strong.all():
        x, exists = _four_mild(z, lam)
        candidates.append((x, exists & ~strong))
    if strong.any():
        x, exists = _four_strong(z[:, strong], lam[strong])
        spread = z.new_zeros(z.shape)
        spread[:, strong] = x
        full = torch.zeros_like(strong)
        full[strong] = exists
        candidates.append((spread, full))
    for x, exists in candidates:
        x = torch.minimum(x.clamp_min(0), z)
        # As shrinkage, not as z - x, whose rounding would move weights that shrink by less than float32 resolves.
        shrink = torch.where(x > 0, torch.minimum(lam * _e2_of_others(x), z), z)
        value = _objective(x, z, lam)
        better = exists & (value < best)
        best = torch.where(better, value, best)
        best_shrink = torch.where(better, shrink, best_shrink)
    return best_shrink


def prox_blocks_(blocks: Tensor, lam: float, scale: Tensor | None = None) -> None:
    """Apply the operator in place.

    Args:
        blocks: (G, 4) float32, contiguous or a view; overwritten.
        lam: strength, unit 1 / |block entry * scale|; > 0.
        scale: (G, 4) positive, or None for ones: the operator acts on blocks * scale, the result is divided back.
    """
    for start in range(0, blocks.shape[0], CHUNK_BLOCKS):
        part = blocks[start : start + CHUNK_BLOCKS]
        measured = part if scale is None else part * scale[start : start + CHUNK_BLOCKS]
        z, order = measured.abs().T.sort(dim=0, descending=True, stable=True)
        top = z[0].clone()
        lam_block = lam * top
        # Nothing to solve: already 2:4 (zero blocks too), or a strength that underflows.
        active = (z[2] > 0) & (lam_block > 0)
        shrink = torch.zeros_like(z)
        crushed = active & (lam_block >= 3)
        shrink[2:, crushed] = z[2:, crushed]
        solve = active & (lam_block < 3)
        if solve.any():
            unit = z[:, solve] / top[solve]
            relative = solve_sorted(unit, lam_block[solve])
            shrink[:, solve] = torch.where(relative >= unit, z[:, solve], relative * top[solve])
        removed = shrink >= z
        shrink = torch.empty_like(shrink).scatter_(0, order, shrink).T
        removed = torch.empty_like(removed).scatter_(0, order, removed).T
        if scale is not None:
            shrink = shrink / scale[start : start + CHUNK_BLOCKS]
        part.copy_(torch.where(removed, torch.zeros_like(part), part.sign() * (part.abs() - shrink).clamp_min(0)))
