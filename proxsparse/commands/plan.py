"""What a learning run will need, before it starts: parameters, steps, memory per device. Loads no weights.

    python -m proxsparse plan --recipe llama2-7b-prox --dtype bfloat16
    python -m proxsparse plan --model runs/mine/pruned --dataset my_text.txt
    python -m proxsparse plan --model meta-llama/Llama-2-13b-hf --bf16 true \\
        --gpus 8 --sharded

It takes the flags of end-to-end/main.py. With --gpus N and --sharded it plans for other devices than this machine's.
The figures are computed, not measured; tests compare them with tiny runs.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from proxsparse.commands.cli import command, print_json
from proxsparse.commands.flags import LearnArguments, LearnParser, Parsed, option, underscored
from proxsparse.commands.groups import say_coverage
from proxsparse.errors import UsageError
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.plan import Plan, dimensions, plan_learning
from proxsparse.model.loading import empty_of, resolve_dtype
from proxsparse.model.windows import check_ctx_len

GIB = 2**30


def arguments() -> "PlanParser":
    return PlanParser()


class PlanParser(LearnParser):
    """The flags of learning, and for which devices to plan."""

    def __init__(self) -> None:
        super().__init__(documentation=__doc__, planning=True)
        self.own.add_argument("--gpus", type=int, default=None, help="how many GPUs to plan for; default: this machine")
        self.own.add_argument("--sharded", action="store_true", help="plan for FSDP2: the GPUs share one model")

    def parse(self, argv: Sequence[str]) -> Parsed:
        if option([underscored(word) for word in argv], "gpus") is not None:
            # A GPU's defaults, wherever the plan is made; use_cpu only lets the flags be read where there is none.
            self.defaults = {"use_cpu": True, "bf16": True, "activation_checkpointing": True}
        return super().parse(argv)


@command(arguments)
def main(parsed: Parsed) -> None:
    plan = print_plan(parsed.run, parsed.config, parsed.own.gpus, parsed.own.sharded)
    total = round(plan.total)
    print_json({"model": parsed.run.model, "parameters": plan.parameters, "steps": plan.steps, "bytes": total})


def print_plan(run: LearnArguments, config: ProxSparseConfig, gpus: int | None = None, sharded: bool = False) -> Plan:
    """Print what a run needs.

    Args:
        gpus: to plan for; None: this machine's devices.
        sharded: over the GPUs (FSDP2).

    Raises:
        UsageError: fewer than one GPU, or than two that share a model.
    """
    found, note = dimensions(run.model, revision=run.revision, trust_remote_code=config.trust_remote_code)
    check_ctx_len(run.ctx_len, found)
    dtype = resolve_dtype(run.dtype)
    if isinstance(dtype, str):
        dtype = found.dtype if isinstance(found.dtype, torch.dtype) else torch.float32
    on_cpu = config.use_cpu and gpus is None
    here = 1 if config.use_cpu else max(1, torch.cuda.device_count())
    devices = here if gpus is None else gpus
    if devices < 1 or (sharded and devices < 2):
        raise UsageError(f"--gpus must be at least 1, and with --sharded at least 2; got {devices}.")
    plan = plan_learning(
        found,
        config,
        ctx_len=run.ctx_len,
        samples=run.samples,
        batch_size=run.batch_size,
        dtype=dtype,
        devices=devices,
        sharded=sharded,
        on_cpu=on_cpu,
    )
    empty = empty_of(found, config.trust_remote_code)
    say_coverage(empty, config.include, config.exclude, pattern=config.wanted)
    show(plan, str(run.model), str(config.output_dir), dtype, config.pattern)
    if gpus is None:
        compare_with_this_machine(plan, on_cpu)
    for line in filter(None, (note, plan.note)):
        print(f"note: {line}")
    return plan


def show(plan: Plan, model: str, folder: str, dtype: torch.dtype, pattern: str) -> None:
    """Print the plan as a table."""
    table = Table(title=f"plan for {model}, {str(dtype).removeprefix('torch.')} weights", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{plan.parameters:,}")
    table.add_row(f"  of them pruned to {pattern}", f"{plan.prunable:,}")
    table.add_row("  of them trained", f"{plan.trainable:,}")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("folder", folder, end_section=True)
    for name, size in plan.parts.items():
        table.add_row(name, f"{size / GIB:,.2f} GiB")
    table.add_row("memory per device, computed", f"{plan.total / GIB:,.2f} GiB", style="bold")
    table.add_row("  bytes per parameter", f"{plan.per_parameter():.1f}")
    if plan.waiting:
        table.add_row("host memory per device, for weights that wait", f"{plan.waiting / GIB:,.2f} GiB")
    Console().print(table)


def compare_with_this_machine(plan: Plan, on_cpu: bool) -> None:
    """Say so where the plan needs more than there is, and what helps."""
    available, device = device_memory(on_cpu)
    if plan.total > available:
        print(
            f"note: {device} has {available / GIB:.1f} GiB, less than this needs. What helps, in this order: "
            "--activation_checkpointing true, --dtype bfloat16, --keep_base checkpoint, --optim_in_backward true, "
            "--optim adafactor (which masked has by default), a shorter --ctx_len, several GPUs with FSDP2."
        )


def device_memory(on_cpu: bool) -> tuple[float, str]:
    """(bytes, name) of the device that a run would take."""
    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    limit = Path("/sys/fs/cgroup/memory.max")
    bound = limit.read_text().strip() if limit.is_file() and os.access(limit, os.R_OK) else "max"
    total = psutil.virtual_memory().total
    return min(total, int(bound)) if bound.isdigit() else total, "this machine"
