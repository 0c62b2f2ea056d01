"""Update the kept weights of a pruned model, so that it comes closer to the dense one. The mask stays as it is.

    python -m proxsparse recover --run runs/demo
                  (the run's mask, model and text; writes runs/demo/recovered)
    python -m proxsparse recover --model pruned --base meta-llama/Llama-3.1-8B \\
        --dataset c4 --to recovered

The dense model is the teacher, and nothing but text is needed. Without --mask, the zeros of --model are the mask. With
--run, the windows are drawn from the run's text with another seed. The result has updated weights: compare it with
models whose weights were updated too, and never with a mask alone. If the command stops, the same command goes on from
its last checkpoint.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from proxsparse.commands.cli import Parser, command, positive_int, print_json, seed
from proxsparse.commands.groups import (
    CALIBRATION_HELP,
    RunParser,
    add_mask_argument,
    add_model_arguments,
    check_base_revision,
    load,
    model_of,
    options_of,
    read_mask,
    require,
    samples_of,
    tokenizer_to_save,
)
from proxsparse.commands.measuring import mask_digest
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import UsageError
from proxsparse.learning.folder import RECOVERED, WINDOWS, Run
from proxsparse.learning.learn import defaults_on
from proxsparse.learning.recover import RATES, SCOPES, RecoveryConfig, recover
from proxsparse.mask import mask_of_pruned
from proxsparse.model.loading import cast_weights, load_config, load_model, load_tokenizer, resolve_device
from proxsparse.model.windows import check_ctx_len
from proxsparse.record import OWN, origin_of, refuse_folder, refuse_trained
from proxsparse.resume import RUN_FILE
from proxsparse.text import SELF, parts_of, stamp


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser)
    add_mask_argument(parser)
    parser.add_argument("--base", default=None, metavar="MODEL", help="the dense model; default: --model, with --mask")
    parser.add_argument("--base_revision", default=None, help="revision of a --base on the Hub")
    parser.add_argument("--to", default=None, metavar="FOLDER", help="new folder for the recovered checkpoint")
    parser.add_argument("--dataset", default=None, metavar="TEXT", help=f"text to learn from: {CALIBRATION_HELP}")
    parser.add_argument("--ctx_len", type=positive_int, default=4096, help="tokens per window; default: %(default)s")
    parser.add_argument("--samples", type=positive_int, default=400, help="windows; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=43, help="seed of the choice of windows; default: %(default)s")
    parser.add_argument("--scope", default="full", choices=SCOPES, help="what learns; default: %(default)s")
    rates = ", ".join(f"{rate} with {scope}" for scope, rate in RATES.items())
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=None,
        help=f"relative to the weights' root mean square; default: {rates}",
    )
    parser.add_argument(
        "--distill", type=float, default=1.0, help="share of the loss that is KL to the dense model; default: 1"
    )
    parser.add_argument(
        "--epochs",
        dest="num_train_epochs",
        type=float,
        default=1.0,
        help="times that each window is seen; default: 1",
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="windows at once; default: 1")
    parser.add_argument(
        "--bf16",
        default="auto",
        choices=["auto", "true", "false"],
        help="compute in bfloat16 autocast; auto: where the device does so natively; default: %(default)s",
    )
    return parser


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    settings = run.settings
    found = {name: settings[name] for name in ("dataset", "ctx_len", "samples") if settings.get("dataset") != WINDOWS}
    found |= {"mask": str(run.mask_file), "to": str(run.recovered_folder), "base": settings["model"]}
    found["base_revision"] = settings.get("revision")
    return model_of(run) | found | {"seed": int(settings.get("seed", 42)) + 1}  # other windows than the mask's


@command(arguments)
def main(args: argparse.Namespace) -> None:
    require(args, "to", "dataset")
    check_base_revision(args)
    to, device = Path(args.to), resolve_device(args.device)
    scratch = to.with_name(f"{to.name}-training")
    rate = RATES[args.scope] if args.learning_rate is None else args.learning_rate
    settings = {"scope": args.scope, "learning_rate": rate, "distill": args.distill, "seed": args.seed}
    settings |= {"num_train_epochs": args.num_train_epochs, "per_device_train_batch_size": args.batch_size}
    settings |= {} if args.bf16 == "auto" else {"bf16": args.bf16 == "true"}
    RecoveryConfig(output_dir=str(scratch), **(defaults_on(torch.device(device).type) | settings))  # refuses early
    tokens = round(args.samples * args.ctx_len * args.num_train_epochs)
    updated = f"distilling the dense model ({args.scope}, {tokens:,} tokens, rate {rate}, seed {args.seed})"
    made_of = settings | {name: getattr(args, name) for name in ("model", "base", "dataset", "samples", "ctx_len")}
    usual = Run(args.run).settings.get("revision") if args.run else None
    made_of |= {name: value for name in ("revision", "base_revision") if (value := getattr(args, name)) != usual}
    made_of |= {"mask": None if args.mask is None else mask_digest(args.mask), "files": stamp(args.dataset)}
    if args.run and (to / OWN).is_file():
        before = origin_of(to).get("info", {}).get("recovery")
        if before != made_of:
            what = "was recovered with other settings" if before else "is no recovered model"
            raise UsageError(f"{to} {what}: give another --to, or delete it.", "to")
        print(f"recovered: done already ({to})")
        return
    given = read_mask(args)
    if given is None and args.base is None:
        raise UsageError("--model is the pruned model: give the dense one as --base, or a --mask.", "base")
    refuse_folder(to, args.model, args.base, args.mask)
    refuse_trained(to, {"weights_updated": updated})
    if scratch.is_dir() and any(scratch.iterdir()) and not (scratch / RUN_FILE).is_file():
        raise UsageError(f"Checkpoints go into {scratch}, which holds something else: give another --to.", "to")
    base = args.base or args.model
    revision = args.revision if args.base is None else args.base_revision
    of_base = argparse.Namespace(**vars(args) | {"model": base, "revision": revision})
    check_ctx_len(args.ctx_len, load_config(base, **options_of(of_base)))  # before a model writes the text
    tokenizer = load_tokenizer(base, **options_of(of_base))
    set_seed(args.seed)
    dense = load(of_base) if SELF in parts_of(args.dataset) else None
    windows = samples_of(of_base, tokenizer, dense)
    saved = tokenizer_to_save(args)
    # One layer at a time is on the device; the models wait on the CPU.
    home = "cpu" if args.scope == "layer" else args.device
    model = load(argparse.Namespace(**vars(args) | {"device": home}), mask=given)
    if model.dtype == torch.float16:
        print("note: float16 weights are updated in bfloat16, because second moments underflow in float16")
        model = cast_weights(model, torch.bfloat16)
    mask = mask_of_pruned(model) if given is None else given
    if dense is None or dense.dtype != model.dtype:
        dense = load_model(base, dtype=model.dtype, **options_of(of_base))
    dense = dense.to(model.device)  # type: ignore[arg-type]
    recover(model, dense, mask, tokenizer, windows, scratch, device=device, **settings)
    mask = dataclasses.replace(
        mask, base_model=base, info=mask.info | {"weights_updated": updated, "recovery": made_of}
    )
    if args.run:
        Run(args.run).forget_result(RECOVERED, to)
    save_pruned(model, mask, to, tokenizer=saved)
    shutil.rmtree(scratch)
    print(f"weights updated by {updated}; the checkpoint in {to} is {mask.pattern}")
    print_json({"model": args.model, "base": base, "scope": args.scope, "tokens": tokens, "to": str(to)})
