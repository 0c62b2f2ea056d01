"""How long work takes, by the wall clock or a GPU's, one call after another or recorded as a CUDA graph."""

import time
from collections.abc import Callable, Sequence

import torch

from proxsparse.errors import RunError


def recorded(work: Callable[[], object]) -> Callable[[], None]:
    """A piece of work as a CUDA graph: a function that does it again, on the same memory, without the host's part.

    The work is done three times on a stream of its own before, as torch asks for.

    Raises:
        RunError: the work has parts that a graph can't hold; torch.OutOfMemoryError as it is.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Where the work fails, the graph's end fails too, and leaves its stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            work()
    except Exception as error:
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        line = next(iter(str(first).splitlines()), type(first).__name__)
        raise RunError(f"A CUDA graph can't be recorded: {line}") from error
    return graph.replay


def device_seconds(works: Sequence[Callable[[], object]], repeat: int = 20, graph: bool = False) -> float:
    """Median seconds per piece of work on a GPU, by its clock.

    The pieces follow one another without waiting, as the layers of a model do. The host's time counts only where the
    GPU waits for it. With ``graph`` the pieces are recorded as one CUDA graph, and it hardly counts: the GPU is at work
    on a graph before while the host starts the one that is measured.
    """

    def all_of_them() -> None:
        for work in works:
            work()

    run = recorded(all_of_them) if graph else all_of_them
    taken = []
    for attempt in range(repeat + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if graph:
            run()
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
