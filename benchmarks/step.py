"""A training step of the demo, part by part: what learning adds to the model's own work.

    python benchmarks/step.py                          three steps of each way
    python benchmarks/step.py --layers 3               a tenth of the model, less than a minute
    python benchmarks/step.py --threads 1 --clock cpu  seconds of the processor, where other programs run too

The step is the demo's: SmolLM2-135M, one window of 512 tokens, method ``masked``, float32 weights, bfloat16 autocast
where the CPU has it. Four ways take turns in one process:

    fused      what learning runs, without layer-wise steps
    unfused    the same arithmetic in plain torch operations, and copies instead of exchanged memory
    with layer-wise steps, which count as forward and backward: what learning runs by default
    AdamW      plain fine-tuning of the same weights on the language-model loss, with torch's fused AdamW

Seconds are medians, after one step that does not count. Bytes are those that a part reads and writes of tensors of the
weight's size, per pruned weight: of kernels they follow from their passes, of torch operations they are counted. In
the end the masks of the first two ways are compared. Their optimizers agree in every bit; their operators, which
iterate, to about 1e-6.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from common import print_table, write_record
from datasets import Dataset, disable_progress_bars
from tiny_models import byte_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from proxsparse.evaluation.report import agreement_by_kind
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.learn import defaults_on
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.model.loading import EMBEDDED, load_model, native_bf16
from proxsparse.model.prunable import find_prunable
from proxsparse.record import write_json

CTX_LEN = 512
WEIGHT = 4  # bytes of a float32 weight
# Passes over a tensor of the weight's size, read or written.
PASSES = {
    "clip": 3,  # the gradient: read for its norm, then read and written
    "optimizer": 5,  # Adafactor: the gradient three times, the weight read and written
    "operator": 2,
    "mask": 3,  # W0 and the learned weight read, the masked one written
    "swaps": 0,
    "AdamW": 7,  # weight, gradient and two moments read, all but the gradient written
}
PARTS = ("forward and backward", "clip", "optimizer", "operator", "mask", "swaps")
WITH_LAYERS = "with layer-wise steps"  # fused, and what learning runs by default
OWN = PARTS[2:]  # what this project adds or replaces


class Clock:
    """Seconds of each part; of parts that are inside of others too, which the caller subtracts."""

    now: Callable[[], float] = time.perf_counter

    def __init__(self) -> None:
        self.seconds: Counter = Counter()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = Clock.now()
        try:
            yield
        finally:
            self.seconds[part] += Clock.now() - start

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Count the time of an object's method from here on."""
        real = getattr(owner, method)

        def timed(*args, **kwargs):
            with self(part):
                return real(*args, **kwargs)

        setattr(owner, method, timed)


class Learning:
    """A step of learning, outside of the Trainer's loop, so that several can take turns.

    Args:
        fused: False: plain torch operations, and copies.
        changes: to the settings.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, folder: str, fused: bool, **changes: Any):
        self.fused, self.step, self.clock = fused, 0, Clock()
        config = ProxSparseConfig(
            output_dir=folder, max_length=windows.shape[1], max_steps=100, norm_samples=1, report_to="none",
            disable_tqdm=True, save_strategy="no", **defaults_on("cpu"), **changes,
        )  # fmt: skip
        with self.kernels():
            self.trainer = ProxSparseTrainer(
                model, config, train_dataset=Dataset.from_dict({"input_ids": windows.tolist()}),
                processing_class=byte_tokenizer(),
            )  # fmt: skip
            self.trainer.create_optimizer_and_scheduler(config.max_steps)
        accelerator = self.trainer.accelerator
        self.model, self.optimizer = accelerator.prepare(model, self.trainer.optimizer)
        for group in self.optimizer.param_groups:  # as after the warm-up
            group["lr"] = group["initial_lr"]
        if not fused:
            self.optimizer.optimizer.kernel = "eager"
        self.trainer.current_gradient_accumulation_steps = 1  # the loop would say so
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        turns = self.trainer.objective.turns
        assert turns is not None
        turns._exchange = fused
        for method in ("put_original", "put_learned", "_leave"):
            self.clock.watch(turns, method, "swaps")
        self.clock.watch(turns, "put_masked", "mask")

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, the kernels of this way are used."""
        with contextlib.ExitStack() as stack:
            if not self.fused:
                stack.enter_context(patch("proxsparse.operator.prox.kernel_for", lambda weight: "eager"))
            yield

    def __call__(self) -> Counter:
        """Seconds of every part, in one step."""
        self.clock.seconds.clear()
        trainer, clock, found = self.trainer, self.clock, Counter()
        with self.kernels(), clock("whole"):
            with clock("computing"):
                trainer.training_step(self.model, dict(self.batch))
            with clock("clip"):
                trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
            with clock("optimizer"):
                self.optimizer.step()
            with clock("operator"):
                trainer.proximal(50 + self.step, trainer.args.max_steps)  # lambda has risen to its full value
            self.model.zero_grad()
        self.step = (self.step + 1) % 50
        found.update(clock.seconds)
        found["forward and backward"] = found.pop("computing") - found["mask"] - found["swaps"]
        return found


class FineTuning:
    """A step of plain fine-tuning."""

    def __init__(self, model: PreTrainedModel, windows: Tensor):
        self.model, self.batch, self.clock = model.train(), windows[:1], Clock()
        pruned = {target.name for target in find_prunable(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in pruned)
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5, weight_decay=0.0, fused=True)

    def __call__(self) -> Counter:
        """Seconds of every part, in one step."""
        self.clock.seconds.clear()
        with self.clock("whole"):
            with self.clock("forward and backward"):
                with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
                    loss = self.model(input_ids=self.batch, labels=self.batch, use_cache=False).loss
                loss.backward()
                loss.item()
            with self.clock("clip"):
                nn.utils.clip_grad_norm_(self.weights, 1.0)
            with self.clock("optimizer"):
                self.optimizer.step()
            self.model.zero_grad()
        return Counter(self.clock.seconds)


class Traffic(TorchDispatchMode):
    """Bytes that torch operations read and write."""

    MADE = ("empty", "view", "expand", "transpose", "t.", "slice", "select", "unsqueeze", "squeeze", "detach", "alias",
            "as_strided", "split", "unbind", "_unsafe_view", "unfold", "permute", "lift")  # fmt: skip

    WRITTEN = ("copy_", "fill_", "zero_")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.MADE):
            read = args[1:] if name.startswith(self.WRITTEN) else args  # the first is only written
            given = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            touched = [leaf for leaf in tree_leaves((read, given, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in touched)
        return out


def weights_of(model: PreTrainedModel) -> int:
    return sum(target.weight.numel() for target in find_prunable(model))


def shortened(layers: int) -> PreTrainedModel:
    """The embedded model, or its first layers."""
    model = load_model(EMBEDDED, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def masks_alike(one: Learning, other: Learning) -> float:
    """Share of mask entries that two ways decide alike, which took the same steps."""
    return agreement_by_kind(one.trainer.mask(), other.trainer.mask())["all"]


def unfused_bytes(learning: Learning) -> dict[str, float]:
    """Per weight, of the parts of the unfused way, counted while they run."""
    trainer, found = learning.trainer, {}
    turns = trainer.objective.turns
    assert turns is not None
    count = weights_of(trainer.model)
    for target in trainer.targets:
        target.weight.grad = torch.full_like(target.weight, 1e-4)
    works: dict[str, Callable[[], Any]] = {
        "optimizer": learning.optimizer.step,
        "operator": lambda: trainer.proximal(50, 100),
    }
    with learning.kernels():
        for part, work in works.items():
            with Traffic() as traffic:
                work()
            found[part] = traffic.bytes / count
        with Traffic() as traffic, turns.away():
            turns.put_original()
            copies = traffic.bytes
            turns.put_masked()
            found["mask"] = (traffic.bytes - copies) / count
        found["swaps"] = traffic.bytes / count - found["mask"]
    return {"clip": PASSES["clip"] * WEIGHT, **found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="of the model; default: all 30")
    parser.add_argument("--repeat", type=int, default=3, help="steps of each way; default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="default: %(default)s")
    parser.add_argument("--output", default=None, help="default: benchmarks/results/step.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    Clock.now = time.process_time if args.clock == "cpu" else time.perf_counter
    disable_progress_bars()
    windows = torch.randint(1, 40000, (1, CTX_LEN), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        model = shortened(args.layers)
        ways: dict[str, Any] = {
            "fused": Learning(copy.deepcopy(model), windows, folder, True, layer_rate=0),
            "unfused": Learning(copy.deepcopy(model), windows, folder, False, layer_rate=0),
            WITH_LAYERS: Learning(copy.deepcopy(model), windows, folder, True),
            "AdamW": FineTuning(model, windows),
        }
        found: dict[str, list[Counter]] = {name: [] for name in ways}
        for turn in range(args.repeat + 1):
            for name, way in ways.items():
                seconds = way()
                if turn:  # the first compiles kernels and makes states
                    found[name].append(seconds)
        sizes = {
            "fused": {part: float(PASSES[part] * WEIGHT) for part in PARTS[1:]},
            "unfused": unfused_bytes(Learning(shortened(1), windows, folder, False, layer_rate=0)),
            WITH_LAYERS: {},
            "AdamW": {"clip": float(PASSES["clip"] * WEIGHT), "optimizer": float(PASSES["AdamW"] * WEIGHT)},
        }
        weights = weights_of(ways["fused"].trainer.model)
        alike = masks_alike(ways["fused"], ways["unfused"])
    medians = {
        name: {part: statistics.median(s[part] for s in seconds) for part in ("whole", *PARTS)}
        for name, seconds in found.items()
    }
    show(medians, sizes)
    print(f"mask entries that the fused and the unfused way decide alike after {args.repeat + 1} steps: {alike:.5%}")
    record = {
        "layers": args.layers,
        "weights": weights,
        "threads": args.threads,
        "clock": args.clock,
        "ctx_len": CTX_LEN,
    }
    record |= {"bf16": native_bf16("cpu"), "seconds": medians, "all": found, "bytes_per_weight": sizes}
    record["masks_alike"] = alike
    record |= {"cpu": torch.cpu.get_capabilities().get("cpu_name")}
    write_json(args.output, record) if args.output else write_record("step", record)
    return 0


def show(medians: dict[str, dict[str, float]], sizes: dict[str, dict[str, float]]) -> None:
    rows = []
    for name, seconds in medians.items():
        whole, own = seconds["whole"], sum(seconds[part] for part in OWN)
        traffic = [sizes[name].get(part, 0.0) for part in PARTS]
        total = sum(sizes[name].get(part, 0.0) for part in OWN)
        rows.append([name, "seconds", *(f"{seconds[part]:.3f}" for part in PARTS), f"{own:.3f}", f"{whole:.2f}"])
        rows.append(["", "share", *(f"{seconds[part] / whole:.1%}" for part in PARTS), f"{own / whole:.1%}", ""])
        if not sizes[name]:
            continue
        rows.append(["", "bytes per weight", "", *(f"{size:.0f}" for size in traffic[1:]), f"{total:.0f}", ""])
    print_table("a step of the demo", ("way", "", *PARTS, "optimizer to swaps", "whole"), rows, text_columns=2)


if __name__ == "__main__":
    sys.exit(main())
