"""One token through a pruned linear on the CPU: compact weights next to torch's dense product, in the same run.

    python benchmarks/decode.py

It takes the shapes of 7B models and of SmolLM2-135M, in float32 and bfloat16. Small ones fit into the cache here, but
in a model their weights come from memory: ``proxsparse bench`` measures whole models. It writes
benchmarks/results/decode.json.
"""

import sys
from functools import partial

import torch
from common import print_table, write_record
from torch import nn

from proxsparse.deploy.sparse import CompactLinear, seconds
from proxsparse.operator.prox import top2_mask

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (1536, 576), (576, 1536))


def main() -> int:
    rows = [measure(outputs, inputs, dtype) for dtype in (torch.float32, torch.bfloat16) for outputs, inputs in SHAPES]
    heads = ("out x in", "dtype", "dense ms", "compact ms", "times faster", "largest error")
    title = f"one token, {torch.get_num_threads()} threads"
    print_table(title, heads, map(cells, rows), text_columns=2)
    write_record("decode", {"rows": rows})
    return 0


def cells(row: dict) -> list[str]:
    gain = row["dense_ms"] / row["compact_ms"]
    numbers = [f"{row['dense_ms']:.3f}", f"{row['compact_ms']:.3f}", f"{gain:.2f}", f"{row['error']:.1e}"]
    return [f"{row['out']} x {row['in']}", row["dtype"], *numbers]


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
