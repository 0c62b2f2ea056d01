"""Does --lambda_value auto reach its share of 2:4 blocks on models that no one tuned, where a fixed lambda does not?

    python benchmarks/auto_lambda.py

There are three models of different weight scale: SmolLM2-135M; the same function with up_proj multiplied by 30 and
down_proj divided by 30 in every layer; a tiny Llama, trained for a moment on the same text. Each learns with the
paper's method, once with lambda 0.25 (the paper's for Llama-2-7B), once with a fixed relative lambda, once with auto.
The table shows the share of 2:4 blocks at the end. It writes benchmarks/results/auto_lambda.json.
"""

import argparse
import sys
import tempfile

import torch
from common import print_table, write_record
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.learn import defaults_on, learn
from proxsparse.model.loading import EMBEDDED, load_model, load_tokenizer
from proxsparse.text import calibration_windows

FACTOR = 30.0
SETTINGS = {
    "lambda 0.25": {"lambda_value": 0.25},
    "lambda * rms 0.02": {"lambda_value": 0.02, "relative": True, "lambda_ramp": 0.5},
    "auto": {"lambda_value": "auto"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--ctx_len", type=int, default=128)
    args = parser.parse_args()
    tokenizer = load_tokenizer(EMBEDDED)
    windows = calibration_windows("wiki", tokenizer, args.ctx_len, args.samples, 0)
    shares: dict[str, dict[str, float]] = {}
    for name, make in {
        "SmolLM2-135M": smollm2,
        "SmolLM2-135M, rescaled": rescaled,
        "tiny Llama, trained": tiny,
    }.items():
        shares[name] = {}
        for label, settings in SETTINGS.items():
            shares[name][label] = learned_share(make(), tokenizer, windows, settings)
            print(name, label, f"{shares[name][label]:.1%}", file=sys.stderr, flush=True)
    rows = [[name, *(f"{found[label]:.1%}" for label in SETTINGS)] for name, found in shares.items()]
    print_table(f"share of 2:4 blocks after {args.samples} steps; auto aims at 95 %", ("model", *SETTINGS), rows)
    write_record("auto_lambda", {"samples": args.samples, "ctx_len": args.ctx_len, "shares": shares})
    return 0


def learned_share(model: PreTrainedModel, tokenizer, windows: torch.Tensor, settings: dict) -> float:
    """Share of 2:4 blocks that a run ends with."""
    with tempfile.TemporaryDirectory() as folder:
        short = {"output_dir": folder, "method": "paper", "save_strategy": "no", "logging_steps": 1}
        short |= {"learning_rate": 1e-4}
        config = ProxSparseConfig(**(defaults_on("cpu") | short | settings))
        history = learn(model, tokenizer, windows, config, {"model": EMBEDDED}).history
        return [entry for entry in history if "share_24" in entry][-1]["share_24"]


def smollm2() -> PreTrainedModel:
    return load_model(EMBEDDED, dtype=torch.float32)


def rescaled() -> PreTrainedModel:
    """The same function with other weights: up_proj is multiplied by what down_proj is divided by."""
    model = smollm2()
    with torch.no_grad():
        for block in model.get_decoder().layers:
            block.mlp.up_proj.weight.mul_(FACTOR)
            block.mlp.down_proj.weight.div_(FACTOR)
    return model


def tiny() -> PreTrainedModel:
    """Two layers, trained for 30 steps."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(EMBEDDED)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for window in calibration_windows("wiki", tokenizer, 128, 30, 1):
        model(input_ids=window[None], labels=window[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    sys.exit(main())
