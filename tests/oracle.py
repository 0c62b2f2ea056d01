"""Independent float64 references for the tests: the global minimum of the prox objective, and the original solver.

``global_minimum`` knows nothing of the derivation the kernels use: it runs coordinate descent, which never raises
the objective, from many starts on every number of weights kept.
"""

import numpy as np


def objective(x: np.ndarray, z: np.ndarray, lam: float) -> np.ndarray:
    """1/2 ||x - z||^2 + lam R(x), for blocks of shape (G, 4) of any sign, in float64."""
    x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
    a, b, c, d = np.abs(x).T
    return 0.5 * np.square(x - z).sum(1) + lam * (a * b * (c + d) + c * d * (a + b))


def coordinate_descent(z: np.ndarray, lam: float, start: np.ndarray, sweeps: int) -> np.ndarray:
    """Exact minimisation over one weight after the other, magnitudes only; entries that start at zero may wake up."""
    x = start.copy()
    for _ in range(sweeps):
        for i in range(4):
            a, b, c = (x[:, j] for j in range(4) if j != i)
            x[:, i] = np.maximum(z[:, i] - lam * (a * b + b * c + c * a), 0)
    return x


def global_minimum(blocks: np.ndarray, lam: float, starts: int = 60, sweeps: int = 200, seed: int = 0) -> np.ndarray:
    """Least objective over many starts: (G, 4) -> (G,)."""
    rng = np.random.default_rng(seed)
    z = np.sort(np.abs(np.asarray(blocks, np.float64)), 1)[:, ::-1].copy()
    two = z.copy()
    two[:, 2:] = 0
    best = np.minimum(objective(two, z, lam), objective(z, z, lam))
    for attempt in range(starts):
        start = z * (rng.random((len(z), 1)) if attempt % 2 else rng.random((len(z), 4)))
        if attempt % 3 == 0:
            start[:, 3] = 0
        best = np.minimum(best, objective(coordinate_descent(z, lam, start, sweeps), z, lam))
    return best


def hard_blocks(count: int, seed: int = 0) -> np.ndarray:
    """Blocks of magnitude one that have given solvers trouble: spread, tied, near-tied, with zeros, of many scales."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, 4))
    part = count // 8
    z[:part] = 1 + 0.1 * rng.random((part, 4))
    z[part : 2 * part] = 0.3 + rng.random((part, 1)) + 0.3 * rng.random((part, 4))
    z[2 * part : 3 * part, 3] = z[2 * part : 3 * part, 0] * (1 + 0.01 * rng.normal(size=part))
    z[3 * part : 4 * part] = rng.choice([0.0, 0.5, 1.0, -1.0], size=(part, 4))
    z[4 * part : 5 * part] = np.exp(2 * rng.normal(size=(part, 4)))
    z[5 * part : 6 * part, rng.integers(4)] = 0
    return z
