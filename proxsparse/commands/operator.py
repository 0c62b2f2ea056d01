"""Try the proximal operator: on four numbers, and along lambda.

    python end-to-end/prox_op.py 4 3 2 1 --lambda_value 0.1
    python end-to-end/prox_op.py 4 3 2 1 --draw path.png
                                   (the block's path over lambda)

It prints the block before and after, its penalty R, and the objective that the operator minimises.
"""

import argparse
import math

import torch
from torch import Tensor

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.errors import UsageError
from proxsparse.evaluation.report import draw_path
from proxsparse.operator.prox import prox_op, regularizer

PATH_POINTS = 400


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("block", nargs="*", type=float, metavar="w", help="four weights")
    parser.add_argument("--lambda_value", "--lambda", type=float, default=0.25, help="strength; default: %(default)s")
    parser.add_argument("--draw", default=None, metavar="PNG", help="draw the path of the block over lambda")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.lambda_value) and args.lambda_value >= 0):
        raise UsageError(f"--lambda_value must be a finite number >= 0; got {args.lambda_value}.")
    if not args.block:
        raise UsageError("Give the four weights of a block (see --help).")
    if len(args.block) != 4 or not all(map(math.isfinite, args.block)):
        raise UsageError(f"A block is four finite numbers; got {len(args.block)}: {args.block}.")
    show(torch.tensor(args.block, dtype=torch.float64), args.lambda_value)
    if args.draw:
        draw(torch.tensor(args.block, dtype=torch.float64), args.draw)
    found = prox_op(torch.tensor(args.block, dtype=torch.float64), args.lambda_value)
    print_json({"block": args.block, "lambda": args.lambda_value, "prox": found.tolist()})


def show(block: Tensor, lam: float) -> None:
    found = prox_op(block, lam)
    print(f"w           {_numbers(block)}   R(w) = {regularizer(block).item():.6g}")
    print(f"prox(w)     {_numbers(found)}   R    = {regularizer(found).item():.6g}")
    print(f"objective   {objective(found, block, lam).item():.6g} (at w itself {lam * regularizer(block).item():.6g})")


def objective(x: Tensor, w: Tensor, lam: float) -> Tensor:
    """1/2 ||x - w||^2 + lam R(x), for each block: (..., 4) -> (...)."""
    a, b, c, d = x.abs().unbind(-1)
    return 0.5 * (x - w).square().sum(-1) + lam * (a * b * (c + d) + c * d * (a + b))


def draw(block: Tensor, path: str) -> None:
    top = block.abs().max().item() or 1.0
    lams = torch.linspace(0, 1.5 / top, PATH_POINTS).tolist()
    draw_path(lams, torch.stack([prox_op(block, lam) for lam in lams]).T.tolist(), block.tolist(), path)
    print(f"path over lambda drawn: {path}")


def _numbers(block: Tensor) -> str:
    return " ".join(f"{value:9.5f}" for value in block.tolist())
