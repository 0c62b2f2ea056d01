"""Extract the mask from a learned checkpoint: the largest scores of every block.

    python end-to-end/mask_op.py --run runs/mine      (its last checkpoint)
    python end-to-end/mask_op.py --checkpoint runs/mine/checkpoint-100 \\
        --output mask-100.safetensors

It prints how many zeros the blocks of the learned weights have, by layer kind. The more blocks have the zeros of
the pattern already, the less the mask changes the learned weights. For a run, the shares are also written into its
folder.
"""

import argparse
import contextlib
from pathlib import Path

from rich.console import Console
from rich.table import Table

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import add_choice_arguments
from proxsparse.commands.measuring import mask_digest
from proxsparse.errors import RunError, UsageError
from proxsparse.learning.folder import locate
from proxsparse.operator.pattern import Pattern
from proxsparse.record import read_record, versions, write_json


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", "--run", "--model", required=True, metavar="FOLDER",
        help="learned checkpoint, or the folder of a run",
    )  # fmt: skip
    parser.add_argument("--output", default=None, metavar="FILE", help="default: the mask of the run")
    add_choice_arguments(parser, "take")
    parser.add_argument(
        "--record", default=None, metavar="FILE", help="write the shares of zeros as JSON; default: in the run's folder"
    )
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    checkpoint, run = locate(args.checkpoint)
    whole_run = checkpoint != Path(args.checkpoint) and not (args.output or args.include or args.exclude)
    if not whole_run and not args.output and run.is_finished:
        raise UsageError(
            f"{run.mask_file} is the mask of the whole run: give --output FILE for that of one checkpoint, or of some "
            "weights."
        )
    record = Path(args.record) if args.record else (run.blocks_file if whole_run else None)
    before = {}
    if record and record.is_file():
        with contextlib.suppress(RunError):  # a damaged one is made again
            before = read_record(record)
    if (
        whole_run
        and run.mask_file.is_file()
        and before.get("checkpoint") == str(checkpoint)
        and before.get("mask") == mask_digest(run.mask_file)
    ):
        print(f"extract: done already ({run.mask_file})")
        print_json({"mask": str(run.mask_file)})
        return
    learned = run.learned(checkpoint, args.include, args.exclude)
    if not run.settings and learned.compared == "weight":
        print("note: the checkpoint is not in the folder of a run, so blocks are 2:4, and compare magnitudes alone")
    print_zeros(learned.zeros, learned.mask.pattern)
    output = run.save(learned.mask, args.output)
    if record:
        found = {"checkpoint": str(checkpoint), "mask": mask_digest(output), "zeros": learned.zeros}
        write_json(record, found | {"versions": versions()})
    pattern = learned.mask.pattern
    sparse = sum(learned.zeros["all"][pattern.m - pattern.n :])
    print_json({"mask": str(output), "weights": len(learned.mask.tensors), f"blocks_{pattern.n}{pattern.m}": sparse})


def print_zeros(shares: dict[str, list[float]], pattern: Pattern) -> None:
    """Table of the share of blocks with 0, 1, ... zeros; of longer blocks than four, with enough of them."""
    table = Table(title="zeros in the blocks of the learned weights")
    table.add_column("layer kind", no_wrap=True)
    enough = pattern.m - pattern.n
    heads = [f"{zeros}" for zeros in range(pattern.m + 1)] if pattern.m <= 4 else [f"fewer than {enough}", f"{pattern}"]
    for head in heads:
        table.add_column(head, justify="right")
    for kind, row in shares.items():
        cells = row if pattern.m <= 4 else [sum(row[:enough]), sum(row[enough:])]
        table.add_row(kind, *(f"{share:.1%}" for share in cells), style="bold" if kind == "all" else None)
    Console().print(table)
