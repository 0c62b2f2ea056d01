"""Learn a mask from samples of text, and write it to mask.safetensors in the folder of the run.

    python end-to-end/main.py --model smollm2-135m --dataset wiki \\
        --ctx_len 512 --samples 100 --output_dir runs/mine
    python end-to-end/main.py --recipe llama2-7b-prox --dry_run
                                       (a published recipe: what it will do)

Flags of TRL's SFTConfig and transformers' TrainingArguments work too; --help_all lists them. The folder holds run.json
(the settings), checkpoints, mask.safetensors and history.json. If a run stops, the same command goes on from the last
checkpoint.
"""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.commands.cli import command, print_json
from proxsparse.commands.flags import LearnArguments, LearnParser, Parsed, without
from proxsparse.commands.groups import say_coverage
from proxsparse.commands.plan import print_plan
from proxsparse.errors import UsageError
from proxsparse.learning.checks import require_packages
from proxsparse.learning.config import ProxSparseConfig
from proxsparse.learning.folder import TEXT_FILES, Run, described
from proxsparse.learning.learn import is_sharded, learn
from proxsparse.model.inputs import digest
from proxsparse.model.loading import cast_weights, load_config, load_model, load_tokenizer, resolve_dtype
from proxsparse.model.windows import check_ctx_len, check_tokens
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.text import SELF, calibration_windows, parts_of, stamp


def arguments() -> LearnParser:
    parser = LearnParser(documentation=__doc__)
    parser.own.add_argument("--dry_run", action="store_true", help="show the plan and the settings, and learn nothing")
    parser.own.add_argument("--where", action="store_true", help="print the folder of the run, and learn nothing")
    return parser


@command(arguments)
def main(parsed: Parsed) -> None:
    run, config = parsed.run, parsed.config
    folder = Run(str(config.output_dir))
    if parsed.own.where:
        print(folder.folder)
        return
    if parsed.own.dry_run:
        print_plan(run, config)
        words = without([word for word in parsed.words if word != "--dry_run"], "output_dir")
        print(f"python end-to-end/main.py {shlex.join([*words, '--output_dir', str(folder.folder)])}")
        return
    data = dataclasses.asdict(run)
    # As they lie on the disk, so that commands with --run find them from every folder.
    data |= {"model": absolute(data["model"]), "dataset": absolute_parts(data["dataset"])}
    data[TEXT_FILES] = stamp(run.dataset)
    folder.refuse_another(described(data, config))
    if folder.is_finished:
        refuse_another_text(run, config, folder, data[TEXT_FILES])
        print(f"learned: done already ({folder.mask_file})")
    else:
        learn_from_start(run, config, data)
    if int(os.environ.get("RANK", "0")) == 0:
        share = {"share_24": folder.share_24()} if folder.pattern == TWO_OF_FOUR else {}
        print_json({"mask": str(folder.mask_file)} | share | {"run": str(folder.folder)})


def absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def absolute_parts(dataset: str) -> str:
    parts = parts_of(dataset)
    return absolute(dataset) if len(parts) == 1 else ",".join(f"{absolute(t)}:{share}" for t, share in parts.items())


def options_of(run: LearnArguments, config: ProxSparseConfig) -> dict[str, Any]:
    return {"revision": run.revision, "trust_remote_code": config.trust_remote_code}


def samples_of(
    run: LearnArguments,
    config: ProxSparseConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
) -> Tensor:
    """Samples to learn from, and after them those to evaluate on: (N, T) token ids that the model knows."""
    model_config = load_config(run.model, **options_of(run, config))
    check_ctx_len(run.ctx_len, model_config)
    samples = run.samples + run.eval_samples
    windows = calibration_windows(run.dataset, tokenizer, run.ctx_len, samples, config.seed, model)
    check_tokens(windows, model_config)
    return windows


def refuse_another_text(run: LearnArguments, config: ProxSparseConfig, folder: Run, stamped: str | None) -> None:
    """Refuse to call a run done whose text has changed since. Files that look as before are not read again.

    Raises:
        UsageError: the text gives other samples now.
    """
    if stamped is None or stamped == folder.settings.get(TEXT_FILES, stamped):
        return
    if SELF not in parts_of(run.dataset):  # what a model wrote is not written again only to be compared
        tokenizer = load_tokenizer(run.model, **options_of(run, config))
        windows = samples_of(run, config, tokenizer)[: run.samples]
        if folder.settings.get("text") == digest(windows):
            return
    raise UsageError(
        f"{folder.mask_file} was learned from another text: the files of {run.dataset} have changed since then. Give "
        "another `output_dir`, or delete that folder."
    )


def learn_from_start(run: LearnArguments, config: ProxSparseConfig, data: dict) -> None:
    """Read the texts, then load the model, then learn: what is wrong with a text costs no wait for the model.

    Only where the model writes text itself it is loaded first.
    """
    require_packages(config)
    options = options_of(run, config)
    dtype = resolve_dtype(run.dtype)
    set_seed(config.seed)
    tokenizer = load_tokenizer(run.model, **options)
    # FSDP puts shards where they belong; until then no device may need to hold the whole model.
    device = "cpu" if config.use_cpu or is_sharded(config) else str(config.device)
    own_text = SELF in parts_of(run.dataset)
    if own_text and is_sharded(config):
        raise UsageError("A sharded run can't have the model write its text: give a text instead of self.", "dataset")
    model = load_model(run.model, dtype=dtype, device=device, **options) if own_text else None
    windows = samples_of(run, config, tokenizer, model)
    model = model or load_model(run.model, dtype=dtype, device=device, **options)
    if model.dtype == torch.float16:
        print("note: float16 weights are learned in bfloat16, because second moments underflow in float16")
        model = cast_weights(model, torch.bfloat16)
    say_coverage(model, config.include, config.exclude, pattern=config.wanted)
    held_out = windows[run.samples :] if run.eval_samples else None
    learn(model, tokenizer, windows[: run.samples], config, data, eval_windows=held_out)
