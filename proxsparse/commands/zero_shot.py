"""Accuracy on zero-shot tasks, of a checkpoint or of original weights under a mask.

    python eval/zero_shot.py --run runs/mine
    python eval/zero_shot.py --model runs/mine/pruned --tasks arc_easy piqa
    python eval/zero_shot.py --model smollm2-135m --tasks my_task.yaml \\
        --limit 100

It runs EleutherAI's lm-evaluation-harness: pip install 'lm_eval>=0.4.9'. Its tasks come from the Hub; a .yaml file in
the harness's format, whose dataset_path is json and whose data_files are local, runs without a network.
"""

import argparse
from typing import Any

from rich.console import Console

from proxsparse.commands.cli import Parser, command, positive_int, print_json
from proxsparse.commands.groups import (
    RunParser,
    add_mask_argument,
    add_model_arguments,
    add_output_argument,
    load,
    model_of,
    options_of,
    put_mask,
    read_mask,
    write_result,
)
from proxsparse.evaluation.report import accuracy_table
from proxsparse.evaluation.zero_shot import PAPER_TASKS, accuracy, zero_shot
from proxsparse.learning.folder import ZERO_SHOT, Run
from proxsparse.model.loading import load_tokenizer


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser)
    add_mask_argument(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(PAPER_TASKS),
        metavar="TASK",
        help="tasks of the harness or .yaml files; default: the paper's seven",
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="requests at once; default: %(default)s")
    parser.add_argument("--limit", type=positive_int, default=None, help="examples per task; default: all")
    add_output_argument(parser)
    return parser


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    if args.mask or args.model not in (None, run.settings["model"]):  # not the run's own: its result stays
        return model_of(run) | {"mask": str(run.mask_file)}
    return model_of(run) | {"mask": str(run.mask_file), "output": str(run.result_file(ZERO_SHOT))}


@command(arguments)
def main(args: argparse.Namespace) -> None:
    mask = read_mask(args)
    tokenizer = load_tokenizer(args.model, **options_of(args))
    model = load(args, evaluating=mask is None, mask=mask)
    put_mask(model, mask, args)
    results = zero_shot(model, tokenizer, args.tasks, batch_size=args.batch_size, limit=args.limit)
    write_result(model, args, limit=args.limit, tasks=results)
    Console().print(accuracy_table(results))
    print_json({"model": args.model, **{task: round(accuracy(found), 4) for task, found in results.items()}})
