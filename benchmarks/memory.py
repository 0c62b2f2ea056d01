"""Peak memory of learning on the CPU, in bytes per parameter: a plain loop like upstream's, and each of our settings.

    python benchmarks/memory.py                      the table of BENCHMARKS.md (about ten minutes on 2 cores)
    python benchmarks/memory.py --hidden_size 1024   larger

The model is a Llama of random weights, with windows of 32 tokens and three steps. Every row runs in its own process.
What counts is anonymous memory above what the process holds before it loads the model, sampled every ms. Pages of
mapped files (--keep_base checkpoint reads weights from them) can be dropped at any time, so they have their own column.
glibc is told to give every freed block back (MALLOC_MMAP_THRESHOLD_); otherwise the holes in its heap would count too.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import print_table, write_record
from datasets import Dataset
from original import original_
from transformers import LlamaConfig, LlamaForCausalLM

from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.plan import plan_learning
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import find_prunable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from peaks import Sampler, status

CTX_LEN, STEPS = 32, 3
PLAIN = "plain loop"
# name -> settings on top of the method's own; the paper's method comes first, because the plain loop learns with it
SETTINGS: dict[str, dict] = {
    "paper": {"method": "paper"},
    "paper, step in backward": {"method": "paper", "optim_in_backward": True},
    "paper, Adafactor": {"method": "paper", "optim": "adafactor"},
    "paper, Adafactor, step in backward": {"method": "paper", "optim": "adafactor", "optim_in_backward": True},
    "masked, AdamW": {"optim": "adamw_torch_fused"},
    "masked, AdamW in 8 bits": {"optim": "adamw_bnb_8bit"},
    "masked": {},
    "masked, W0 in its files": {"keep_base": "checkpoint"},
    "masked, W0 in its files, step in backward": {"keep_base": "checkpoint", "optim_in_backward": True},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", nargs="+", default=[PLAIN, *SETTINGS], choices=[PLAIN, *SETTINGS])
    parser.add_argument("--one", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        name, dtype, folder = args.one
        print(json.dumps(measure(name, getattr(torch, dtype), folder)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            config = LlamaConfig(
                vocab_size=1024, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 11 // 4,
                num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8,
            )  # fmt: skip
            LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(f"{folder}/{dtype}")
            for name in args.rows:
                command = [sys.executable, __file__, "--one", name, dtype, f"{folder}/{dtype}"]
                environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    print(done.stderr[-3000:], file=sys.stderr)
                    return 1
                rows.append({"setting": name, "dtype": dtype} | json.loads(done.stdout.splitlines()[-1]))
                print(f"{dtype} {name}: {rows[-1]['bytes']:.1f}", file=sys.stderr, flush=True)
    show(rows)
    record = {"rows": rows, "hidden_size": args.hidden_size, "layers": args.layers}
    write_record("memory", record)
    return 0


def measure(name: str, dtype: torch.dtype, folder: str) -> dict:
    """Peak bytes per parameter of one setting, seconds per step, and what the plan says of it."""
    run = plain_loop if name == PLAIN else learning
    warm = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    with tempfile.TemporaryDirectory() as tiny:
        LlamaForCausalLM(warm).to(dtype).save_pretrained(tiny)
        run(name, tiny, dtype)  # libraries, kernels, thread pools
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("RssAnon"), status("RssFile")
    with Sampler() as peaks:
        parameters, seconds, planned = run(name, folder, dtype)
    return {
        "parameters": parameters,
        "bytes": (peaks.anonymous - before[0]) / parameters,
        "file_bytes": max(0, peaks.files - before[1]) / parameters,
        "planned": planned and planned / parameters,
        "seconds_a_step": seconds / STEPS,
    }


def plain_loop(name: str, folder: str, dtype: torch.dtype) -> tuple[int, float, None]:
    """Upstream's loop, written plainly: AdamW, a copy of every pruned weight, the operator in plain torch."""
    model = load_model(folder, dtype=dtype)
    targets = find_prunable(model)
    copies = [target.weight.detach().clone() for target in targets]  # ProxLinear.original_weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    start = time.perf_counter()
    for window in windows(model.config.vocab_size):
        model(input_ids=window[None], labels=window[None]).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for target in targets:
                original_(target.weight, 0.25)
        optimizer.zero_grad()
    assert len(copies) == len(targets)
    return sum(p.numel() for p in model.parameters()), time.perf_counter() - start, None


def learning(name: str, folder: str, dtype: torch.dtype) -> tuple[int, float, float]:
    """This project's trainer."""
    model = load_model(folder, dtype=dtype)
    dimensions = model.config
    norms = {t.name: torch.ones(t.weight.shape[t.in_dim]) for t in find_prunable(model)}
    data = Dataset.from_dict({"input_ids": windows(model.config.vocab_size).tolist()})
    with tempfile.TemporaryDirectory() as output:
        config = ProxSparseConfig(
            output_dir=output, use_cpu=True, bf16=False, activation_checkpointing=False, save_strategy="no",
            max_length=CTX_LEN, report_to="none", disable_tqdm=True, **SETTINGS[name],
        )  # fmt: skip
        own_norms = norms if config.score == "activation" else None
        trainer = ProxSparseTrainer(model, config, norms=own_norms, train_dataset=data, processing_class=tokenizer())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    planned = plan_learning(dimensions, config, ctx_len=CTX_LEN, samples=STEPS, batch_size=1, dtype=dtype)
    return planned.parameters, seconds, planned.total


def windows(vocabulary: int) -> torch.Tensor:
    return torch.randint(1, vocabulary, (STEPS, CTX_LEN), generator=torch.Generator().manual_seed(0))


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def show(rows: list[dict]) -> None:
    heads = ("weights", "setting", "bytes per parameter", "of the plain loop", "planned", "mapped files", "s per step")
    table = []
    plain = {row["dtype"]: row["bytes"] for row in rows if row["setting"] == PLAIN}
    for row in rows:
        share = f"{row['bytes'] / plain[row['dtype']]:.0%}" if row["dtype"] in plain else ""
        planned = f"{row['planned']:.1f}" if row["planned"] else ""
        cells = [f"{row['bytes']:.1f}", share, planned, f"{row['file_bytes']:.1f}", f"{row['seconds_a_step']:.2f}"]
        table.append([row["dtype"], row["setting"], *cells])
    print_table(f"peak memory of learning, {rows[0]['parameters'] / 1e6:.0f} million parameters", heads, table, 2)


if __name__ == "__main__":
    sys.exit(main())
