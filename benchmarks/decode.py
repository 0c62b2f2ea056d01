"""Tokens through a pruned linear on the CPU: compact weights next to torch's dense products, in the same run.

    python benchmarks/decode.py
    OMP_NUM_THREADS=1 python benchmarks/decode.py

It takes the shapes of 7B models and of SmolLM2-135M. All ways take turns on the same weight, so that each finds the
cache full of the others' weights, as the layers of a model do; medians count. ``torch int8`` is torch's own product
with dense int8 weights, ``torch._weight_int8pack_mm``. One row is decoding; 256 rows are prefill. With one thread, the
time is what the processor spent on it, which other programs disturb least; with several it is the clock's. It writes
benchmarks/results/decode.json.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from common import print_table, write_record
from torch import Tensor, nn

from proxsparse.deploy.compact_linear import CompactLinear
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (1536, 576), (576, 1536))
MANY = ((4096, 11008), (1536, 576))  # shapes that are measured with more rows, too
PATTERNS = (TWO_OF_FOUR, Pattern.parse("4:8"))  # of compact weights
ROUNDS = {1: 30, 8: 15, 256: 5}


def main() -> int:
    found = []
    for outputs, inputs in SHAPES:
        torch.manual_seed(0)
        ways = ways_of(torch.randn(outputs, inputs).div_(inputs**0.5))
        for rows in ROUNDS if (outputs, inputs) in MANY else (1,):
            found.append({"out": outputs, "in": inputs, "rows": rows, **measure(ways, rows, inputs)})
    names = list(found[0]["ms"])
    title = f"milliseconds, {torch.get_num_threads()} threads"
    print_table(title, ("out x in", "rows", *names), map(cells, found), text_columns=1)
    write_record("decode", {"rows": found, "threads": torch.get_num_threads(), "load": os.getloadavg()})
    return 0


def cells(row: dict) -> list[str]:
    return [f"{row['out']} x {row['in']}", str(row["rows"]), *(f"{value:.3f}" for value in row["ms"].values())]


def ways_of(weight: Tensor) -> dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor], Tensor]]:
    """Name -> the dtype of its inputs, the product, and the weight that it should multiply with."""
    found: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor], Tensor]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for pattern in PATTERNS:
            linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
            linear.weight = nn.Parameter((weight * pattern.mask(weight.abs())).to(dtype), requires_grad=False)
            if pattern == TWO_OF_FOUR:
                found[f"dense {name}"] = (dtype, linear, linear.weight)
            found[f"{pattern} {name}"] = (dtype, CompactLinear(linear, pattern=pattern), linear.weight)
    for pattern in PATTERNS:
        linear.weight = nn.Parameter((weight * pattern.mask(weight.abs())).bfloat16(), requires_grad=False)
        compact = CompactLinear(linear, "int8", pattern)
        found[f"{pattern} int8"] = (torch.bfloat16, compact, compact.dense())
    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
    linear.weight = nn.Parameter((weight * TWO_OF_FOUR.mask(weight.abs())).bfloat16(), requires_grad=False)
    scales = linear.weight.abs().amax(1) / 127
    codes = (linear.weight / scales[:, None]).round().to(torch.int8)
    product = partial(_torch_int8, codes, scales)
    found["torch int8"] = (torch.bfloat16, product, codes * scales[:, None])
    return found


def _torch_int8(codes: Tensor, scales: Tensor, inputs: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(inputs, codes, scales)


@torch.no_grad()
def measure(ways: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor], Tensor]], rows: int, inputs: int) -> dict:
    """Median milliseconds of every way, and its error relative to float64: the norm of the difference."""
    x = torch.randn(rows, inputs).bfloat16()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS[rows] + 1):
        for name, (dtype, product, _) in ways.items():
            given = x.to(dtype)
            start = clock()
            product(given)
            if turn:
                taken[name].append(1e3 * (clock() - start))
    errors = {}
    for name, (dtype, product, weight) in ways.items():
        exact = x[:8].double() @ weight.double().T
        errors[name] = float((product(x[:8].to(dtype)).double() - exact).norm() / exact.norm())
    return {"ms": {name: statistics.median(times) for name, times in taken.items()}, "error": errors}


if __name__ == "__main__":
    sys.exit(main())
