"""Groups of arguments that several commands share, and what they name: model, mask, texts, device, output."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import UsageError
from proxsparse.evaluation.perplexity import Perplexity, perplexity
from proxsparse.mask import Mask, apply_mask, load_mask
from proxsparse.model.loading import DTYPES, EMBEDDED, load_model, load_tokenizer, resolve_device, resolve_dtype
from proxsparse.record import versions, write_json
from proxsparse.text import NAMED, SPLITS, check_ctx_len, evaluation_windows

MODEL_HELP = f"checkpoint folder, .gguf file, Hub id, or {EMBEDDED} (embedded)"
TEXT_HELP = f"{', '.join(NAMED)}, or a .txt/.jsonl/.json.gz/.parquet file or a folder of them"


def positive_int(text: str) -> int:
    """An integer >= 1, for argparse."""
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def batch_size(text: str) -> int | None:
    """An integer >= 1, or None for 'auto', for argparse."""
    return None if text == "auto" else positive_int(text)


def add_model_arguments(parser: argparse.ArgumentParser, computes: bool = True) -> None:
    """--model and what belongs to it; dtype and device only where the command computes with it."""
    parser.add_argument("--model", default=EMBEDDED, help=f"{MODEL_HELP}; default: %(default)s")
    parser.add_argument("--revision", default=None, help="revision of a Hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    if computes:
        parser.add_argument(
            "--dtype", default="auto", choices=["auto", *DTYPES], help="of the weights; auto: the checkpoint's own"
        )
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...; default: %(default)s")


def add_mask_argument(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--mask", required=required, default=None, metavar="FILE", help="mask.safetensors, or the folder it lies in"
    )


def read_mask(args: argparse.Namespace) -> Mask | None:
    """The mask the arguments name, or None. Before the model is loaded, so that a wrong file costs no wait."""
    return None if args.mask is None else load_mask(args.mask)


def put_mask(model: PreTrainedModel, mask: Mask | None, args: argparse.Namespace) -> None:
    """Apply a mask, if there is one, and say so."""
    if mask is None:
        return
    if mask.base_model and mask.base_model != args.model:
        print(f"note: the mask was made for {mask.base_model}; the model given is {args.model}")
    pruned = apply_mask(model, mask)
    print(f"{mask.pattern} mask applied to {len(pruned)} weights, {mask.density():.1%} of their entries kept")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", nargs="+", default=["wikitext2"], metavar="TEXT", help=f"{TEXT_HELP}; default: %(default)s"
    )
    parser.add_argument(
        "--split",
        default="all",
        choices=SPLITS,
        help="part of a local or embedded text: all, or heldout where another part calibrated; default: %(default)s",
    )
    parser.add_argument("--ctx_len", type=positive_int, default=4096, help="tokens a window; default: %(default)s")
    parser.add_argument(
        "--batch_size", type=batch_size, default=None, help="windows at once, or auto (as memory allows); default: auto"
    )
    parser.add_argument(
        "--max_windows", type=positive_int, default=None, help="use so many windows, spread evenly; default: all"
    )


def load(args: argparse.Namespace, evaluating: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer that the arguments name; see ``load_model`` for ``evaluating``."""
    device, dtype = resolve_device(args.device), resolve_dtype(args.dtype)
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    model = load_model(args.model, dtype=dtype, device=device, evaluating=evaluating, **options)
    return model, load_tokenizer(args.model, **options)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> dict[str, Perplexity]:
    """Perplexity on every text the arguments name, printed as it comes."""
    check_ctx_len(args.ctx_len, model.config)
    windows = {
        text: evaluation_windows(text, tokenizer, args.ctx_len, args.split, args.max_windows) for text in args.dataset
    }
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


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default=None, metavar="FILE", help="write the result as JSON")


def write_result(model: PreTrainedModel, args: argparse.Namespace, **measured: Any) -> None:
    """Write what was measured, and on what, to --output where it was given."""
    if not args.output:
        return
    record = {
        "model": args.model,
        "mask": getattr(args, "mask", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": describe_device(model.device),
    }
    write_json(args.output, record | measured | {"versions": versions()})


def as_record(results: dict[str, Perplexity]) -> dict:
    return {text: result._asdict() for text, result in results.items()}


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
