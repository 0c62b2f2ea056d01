"""Prune SmolLM2-135M to 2:4 on this machine's CPU, and see what it writes before and after: about four minutes.

    python examples/prune_and_generate.py                          (after bash script/setup.sh)
    python examples/prune_and_generate.py "The river flows"        another beginning

No network is needed. The same steps as commands: script/demo.sh.
"""

import sys
import tempfile
import time

import torch
from datasets import Dataset, disable_progress_bars

from proxsparse.deploy.sparse import use_compact
from proxsparse.evaluation.perplexity import perplexity
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.progress import show_progress
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.mask import apply_mask
from proxsparse.model.loading import EMBEDDED, load_model, load_tokenizer, native_bf16
from proxsparse.text import calibration_windows, evaluation_windows

SAMPLES, CTX_LEN = 24, 512
PROMPT = "The first railway in the country was built"


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    disable_progress_bars()
    tokenizer, model = load_tokenizer(EMBEDDED), load_model(EMBEDDED, dtype=torch.float32)
    held_out = evaluation_windows("wiki", tokenizer, CTX_LEN, "heldout", 8)
    show("dense", model, tokenizer, prompt, held_out)

    start = time.perf_counter()
    windows = calibration_windows("wiki", tokenizer, CTX_LEN, SAMPLES, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        config = ProxSparseConfig(
            output_dir=folder, use_cpu=True, bf16=native_bf16("cpu"), activation_checkpointing=False,
            max_length=CTX_LEN, save_strategy="no", logging_steps=4,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": windows.tolist()})
        trainer = ProxSparseTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        show_progress(trainer)
        trainer.train()
        mask = trainer.mask()
    print(f"learned a mask from {SAMPLES * CTX_LEN:,} tokens in {time.perf_counter() - start:.0f} s")

    model = load_model(EMBEDDED, dtype=torch.float32)  # the original weights: the mask is all that was learned
    apply_mask(model, mask)
    use_compact(model)  # two values of four in memory
    show("2:4", model, tokenizer, prompt, held_out)


@torch.no_grad()
def show(name: str, model, tokenizer, prompt: str, windows) -> None:
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt")
    start = time.perf_counter()
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    seconds = time.perf_counter() - start
    speed = (out.shape[1] - ids["input_ids"].shape[1]) / seconds
    print(f"\n{name}: perplexity {perplexity(model, windows).perplexity:.1f}, {speed:.1f} tokens a second")
    print(tokenizer.decode(out[0], skip_special_tokens=True) + "\n")


if __name__ == "__main__":
    main()
