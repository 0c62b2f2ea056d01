"""Prune with a baseline: magnitude, Wanda, SparseGPT, ADMM, MaskLLM or RoI. The flags are named as in Wanda's code.

    python baseline/main.py --run runs/demo --prune_method wanda
                                  (the model and the samples of a run)
    python baseline/main.py --model smollm2-135m --prune_method wanda \\
        --dataset wiki --ctx_len 512 --save runs/wanda
    python baseline/main.py --model smollm2-135m --prune_method sparsegpt \\
        --mask_only --dataset wiki --save runs/sparsegpt
    python baseline/main.py --prune_method wanda --sparsity_type unstructured \\
        --sparsity_ratio 0.7 --allocation owl --save runs/owl

--save writes mask.safetensors, --save_model the pruned checkpoint. SparseGPT and ADMM change the kept weights, so their
result is a checkpoint; with --mask_only it is a mask.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.baselines import METHODS, ONE_SHOT, Pattern, Wanted
from proxsparse.baselines.allocation import ALLOCATIONS, refuse_without_freedom
from proxsparse.baselines.method import INPUTS
from proxsparse.commands.cli import Parser, command, positive_int, print_json, seed
from proxsparse.commands.groups import (
    CALIBRATION_HELP,
    RunParser,
    add_choice_arguments,
    add_model_arguments,
    load,
    model_of,
    options_of,
    samples_of,
)
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import UsageError
from proxsparse.evaluation.report import accuracy_table
from proxsparse.evaluation.zero_shot import PAPER_TASKS, zero_shot
from proxsparse.learning.folder import Run
from proxsparse.mask import MASK_FILE, load_mask, save_mask
from proxsparse.model.channels import ORDER_FILE, PERMUTE, PERMUTE_HELP, load_order, put_into_order
from proxsparse.model.inputs import digest, origin_of
from proxsparse.model.loading import load_tokenizer, native_bf16
from proxsparse.model.ordering import order_channels
from proxsparse.model.walk import runs_in_bf16
from proxsparse.record import refuse_folder, refuse_trained
from proxsparse.text import SELF, parts_of, stamp


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prune_method", required=True, choices=METHODS, help="the baseline")
    parser.add_argument("--sparsity_type", default="2:4", help="N:M or unstructured; default: %(default)s")
    parser.add_argument(
        "--sparsity_ratio", type=float, default=0.5, help="share removed, for unstructured; default: %(default)s"
    )
    parser.add_argument(
        "--allocation",
        default="uniform",
        choices=ALLOCATIONS,
        help="share removed in each layer, for unstructured patterns and blocks of 8 or more; default: %(default)s",
    )
    parser.add_argument("--permute", default="none", choices=PERMUTE, help=f"{PERMUTE_HELP}; default: %(default)s")
    parser.add_argument(
        "--inputs",
        default="pruned",
        choices=INPUTS,
        help="whose inputs weights are scored by: pruned (the layers before are pruned already, as in the methods' "
        "papers), or dense (they are not yet; half the work); default: %(default)s",
    )
    add_choice_arguments(parser, "prune")
    parser.add_argument("--mask_only", action="store_true", help="put the method's mask on the original weights")
    add_learning_arguments(parser)
    parser.add_argument("--dataset", default="c4", help=f"calibration text: {CALIBRATION_HELP}; default: %(default)s")
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
    parser.add_argument("--seed", type=seed, default=0, help="seed of the choice of samples; default: %(default)s")
    parser.add_argument(
        "--hidden_device",
        default="cpu",
        choices=["cpu", "model"],
        help="where hidden states are kept between layers: cpu, or with the model (faster); default: %(default)s",
    )
    parser.add_argument(
        "--bf16",
        default="auto",
        choices=["auto", "true", "false"],
        help="compute layers in bfloat16 autocast, statistics in float32; auto: where the CPU does so natively",
    )
    parser.add_argument("--save", default=None, metavar="FOLDER", help=f"write {MASK_FILE} here")
    parser.add_argument("--save_model", default=None, metavar="FOLDER", help="write the pruned checkpoint here")
    parser.add_argument(
        "--eval_zero_shot",
        nargs="*",
        default=None,
        metavar="TASK",
        help="measure zero-shot tasks of the pruned model; without names: the paper's seven",
    )
    return parser


def add_learning_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the methods that learn."""
    parser.add_argument(
        "--prior",
        default="sparsegpt",
        choices=[*ONE_SHOT, "none"],
        help="method whose mask maskllm and roi start from; default: %(default)s",
    )
    parser.add_argument(
        "--cooling",
        default=None,
        choices=["linear", "exponential"],
        help="how the temperature of maskllm and roi falls; default: linear for maskllm, exponential for roi",
    )


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    names = ("dataset", "samples", "ctx_len", "seed", "permute", "include", "exclude")
    same = {name: run.settings[name] for name in names if name in run.settings}
    same["sparsity_type"] = str(run.pattern)
    return model_of(run) | same | {"save": str(run.baseline_folder(args.prune_method))}


@command(arguments)
def main(args: argparse.Namespace) -> None:
    method = METHODS[args.prune_method]()
    wanted = Wanted(
        Pattern.parse(args.sparsity_type, args.sparsity_ratio),
        args.allocation,
        inputs=args.inputs,
        update=not args.mask_only,
        prior=None if args.prior == "none" else ONE_SHOT[args.prior](),
        cooling=args.cooling,
        seed=args.seed,
        folder=learning_folder(args),
        include=args.include,
        exclude=args.exclude,
    )
    changes_weights = method.updates_weights and wanted.update
    check(args, wanted.pattern, changes_weights)
    method.check(wanted)
    info = information(args, changes_weights)
    reads, own_text = method.reads_text or args.allocation == "owl", SELF in parts_of(args.dataset)
    changeable = reads and not own_text and stamp(args.dataset) is not None
    if not changeable and pruned_already(args, info, wanted.pattern):
        return
    tokenizer = load_tokenizer(args.model, **options_of(args))
    model = load(args, pattern=wanted.pattern) if own_text else None
    windows = samples_of(args, tokenizer, model) if reads else None
    if changeable and windows is not None:
        info["text"] = digest(windows)
        if pruned_already(args, info, wanted.pattern):
            return
    model = model or load(args, pattern=wanted.pattern)
    windows = model.dummy_inputs["input_ids"] if windows is None else windows
    wanted.hidden_device = "cpu" if args.hidden_device == "cpu" else str(model.device)
    automatic = native_bf16("cpu") if model.device.type == "cpu" else None
    wanted.bf16 = automatic if args.bf16 == "auto" else args.bf16 == "true"
    if args.bf16 == "auto" and wanted.bf16 and method.reads_text:
        wanted.bf16 = runs_in_bf16(model, windows)
    if args.permute == "auto":
        reorder(model, windows if method.reads_text else None, wanted.pattern, Run(args.run) if args.run else None)
    mask = method.prune_model(model, tokenizer, windows, wanted)
    mask.base_model = args.model
    mask.info = info
    same = args.allocation == "uniform" or (mask.pattern.structured and str(mask.pattern) == args.sparsity_type)
    note = "" if same else " (layers keep different shares)"
    print(f"{args.prune_method}, {mask.pattern}: {mask.density():.1%} of the weights kept{note}")
    if args.save:
        if args.run:
            Run(args.run).forget_result(args.prune_method, args.save)
        save_mask(mask, Path(args.save) / MASK_FILE)
    if args.save_model:
        save_pruned(model, mask, args.save_model, tokenizer=tokenizer)
    method.forget(wanted)
    if args.eval_zero_shot is not None:
        found = zero_shot(model, tokenizer, args.eval_zero_shot or list(PAPER_TASKS))
        Console().print(accuracy_table(found))
    print_json({"method": args.prune_method, "pattern": str(mask.pattern), "kept": mask.density(), "save": args.save})


def reorder(model: PreTrainedModel, windows: Tensor | None, pattern: Pattern, run: Run | None) -> None:
    """Reorder the channels: as the run did, where it chose its order by the same windows, else anew."""
    if run is not None and windows is not None and pattern == run.pattern:
        measured = windows[: run.settings.get("norm_samples", len(windows))]
        with contextlib.suppress(UsageError):  # the order of another text
            order = load_order(run.folder / ORDER_FILE, origin_of(model, measured))
            if order:
                put_into_order(model, order)
                return
    order_channels(model, windows, pattern=pattern)


def information(args: argparse.Namespace, weights_updated: bool) -> dict[str, Any]:
    """What the mask's file says about how it was made."""
    always = {name: getattr(args, name) for name in ("allocation", "dataset", "samples", "ctx_len", "seed")}
    # Left out where they are as ever, so that a mask of an older version is known again.
    changed: dict[str, Any] = {"permute": "none", "inputs": "pruned"}
    changed |= dict.fromkeys(("cooling", "include", "exclude"))
    changed["revision"] = Run(args.run).settings.get("revision") if args.run else None
    changed |= {} if args.prune_method in ONE_SHOT else {"prior": "sparsegpt"}
    more = {name: value for name, usual in changed.items() if (value := getattr(args, name)) != usual}
    return {"method": args.prune_method, "weights_updated": weights_updated} | always | more


def pruned_already(args: argparse.Namespace, info: dict[str, Any], pattern: Pattern) -> bool:
    """Whether the folder of a run has this very mask, and nothing else is asked for; says so."""
    path = Path(args.save or "") / MASK_FILE
    if not args.run or args.save_model or args.eval_zero_shot is not None or not path.is_file():
        return False
    found = load_mask(path)
    known = info if "text" in found.info else {name: value for name, value in info.items() if name != "text"}
    if found.info != known or found.pattern != pattern:
        return False
    print(f"{args.prune_method}: done already ({path})")
    return True


def check(args: argparse.Namespace, pattern: Pattern, changes_weights: bool) -> None:
    """Refuse what can't work before a model is loaded."""
    if not (args.save or args.save_model):
        raise UsageError("Give --save FOLDER for the mask, --save_model FOLDER for the pruned checkpoint, or both.")
    if changes_weights and not args.save_model:
        raise UsageError(
            f"{args.prune_method} changes weights, so a mask alone is not its result: give --save_model or --mask_only."
        )
    if args.save_model:
        refuse_folder(args.save_model, args.model)
        refuse_trained(args.save_model, {})
    if args.save and Path(args.save).is_file():
        raise UsageError(f"--save {args.save} is a file; name a folder.", "save")
    if args.permute != "none" and not pattern.structured:
        raise UsageError(f"--permute auto is for N:M patterns, whose blocks it forms; got {pattern}.")
    if args.allocation != "uniform":
        refuse_without_freedom(pattern, args.allocation)


def learning_folder(args: argparse.Namespace) -> Path:
    """Where a learned method keeps its checkpoints while it learns."""
    folder = Path(args.save or args.save_model or ".")
    return folder.parent / f"{folder.name}-{args.prune_method}-learning"
