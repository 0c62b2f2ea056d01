"""Speed, memory and exactness of the operator: fused, eager, and upstream's method in plain torch ("original").

    python benchmarks/operator_speed.py                    the table of BENCHMARKS.md (about ten minutes on 2 cores)
    python benchmarks/operator_speed.py --sizes 1e5 1e6    smaller

Seconds are the best of the repetitions. A copy of the same weights (``torch.Tensor.copy_``, same threads) is timed in
the same run; GB/s counts one read and one write per weight. The gap is the worst relative excess of the objective over
the least of many float64 descents (tests/oracle.py), on a sample of blocks. Extra memory is how far the process's peak
rises during the call, measured in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import RESULTS, best_seconds, print_table, write_record
from original import original_
from torch import Tensor

from proxsparse.model.loading import EMBEDDED, load_model
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import prox_op_
from proxsparse.record import atomic_path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracle import global_minimum, objective

STRENGTHS = [1e-3, 1e-2, 1e-1, 1.0, 10.0]  # lambda * rms
GAP_BLOCKS = 4000


KERNELS = {
    "fused": lambda w, lam: prox_op_(w, lam, kernel="cpu"),
    "eager": lambda w, lam: prox_op_(w, lam, kernel="eager"),
    "original": original_,
}


def weights(kind: str, size: int) -> list[Tensor]:
    """Tensors of ``size`` weights in all, or every prunable weight of the embedded model."""
    if kind == "smollm2":
        model = load_model(EMBEDDED, dtype=torch.float32)
        return [t.weight.detach() for t in find_prunable(model)]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size // 4 * 4, generator=generator)
    if kind == "laplace":
        values = values.sign() * torch.empty_like(values).exponential_(generator=generator)
    return [values.view(1, -1)]


def root_mean_square(tensors: list[Tensor]) -> float:
    return (sum(t.square().sum().item() for t in tensors) / sum(t.numel() for t in tensors)) ** 0.5


def seconds(run, tensors: list[Tensor], repeat: int) -> float:
    """Best time of ``run`` over all tensors, on fresh copies each time."""
    scratch = [t.clone() for t in tensors]

    def fresh() -> None:
        for s, t in zip(scratch, tensors, strict=True):
            s.copy_(t)

    return best_seconds(lambda: [run(s) for s in scratch], repeat, fresh)


def worst_gap(kernel: str, tensors: list[Tensor], lam: float) -> float:
    """Worst relative excess of the objective over the float64 search, on blocks spread over the tensors."""
    blocks = torch.cat([t.reshape(-1, 4) for t in tensors]) if len(tensors) > 1 else tensors[0].view(-1, 4)
    sample = blocks[:: max(1, len(blocks) // GAP_BLOCKS)][:GAP_BLOCKS].clone()
    found = sample.clone()
    KERNELS[kernel](found.view(1, -1), lam)
    best = global_minimum(sample.numpy(), lam)
    gap = (objective(found.numpy(), sample.numpy(), lam) - best) / np.maximum(best, 1e-30)
    return float(gap.max())


def extra_memory(kernel: str, size: int) -> float:
    """MiB by which the peak rises during one call, in a fresh process."""
    command = [sys.executable, __file__, "--memory_of", kernel, "--sizes", str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_of(kernel: str, size: int) -> float:
    tensor = weights("normal", size)[0]
    KERNELS[kernel](tensor[:, :4096].clone(), 0.1)  # compile and warm up
    ballast = torch.empty(256 * 2**18).fill_(1.0)  # push the peak so far out of the way of start-up
    del ballast
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    KERNELS[kernel](tensor, 0.1)
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return (int(peak.split()[1]) * 1024 - held) / 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory_of", default=None, choices=KERNELS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of:
        print(memory_of(args.memory_of, int(args.sizes[0])))
        return 0
    rows = []
    cases = [("smollm2", 0, strength) for strength in (*STRENGTHS, "0.25")]
    cases += [(kind, int(size), 1e-2) for kind in ("normal", "laplace") for size in args.sizes]
    cases += [(kind, 10**6, strength) for kind in ("normal", "laplace") for strength in STRENGTHS if strength != 1e-2]
    loaded: tuple[tuple, list[Tensor]] = ((), [])
    for kind, size, strength in cases:
        if loaded[0] != (kind, size):
            loaded = ((kind, size), weights(kind, size))
        tensors = loaded[1]
        rms = root_mean_square(tensors)
        lam = float(strength) if isinstance(strength, str) else strength / rms
        for kernel in KERNELS:
            gap = worst_gap(kernel, tensors, lam)
            for threads in args.threads:
                # Upstream's method takes minutes on the whole model: once, at the paper's strength, with all threads.
                whole = kind == "smollm2" or size > 10**7
                if kernel == "original" and whole and not (strength == "0.25" and threads == args.threads[-1]):
                    continue
                torch.set_num_threads(threads)
                repeat = 1 if kernel == "original" else args.repeat
                row = {"weights": kind, "count": sum(t.numel() for t in tensors), "lambda_rms": lam * rms}
                row |= {"kernel": kernel, "threads": threads, "gap": gap}
                row["seconds"] = seconds(lambda w, k=kernel, s=lam: KERNELS[k](w, s), tensors, repeat)
                source = [t.clone() for t in tensors]
                pairs = iter(())

                def copy(w, source=source):
                    nonlocal pairs
                    try:
                        origin = next(pairs)
                    except StopIteration:
                        pairs = iter(source)
                        origin = next(pairs)
                    w.copy_(origin)

                row["copy_seconds"] = seconds(copy, tensors, args.repeat)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    memory = {kernel: extra_memory(kernel, 4 * 10**6) for kernel in KERNELS}
    record = {"rows": rows, "extra_mib": memory, "cpu": torch.cpu.get_capabilities().get("cpu_name")}
    write_record("operator", record)
    show(record)
    draw(record, RESULTS / "operator.png")
    return 0


def show(record: dict) -> None:
    heads = ("weights", "kernel", "count", "lambda*rms", "threads", "seconds", "x copy", "GB/s", "worst gap")
    rows = []
    for r in record["rows"]:
        rate = 8 * r["count"] / r["seconds"] / 1e9
        cells = [r["weights"], r["kernel"], f"{r['count']:,}", f"{r['lambda_rms']:.3g}", str(r["threads"])]
        cells += [f"{r['seconds']:.4f}", f"{r['seconds'] / r['copy_seconds']:.1f}", f"{rate:.2f}", f"{r['gap']:.1e}"]
        rows.append(cells)
    print_table("the 2:4 operator", heads, rows, text_columns=2)
    print("extra memory, MiB, 4 million weights:", {k: round(v, 2) for k, v in record["extra_mib"].items()})


def draw(record: dict, path: Path) -> None:
    """Time over the number of weights, and gap over the strength."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = {"fused": "#3b6fb6", "eager": "#5a9e6f", "original": "#c0504d"}
    most = max(r["threads"] for r in record["rows"])
    for kernel, colour in colours.items():
        sized = [r for r in record["rows"] if r["kernel"] == kernel and r["weights"] == "normal"]
        sized = [r for r in sized if r["threads"] == most and abs(r["lambda_rms"] - 1e-2) < 1e-3]
        sized.sort(key=lambda r: r["count"])
        left.loglog([r["count"] for r in sized], [r["seconds"] for r in sized], "o-", color=colour, label=kernel)
        if kernel == "fused":
            left.loglog([r["count"] for r in sized], [r["copy_seconds"] for r in sized], "k--", label="plain copy")
        real = {r["lambda_rms"]: max(r["gap"], 1e-17) for r in record["rows"] if r["kernel"] == kernel}
        right.loglog(sorted(real), [real[k] for k in sorted(real)], "o-", color=colour, label=kernel)
    left.set(xlabel="weights", ylabel="seconds", title=f"time, lambda*rms = 0.01, {most} threads")
    right.set(xlabel="lambda * rms", ylabel="worst relative gap", title="objective above the float64 search")
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    with atomic_path(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")


if __name__ == "__main__":
    sys.exit(main())
