"""Learn a 2:4 mask: fine-tune under the ProxSparse regulariser, then write mask.safetensors.

    python end-to-end/main.py --model smollm2-135m --dataset wiki --ctx_len 512 --samples 100 --output_dir runs/mine
    python end-to-end/main.py --model meta-llama/Llama-2-7b-hf --dataset c4 --method paper --lambda_value 0.25 \\
        --ctx_len 4096 --samples 400 --batch_size 1 --learning_rate 1e-4 --bf16 true --dtype bfloat16

Every flag of transformers' TrainingArguments and TRL's SFTConfig works too. The output folder holds run.json (its
settings), checkpoints, mask.safetensors and history.json. The same command again goes on from the last checkpoint.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from transformers import HfArgumentParser, IntervalStrategy, set_seed

from proxsparse.commands.cli import command, print_json
from proxsparse.commands.groups import (
    MODEL_HELP,
    TEXT_HELP,
)
from proxsparse.errors import UsageError
from proxsparse.learning.config import METHODS, ProxSparseConfig
from proxsparse.learning.progress import show_progress
from proxsparse.mask import MASK_FILE, save_mask
from proxsparse.model.hub_errors import quiet_bars
from proxsparse.model.loading import (
    EMBEDDED,
    load_model,
    load_tokenizer,
    native_bf16,
    resolve_device,
    resolve_dtype,
)
from proxsparse.record import git_commit, read_json, versions, write_json
from proxsparse.resume import last_complete_checkpoint
from proxsparse.text import calibration_windows, check_ctx_len

logger = logging.getLogger(__name__)


OUTPUT_DIR = field(default="runs/<a name made of the settings>", metadata={"help": "folder of the run"})


@dataclass
class LearnArguments:
    """What to learn on; the settings of the learning itself are in ProxSparseConfig."""

    model: str = field(default=EMBEDDED, metadata={"help": MODEL_HELP, "aliases": ["--model_dir"]})
    dataset: str = field(default="c4", metadata={"help": f"calibration text: {TEXT_HELP}"})
    ctx_len: int = field(default=4096, metadata={"help": "tokens a calibration sample"})
    samples: int = field(default=400, metadata={"help": "calibration samples"})
    eval_samples: int = field(default=0, metadata={"help": "held-out calibration samples for eval_loss under the mask"})
    batch_size: int = field(default=1, metadata={"help": "samples a device and micro-batch"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, float32, bfloat16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, or the accelerator's name"})
    revision: str | None = field(default=None, metadata={"help": "revision of a Hub model"})


class LearnParser(HfArgumentParser):
    """The flags of LearnArguments and ProxSparseConfig, TrainingArguments' and SFTConfig's among them.

    Args:
        documentation: shown above the flags by --help.
        planning: only look; several GPUs and one process are then no mistake.
        defaults: name -> value where the user gives none; None: what suits this machine.
    """

    def __init__(self, documentation: str | None = __doc__, planning: bool = False):
        super().__init__([LearnArguments, ProxSparseConfig], description=documentation, allow_abbrev=False)  # type: ignore
        self.documentation, self.planning = documentation, planning
        self.defaults: dict[str, str] | None = None
        self.formatter_class = _Formatter
        self.add_argument("--help_all", action="help", help="show this message")

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def parse(self, argv: Sequence[str]) -> tuple[LearnArguments, ProxSparseConfig]:
        return parse_arguments(list(argv), self)


@command(LearnParser)
def main(parsed: tuple[LearnArguments, ProxSparseConfig]) -> None:
    run, config = parsed
    trainer, checkpoint = build(run, config)
    out = Path(str(config.output_dir))
    with quiet_bars():
        trainer.train(resume_from_checkpoint=checkpoint)
    mask = trainer.mask()
    mask.base_model = run.model
    mask.info |= {"dataset": run.dataset, "samples": run.samples, "ctx_len": run.ctx_len, "seed": config.seed}
    if trainer.is_world_process_zero():
        save_mask(mask, out / MASK_FILE)
        write_json(out / "history.json", trainer.state.log_history)
        last: dict = next((entry for entry in reversed(trainer.state.log_history) if "share_24" in entry), {})
        print_json({"mask": str(out / MASK_FILE), "share_24": last.get("share_24")})


def parse_arguments(argv: list[str], parser: LearnParser | None = None) -> tuple[LearnArguments, ProxSparseConfig]:
    """Arguments of a run.

    Raises:
        UsageError: names the flag, what was found and what is accepted.
    """
    parser = parser or LearnParser()
    argv = [_underscored(word) for word in argv]
    if {"-h", "--help"} & set(argv):
        short_help(parser.documentation)
    defaults = _defaults_of_this_machine(argv) if parser.defaults is None else parser.defaults
    argv = [*argv, *(w for n, value in defaults.items() if _option(argv, n) is None for w in (f"--{n}", value))]
    named = _option(argv, "output_dir") is not None
    if not named:
        argv = [*argv, "--output_dir", "runs"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            run, config = parser.parse_args_into_dataclasses(argv)
        except UsageError:
            raise
        except ValueError as error:
            unknown = re.search(r"not used by the HfArgumentParser: \['--([^']+)'", str(error))
            if unknown:
                raise UsageError(_unknown_flag(unknown[1], parser)) from error
            raise UsageError(f"{str(error).splitlines()[0]} (see --help)") from error
    if ":" in resolve_device(run.device):
        raise UsageError(
            f"--device takes auto, cpu or an accelerator without a number; choose one with "
            f"CUDA_VISIBLE_DEVICES. Got {run.device!r}."
        )
    if config.eval_strategy == "no" and run.eval_samples:
        config.eval_strategy, config.eval_steps = IntervalStrategy.STEPS, 0.1
    if not parser.planning and torch.cuda.device_count() > 1 and "RANK" not in os.environ and not config.use_cpu:
        raise UsageError(
            f"There are {torch.cuda.device_count()} GPUs and one process: choose one with CUDA_VISIBLE_DEVICES=0, or "
            "use all with accelerate launch end-to-end/main.py ..."
        )
    for name in ("ctx_len", "samples", "batch_size"):
        if getattr(run, name) < 1:
            raise UsageError(f"--{name} must be at least 1; got {getattr(run, name)}.")
    if run.eval_samples < 0:
        raise UsageError(f"--eval_samples must be at least 0; got {run.eval_samples}.")
    config.per_device_train_batch_size = run.batch_size
    if not named:
        config.output_dir = str(Path("runs") / default_folder(run, config))
    return run, config


def _unknown_flag(name: str, parser: argparse.ArgumentParser) -> str:
    known = [option.lstrip("-").replace("-", "_") for option in parser._option_string_actions]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [n for n in known if n.startswith(name[:4])][:1]
    return f"There is no flag --{name}{f'; did you mean --{alike[0]}?' if alike else '.'} (see --help)"


def short_help(documentation: str | None) -> None:
    """Print the flags of this project and leave; those of SFTConfig are two hundred more."""
    own = {f.name: f for f in dataclasses.fields(ProxSparseConfig) if f.name in ProxSparseConfig.__annotations__}
    shown = [(f.name, ProxSparseConfig.__annotations__[f.name], f) for f in own.values() if f.metadata.get("help")]
    settings = dataclasses.make_dataclass("Settings", [("output_dir", str, OUTPUT_DIR), *shown])
    usage = "%(prog)s [--model MODEL] [--dataset TEXT] [--output_dir FOLDER] [settings]"
    parser = HfArgumentParser([LearnArguments, settings], usage=usage, description=documentation, add_help=False)  # type: ignore
    parser.formatter_class = _Formatter
    presets = "\n".join(
        f"--method {method} means " + " ".join(f"--{k} {v}" for k, v in values.items())
        for method, values in METHODS.items()
    )
    parser.epilog = presets + "\n--help_all lists every flag, TrainingArguments' and SFTConfig's too."
    parser.print_help()
    raise SystemExit(0)


def _defaults_of_this_machine(argv: list[str]) -> dict[str, str]:
    """Flags that suit the CPU: the Trainer's own defaults assume a GPU."""
    if _option(argv, "device") != "cpu" and resolve_device("auto") != "cpu":
        return {}
    bf16 = "true" if native_bf16("cpu") else "false"
    return {"use_cpu": "true", "activation_checkpointing": "false", "bf16": bf16}


def default_folder(run: LearnArguments, config: ProxSparseConfig) -> str:
    """The name of a run's folder, after the released ones: model, data, samples, learning rate, context, lambdas."""
    name = (
        f"{Path(run.model).name}-{Path(run.dataset).name}_{config.method}_{run.samples}_lr{config.learning_rate}"
        f"_len{run.ctx_len}_batch{run.batch_size}_lambda{config.lambda_value}"
    )
    return name + (f"_lambdatwo{config.lambda2_value}_eps{config.epsilon}" if config.project_lambda2 else "")


def build(run: LearnArguments, config: ProxSparseConfig):
    """Model, data and trainer of a run, and the checkpoint to go on from (None at the start)."""
    from proxsparse.learning.trainer import ProxSparseTrainer

    out = Path(str(config.output_dir))
    record = _record(run, config)
    refuse_another_run(out, record)
    set_seed(config.seed)
    disable_progress_bars()  # three bars of tokenising for windows that are tokens already
    dtype = resolve_dtype(run.dtype)
    tokenizer = load_tokenizer(run.model, revision=run.revision, trust_remote_code=config.trust_remote_code)
    # FSDP puts shards where they belong; until then no device may need to hold the whole model.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    model = load_model(
        run.model,
        dtype=dtype,
        device="cpu" if config.use_cpu or config.fsdp_plugin_args or sharded else str(config.device),
        revision=run.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if model.dtype == torch.float16:
        logger.info("float16 weights are learned in bfloat16: second moments underflow in float16")
        model = model.to(torch.bfloat16)  # type: ignore[arg-type]
    check_ctx_len(run.ctx_len, model.config)
    windows = calibration_windows(run.dataset, tokenizer, run.ctx_len, run.samples + run.eval_samples, config.seed)
    data = Dataset.from_dict({"input_ids": windows.tolist()})
    config.max_length = run.ctx_len
    trainer = ProxSparseTrainer(
        model,
        config,
        train_dataset=data.select(range(run.samples)),
        eval_dataset=data.select(range(run.samples, len(data))) if run.eval_samples else None,
        processing_class=tokenizer,
    )
    # Only now, so that a mistake leaves no folder behind that refuses the right one.
    first = int(os.environ.get("RANK", "0")) == 0
    if first and not (out / "run.json").is_file():
        write_json(out / "run.json", record)
    show_progress(trainer)
    checkpoint = last_complete_checkpoint(out)
    if checkpoint and first:
        print(f"going on from {checkpoint}")
    return trainer, checkpoint


def _record(run: LearnArguments, config: ProxSparseConfig) -> dict:
    """What stands in run.json: every setting, the versions and the commit."""
    described = dataclasses.asdict(run) | {
        f.name: getattr(config, f.name) for f in dataclasses.fields(ProxSparseConfig) if f.init
    }
    described = json.loads(json.dumps(described, default=str))
    return {"settings": described, "versions": versions(), "commit": git_commit()}


def refuse_another_run(out: Path, record: dict) -> None:
    """Refuse a folder that holds a run with other settings.

    Raises:
        UsageError: names the first setting that differs.
    """
    if not (out / "run.json").is_file():
        return
    decisive = [f.name for f in dataclasses.fields(LearnArguments)]
    where = ("keep_base", "offload_learned")  # a run that ran out of memory goes on with others
    decisive += [n for n in ProxSparseConfig.__annotations__ if not n.startswith("logging") and n not in where]
    decisive += ["learning_rate", "max_steps", "gradient_accumulation_steps", "adam_beta2", "warmup_steps"]
    before, now = read_json(out / "run.json")["settings"], record["settings"]
    changed = [n for n in decisive if n in before and before[n] != now[n]]
    if changed:
        n = changed[0]
        raise UsageError(
            f"{out} holds a run with --{n} {before.get(n)}, now it is {now[n]}: "
            "give another --output_dir, or delete that folder."
        )


def _option(argv: list[str], name: str) -> str | None:
    """Value of --name in argv, in either spelling; '' for a bare flag, None where it is not given."""
    for i, word in enumerate(argv):
        if word == f"--{name}":
            return argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else ""
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _underscored(word: str) -> str:
    """--output-dir as --output_dir, which is the same flag; values stay as they are."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


class _Formatter(HfArgumentParser().formatter_class):  # type: ignore[misc]
    """Keeps the examples' line breaks."""

    def _fill_text(self, text, width, indent):
        return "\n".join(indent + line for line in text.splitlines())
