"""Time and memory on a GPU: the kernels, a step of Llama-2-7B compared with its plan, sparse products, decoding.

    python benchmarks/gpu.py kernels     operator, optimizer and masked product on 4096 x 11008 weights (half a minute)
    python benchmarks/gpu.py step        time and memory of three steps of a 7B model with random weights (minutes)
    python benchmarks/gpu.py products    dense and 2:4 products at the shapes of a 7B model, 1 to 4096 rows
    python benchmarks/gpu.py generate    prefill and decoding of a 7B model with random weights, dense and 2:4, as
                                         calls and as CUDA graphs

Times are medians by the GPU's clock; a step's is the least of several by the host's. A device copy of the same
weights, read and written, is timed in the same run. Nothing is downloaded. Results go to
benchmarks/results/gpu_*.json with the card's name.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import psutil
import torch
from common import print_table, write_record
from datasets import Dataset
from tiny_models import byte_tokenizer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from proxsparse.commands.bench import measure, measure_sparse
from proxsparse.deploy.sparse import use_dense
from proxsparse.deploy.timing import device_seconds
from proxsparse.errors import RunError
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.plan import dimensions, plan_learning
from proxsparse.learning.rounded import Adafactor
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import prox_counted_, survey_, top2_mask, top2_product_
from proxsparse.operator.rounding import Noise

MODEL = "meta-llama/Llama-2-7b-hf"
SHAPE = (4096, 11008)  # of its down_proj
SHAPES = {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": SHAPE}
GIB = 2**30
# Settings of a step: name -> what is passed to learning next to method masked and bfloat16.
STEPS = {
    "default": {},
    "W0 on the CPU, in backward": {"keep_base": "cpu", "optim_in_backward": True},
    "W0 on the CPU, in backward, offloaded": {"keep_base": "cpu", "optim_in_backward": True, "offload_learned": True},
}
OURS = ("_prox", "_product", "_survey", "_squares", "_size", "_apply")  # Triton kernels


def kernels() -> list[dict]:
    """Seconds and bytes of each pass over one weight, fused and in plain torch operations."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator("cuda").manual_seed(0)
        weight, base, gradient = (
            (0.02 * torch.randn(SHAPE, device="cuda", generator=generator)).to(dtype) for _ in range(3)
        )
        norms = torch.rand(SHAPE[1], device="cuda", generator=generator) + 0.5
        rms = (weight.float() * norms).square().mean().sqrt().item()
        codes, counts = (
            torch.zeros(weight.numel() // 4, dtype=torch.uint8, device="cuda"),
            torch.zeros(2, dtype=torch.int32, device="cuda"),
        )
        noise, out = Noise(1) if dtype == torch.bfloat16 else None, torch.empty_like(weight)

        shrink = partial(_shrink, weight, rms, counts, norms, noise)

        works: dict[str, tuple[Callable[[str | None], object], float]] = {
            "copy": (lambda kernel, out=out, weight=weight: out.copy_(weight), 2),
            "operator, lambda*rms 0.002": (partial(shrink, 0.002), 2),
            "operator, lambda*rms 0.05": (partial(shrink, 0.05), 2),
            "operator, lambda*rms 0.5": (partial(shrink, 0.5), 2),
            "masked product": (
                lambda kernel, out=out, base=base, weight=weight, norms=norms: top2_product_(
                    out, base, weight, norms, kernel
                ),
                3,
            ),
            "survey": (
                lambda kernel, weight=weight, codes=codes, norms=norms: survey_(weight, codes, norms, kernel),
                1 + 0.5 / dtype.itemsize,
            ),
        }
        for kernel in (None, "eager"):
            parameter = nn.Parameter(weight.clone())
            parameter.grad = gradient
            optimizer = Adafactor([parameter], lr=1e-6, kernel=kernel)
            works["Adafactor"] = (lambda kernel, optimizer=optimizer: optimizer.step(), 5)
            for name, (work, passes) in works.items():
                if name == "copy" and kernel:
                    continue
                taken = kernel_seconds(partial(work, kernel), weight, 5 if kernel else 30)
                size = passes * weight.nbytes
                row = {"dtype": str(dtype)[6:], "what": name, "kernel": kernel or "fused", "seconds": taken}
                rows.append(row | {"bytes_per_weight": passes * dtype.itemsize, "bytes_per_second": size / taken})
    copies = {row["dtype"]: row["seconds"] for row in rows if row["what"] == "copy"}
    cells = [
        [r["dtype"], r["what"], r["kernel"], f"{r['seconds'] * 1e6:,.0f}", f"{r['seconds'] / copies[r['dtype']]:.1f}",
         f"{r['bytes_per_weight']:.1f}", f"{r['bytes_per_second'] / 1e12:.2f}"]
        for r in rows
    ]  # fmt: skip
    heads = ("weights", "what", "kernel", "microseconds", "x copy", "bytes per weight", "TB/s")
    print_table(f"{SHAPE[0]} x {SHAPE[1]} on {card()}", heads, cells, text_columns=3)
    return rows


def kernel_seconds(work: Callable[[], object], weight: Tensor, repeat: int) -> float:
    """Median time of a piece of work that changes a weight, which is put back each time."""
    fresh, taken = weight.clone(), []
    for attempt in range(repeat + 3):
        for _ in range(4):  # the GPU is busy until the work is queued
            weight.copy_(fresh)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if attempt >= 3:
            taken.append(start.elapsed_time(end) / 1e3)
    weight.copy_(fresh)
    return sorted(taken)[len(taken) // 2]


def _shrink(weight, rms, counts, norms, noise, strength: float, kernel: str | None) -> None:
    prox_counted_(weight, strength / rms, counts, scale=norms, noise=noise, kernel=kernel)


class Watching(TrainerCallback):
    """Seconds of every step, and what the last one spends on which kernel."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.profiler: profile | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps - 1:
            self.profiler = profile(activities=[ProfilerActivity.CUDA])
            self.profiler.__enter__()
        torch.cuda.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        if self.profiler:
            self.profiler.__exit__(None, None, None)

    def shares(self) -> dict[str, float]:
        """Seconds of the GPU by kernel, in the last step."""
        assert self.profiler is not None
        found: dict[str, float] = defaultdict(float)
        for event in self.profiler.key_averages():
            found[event.key] += event.self_device_time_total / 1e6
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def random_model(name: str = MODEL) -> PreTrainedModel:
    """A model with random bfloat16 weights, made on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(dimensions(name)[0], dtype=torch.bfloat16)


def step(name: str, ctx_len: int, steps: int = 4) -> dict:
    """One setting: seconds of a step, by kernel, and peak memory compared with the plan."""
    model = random_model()
    shapes = dict(dimensions(MODEL)[0].to_dict())
    with tempfile.TemporaryDirectory() as folder:
        config = ProxSparseConfig(
            output_dir=folder, bf16=True, max_steps=steps, save_strategy="no", logging_steps=1, report_to="none",
            disable_tqdm=True, max_length=ctx_len, activation_checkpointing=True, per_device_train_batch_size=1,
            **STEPS[name],
        )  # fmt: skip
        plan = plan_learning(
            dimensions(MODEL)[0], config, ctx_len=ctx_len, samples=steps, batch_size=1, dtype=torch.bfloat16
        )
        windows = torch.randint(1, shapes["vocab_size"], (steps, ctx_len)).tolist()
        watching = Watching()
        trainer = ProxSparseTrainer(
            model, config, train_dataset=Dataset.from_dict({"input_ids": windows}), callbacks=[watching],
            processing_class=byte_tokenizer(),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    shares = watching.shares()
    ours = {key: value for key, value in shares.items() if key.startswith(OURS)}
    copies = sum(value for key, value in shares.items() if "emcpy" in key or "copy" in key.lower())
    return {
        "model": MODEL, "setting": name, "ctx_len": ctx_len, "step_seconds": sorted(watching.seconds[1:-1])[0],
        "gpu_seconds": sum(shares.values()), "own_kernels": sum(ours.values()), "copies": copies, "by_kernel": ours,
        "largest": dict(list(shares.items())[:12]),
        "plan_gib": plan.total / GIB, "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "host_gib": psutil.Process().memory_info().rss / GIB,
    }  # fmt: skip


def products() -> list[dict]:
    """A product with a 2:4 weight, dense, by cuSPARSELt and by CUTLASS, at several numbers of rows."""
    rows = []
    for name, shape in SHAPES.items():
        weights = [0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        weights = [weight * top2_mask(weight) for weight in weights]
        forms: dict[str, list[Tensor]] = {"dense": weights}
        for library, cutlass in (("cuSPARSELt", False), ("CUTLASS", True)):
            SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass
            try:
                forms[library] = [to_sparse_semi_structured(weight) for weight in weights]
            except RuntimeError as error:
                print(f"{library}: {str(error).splitlines()[0]}", file=sys.stderr)
        for tokens in (1, 8, 256, 4096):
            x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
            found = {}
            for form, own in forms.items():
                try:
                    with torch.no_grad():
                        works = [lambda w=w, x=x: nn.functional.linear(x, w) for w in own]
                        found[form] = device_seconds(works)
                        difference = (works[0]() - nn.functional.linear(x, weights[0])).abs().max().item()
                        found[f"{form} error"] = difference
                        found[f"{form} graph"] = device_seconds(works, graph=True)
                except (RuntimeError, RunError) as error:
                    print(f"{form}, {tokens} rows: {str(error).splitlines()[0]}", file=sys.stderr)
            rows.append({"layer": name, "shape": shape, "rows": tokens, **found})
    cells = []
    for r in rows:
        for way in ("", " graph"):
            own = [r.get(f"{form}{way}") for form in ("dense", "cuSPARSELt", "CUTLASS")]
            gains = [f"{own[0] / value:.2f}" if own[0] and value else "-" for value in own[1:]]
            times = [f"{value * 1e6:,.0f}" if value else "-" for value in own]
            cells.append([r["layer"], str(r["rows"]), "graph" if way else "calls", *times, *gains])
    heads = ("layer", "rows", "as", "dense, us", "cuSPARSELt, us", "CUTLASS, us", "gain, cuSPARSELt", "gain, CUTLASS")
    print_table(f"bfloat16 products on {card()}", heads, cells)
    return rows


@torch.no_grad()
def generate(tokens: int = 32, prompt: int = 1024) -> list[dict]:
    """Decoding and prefill of a 7B model pruned by magnitude, as ``proxsparse bench`` measures them."""
    model = random_model().eval()
    for target in find_prunable(model):
        weight = target.weight.data
        weight.mul_(top2_mask(weight))
    ids = torch.randint(1, 32000, (1, prompt), device="cuda")
    rows = []
    for graph in (False, True):
        settings = argparse.Namespace(prompt=prompt, tokens=tokens, repeat=3, graph=graph)
        use_dense(model)
        for name in ("dense", "sparse"):
            found = measure(model, ids, settings) if name == "dense" else measure_sparse(model, ids, settings, None)
            rows.append({"weights": name, "graph": graph} | found)
    heads = ("weights", "as", "prefill tokens/s", "decode tokens/s", "weights, GiB")
    cells = [
        [r["weights"], "graph" if r["graph"] else "calls", f"{r['prefill_tokens_per_second']:,.0f}",
         f"{r['decode_tokens_per_second']:,.1f}", f"{r['weight_bytes'] / GIB:.1f}"]
        for r in rows
    ]  # fmt: skip
    print_table(f"Llama-2-7B (random, bfloat16), {prompt} and {tokens} tokens, on {card()}", heads, cells, 2)
    return rows


def card() -> str:
    return torch.cuda.get_device_name(0)


def all_steps(ctx_len: int) -> list[dict]:
    """Every setting in a process of its own, so that each begins with an empty GPU."""
    rows = []
    for name in STEPS:
        command = [sys.executable, __file__, "step", "--one", name, "--ctx_len", str(ctx_len)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr[-1500:]}", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    cells = [
        [r["setting"], f"{r['step_seconds']:.2f}", f"{r['own_kernels'] / r['gpu_seconds']:.1%}",
         *(f"{r[key]:.1f}" for key in ("plan_gib", "peak_gib", "reserved_gib", "host_gib"))]
        for r in rows
    ]  # fmt: skip
    heads = ("setting", "s per step", "own kernels", "plan, GiB", "peak, GiB", "reserved, GiB", "host, GiB")
    print_table(f"Llama-2-7B, masked, {ctx_len} tokens per step, bfloat16, {card()}", heads, cells)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "step", "products", "generate"))
    parser.add_argument("--ctx_len", type=int, default=4096, help="of a step")
    parser.add_argument("--one", default=None, choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: there is no GPU here that torch can use", file=sys.stderr)
        return 1
    if args.one:
        print(json.dumps(step(args.one, args.ctx_len)))
        return 0
    works = {"kernels": kernels, "step": lambda: all_steps(args.ctx_len), "products": products, "generate": generate}
    write_record(f"gpu_{args.what}", {"card": card(), "rows": works[args.what]()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
