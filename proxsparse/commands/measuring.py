"""Perplexity by command: the arguments, the windows, the measurement, and whether it was made before."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.commands.cli import batch_size, positive_int
from proxsparse.commands.groups import TEXT_HELP, model_of, options_of
from proxsparse.errors import RunError, UsageError
from proxsparse.evaluation.perplexity import Perplexity, perplexity
from proxsparse.learning.folder import WINDOWS, Run
from proxsparse.mask import mask_file
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.loading import load_config, load_tokenizer
from proxsparse.model.windows import check_ctx_len, check_tokens
from proxsparse.record import read_record, stamp_of
from proxsparse.text import NAMED, SELF, SPLITS, adds_bos, evaluation_windows, parts_of, stamp

FROM_HUB = ("wikitext2", "c4", "c4_new")
PRINTED = ("wikitext2", "c4")  # the texts on which papers print perplexities


def evaluation_of(run: Run) -> dict[str, Any]:
    """What a run says about how to measure it: on held-out parts of its own text, or on the texts that papers print."""
    settings = run.settings
    found = model_of(run) | {"ctx_len": settings["ctx_len"]}
    dataset = settings["dataset"]
    texts = [text for text in parts_of(dataset) if text not in (SELF, WINDOWS)]
    if set(texts) & set(FROM_HUB):
        return found | {"dataset": list(PRINTED)}
    if not texts:
        return found
    for text in texts:
        if text not in NAMED and not Path(text).exists():
            raise UsageError(f"The text of this run, {text}, is not here any more: give --dataset and --split.", "run")
    return found | {"dataset": texts, "split": "heldout"}


def done_already(args: argparse.Namespace, what: str, decisive: dict[str, Any]) -> bool:
    """Whether a result of this run was measured before, the same way; says so."""
    if not args.run or not args.output or not Path(args.output).is_file():
        return False
    try:
        before = read_record(args.output)
    except RunError:  # a damaged result is made again
        return False
    if before.get("measured") != decisive:
        return False
    print(f"{what}: done already ({args.output})")
    return True


def decisive_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide a measured perplexity."""
    mask = getattr(args, "mask", None)
    names = ("model", "revision", "dtype", "dataset", "split", "ctx_len", "max_windows", "bos")
    decisive = {name: getattr(args, name) for name in names} | {"files": [stamp(text) for text in args.dataset]}
    decisive["weights"] = weights_stamp(args.model, args.revision)
    return decisive | {"mask": None if mask is None else mask_digest(mask)}


def weights_stamp(model: str, revision: str | None = None) -> str | None:
    """What tells that the weights of a model may have changed: of files, or the commit; None for a GGUF."""
    folder = Path(model)
    if folder.is_dir():
        return stamp_of(sorted(folder.glob("*.safetensors")), folder)
    found = Checkpoint.find(model, revision)
    return found.folder.name if found is not None and found.folder.parent.name == "snapshots" else None


def mask_digest(mask: str | Path) -> str:
    """SHA-256 of a mask file."""
    try:
        return hashlib.sha256(mask_file(mask).read_bytes()).hexdigest()
    except UsageError:  # there is none
        return ""


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", nargs="+", default=["wikitext2"], metavar="TEXT", help=f"{TEXT_HELP}; default: wikitext2"
    )
    parser.add_argument(
        "--split",
        default="all",
        choices=SPLITS,
        help="part of a local or embedded text: heldout is what calibration never reads; default: %(default)s, and "
        "heldout with --run",
    )
    parser.add_argument("--ctx_len", type=positive_int, default=4096, help="tokens per window; default: %(default)s")
    parser.add_argument("--bos", action="store_true", help="begin every window with BOS; papers do not do this")
    parser.add_argument(
        "--batch_size", type=batch_size, default=None, help="windows at once, or auto (as memory allows); default: auto"
    )
    parser.add_argument(
        "--max_windows",
        type=positive_int,
        default=None,
        help="measure only this many windows, every k-th of the text; default: all",
    )


def windows_of(args: argparse.Namespace, evaluating: bool = False) -> dict[str, Tensor]:
    """Evaluation windows of every text that the arguments name; read before the model is loaded."""
    config = load_config(args.model, evaluating=evaluating, **options_of(args))
    check_ctx_len(args.ctx_len, config)
    tokenizer = load_tokenizer(args.model, **options_of(args))
    if adds_bos(tokenizer) and not args.bos:
        print("note: this tokenizer puts BOS first, so most windows begin without it; --bos puts it into every window")
    windows = {
        text: evaluation_windows(text, tokenizer, args.ctx_len, args.split, args.max_windows, bos=args.bos)
        for text in args.dataset
    }
    for found in windows.values():
        check_tokens(found, config)
    return windows


def evaluate(model: PreTrainedModel, windows: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Perplexity]:
    """Perplexity on every text, printed as it comes."""
    results = {}
    for text, batch in windows.items():
        result = perplexity(model, batch, args.batch_size, progress=text)
        results[text] = result
        print(
            f"{text}: perplexity {result.perplexity:.3f} +- {result.standard_error:.3f} "
            f"({result.windows} windows of {result.ctx_len} tokens, {result.tokens_per_second:,.0f} tokens/s)",
            flush=True,
        )
    return results


def as_record(results: dict[str, Perplexity]) -> dict:
    return {text: result._asdict() for text, result in results.items()}
