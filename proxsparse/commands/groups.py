"""Groups of arguments that several commands share, and what they name: model, mask, samples, device, output."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.commands.cli import Parser, file_to_write
from proxsparse.errors import UsageError
from proxsparse.learning.folder import Run
from proxsparse.mask import MASK_FILE, Mask, apply_mask, load_mask, mask_file, mask_of_pruned
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.loading import (
    DTYPES,
    EMBEDDED,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from proxsparse.model.prunable import Prunable, coverage, find_prunable
from proxsparse.model.windows import check_ctx_len, check_tokens
from proxsparse.operator.pattern import Pattern
from proxsparse.record import versions, write_json
from proxsparse.resume import same_place
from proxsparse.text import (
    NAMED,
    calibration_windows,
)

MODEL_HELP = f"checkpoint folder, .gguf file, Hub id, or {EMBEDDED} (from script/setup.sh)"
FILES_HELP = ".txt, .jsonl, .ndjson, .json (these also as .gz, .bz2, .xz, .zst), .parquet or .arrow"
TEXT_HELP = f"{', '.join(NAMED)}, or a {FILES_HELP} file, or a folder of them"
CALIBRATION_HELP = f"{TEXT_HELP}; self is text that the model generates, and wiki:2,self:1 mixes texts two to one"


class RunParser(Parser):
    """A parser with --run FOLDER, from which a command knows model, text, context and files by itself.

    Args:
        from_run: gives name -> default from the run and what was given, where model is None unless the user wrote one;
            what the user writes wins.
    """

    def __init__(self, from_run: Callable[[Run, argparse.Namespace], dict[str, Any]], **kwargs: Any):
        super().__init__(**kwargs)
        self.from_run = from_run
        self.add_argument(
            "--run",
            default=None,
            metavar="FOLDER",
            help="folder of a learning run: the model, the text and the files that you do not name come from it",
        )

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        args = self.parse_args(argv)
        if args.run:
            known = {action.dest: action.default for action in self._actions}
            self.set_defaults(model=None)
            found = {"model": known.get("model")} | self.from_run(Run.finished(args.run), self.parse_args(argv))
            self.set_defaults(**{name: value for name, value in found.items() if name in known})
            args = self.parse_args(argv)
        return args


def tokenizer_to_save(args: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """What a pruned checkpoint needs of the tokenizer; None: the model's own files of it are copied."""
    if Checkpoint.find(args.model, args.revision) is not None:
        return None
    return load_tokenizer(args.model, **options_of(args))


def model_of(run: Run) -> dict[str, Any]:
    """What a run says about its model."""
    settings = run.settings
    return {
        "model": settings["model"],
        "revision": settings.get("revision"),
        "trust_remote_code": bool(settings.get("trust_remote_code")),
    }


def add_model_arguments(parser: argparse.ArgumentParser, computes: bool = True) -> None:
    """--model and what belongs to it; dtype and device only where the command computes with it."""
    parser.add_argument("--model", default=EMBEDDED, help=f"{MODEL_HELP}; default: %(default)s")
    parser.add_argument("--revision", default=None, help="revision of a Hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    if computes:
        parser.add_argument(
            "--dtype",
            default="auto",
            choices=["auto", *DTYPES],
            help="dtype of the weights; auto: the checkpoint's own; default: %(default)s",
        )
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...; default: %(default)s")


def add_mask_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mask",
        default=None,
        metavar="FILE",
        help=f"{MASK_FILE}, or the folder it lies in; also an .npz file that MaskLLM or PATCH published",
    )


def add_choice_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """The expressions of ``find_prunable``."""
    parser.add_argument(
        "--include", default=None, metavar="REGEX", help=f"{verb} only weights whose name matches this expression"
    )
    parser.add_argument(
        "--exclude", default=None, metavar="REGEX", help="leave out weights whose name matches this expression"
    )


def require(args: argparse.Namespace, *names: str) -> None:
    """Refuse a call without these arguments, which a run would give.

    Raises:
        UsageError: names those that are missing.
    """
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}, or --run (see --help)")


def read_mask(args: argparse.Namespace) -> Mask | None:
    """The mask the arguments name, or None. Before the model is loaded, so that a wrong file costs no wait."""
    if args.mask is None:
        return None
    npz = mask_file(args.mask).suffix.lower() == ".npz"
    return load_mask(args.mask, empty_model(args.model, **options_of(args)) if npz else None)


def given_mask(args: argparse.Namespace) -> Mask:
    """The mask of a command that needs one."""
    require(args, "mask")
    found = read_mask(args)
    assert found is not None
    return found


def mask_or_zeros(args: argparse.Namespace) -> Mask:
    """The mask that the arguments name; of a pruned model without one, its zeros."""
    if args.mask is None and args.model != EMBEDDED:
        return mask_of_pruned(load_model(args.model, **options_of(args)))
    return given_mask(args)


def put_mask(model: PreTrainedModel, mask: Mask | None, args: argparse.Namespace) -> None:
    """Apply a mask, if there is one, and say so."""
    if mask is None:
        return
    if mask.base_model and not same_place(mask.base_model, args.model):
        print(f"note: the mask was made for {mask.base_model}; the model given is {args.model}")
    pruned = apply_mask(model, mask)
    print(f"{mask.pattern} mask applied to {len(pruned)} weights, {mask.density():.1%} of their entries kept")


def check_base_revision(args: argparse.Namespace) -> None:
    """Refuse revisions that are of nothing.

    Raises:
        UsageError: --base_revision without a base; or --revision where only the base can have one.
    """
    if args.base_revision and not args.base:
        raise UsageError("--base_revision is that of a --base: give one.")
    if args.revision and args.base and not args.base_revision and Path(args.model).exists():
        raise UsageError("--revision is that of --model, which is not on the Hub: is --base_revision meant?")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords that loading a model, its tokenizer and its configuration share."""
    return {"revision": args.revision, "trust_remote_code": args.trust_remote_code}


def load(
    args: argparse.Namespace, evaluating: bool = False, mask: Mask | None = None, pattern: Pattern | None = None
) -> PreTrainedModel:
    """The model that the arguments name.

    Args:
        evaluating: see ``load_model``.
        mask: the mask that prunes it.
        pattern: what the command prunes it to.
    """
    device, dtype = resolve_device(args.device), resolve_dtype(args.dtype)
    model = load_model(args.model, dtype=dtype, device=device, evaluating=evaluating, **options_of(args))
    say_coverage(model, getattr(args, "include", None), getattr(args, "exclude", None), mask=mask, pattern=pattern)
    return model


def say_coverage(
    model: PreTrainedModel,
    include: str | None = None,
    exclude: str | None = None,
    *,
    mask: Mask | None = None,
    pattern: Pattern | None = None,
) -> None:
    """Say in one line what share of the linear weights is pruned, and what is left dense and why.

    Without a mask, and without a pattern that the command prunes to, it is the share that can be pruned.
    """
    pattern = mask.pattern if mask else pattern
    try:
        targets = find_prunable(model, include, exclude, multiple=pattern.m if pattern and not mask else 1)
    except UsageError:  # nothing to prune: commands that prune say so, others do without
        return
    chosen = targets if mask is None else [target for target in targets if target.name in mask.tensors]
    print_coverage(model, chosen, pattern.m if pattern else 4, "pruned" if pattern else "prunable")


def print_coverage(model: PreTrainedModel, targets: list[Prunable], multiple: int, word: str) -> None:
    """The sentence of ``coverage``; none for a quantised model, whose weights are codes."""
    if getattr(model, "hf_quantizer", None) is None:
        print(coverage(model, targets, multiple, word), flush=True)


def samples_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None) -> Tensor:
    """Calibration samples, (N, T) token ids that the model knows."""
    config = load_config(args.model, **options_of(args))
    check_ctx_len(args.ctx_len, config)
    windows = calibration_windows(args.dataset, tokenizer, args.ctx_len, args.samples, args.seed, model)
    check_tokens(windows, config)
    return windows


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default=None, type=file_to_write, metavar="FILE", help="write the result as JSON")


def write_result(model: PreTrainedModel, args: argparse.Namespace, **found: Any) -> None:
    """Write what was measured, and on what, to --output where it was given."""
    if not args.output:
        return
    record = {
        "model": args.model,
        "mask": getattr(args, "mask", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": describe_device(model.device),
    }
    write_json(args.output, record | found | {"versions": versions()})


def existing_folder(text: str, argument: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise UsageError(f"There is no folder {text}.", argument)
    return path


def describe_device(device: torch.device | str) -> str:
    """Name of the device for records."""
    device = torch.device(device)
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
