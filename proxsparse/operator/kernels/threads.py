"""numba's loops use as many threads as torch does, and no more."""

import numba
import torch


def match_torch() -> int:
    """Make numba's parallel loops use as many threads as torch. Call it before each loop.

    Returns:
        the number of numba's threads: torch's, or ``NUMBA_NUM_THREADS`` if that is less.
    """
    threads = torch.get_num_threads()
    count = max(1, min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    numba.set_num_threads(count)
    # The first call starts numba's threads, and that sets OpenMP's count, which torch reads, to the number of cores
    # (numba/numba#9387). Without this, every process of `OMP_NUM_THREADS=1 torchrun ...` would go on with as many
    # threads as the machine has cores. Threads spin while they wait for each other, and a step would take up to 60
    # times as long.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return count
