"""Prune SmolLM2-135M to 2:4 on this machine's CPU, and see what it writes before and after: about four minutes.

    python examples/prune_and_generate.py                          (after bash script/setup.sh)
    python examples/prune_and_generate.py "The river flows"        another beginning

No network is needed. The same steps as commands: script/demo.sh.
"""

import sys
import time

import torch

import proxsparse
from proxsparse.deploy.sparse import use_compact

MODEL = "smollm2-135m"
SAMPLES, CTX_LEN = 24, 512
PROMPT = "The first railway in the country was built"


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else PROMPT
    tokenizer = proxsparse.load_tokenizer(MODEL)
    model = proxsparse.load_model(MODEL, dtype=torch.float32)
    held_out = proxsparse.evaluation_windows("wiki", tokenizer, CTX_LEN, "heldout", 8)
    show("dense", model, tokenizer, prompt, held_out)

    start = time.perf_counter()
    windows = proxsparse.calibration_windows("wiki", tokenizer, CTX_LEN, SAMPLES, seed=0)
    mask = proxsparse.learn_mask(model, tokenizer, windows, logging_steps=4)
    print(f"learned a mask from {SAMPLES * CTX_LEN:,} tokens in {time.perf_counter() - start:.0f} s")

    proxsparse.apply_mask(model, mask)  # on the original weights: the mask is all that was learned
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
    print(f"\n{name}: perplexity {proxsparse.perplexity(model, windows).perplexity:.1f}, {speed:.1f} tokens per second")
    print(tokenizer.decode(out[0], skip_special_tokens=True) + "\n")


if __name__ == "__main__":
    main()
