"""Apply a mask to the original weights: measure the perplexity, save the pruned checkpoint.

    python eval/eval_mask_ppl.py --run runs/demo
                 (the run's mask, model and text; saves runs/demo/pruned)
    python eval/eval_mask_ppl.py --model smollm2-135m --dataset wiki news \\
        --ctx_len 512 --mask runs/demo/mask.safetensors
    python eval/eval_mask_ppl.py --mask runs/demo --save pruned --no_eval
"""

import argparse
from pathlib import Path
from typing import Any

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    RunParser,
    add_mask_argument,
    add_model_arguments,
    add_output_argument,
    given_mask,
    load,
    put_mask,
    tokenizer_to_save,
    write_result,
)
from proxsparse.commands.measuring import (
    add_evaluation_arguments,
    as_record,
    decisive_of,
    done_already,
    evaluate,
    evaluation_of,
    weights_stamp,
    windows_of,
)
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import UsageError
from proxsparse.learning.folder import PRUNED, Run
from proxsparse.record import OWN, refuse_folder, refuse_trained


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_mask_argument(parser)
    parser.add_argument("--baseline", default=None, metavar="METHOD", help="with --run: the mask of this baseline")
    parser.add_argument("--save", default=None, metavar="FOLDER", help="write the pruned checkpoint here")
    parser.add_argument("--no_eval", action="store_true", help="do not measure the perplexity")
    add_output_argument(parser)
    return parser


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    if args.baseline:
        own = {"mask": str(run.baseline_folder(args.baseline)), "output": str(run.result_file(args.baseline))}
    elif args.mask or args.model not in (None, run.settings["model"]):  # not the run's own: its files stay
        own = {"mask": str(run.mask_file)}
    else:
        own = {"mask": str(run.mask_file), "output": str(run.result_file(PRUNED)), "save": str(run.pruned_folder)}
    return evaluation_of(run) | own


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the result, and the checkpoint that was saved with it: another one may take its place later."""
    return decisive_of(args) | {"saved": weights_stamp(args.save) if args.save else None}


@command(arguments)
def main(args: argparse.Namespace) -> None:
    if args.baseline and not args.run:
        raise UsageError("--baseline needs the run that the baseline was pruned for: give --run FOLDER.")
    if args.no_eval and not args.save:
        raise UsageError("--no_eval without --save leaves nothing to do; give --save FOLDER.")
    mask = given_mask(args)
    own_folder = args.run and args.save and Path(args.save) == Run(args.run).pruned_folder
    saved = not args.save or (own_folder and (Path(args.save) / OWN).is_file())
    if saved and not args.no_eval and done_already(args, "pruned perplexity", _measured(args)):
        return
    if args.save:
        refuse_folder(args.save, args.model, args.mask)
        refuse_trained(args.save, mask.info)
    windows = {} if args.no_eval else windows_of(args)
    tokenizer = tokenizer_to_save(args) if args.save else None
    model = load(args, mask=mask)
    put_mask(model, mask, args)
    if args.save:
        save_pruned(model, mask, args.save, tokenizer=tokenizer)
        print(f"pruned checkpoint written to {args.save}")
    results = evaluate(model, windows, args)
    if not args.no_eval:
        write_result(model, args, perplexity=as_record(results), measured=_measured(args))
    print_json(
        {"model": args.model, "mask": args.mask, **{text: round(r.perplexity, 4) for text, r in results.items()}}
    )
