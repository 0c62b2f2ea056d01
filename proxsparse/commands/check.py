"""Check that a checkpoint is 2:4 and, compared with its base, nothing but pruned.

    python -m proxsparse check --model runs/mine/pruned
    python -m proxsparse check --model runs/mine/pruned --base the/original

Every block has at most two non-zeros. With --base, kept weights are the base's bit for bit, and everything else is
unchanged. Otherwise the exit code is 1 and the first offenders are named: for people who fine-tune or merge after
pruning.
"""

import argparse

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.deploy.dense import MOST_OFFENDERS, check_sparsity
from proxsparse.errors import RunError


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="pruned checkpoint")
    parser.add_argument("--base", default=None, metavar="FOLDER", help="checkpoint of the original model")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    counts, offenders = check_sparsity(args.model, args.base)
    print(f"{counts['weights']} prunable weights, {counts['blocks']:,} blocks, {counts['wrong_blocks']:,} not 2:4")
    if offenders:
        for sentence in offenders[:MOST_OFFENDERS]:
            print(f"  {sentence}")
        raise RunError(f"{args.model} fails the check: {len(offenders)} findings, the first above.")
    print_json({"model": args.model, "base": args.base, **counts})
