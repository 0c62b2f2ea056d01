"""Accuracy on the paper's seven zero-shot tasks, of a checkpoint or of original weights under a mask.

    python eval/zero_shot.py --model runs/mine/pruned
    python eval/zero_shot.py --model meta-llama/Llama-2-7b-hf --mask runs/mine --tasks arc_easy piqa
    python eval/zero_shot.py --model smollm2-135m --tasks my_task.yaml --limit 100

Runs EleutherAI's lm-evaluation-harness: pip install 'proxsparse[zero-shot]'. Its tasks come from the Hub; a .yaml file
in the harness's format, whose dataset_path is json and whose data_files are local, runs without a network.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from proxsparse.commands.common import (
    Parser,
    add_mask_argument,
    add_model_arguments,
    describe_device,
    load,
    positive_int,
    print_json,
    put_mask,
    read_mask,
)
from proxsparse.errors import command
from proxsparse.record import versions, write_json
from proxsparse.zero_shot import PAPER_TASKS, accuracy, zero_shot


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_mask_argument(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=list(PAPER_TASKS), metavar="TASK", help="harness tasks or .yaml files"
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="requests at once; default: %(default)s")
    parser.add_argument("--limit", type=positive_int, default=None, help="examples a task; default: all")
    parser.add_argument("--output", default=None, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    mask = read_mask(args)
    model, tokenizer = load(args)
    put_mask(model, mask, args)
    results = zero_shot(model, tokenizer, args.tasks, batch_size=args.batch_size, limit=args.limit)
    record = {
        "model": args.model,
        "mask": args.mask,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": describe_device(model.device),
        "limit": args.limit,
        "tasks": results,
        "versions": versions(),
    }
    if args.output:
        write_json(args.output, record)
    show(results)
    print_json({"model": args.model, **{task: round(accuracy(found), 4) for task, found in results.items()}})


def show(results: dict[str, dict[str, float]]) -> None:
    """Print the accuracies and their mean."""
    table = Table(title="zero-shot accuracy")
    for head in ("task", "accuracy", "standard error"):
        table.add_column(head, justify="left" if head == "task" else "right")
    for task, found in results.items():
        error = found.get("acc_stderr")
        table.add_row(task, f"{accuracy(found):.2%}", "" if error is None else f"{error:.2%}")
    mean = sum(map(accuracy, results.values())) / len(results)
    table.add_row("mean", f"{mean:.2%}", "", style="bold")
    Console().print(table)
