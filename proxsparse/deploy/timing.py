"""How long work takes, by the wall clock or a GPU's, one call after another or recorded as a CUDA graph."""

import time
from collections.abc import Callable, Sequence

import torch


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """A piece of work as a CUDA graph: a function that does it again, on the same memory, without the host's part.

    The work is done three times on a stream of its own before, as torch asks for.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def device_seconds(works: Sequence[Callable[[], object]], repeat: int = 20, graph: bool = False) -> float:
    """Median seconds per piece of work on a GPU, by its clock.

    The pieces follow one another without waiting, as the layers of a model do. The host's time counts only where the
    GPU waits for it; with ``graph`` the pieces are recorded as one CUDA graph, and it does not count.
    """

    def all_of_them() -> None:
        for work in works:
            work()

    run = recorded(all_of_them) if graph else all_of_them
    taken = []
    for attempt in range(repeat + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if attempt >= 3:
            taken.append(start.elapsed_time(end) / 1e3 / len(works))
    return sorted(taken)[len(taken) // 2]


def seconds(work: Callable[[], object], device: torch.device, repeat: int = 20) -> float:
    """Median wall time of a piece of work, after a warm-up."""
    taken = []
    for attempt in range(repeat + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt >= 3:
            taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]
