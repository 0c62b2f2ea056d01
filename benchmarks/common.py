"""What the benchmarks share: one way to time, one table, one record."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from proxsparse.record import git_commit, versions, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def best_seconds(work: Callable[[], object], repeat: int, before: Callable[[], object] | None = None) -> float:
    """Least wall time of several repetitions: other programs can only add to it.

    Args:
        before: called before each repetition, untimed.
    """
    found = []
    for _ in range(repeat):
        if before is not None:
            before()
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> None:
    """Print a table whose first columns are text and the others numbers."""
    table = Table(title=title)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < text_columns else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)


def write_record(name: str, record: dict[str, Any]) -> None:
    """Write results/NAME.json with the versions and the commit that explain its numbers."""
    write_json(RESULTS / f"{name}.json", record | {"versions": versions(), "commit": git_commit()})
