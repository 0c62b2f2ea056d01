"""From a mask to a deployed model on SmolLM2-135M: what each step costs and brings, and that the model stays 2:4.

    python benchmarks/deployed.py runs/demo          the mask of this run; all models are written below it
    python benchmarks/deployed.py                    learns a mask first, into runs/deployed

The rows: the dense model, the mask alone, recovery in each scope, fine-tuning with KeepMask, a masked LoRA adapter that
was merged, and the recovered model in int8, in int4, and in the compact form. All that learn see the same windows once,
which are other ones than the mask's. Every model is written, passes ``proxsparse check``, and is read back before it is
measured. Fine-tuning and LoRA run with one plain setting each, which was not tuned. It writes
benchmarks/results/deployed.json row by row; the same command again measures what is missing.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from common import RESULTS, best_seconds, print_table, write_record
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.learning.folder import Run
from proxsparse.learning.recover import SCOPES
from proxsparse.mask import Mask
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.loading import EMBEDDED
from proxsparse.record import git_commit, read_json

TEXTS = ("wiki", "news")
COMPACT, RESULT = "compact", RESULTS / "deployed.json"
PROMPT, TOKENS = "The first railway in the country was built", 24
HEADS = ("model", "weights updated", *(f"{text} perplexity" for text in TEXTS), "MB", "tokens/s")


class Chain:
    """The models of one mask, in folders below its run.

    Args:
        folder: of the run; it is learned where there is none.
        samples, ctx_len: windows and their length, for learning the mask and for each update.
        max_windows: windows of each text that measure a model.
    """

    def __init__(self, folder: Path, samples: int, ctx_len: int, max_windows: int):
        self.folder, self.samples, self.ctx_len, self.max_windows = folder, samples, ctx_len, max_windows
        flags = {"model": EMBEDDED, "dataset": "wiki", "ctx_len": ctx_len, "samples": samples, "output_dir": folder}
        if not Run(folder).is_finished:
            run("learn", *(word for name, value in flags.items() for word in (f"--{name}", value)))
        self.mask = proxsparse.load_mask(folder)
        self.tokenizer = proxsparse.load_tokenizer(EMBEDDED)
        options = (ctx_len, "heldout", max_windows)
        self.held_out = {text: proxsparse.evaluation_windows(text, self.tokenizer, *options) for text in TEXTS}

    def models(self) -> list[tuple[str, str, Path, Callable[[Path], object] | None]]:
        """Name, whether weights were updated, folder, and what writes it, of every model."""
        export, below = partial(self.command, "export", "--to"), self.folder.joinpath
        found = [("dense", "", Path(EMBEDDED), None), ("mask alone", "", below("pruned"), export)]
        for scope in SCOPES:
            found.append((f"recovered, {scope}", "yes", below(f"recovered-{scope}"), partial(self.recover, scope)))
        for title, name, update in (("fine-tuned, KeepMask", "tuned", fine_tune), ("LoRA, merged", "adapted", adapt)):
            write = partial(update, self.mask, self.tokenizer, self.windows())
            found.append((title, "yes", below(name), write))
        text = ("--dataset", "wiki", "--samples", self.samples, "--ctx_len", self.ctx_len)
        forms = {"int8": ("--quantize", "int8"), "int4": ("--quantize", "int4", *text), COMPACT: ("--form", "compact")}
        for form, flags in forms.items():
            write = partial(run, "export", "--model", below("recovered-full"), *flags, "--to")
            found.append((f"recovered, full, {form}", "yes", below(form), write))
        return found

    def checked(self) -> Iterator[tuple[str, str, Path]]:
        """The models, each written, unless an earlier start did, and seen to be 2:4, when it comes."""
        for title, updated, folder, write in self.models():
            if write is not None:
                if not folder.is_dir():
                    write(folder)
                run("check", "--model", folder)
            yield title, updated, folder

    def measured(self) -> list[dict]:
        """The rows; those that the record has of the same mask and windows are not measured again."""
        made_of = {"samples": self.samples, "ctx_len": self.ctx_len, "max_windows": self.max_windows}
        made_of |= {"mask": sha256((self.folder / "mask.safetensors").read_bytes()).hexdigest()}
        record = read_json(RESULT) if RESULT.is_file() else {}
        rows = {row["model"]: row for row in record.get("rows", [])} if made_of.items() <= record.items() else {}
        titles = [title for title, *_ in self.models()]
        for title, updated, folder in self.checked():
            if title not in rows:
                rows[title] = {"model": title, "updated": updated} | self.measure(folder)
                rows[title]["commit"] = git_commit()
                print(rows[title], flush=True)
                write_record("deployed", made_of | {"rows": [rows[name] for name in titles if name in rows]})
        return [rows[name] for name in titles]

    def windows(self) -> Tensor:
        return proxsparse.calibration_windows("wiki", self.tokenizer, self.ctx_len, self.samples, seed=43)

    def command(self, name: str, *words: object) -> None:
        run(name, "--run", self.folder, *words)

    def recover(self, scope: str, to: Path) -> None:
        self.command("recover", "--scope", scope, "--samples", self.samples, "--to", to)

    @torch.no_grad()
    def measure(self, folder: Path) -> dict[str, float]:
        dense = proxsparse.load_model(str(folder), evaluating=True)
        found = {text: proxsparse.perplexity(dense, windows).perplexity for text, windows in self.held_out.items()}
        model = proxsparse.load(str(folder), sparse=True) if folder.name == COMPACT else dense
        ids = self.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        made = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        elapsed = best_seconds(lambda: model.generate(ids, **made), 3)
        checkpoint = Checkpoint.find(str(folder))
        assert checkpoint is not None
        size = sum(file.stat().st_size for file in checkpoint.files)
        return found | {"MB": size / 1e6, "tokens_per_second": TOKENS / elapsed}


def fine_tune(mask: Mask, tokenizer: PreTrainedTokenizerBase, windows: Tensor, to: Path) -> None:
    """TRL's trainer on the text, with the mask kept."""
    model = proxsparse.load_model(EMBEDDED)
    train(model, tokenizer, windows, 1e-4, [proxsparse.KeepMask(mask)])
    proxsparse.save_pruned(model, mask, to)


def adapt(mask: Mask, tokenizer: PreTrainedTokenizerBase, windows: Tensor, to: Path) -> None:
    """A LoRA adapter on every linear layer, trained under the mask and merged."""
    from peft import LoraConfig

    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = proxsparse.masked_lora(proxsparse.load_model(EMBEDDED), mask, adapter)
    train(model, tokenizer, windows, 5e-4, [])
    proxsparse.save_pruned(model.merge_and_unload(), mask, to)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, rate: float, callbacks: list
) -> None:
    settings = SFTConfig(
        output_dir="unused", num_train_epochs=1, per_device_train_batch_size=1, learning_rate=rate,
        lr_scheduler_type="linear", warmup_steps=0.05, max_length=windows.shape[1], use_cpu=True, bf16=False,
        activation_checkpointing=False, report_to="none", save_strategy="no", logging_steps=10,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": windows.tolist()})
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()


def run(*words: object) -> None:
    if console([str(word) for word in words]):
        raise SystemExit(f"{' '.join(map(str, words))} failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/deployed", type=Path, help="folder of a run")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--max_windows", type=int, default=16)
    args = parser.parse_args()
    rows = Chain(args.folder, args.samples, args.ctx_len, args.max_windows).measured()
    cells = (
        [r["model"], r["updated"], *(f"{r[t]:.2f}" for t in TEXTS), f"{r['MB']:.0f}", f"{r['tokens_per_second']:.1f}"]
        for r in rows
    )
    print_table("SmolLM2-135M", HEADS, cells, text_columns=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
