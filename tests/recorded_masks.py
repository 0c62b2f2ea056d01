"""Masks before and after a refactoring: sha256 of what every method gives for tiny models, by the commands.

    python tests/recorded_masks.py record masks.json      before
    python tests/recorded_masks.py compare masks.json     after: exit code 1 and the names of what changed

The sums of another processor or another thread count may differ in their last bits, so record and compare on one
machine. Only the commands are used, so that the script outlives every move of the library's inside.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from conftest import TEXT, byte_tokenizer, tiny_llama
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from proxsparse.__main__ import main as console

LEARNED = {
    "paper": ["--method", "paper", "--lambda_value", "0.25", "--learning_rate", "1e-4"],
    "paper, lambda2": [
        "--method", "paper", "--lambda_value", "0.25", "--learning_rate", "1e-4",
        "--project_lambda2", "1", "--lambda2_value", "0.25", "--epsilon", "0.5",
    ],
    "masked": ["--method", "masked"],
    "masked, without layer-wise steps": ["--method", "masked", "--layer_rate", "0"],
    "masked, auto": ["--method", "masked", "--lambda_value", "auto"],
    "masked, AdamW": ["--method", "masked", "--optim", "adamw_torch_fused"],
    "masked, bfloat16": ["--method", "masked", "--dtype", "bfloat16"],
    "masked, in backward": ["--method", "masked", "--optim_in_backward", "true"],
    "masked, base in the checkpoint": ["--method", "masked", "--keep_base", "checkpoint"],
    "masked, accumulation": ["--method", "masked", "--gradient_accumulation_steps", "2"],
}  # fmt: skip
PRUNED = ("magnitude", "wanda", "sparsegpt", "admm", "maskllm")


def models(folder: Path) -> dict[str, Path]:
    """Tiny checkpoints with linear layers, Conv1D and stacked experts."""
    torch.manual_seed(1)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 128,
    }
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, eos_token_id=0, pad_token_id=0, bos_token_id=None))
    made = {"llama": tiny_llama(), "gpt2": gpt2, "mixtral": mixtral}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in made}


def digest(path: Path) -> str:
    """Of the packed bits of a mask file, by name; its metadata has versions and times."""
    found = hashlib.sha256()
    with safe_open(path, framework="numpy") as file:
        for name in sorted(file.keys()):
            found.update(name.encode() + file.get_tensor(name).tobytes())
    return found.hexdigest()


def run(*words: object) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = console([str(word) for word in words])
    if code:
        raise SystemExit(f"proxsparse {' '.join(map(str, words))}\n{out.getvalue()}")


def masks() -> dict[str, str]:
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = folder / "corpus"
        corpus.mkdir()
        for i in range(16):
            (corpus / f"{i:02}.txt").write_text(f"Document {i}. " + TEXT * 3)
        for name, model in models(folder).items():
            text = ["--model", model, "--dataset", corpus, "--ctx_len", 32]
            for method, flags in LEARNED.items():
                out = folder / f"{name}-{method}"
                run("learn", *text, "--samples", 24, "--output_dir", out, "--bf16", "false", *flags)
                found[f"{name}: {method}"] = digest(out / "mask.safetensors")
            for method in PRUNED:
                out = folder / f"{name}-{method}"
                flags = ["--nsamples", 8, "--bf16", "false", "--mask_only", "--save", out]
                run("prune", *text, "--prune_method", method, *flags)
                found[f"{name}: {method}"] = digest(out / "mask.safetensors")
    return found


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        raise SystemExit(__doc__)
    verb, file = sys.argv[1], Path(sys.argv[2])
    found = masks()
    if verb == "record":
        file.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    before = json.loads(file.read_text())
    changed = [name for name in before if found.get(name) != before[name]]
    sys.stdout.write(f"{len(before) - len(changed)} of {len(before)} masks are identical\n")
    for name in changed:
        sys.stdout.write(f"changed: {name}\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
