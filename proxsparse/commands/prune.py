"""Baselines on any decoder architecture, with the flags of Wanda's users.

    python baseline/main.py --run runs/demo --prune_method wanda
                                  (the model and the samples of a run)
    python baseline/main.py --model smollm2-135m --prune_method wanda \\
        --dataset wiki --ctx_len 512 --save runs/wanda
    python baseline/main.py --model smollm2-135m --prune_method sparsegpt \\
        --mask_only --dataset wiki --save runs/sparsegpt
    python baseline/main.py --prune_method wanda --sparsity_type unstructured \\
        --sparsity_ratio 0.7 --allocation owl --save runs/owl

It writes mask.safetensors to --save wherever the weights keep their values, and the pruned checkpoint to --save_model.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from proxsparse.baselines import METHODS, Pattern
from proxsparse.baselines.allocation import ALLOCATIONS, allocate, refuse_without_freedom
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    TEXT_HELP,
    RunParser,
    add_model_arguments,
    load,
    model_of,
    options_of,
    positive_int,
)
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import UsageError
from proxsparse.evaluation.report import accuracy_table
from proxsparse.evaluation.zero_shot import PAPER_TASKS, zero_shot
from proxsparse.learning.folder import Run
from proxsparse.mask import MASK_FILE, Mask, apply_mask, save_mask
from proxsparse.model.loading import load_config, load_tokenizer, native_bf16
from proxsparse.record import refuse_to_overwrite
from proxsparse.text import calibration_windows, check_ctx_len

LEARNED = "maskllm"


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prune_method", required=True, choices=[*METHODS, LEARNED], help="the baseline")
    parser.add_argument("--sparsity_type", default="2:4", help="N:M or unstructured; default: %(default)s")
    parser.add_argument("--sparsity_ratio", type=float, default=0.5, help="share removed, for unstructured")
    parser.add_argument(
        "--allocation",
        default="uniform",
        choices=ALLOCATIONS,
        help="share of each decoder block, for unstructured and N:8 patterns; default: %(default)s",
    )
    parser.add_argument("--mask_only", action="store_true", help="keep the original weights under the method's mask")
    parser.add_argument(
        "--prior", default="sparsegpt", choices=[*METHODS, "none"], help="mask that maskllm starts from"
    )
    parser.add_argument("--dataset", default="c4", help=f"calibration text: {TEXT_HELP}; default: %(default)s")
    parser.add_argument(
        "--nsamples", dest="samples", type=positive_int, default=128, help="calibration samples; default: %(default)s"
    )
    parser.add_argument(
        "--ctx_len",
        "--seqlen",
        type=positive_int,
        dest="ctx_len",
        default=2048,
        help="tokens per sample; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples; default: %(default)s")
    parser.add_argument(
        "--hidden_device",
        default="cpu",
        choices=["cpu", "model"],
        help="where hidden states lie between layers: cpu, or with the model (faster); default: %(default)s",
    )
    parser.add_argument(
        "--bf16",
        default="auto",
        choices=["auto", "true", "false"],
        help="compute layers in bfloat16 autocast, statistics in float32; auto: where the CPU does so natively",
    )
    parser.add_argument("--save", default=None, metavar="FOLDER", help="write mask.safetensors here")
    parser.add_argument("--save_model", default=None, metavar="FOLDER", help="write the pruned checkpoint here")
    parser.add_argument(
        "--eval_zero_shot",
        nargs="*",
        default=None,
        metavar="TASK",
        help="measure zero-shot tasks of the pruned model; without names: the paper's seven",
    )
    return parser


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    names = ("dataset", "samples", "ctx_len", "seed")
    same = {name: run.settings[name] for name in names if name in run.settings}
    return model_of(run) | same | {"save": str(run.baseline_folder(args.prune_method))}


@command(arguments)
def main(args: argparse.Namespace) -> None:
    pattern = Pattern.parse(args.sparsity_type, args.sparsity_ratio)
    if args.run and args.save and (Path(args.save) / MASK_FILE).is_file():
        print(f"{args.prune_method}: done already ({Path(args.save) / MASK_FILE})")
        return
    changes_weights = args.prune_method != LEARNED and METHODS[args.prune_method].updates_weights and not args.mask_only
    check(args, pattern, changes_weights)
    tokenizer = load_tokenizer(args.model, **options_of(args))
    windows = None
    if args.prune_method != "magnitude" or args.allocation == "owl":
        check_ctx_len(args.ctx_len, load_config(args.model, **options_of(args)))
        windows = calibration_windows(args.dataset, tokenizer, args.ctx_len, args.samples, args.seed)
    model = load(args)
    if windows is None:
        windows = model.dummy_inputs["input_ids"]
    mask = prune(model, tokenizer, windows, pattern, args)
    mask.base_model = args.model
    mask.info = {
        "method": args.prune_method,
        "weights_updated": changes_weights,
        "allocation": args.allocation,
        "dataset": args.dataset,
        "samples": args.samples,
        "ctx_len": args.ctx_len,
        "seed": args.seed,
    }
    note = " (not 2:4: decoder blocks keep different shares)" if args.allocation != "uniform" else ""
    print(f"{args.prune_method}, {mask.pattern}: {mask.density():.1%} of the weights kept{note}")
    if args.save:
        save_mask(mask, Path(args.save) / MASK_FILE)
    if args.save_model:
        save_pruned(model, tokenizer, args.save_model)
    if args.prune_method == LEARNED:
        shutil.rmtree(learning_folder(args), ignore_errors=True)
    if args.eval_zero_shot is not None:
        found = zero_shot(model, tokenizer, args.eval_zero_shot or list(PAPER_TASKS))
        Console().print(accuracy_table(found))
    print_json({"method": args.prune_method, "pattern": str(mask.pattern), "kept": mask.density(), "save": args.save})


def check(args: argparse.Namespace, pattern: Pattern, changes_weights: bool) -> None:
    """Refuse what can't work before a model is loaded."""
    if not (args.save or args.save_model):
        raise UsageError("Give --save FOLDER for the mask, --save_model FOLDER for the pruned checkpoint, or both.")
    if changes_weights and not args.save_model:
        raise UsageError(
            f"{args.prune_method} changes weights, so a mask alone is not its result: give --save_model or --mask_only."
        )
    if args.save_model:
        refuse_to_overwrite(Path(args.save_model))
    if args.allocation != "uniform":
        refuse_without_freedom(pattern, args.allocation)
    if args.prune_method == LEARNED and str(pattern) != "2:4":
        raise UsageError(f"--prune_method maskllm learns 2:4 masks only; got --sparsity_type {args.sparsity_type}.")


def prune(model, tokenizer, windows: torch.Tensor, pattern: Pattern, args: argparse.Namespace) -> Mask:
    """Prune the model in place by the method the arguments name."""
    bf16 = args.bf16 == "true" or (args.bf16 == "auto" and model.device.type == "cpu" and native_bf16("cpu"))
    hidden = "cpu" if args.hidden_device == "cpu" else str(model.device)
    options: dict[str, Any] = {"hidden_device": hidden, "bf16": bf16}
    if args.prune_method != LEARNED:
        patterns = allocate(model, pattern, args.allocation, windows)
        method, update = METHODS[args.prune_method](), not args.mask_only
        label = f"{args.prune_method} {pattern}"
        return prune_layerwise(model, windows, method, patterns, update=update, progress=label, **options)
    from proxsparse.baselines.maskllm import learn_mask, one_shot_prior

    prior = None if args.prior == "none" else one_shot_prior(model, windows, METHODS[args.prior](), **options)
    if model.dtype == torch.float16:
        model.to(torch.bfloat16)  # as end-to-end/main.py: gradients underflow in float16
    settings = {"seed": args.seed} | ({} if args.bf16 == "auto" and model.device.type != "cpu" else {"bf16": bf16})
    mask = learn_mask(model, tokenizer, windows, learning_folder(args), prior=prior, **settings)
    apply_mask(model, mask)
    return mask


def learning_folder(args: argparse.Namespace) -> Path:
    """Where maskllm keeps its checkpoints while it learns."""
    folder = Path(args.save or args.save_model)
    return folder.parent / f"{folder.name}-learning"
