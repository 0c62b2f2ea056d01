"""From a mask to a model that is deployed: prune SmolLM2-135M, fine-tune it, quantise it, and generate.

    python examples/deploy.py                     (after bash script/setup.sh; needs pip install compressed-tensors)
    python examples/deploy.py my/folder           writes into another folder than runs/deploy

It takes about five minutes on a CPU, and no network. The folder gets three checkpoints: pruned, tuned and int8. The
pruned weights are exact zeros in all of them. The example learns from very little text, to show the steps. One run
printed the perplexities 25.77 (dense), 88.58 (pruned), 85.07 (tuned) and 88.11 (int8), and 538 MB became 220 MB. For a
better model, pass more samples to ``main``.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import proxsparse
from proxsparse.deploy.check import check_sparsity
from proxsparse.deploy.quantise import check_quantisation

PROMPT = "The first railway in the country was built"


def main(
    folder: str = "runs/deploy", model: str = "smollm2-135m", text: str = "wiki", samples: int = 8, ctx_len: int = 256
) -> dict[str, float]:
    """Perplexity of every stage, on text that was not learned from."""
    check_quantisation("int8", "dense")  # fails early if compressed-tensors is missing
    out = Path(folder)
    tokenizer = proxsparse.load_tokenizer(model)
    held_out = proxsparse.evaluation_windows(text, tokenizer, ctx_len, "heldout", 8)
    windows = proxsparse.calibration_windows(text, tokenizer, ctx_len, 2 * samples, seed=0)

    network = proxsparse.load_model(model, dtype=torch.float32)
    found = {"dense": measure("dense", network, tokenizer, held_out)}

    mask = proxsparse.learn_mask(network, tokenizer, windows[:samples])
    proxsparse.save_pruned(model, mask, out / "pruned")
    proxsparse.apply_mask(network, mask)
    found["pruned"] = measure("pruned", network, tokenizer, held_out)

    fine_tune(network, tokenizer, mask, windows[samples:], out / "training")
    mask = dataclasses.replace(mask, info=mask.info | {"weights_updated": "fine-tuning"})  # the model card says so
    proxsparse.save_pruned(network, mask, out / "tuned")
    found["tuned"] = measure("tuned", network, tokenizer, held_out)

    proxsparse.save_pruned(str(out / "tuned"), mask, out / "int8", quantize="int8")
    quantised = proxsparse.load_model(str(out / "int8"), evaluating=True)
    found["int8"] = measure("int8", quantised, tokenizer, held_out)

    for name in ("pruned", "tuned", "int8"):
        counts, offenders = check_sparsity(str(out / name))
        size = sum(file.stat().st_size for file in (out / name).glob("*.safetensors")) / 1e6
        print(f"{out / name}: {size:.0f} MB, {counts['blocks']:,} blocks, {len(offenders)} weights not 2:4")
    return found


def fine_tune(model, tokenizer, mask, windows: torch.Tensor, folder: Path) -> None:
    """One pass over the windows by TRL's own trainer; the callback keeps the mask."""
    settings = SFTConfig(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=2, learning_rate=1e-4,
        lr_scheduler_type="cosine", warmup_steps=1, max_length=windows.shape[1], use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=2,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": windows.tolist()})
    callbacks = [proxsparse.KeepMask(mask)]
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()


@torch.no_grad()
def measure(name: str, model, tokenizer, windows: torch.Tensor) -> float:
    model.eval()
    model.config.use_cache = True  # the trainer has turned it off
    start = time.perf_counter()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    seconds = time.perf_counter() - start
    perplexity = proxsparse.perplexity(model, windows).perplexity
    print(f"\n{name}: perplexity {perplexity:.2f}, {24 / seconds:.1f} tokens per second")
    print(tokenizer.decode(written[0], skip_special_tokens=True) + "\n", flush=True)
    return perplexity


if __name__ == "__main__":
    main(*sys.argv[1:])
