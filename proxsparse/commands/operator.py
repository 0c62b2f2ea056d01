"""Try the proximal operator: on four numbers, against a search, along lambda.

python end-to-end/prox_op.py 4 3 2 1 --lambda_value 0.1
python end-to-end/prox_op.py 4 3 2 1 --draw path.png            the block's path over lambda
python end-to-end/prox_op.py --check 1000 --lambda_value 0.6    random blocks against many-start descent in float64
"""

import argparse
import math

import torch
from torch import Tensor

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    positive_int,
)
from proxsparse.errors import RunError, UsageError
from proxsparse.evaluation.report import draw_path
from proxsparse.operator.prox import prox_op, regularizer

PATH_POINTS = 400


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("block", nargs="*", type=float, metavar="w", help="four weights")
    parser.add_argument("--lambda_value", "--lambda", type=float, default=0.25, help="strength; default: %(default)s")
    parser.add_argument("--check", type=positive_int, default=None, metavar="N", help="check N random blocks")
    parser.add_argument("--draw", default=None, metavar="PNG", help="draw the path of the block over lambda")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.lambda_value) and args.lambda_value >= 0):
        raise UsageError(f"--lambda_value must be a finite number >= 0; got {args.lambda_value}.")
    if args.block and (len(args.block) != 4 or not all(map(math.isfinite, args.block))):
        raise UsageError(f"A block is four finite numbers; got {len(args.block)}: {args.block}.")
    if not args.block and not args.check:
        raise UsageError("Give four weights, or --check N (see --help).")
    if args.draw and not args.block:
        raise UsageError("--draw needs the four weights of a block.")
    if args.check:
        check(args.check, args.lambda_value)
    if args.block:
        show(torch.tensor(args.block, dtype=torch.float64), args.lambda_value)
    if args.draw:
        draw(torch.tensor(args.block, dtype=torch.float64), args.draw)
    if args.block:
        found = prox_op(torch.tensor(args.block, dtype=torch.float64), args.lambda_value)
        print_json({"block": args.block, "lambda": args.lambda_value, "prox": found.tolist()})


def show(block: Tensor, lam: float) -> None:
    found = prox_op(block, lam)
    print(f"w           {_numbers(block)}   R(w) = {regularizer(block).item():.6g}")
    print(f"prox(w)     {_numbers(found)}   R    = {regularizer(found).item():.6g}")
    print(f"objective   {objective(found, block, lam).item():.6g} (at w itself {lam * regularizer(block).item():.6g})")


def check(count: int, lam: float) -> None:
    """Compare the operator's objective with the best of many coordinate descents in float64."""
    blocks = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = objective(prox_op(blocks.float(), lam).double(), blocks.float().double(), lam)
    best = search(blocks.float().double(), lam)
    gap = ((found - best) / best.clamp_min(1e-12)).max().item()
    print(f"{count} random blocks, lambda {lam}: the objective is at most {gap:.2e} (relative) above the search's best")
    if gap > 1e-6:
        raise RunError("The operator is worse than the search: please report this block size, lambda and machine.")


def search(blocks: Tensor, lam: float, starts: int = 40, sweeps: int = 150) -> Tensor:
    """Least objective over coordinate descents from many starts; independent of how the operator solves."""
    z, generator = blocks.abs(), torch.Generator().manual_seed(1)
    best = objective(z, z, lam)
    for attempt in range(starts):
        x = z * torch.rand(z.shape, generator=generator, dtype=z.dtype)
        if attempt % 2:
            x.scatter_(1, z.argmin(1, keepdim=True), 0.0)
        for _ in range(sweeps):
            for i in range(4):
                a, b, c = (x[:, j] for j in range(4) if j != i)
                x[:, i] = (z[:, i] - lam * (a * b + b * c + c * a)).clamp_min(0)
        best = torch.minimum(best, objective(x, z, lam))
    return best


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
