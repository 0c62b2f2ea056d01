"""The README's table of settings and GPUs, by ``proxsparse plan``: 4,096 tokens, bfloat16, activation checkpointing.

    python benchmarks/plans.py

No weights are loaded or downloaded. BENCHMARKS.md compares the plan of three settings with what an H100 measured.
"""

import sys

import torch

from proxsparse.commands.plan import GIB
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.plan import dimensions, plan_learning

SMALLEST = {"keep_base": "checkpoint", "optim_in_backward": True, "offload_learned": True}
SMALL = {"keep_base": "checkpoint", "optim_in_backward": True}
LLAMA_2_7B, LLAMA_2_13B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"
# (GPUs, GB of each, settings, tokens per window, model)
ROWS = [
    (1, 24, SMALLEST, 4096, LLAMA_2_7B),
    (1, 24, SMALLEST, 4096, "meta-llama/Llama-3.1-8B"),
    (1, 48, SMALL, 4096, LLAMA_2_7B),
    (1, 48, SMALLEST, 4096, LLAMA_2_13B),
    (1, 80, {}, 4096, LLAMA_2_7B),
    (1, 80, {"keep_base": "checkpoint"}, 4096, LLAMA_2_13B),
    (8, 24, {}, 4096, LLAMA_2_7B),
    (8, 48, {}, 4096, LLAMA_2_13B),
    (32, 80, {}, 4096, "meta-llama/Llama-3.1-70B"),
]


def main() -> int:
    print("| device | settings | model | GiB per device |\n|---|---|---|--:|")
    for gpus, memory, settings, ctx_len, model in ROWS:
        config = ProxSparseConfig(
            output_dir="unused", use_cpu=True, bf16=True, activation_checkpointing=True, max_length=ctx_len, **settings
        )
        plan = plan_learning(
            dimensions(model)[0], config, ctx_len=ctx_len, samples=400, batch_size=1, dtype=torch.bfloat16,
            devices=gpus, sharded=gpus > 1,
        )  # fmt: skip
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in settings.items())
        flags += f" --ctx_len {ctx_len}" if ctx_len != 4096 else ""
        device = f"one GPU of {memory} GB" if gpus == 1 else f"{gpus} GPUs of {memory} GB"
        flags = "FSDP2" if gpus > 1 else f"`{flags.strip()}`" if flags else "nothing to set"
        print(f"| {device} | {flags} | {model.rpartition('/')[2].removesuffix('-hf')} | {plan.total / GIB:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
