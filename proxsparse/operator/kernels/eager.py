"""The 2:4 proximal operator in plain torch operations, for any device.

``proxsparse/operator/kernels/__init__.py`` derives the algorithm.
Shapes: G = blocks of four; magnitudes are stored as four columns of G values each.
"""

import torch
from torch import Tensor

from proxsparse.operator.rounding import round_stochastically

CHUNK_BLOCKS = 1 << 15  # about 300 live temporaries of 128 KiB at worst: below 64 MiB on top of the weight
MAX_STEPS = 32  # near a double root Newton halves its error, and 2^-32 is below float32's resolution
TINY = 1e-30
SETTLED = 1e-7


def _gentle(z: Tensor, lam: Tensor) -> Tensor:
    """Minimiser where the problem is convex, by coordinate descent: (4, G)."""
    a, b, c, d = z
    for _ in range(MAX_STEPS):
        before = a, b, c
        d = (z[3] - lam * (a * b + c * (a + b))).clamp_min(0)
        c = (z[2] - lam * (a * b + d * (a + b))).clamp_min(0)
        b = (z[1] - lam * (c * d + a * (c + d))).clamp_min(0)
        a = (z[0] - lam * (c * d + b * (c + d))).clamp_min(0)
        # One entry alone may stand still while it turns round, and the others still move.
        if not any(torch.any((old - new).abs() > SETTLED) for old, new in zip(before, (a, b, c), strict=True)):
            break
    return torch.stack((a, b, c, d))


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


def _four(z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Best point with four weights: x of (4, G), and where it exists, of (G,)."""
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


def _strong(z: Tensor, lam: Tensor) -> Tensor:
    """Minimiser where the problem may not be convex, the best of three candidates: (4, G)."""
    best = torch.cat((z[:2], torch.zeros_like(z[2:])))
    least = 0.5 * z[2:].square().sum(0)
    for x, exists in (_three(z, lam), _four(z, lam)):
        x = torch.minimum(x.clamp_min(0), z)
        value = _objective(x, z, lam)
        better = exists & (value < least)
        least = torch.where(better, value, least)
        best = torch.where(better, x, best)
    return best


def solve_sorted(z: Tensor, lam: Tensor) -> Tensor:
    """Shrinkage of each sorted block: how much smaller its minimiser is.

    Args:
        z: (4, G), magnitudes in descending order, z[0] == 1.
        lam: (G,), lam * (largest magnitude before scaling), in (0, 3).

    Returns:
        (4, G): z - x, where x is the global minimiser; equal to z where a weight becomes zero.
    """
    strong = 2 * lam * (z[:3].sum(0) - z[3]) >= 1
    x = torch.empty_like(z)
    for part, solve in ((~strong, _gentle), (strong, _strong)):
        if part.any():
            x[:, part] = solve(z[:, part], lam[part])
    # Shrinkage, not z - x: its rounding would move weights that shrink by less than float32 resolves.
    return torch.where(x > 0, torch.minimum(lam * _e2_of_others(x), z), z)


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


def prox_(weight: Tensor, lam: float, scale: Tensor | None, stochastic: bool, seed: int) -> tuple[int, int]:
    """Apply the operator to a contiguous weight of any float dtype in place.

    Args:
        scale: (I,), or None for ones.
        stochastic: round bfloat16 stochastically, with noise from ``seed``.

    Returns:
        (blocks that are 2:4 afterwards, blocks with a non-finite entry, left as they were).
    """
    rows = weight.view(-1, weight.shape[-1])
    step = max(1, 4 * CHUNK_BLOCKS // rows.shape[1])
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    generator = torch.Generator(weight.device).manual_seed(seed) if stochastic else None
    sparse = torch.zeros((), dtype=torch.int64, device=weight.device)
    bad = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        solved = part.to(dtype, copy=True).view(-1, 4)
        finite = solved.isfinite().all(-1)
        bad += (~finite).sum()
        solved[~finite] = 0
        prox_blocks_(solved, lam, None if scale is None else scale.to(solved).expand_as(part).reshape(-1, 4))
        rounded = solved
        if generator is not None and weight.dtype == torch.bfloat16:
            rounded = round_stochastically(solved, generator)
        blocks = part.view(-1, 4)
        blocks.copy_(torch.where(finite[:, None], rounded.to(part.dtype), blocks))
        sparse += ((blocks.count_nonzero(-1) <= 2) & finite).sum()
    return int(sparse), int(bad)
