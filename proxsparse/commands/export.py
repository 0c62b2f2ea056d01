"""Write a pruned model: as an ordinary checkpoint, in the compact form, or as the mask alone.

    python -m proxsparse export --run runs/mine --to pruned
    python -m proxsparse export --model meta-llama/Llama-3.1-8B \\
        --mask runs/mine --form mask --to pruned-mask
    python -m proxsparse export --model runs/mine/recovered --quantize int8 \\
        --to small
    python -m proxsparse export --run runs/demo --form compact --to small

  dense    an ordinary checkpoint with exact zeros, which transformers, vLLM
           and others load; written shard by shard
  mask     one bit per weight, and a JSON file that names its model: to
           publish next to a gated base model
  compact  the kept values and their positions, 9/16 of a 16-bit weight
           (5/16 with --quantize int8); proxsparse.load reads it
  npz      the mask as MaskLLM's programs read it

Without --mask, the zeros of a pruned --model are the mask: of one that was fine-tuned, for example.

--quantize writes the dense form with 8-bit (int8, fp8) or 4-bit weights (int4) and exact zeros. transformers and vLLM
read it, in the layout of compressed-tensors. With 8 bits each output has one scale, and activations are quantised per
token while the model runs. With 4 bits a group of up to 128 inputs has one, and activations stay as they are; --dataset
is then the text on which later inputs make up for the rounding error of earlier ones. With --form compact, --quantize
int8 rounds the kept values to int8, which makes decoding on a CPU faster.

--runtime vllm-torchao writes the dense form, a configuration for vLLM, and SERVING.md, which says how to start it. vLLM
then quantises the model to float8 2:4 while it loads (torchao's kernel, on H100 and H200).
"""

import argparse
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.commands.cli import Parser, command, positive_int, print_json, seed
from proxsparse.commands.groups import (
    CALIBRATION_HELP,
    RunParser,
    add_mask_argument,
    add_model_arguments,
    mask_or_zeros,
    model_of,
    options_of,
    samples_of,
    say_coverage,
)
from proxsparse.deploy.card import model_card
from proxsparse.deploy.dense import FORMS, save_pruned
from proxsparse.deploy.masks import save_hashed, save_npz
from proxsparse.deploy.quantise import KINDS, Quantiser, check_base, check_quantisation
from proxsparse.deploy.runtimes import RUNTIMES, check_runtime
from proxsparse.errors import RunError, UsageError
from proxsparse.learning.folder import PRUNED, WINDOWS, Run
from proxsparse.mask import Mask, apply_mask, fit_mask
from proxsparse.model.compact import check_pattern
from proxsparse.model.hub import fetch
from proxsparse.model.hub_errors import UNREACHABLE
from proxsparse.model.layout import Layout
from proxsparse.model.loading import empty_model, load_model, load_tokenizer, resolve_device
from proxsparse.model.source import model_source
from proxsparse.record import read_record, refuse_folder, refuse_trained
from proxsparse.text import SELF, parts_of

MASKS = ("mask", "npz")  # forms without weights
OF_A_TEXT = {"samples": 128, "ctx_len": 2048, "seed": 0, "device": "auto"}


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser, computes=False)
    add_mask_argument(parser)
    parser.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write into")
    parser.add_argument("--form", default="dense", choices=[*FORMS, *MASKS], help="see above; default: %(default)s")
    parser.add_argument("--quantize", default=None, choices=list(KINDS), help="weights of few bits, see above")
    parser.add_argument("--dataset", default=None, metavar="TEXT", help=f"text for --quantize int4: {CALIBRATION_HELP}")
    for name, kind, what in (
        ("samples", positive_int, "of the text"),
        ("ctx_len", positive_int, "tokens per sample"),
        ("seed", seed, "of the choice of samples"),
        ("device", str, "where int4 weights are rounded with the text"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=None, help=f"{what}; default: {OF_A_TEXT[name]}")
    parser.add_argument(
        "--runtime",
        default=None,
        choices=list(RUNTIMES),
        help="also write what this server needs; see above",
    )
    parser.add_argument(
        "--results", default=None, metavar="FILE", help="JSON that eval_mask_ppl.py wrote, for the model card"
    )
    parser.add_argument(
        "--push_to_hub",
        default=None,
        metavar="REPO",
        help="upload the folder to this Hub repository; a new one is private",
    )
    return parser


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    measured = run.result_file(PRUNED)
    found = model_of(run) | {"mask": str(run.mask_file)}
    if args.quantize == "int4" and run.settings.get("dataset") != WINDOWS:
        found |= {
            name: run.settings[name] for name in ("dataset", "samples", "ctx_len", "seed") if name in run.settings
        }
    other = args.mask or args.quantize or args.model not in (None, run.settings["model"])  # than what was measured
    return found | ({"results": str(measured)} if not other and measured.is_file() else {})


@command(arguments)
def main(args: argparse.Namespace) -> None:
    mask, to = mask_or_zeros(args), Path(args.to)
    if args.form == "compact":
        check_pattern(mask.pattern)
    if args.results and not Path(args.results).is_file():
        raise UsageError(f"--results: there is no file {args.results}.")
    if args.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push_to_hub):
        raise UsageError(f"--push_to_hub takes a repository organisation/name; got {args.push_to_hub!r}.")
    if args.quantize:
        check_quantisation(args.quantize, args.form)
    if args.dataset and args.quantize != "int4":
        raise UsageError("--dataset is for --quantize int4: leave it out.")
    for name, default in OF_A_TEXT.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.dataset:
            raise UsageError(f"--{name} is for --quantize int4 with --dataset: leave it out, or give both.")
    refuse_folder(to, args.model, args.mask)
    refuse_trained(to, mask.info)
    if args.form in MASKS:
        mask.base_model = mask.base_model or args.model
    elif args.mask:
        mask.base_model = args.model  # its weights are what is exported
    results = read_record(args.results).get("perplexity") if args.results else None
    title = args.push_to_hub or to.name
    model = empty_model(args.model, **options_of(args))
    say_coverage(model, mask=mask)
    if args.form in MASKS:
        if args.runtime:
            check_runtime(args.runtime, model, mask, args.form, args.quantize)
        card = model_card(title, mask, results, form=args.form)
        if args.form == "mask":
            save_hashed(mask, to, card)
        else:
            save_npz(mask, fit_mask(model, mask), to, card)
    else:
        made = {"form": args.form, "quantize": args.quantize, "runtime": args.runtime}
        if args.dataset:
            given, made["windows"] = for_rounding(args, mask, model)
        else:
            given, made = args.model, made | options_of(args)
        save_pruned(given, mask, to, title=title, results=results, **made)
    size = sum(p.stat().st_size for p in to.rglob("*") if p.is_file())
    print(f"{args.quantize or args.form} export written to {to} ({size / 1e6:,.1f} MB)")
    if args.push_to_hub:
        push(to, args.push_to_hub)
    print_json({"form": args.form, "quantize": args.quantize, "to": str(to), "bytes": size})


def for_rounding(args: argparse.Namespace, mask: Mask, shape: PreTrainedModel) -> tuple[PreTrainedModel, Tensor]:
    """The pruned model in memory, and the calibration windows by which its weights are rounded.

    Args:
        shape: the model without values, which shows at once what can't be rounded.
    """
    base = None if model_source(args.model)[1] else fetch(args.model, args.revision)
    check_base(base, args.model)
    assert base is not None
    fit_mask(shape, mask)
    Quantiser(args.quantize, shape, Layout(base.tensors, shape))
    if args.runtime:
        check_runtime(args.runtime, shape, mask, args.form, args.quantize)
    device, own_text = resolve_device(args.device), SELF in parts_of(args.dataset)
    model = load_model(args.model, device=device, **options_of(args)) if own_text else None
    windows = samples_of(args, load_tokenizer(args.model, **options_of(args)), model)
    model = model or load_model(args.model, device=device, **options_of(args))
    apply_mask(model, mask)
    mask.info = mask.info | {
        "rounding": f"error feedback, {windows.numel():,} tokens of {args.dataset}, seed {args.seed}"
    }
    return model, windows


def push(folder: Path, repository: str) -> None:
    """Upload a folder.

    Raises:
        RunError: no token, or the Hub refuses.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except LocalTokenNotFoundError as error:
        raise RunError("--push_to_hub needs a token: log in with 'hf auth login'.") from error
    except (HfHubHTTPError, OSError, *UNREACHABLE) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"--push_to_hub: {repository} was not written ({first}); the export in {folder} stays."
        ) from error
    print(f"pushed to https://huggingface.co/{repository}")
