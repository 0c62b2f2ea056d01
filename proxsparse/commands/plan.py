"""What a learning run will need, before it starts: parameters, steps, memory a device. Loads no weights.

    python -m proxsparse plan --model meta-llama/Llama-2-7b-hf --ctx_len 4096 --dtype bfloat16 --bf16 true
    python -m proxsparse plan --model runs/mine/pruned --dataset my_text.txt --method paper

Takes the flags of end-to-end/main.py. The figures are computed, not measured; tests hold them against tiny
runs.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from proxsparse.commands.common import print_json
from proxsparse.commands.learn import parse_arguments
from proxsparse.errors import command
from proxsparse.model import resolve_dtype
from proxsparse.plan import Plan, dimensions, plan_learning
from proxsparse.text import check_ctx_len

GIB = 2**30


@command
def main(argv: Sequence[str] | None = None) -> None:
    run, config = parse_arguments(list(sys.argv[1:] if argv is None else argv), documentation=__doc__, planning=True)
    found, note = dimensions(run.model, revision=run.revision, trust_remote_code=config.trust_remote_code)
    check_ctx_len(run.ctx_len, found)
    dtype = resolve_dtype(run.dtype)
    if isinstance(dtype, str):
        dtype = found.dtype if isinstance(found.dtype, torch.dtype) else torch.float32
    devices = 1 if config.use_cpu else max(1, torch.cuda.device_count())
    plan = plan_learning(
        found,
        config,
        ctx_len=run.ctx_len,
        samples=run.samples,
        batch_size=run.batch_size,
        dtype=dtype,
        devices=devices,
    )
    show(plan, str(run.model), str(config.output_dir), dtype, on_cpu=config.use_cpu)
    if note:
        print(f"note: {note}")
    print_json({"model": run.model, "parameters": plan.parameters, "steps": plan.steps, "bytes": round(plan.total)})


def show(plan: Plan, model: str, folder: str, dtype: torch.dtype, on_cpu: bool) -> None:
    """Print the plan as a table."""
    table = Table(title=f"plan for {model}, {str(dtype).removeprefix('torch.')} weights", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row("  of them pruned to 2:4", f"{plan.prunable:,}")
    table.add_row("  of them trained", f"{plan.trainable:,}")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("folder", folder, end_section=True)
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / GIB:,.2f} GiB")
    table.add_row("memory a device, computed", f"{plan.total / GIB:,.2f} GiB", style="bold")
    table.add_row("  bytes a parameter", f"{plan.per_parameter():.1f}")
    Console().print(table)
    available, device = device_memory(on_cpu)
    if plan.total > available:
        print(
            f"note: {device} has {available / GIB:.1f} GiB, less than this needs. What helps, in this order: "
            "--activation_checkpointing true, --dtype bfloat16, --base_on_cpu true, --optim adafactor (or "
            "adamw_torch_8bit with torchao installed), a shorter --ctx_len."
        )


def device_memory(on_cpu: bool) -> tuple[float, str]:
    """(bytes, name) of the device that a run would take."""
    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    limit = Path("/sys/fs/cgroup/memory.max")
    bound = limit.read_text().strip() if limit.is_file() and os.access(limit, os.R_OK) else "max"
    total = psutil.virtual_memory().total
    return min(total, int(bound)) if bound.isdigit() else total, "this machine"
