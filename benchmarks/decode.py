"""One token through a pruned linear on the CPU: compact weights beside torch's dense product, in the same run.

    python benchmarks/decode.py

Large layers of 7B models and the layers of SmolLM2-135M; float32 and bfloat16. Small ones fit into the cache here, and
in a model their weights come from memory: ``proxsparse bench`` measures whole models. Writes
benchmarks/results/decode.json.
"""

import sys
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from proxsparse.deploy.sparse import CompactLinear, seconds
from proxsparse.operator.prox import top2_mask
from proxsparse.record import git_commit, versions, write_json

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (1536, 576), (576, 1536))


def main() -> int:
    table = Table(title=f"one token, {torch.get_num_threads()} threads")
    for head in ("out x in", "dtype", "dense ms", "compact ms", "times faster", "largest error"):
        table.add_column(head, justify="right")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES:
            row = measure(outputs, inputs, dtype)
            rows.append(row)
            gain = row["dense_ms"] / row["compact_ms"]
            cells = [f"{row['dense_ms']:.3f}", f"{row['compact_ms']:.3f}", f"{gain:.2f}", f"{row['error']:.1e}"]
            table.add_row(f"{outputs} x {inputs}", row["dtype"], *cells)
    Console().print(table)
    write_json("benchmarks/results/decode.json", {"rows": rows, "versions": versions(), "commit": git_commit()})
    return 0


@torch.no_grad()
def measure(outputs: int, inputs: int, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    linear.weight.mul_(top2_mask(linear.weight.float()))
    compact, token = CompactLinear(linear), torch.randn(1, inputs, dtype=dtype)
    exact = token.double() @ linear.weight.double().T
    return {
        "out": outputs,
        "in": inputs,
        "dtype": str(dtype).removeprefix("torch."),
        "dense_ms": 1e3 * seconds(partial(linear, token), token.device, 50),
        "compact_ms": 1e3 * seconds(partial(compact, token), token.device, 50),
        "error": (compact(token).double() - exact).abs().max().item(),
    }


if __name__ == "__main__":
    sys.exit(main())
