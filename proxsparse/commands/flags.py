"""The flags of a learning run, which `learn` and `plan` share, and the help that shows those of this project.

Every field of ProxSparseConfig is a flag, and so is every field of TRL's SFTConfig and transformers' TrainingArguments
above it. A recipe, the method and this machine give defaults; what the user writes wins.
"""

import argparse
import dataclasses
import difflib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import HfArgumentParser

from proxsparse.commands.cli import DEBUG_HELP, HelpFormatter
from proxsparse.commands.groups import CALIBRATION_HELP, MODEL_HELP
from proxsparse.errors import UsageError
from proxsparse.learning.config import METHODS, ProxSparseConfig
from proxsparse.learning.learn import defaults_on
from proxsparse.model.loading import EMBEDDED, resolve_device
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.recipes import RECIPES, find_recipe
from proxsparse.text import parts_of


@dataclass
class LearnArguments:
    """What to learn on; the settings of the learning itself are in ProxSparseConfig."""

    model: str = field(default=EMBEDDED, metadata={"help": MODEL_HELP, "aliases": ["--model_dir"]})
    revision: str | None = field(default=None, metadata={"help": "revision of a Hub model"})
    dataset: str = field(default="c4", metadata={"help": f"calibration text: {CALIBRATION_HELP}"})
    ctx_len: int = field(default=4096, metadata={"help": "tokens per calibration sample"})
    samples: int = field(default=400, metadata={"help": "calibration samples"})
    eval_samples: int = field(default=0, metadata={"help": "further samples, to measure eval_loss under the mask"})
    batch_size: int = field(default=1, metadata={"help": "samples per device and micro-batch"})
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights: auto, float32, bfloat16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, or the accelerator's name"})


class Parsed(NamedTuple):
    """What the flags say.

    Attributes:
        run: what to learn on.
        config: the settings of the learning.
        words: the flags as they were given, and those of the recipe.
        own: flags that belong to one command only.
    """

    run: LearnArguments
    config: ProxSparseConfig
    words: list[str]
    own: argparse.Namespace


class LearnParser(HfArgumentParser):
    """The flags of LearnArguments and ProxSparseConfig, and --recipe.

    Args:
        documentation: text that --help shows above the flags.
        planning: nothing is learned, so one process on a machine with several GPUs is no mistake.
    """

    def __init__(self, documentation: str | None = None, planning: bool = False):
        super().__init__([LearnArguments, ProxSparseConfig], description=documentation, allow_abbrev=False)  # type: ignore
        self.documentation, self.planning = documentation, planning
        self.defaults: dict[str, Any] | None = None  # None: what suits this machine
        self.formatter_class = HelpFormatter
        self.own = self.add_argument_group("this command")
        self.own.add_argument(
            "--recipe", metavar="NAME", default=None, help=f"published settings: {', '.join(RECIPES)}"
        )
        self.own.add_argument("--help_all", action="help", help="show every flag, also TRL's and transformers'")

    def error(self, message: str):
        raise UsageError(f"{message} (see --help)")

    def parse(self, argv: Sequence[str]) -> Parsed:
        """The arguments of a run.

        Raises:
            UsageError: names the flag, what was found and what is accepted.
        """
        words = [underscored(word) for word in argv]
        if {"-h", "--help"} & set(words):
            self.print_short_help()
            raise SystemExit(0)
        recipe = option(words, "recipe")
        if recipe is not None:
            words = _with_defaults(without(words, "recipe"), find_recipe(recipe).settings())
        machine = self._machine(words) if self.defaults is None else self.defaults
        named = option(words, "output_dir") is not None
        if (option(words, "eval_samples") or "0") != "0":
            machine = machine | {"eval_strategy": "steps", "eval_steps": 0.1}
        rest = _with_defaults(words, machine | ({} if named else {"output_dir": "runs"}))
        run, config, own = self._dataclasses(rest)
        looking = self.planning or getattr(own, "where", False) or getattr(own, "dry_run", False)
        self._check(run, config, looking)
        for ours, theirs in SAME.items():
            self._one_setting(words, run, config, ours, theirs)
        if not named:
            config.output_dir = str(Path("runs") / default_folder(run, config))
        return Parsed(run, config, words, own)

    def _machine(self, words: list[str]) -> dict[str, Any]:
        return defaults_on("cpu" if option(words, "device") == "cpu" else resolve_device("auto"))

    def _dataclasses(self, words: list[str]) -> tuple[LearnArguments, ProxSparseConfig, argparse.Namespace]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                run, config, *own = self.parse_args_into_dataclasses(words)
            except UsageError:
                raise
            except ValueError as error:
                unknown = re.search(r"not used by the HfArgumentParser: \['--([^']+)'", str(error))
                if unknown:
                    raise UsageError(self._unknown(unknown[1])) from error
                extra = re.search(r"not used by the HfArgumentParser: \['([^']*)'", str(error))
                if extra:
                    raise UsageError(
                        f"{extra[1]!r} belongs to no flag: a flag takes one value, in quotes where it has spaces (see "
                        "--help)"
                    ) from error
                raise UsageError(f"{str(error).splitlines()[0]} (see --help)") from error
        return run, config, own[0] if own else argparse.Namespace()

    def _unknown(self, name: str) -> str:
        known = [option.lstrip("-").replace("-", "_") for option in self._option_string_actions]
        alike = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        alike = alike or [n for n in known if n.startswith(name[:4])][:1]
        return f"There is no flag --{name}{f'; did you mean --{alike[0]}?' if alike else '.'} (see --help)"

    def _check(self, run: LearnArguments, config: ProxSparseConfig, looking: bool) -> None:
        if ":" in resolve_device(run.device):
            raise UsageError(
                f"--device takes auto, cpu or an accelerator without a number; choose one with "
                f"CUDA_VISIBLE_DEVICES. Got {run.device!r}."
            )
        gpus = torch.cuda.device_count()
        if not looking and gpus > 1 and "RANK" not in os.environ and not config.use_cpu:
            raise UsageError(
                f"There are {gpus} GPUs and one process: choose one with CUDA_VISIBLE_DEVICES=0, or use all with "
                "accelerate launch end-to-end/main.py ..."
            )
        for name, least in (("ctx_len", 1), ("samples", 1), ("batch_size", 1), ("eval_samples", 0)):
            if getattr(run, name) < least:
                raise UsageError(f"--{name} must be at least {least}; got {getattr(run, name)}.")

    @staticmethod
    def _one_setting(words: list[str], run: LearnArguments, config: ProxSparseConfig, ours: str, theirs: str) -> None:
        """A flag of this project and one of TRL or transformers that mean the same."""
        given = option(words, theirs)
        if given is not None and option(words, ours) not in (None, given):
            raise UsageError(f"--{ours} and --{theirs} are the same setting; got {getattr(run, ours)} and {given}.")
        if given is not None:
            setattr(run, ours, getattr(config, theirs))
        setattr(config, theirs, getattr(run, ours))

    def print_short_help(self) -> None:
        """The flags of this project in groups; SFTConfig has two hundred more."""
        usage = "%(prog)s [--model MODEL] [--dataset TEXT] [flags]"
        shown = argparse.ArgumentParser(
            usage=usage,
            description=self.documentation,
            epilog=DEBUG_HELP,
            add_help=False,
            formatter_class=HelpFormatter,
        )
        fields = {f.name: f for cls in (LearnArguments, ProxSparseConfig) for f in dataclasses.fields(cls)}
        for title, names in GROUPS.items():
            group = shown.add_argument_group(title)
            for name in names:
                group.add_argument(f"--{name}", metavar=_metavar(fields[name]), help=_help_of(fields[name]))
        for action in self.own._group_actions:
            shown._add_action(action)
        shown.print_help()


SAME = {"batch_size": "per_device_train_batch_size", "ctx_len": "max_length"}  # ours -> that of TRL or transformers
GROUPS = {
    "model and text": [
        "model", "revision", "trust_remote_code", "dtype", "device", "dataset", "ctx_len", "samples", "eval_samples",
        "batch_size", "seed",
    ],
    "method": [
        "method", "pattern", "permute", "score", "masked_forward", "distill", "temperature", "layer_rate",
        "layer_steps", "layer_span", "relative", "train_only_pruned", "include", "exclude", "norm_samples",
    ],
    "regulariser": [
        "lambda_value", "target_share", "lambda_ramp", "project_lambda2", "lambda2_value", "epsilon",
    ],
    "training": ["learning_rate", "optim", "adam_beta2", "warmup_steps", "rounding", "bf16"],
    "memory": [
        "keep_base", "offload_learned", "optim_in_backward", "activation_checkpointing", "gradient_accumulation_steps",
    ],
    "output": ["output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to"],
}  # fmt: skip
# Of flags that are transformers', whose own help is long.
HELP = {
    "trust_remote_code": "run code that comes with the model: true or false",
    "seed": "seed of the choice of samples and of all noise",
    "bf16": "compute in bfloat16; default: true where the device does so natively",
    "activation_checkpointing": "recompute activations in the backward pass; default: true on GPUs",
    "gradient_accumulation_steps": "micro-batches per optimizer step",
    "output_dir": "folder of the run; default: runs/<a name made of the settings>",
    "logging_steps": "steps between two lines of the log; below 1, a share of all steps",
    "save_steps": "steps between two checkpoints; below 1, a share of all steps",
    "save_total_limit": "how many checkpoints are kept",
    "report_to": "none, tensorboard, wandb or trackio",
}


def _help_of(setting: dataclasses.Field) -> str:
    """A setting's help and its default: by method where the methods differ, and never None."""
    text = HELP.get(setting.name) or setting.metadata.get("help", "")
    if "default:" in text:
        return text.replace("%", "%%")
    by_method = {method: values[setting.name] for method, values in METHODS.items() if setting.name in values}
    if len(set(map(str, by_method.values()))) > 1:
        default = ", ".join(f"{_spoken(value)} with {method}" for method, value in reversed(by_method.items()))
    elif by_method:
        default = _spoken(next(iter(by_method.values())))
    else:
        default = "" if setting.default is None else _spoken(setting.default)
    return (f"{text}; default: {default}" if default else text).replace("%", "%%")


def _spoken(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def _metavar(setting: dataclasses.Field) -> str:
    kind = str(getattr(setting.type, "__name__", setting.type))
    for name, shown in (("bool", "true|false"), ("int", "N"), ("float", "X")):
        if kind.startswith(name):
            return shown
    return {"lambda_value": "X|auto"}.get(setting.name, "X" if setting.name in HELP else setting.name.upper())


def default_folder(run: LearnArguments, config: ProxSparseConfig) -> str:
    """The name of a run's folder, after the released ones: model, data, samples, learning rate, context, lambdas."""
    name = (
        f"{_last_part(run.model)}-{_text_part(run.dataset)}_{config.method}_{run.samples}_lr{config.learning_rate}"
        f"_len{run.ctx_len}_batch{run.batch_size}_lambda{config.lambda_value}"
    )
    name += f"_{config.wanted.n}of{config.wanted.m}" if config.wanted != TWO_OF_FOUR else ""
    name += "_permuted" if config.permute != "none" else ""
    return name + (f"_lambdatwo{config.lambda2_value}_eps{config.epsilon}" if config.project_lambda2 else "")


def _text_part(dataset: str) -> str:
    parts = parts_of(dataset)
    return _last_part(dataset) if len(parts) == 1 else "-".join(f"{_last_part(t)}{share}" for t, share in parts.items())


def _last_part(name: str) -> str:
    path = Path(name)
    return path.name or path.resolve().name


def option(words: list[str], name: str) -> str | None:
    """Value of --name among the words, the last one as for argparse; '' for a bare flag, None where it is not given."""
    for i, word in reversed(list(enumerate(words))):
        if word == f"--{name}":
            return words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def underscored(word: str) -> str:
    """--output-dir as --output_dir, which is the same flag; values stay as they are."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def without(words: list[str], name: str) -> list[str]:
    """The words without --name and its value."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip or word == f"--{name}":
            skip = not skip
        elif not word.startswith(f"--{name}="):
            kept.append(word)
    return kept


def _with_defaults(words: list[str], defaults: dict[str, Any]) -> list[str]:
    """The words, and each default that none of them names."""
    alias = {"model": "model_dir"} | SAME
    missing = {n: v for n, v in defaults.items() if option(words, n) is None and option(words, alias.get(n, n)) is None}
    return [*(w for n, v in missing.items() for w in (f"--{n}", _spoken(v))), *words]
