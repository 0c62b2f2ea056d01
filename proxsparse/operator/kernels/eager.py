"""The 2:4 proximal operator in plain torch operations, for any device.

``proxsparse/operator/kernels/__init__.py`` derives the algorithm.
Shapes: G = blocks of four; magnitudes are stored as four columns of G values each.
"""

import torch
from torch import Tensor

from proxsparse.operator.rounding import Noise, round_stochastically, widest

# Blocks at a time. About 300 live temporaries at worst: 64 MiB on a CPU. Elsewhere small ones would be all launches.
CHUNK_BLOCKS, CHUNK_BLOCKS_OF_A_GPU = 1 << 15, 1 << 22
MAX_STEPS = 32  # near a double root Newton halves its error, and 2^-32 is below float32's resolution
TINY = 1e-30
SETTLED = 1e-7


def chunk_blocks(device: torch.device) -> int:
    """Blocks that are solved at a time."""
    return CHUNK_BLOCKS if device.type == "cpu" else CHUNK_BLOCKS_OF_A_GPU


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
    step = chunk_blocks(blocks.device)
    for start in range(0, blocks.shape[0], step):
        part = blocks[start : start + step]
        measured = part if scale is None else part * scale[start : start + step]
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
            shrink = shrink / scale[start : start + step]
        part.copy_(torch.where(removed, torch.zeros_like(part), part.sign() * (part.abs() - shrink).clamp_min(0)))


def prox_(weight: Tensor, lam: float, scale: Tensor | None, noise: Noise | None, counts: Tensor) -> None:
    """Apply the operator to a contiguous weight of any float dtype in place.

    Args:
        scale: (I,), or None for ones.
        noise: of stochastic rounding, or None to round bfloat16 to nearest.
        counts: (2,), to which are added the blocks that are 2:4 afterwards, and the blocks with a non-finite entry,
            which are left as they were.
    """
    rows = weight.view(-1, weight.shape[-1])
    width = rows.shape[1]
    step = max(1, 4 * chunk_blocks(weight.device) // width)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        solved = part.to(dtype, copy=True).view(-1, 4)
        finite = solved.isfinite().all(-1)
        solved[~finite] = 0
        prox_blocks_(solved, lam, None if scale is None else scale.to(solved).expand_as(part).reshape(-1, 4))
        rounded = solved
        if noise is not None and weight.dtype == torch.bfloat16:
            rounded = round_stochastically(solved, noise.after(start * width))
        blocks = part.view(-1, 4)
        blocks.copy_(torch.where(finite[:, None], rounded.to(part.dtype), blocks))
        counts += torch.stack((((blocks.count_nonzero(-1) <= 2) & finite).sum(), (~finite).sum())).to(counts.dtype)


def top2_mask(scores: Tensor) -> Tensor:
    """Where a score is one of the two largest of its block; ties go to the earlier one. (..., I) -> (..., I) bool."""
    a, b, c, d = scores.abs().unflatten(-1, (-1, 4)).unbind(-1)
    # Kept where fewer than two others are larger.
    ab, ac, ad, bc, bd, cd = b > a, c > a, d > a, c > b, d > b, d > c
    larger = (
        ab.byte() + ac.byte() + ad.byte(),
        (~ab).byte() + bc.byte() + bd.byte(),
        (~ac).byte() + (~bc).byte() + cd.byte(),
        (~ad).byte() + (~bd).byte() + (~cd).byte(),
    )
    return torch.stack([count < 2 for count in larger], -1).flatten(-2)


def top2_product_(out: Tensor, base: Tensor, learned: Tensor, scale: Tensor | None) -> None:
    """Write ``base`` times the top-two mask of ``learned * scale`` into ``out``, of any dtype; scale (I,) or None."""
    mask = top2_mask(learned if scale is None else learned.float() * scale.to(learned.device))
    out.copy_(torch.where(mask, base, 0))


def survey_(weight: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    """Look at every block once.

    Args:
        weight: (..., I), any dtype.
        codes: (blocks,) uint8, bit k set where entry k of a block is kept; overwritten.
        scale: (I,), or None for ones.

    Returns:
        (2,) float64 (see ``widest``): entries of the mask that changed, sum of R(weight * scale).
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    scored = wide if scale is None else wide * scale.to(weight.device)
    kept = top2_mask(scored).unflatten(-1, (-1, 4)).to(torch.uint8)
    now = (kept * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=kept.device)).sum(-1, dtype=torch.uint8)
    before = codes.view(now.shape)
    changed = torch.stack([((now ^ before) >> k & 1).sum() for k in range(4)]).sum()
    before.copy_(now)
    dtype = widest(weight.device)
    return torch.stack((changed.to(dtype), penalty(scored).to(dtype)))


def penalty(weight: Tensor) -> Tensor:
    """Sum of R over all blocks, a differentiable scalar of the weight's dtype."""
    a, b, c, d = weight.abs().unflatten(-1, (-1, 4)).unbind(-1)
    return (a * b * (c + d) + c * d * (a + b)).sum()
