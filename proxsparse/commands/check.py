"""Check that a checkpoint is 2:4 and, compared with its base, that only zeros were added.

    python -m proxsparse check --model runs/mine/pruned
    python -m proxsparse check --model runs/mine/pruned --base the/original
    python -m proxsparse check --model small --base meta-llama/Llama-3.1-8B

Use it after you fine-tune or merge a pruned model. Every block must have at most two non-zeros; with --pattern 4:8, at
most four of eight. Weights that the export left dense are not checked, and --exclude names others. With --base, the
kept weights must be those of the base bit for bit, and everything else must be unchanged. If something is wrong, the
first findings are printed, and the exit code is 1. It reads the forms dense and compact of export, and a base from the
Hub's cache. It also reads what export --quantize wrote, but not together with --base, because those weights are
rounded.

--target lists the weights that a 2:4 kernel can't take, and why. The kernels are torchao (float8 2:4 in vLLM, on H100
and H200), and cusparselt and cutlass (torch's semi-structured tensors). These weights stay dense there; the exit code
does not change.
"""

import argparse

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import add_choice_arguments, check_base_revision, options_of, print_coverage
from proxsparse.deploy.check import MOST_OFFENDERS, check_sparsity, checked_model, weights_to_check
from proxsparse.deploy.runtimes import TARGETS, dense_weights
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import noted_pattern
from proxsparse.model.hub import noted_of
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="pruned checkpoint, dense or compact")
    parser.add_argument(
        "--base", default=None, metavar="MODEL", help="original model: folder, Hub id in the cache, or GGUF file"
    )
    parser.add_argument(
        "--target", default=None, choices=list(TARGETS), help="list the weights that stay dense with this kernel"
    )
    parser.add_argument("--pattern", default=str(TWO_OF_FOUR), help="N:M of the blocks; default: %(default)s")
    add_choice_arguments(parser, "check")
    parser.add_argument("--revision", default=None, help="revision of a model on the Hub")
    parser.add_argument("--base_revision", default=None, help="revision of a base on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    pattern = Pattern.of_blocks(args.pattern)
    if args.target and pattern != TWO_OF_FOUR:
        raise UsageError(f"--target is about kernels for 2:4 weights; got --pattern {pattern}.")
    check_base_revision(args)
    options = options_of(args)
    model = checked_model(args.model, **options)
    names = {"include": args.include, "exclude": args.exclude}
    print_coverage(model, weights_to_check(args.model, model, args.revision, **names), pattern.m, "checked")
    counts, offenders = check_sparsity(
        args.model, args.base, pattern=pattern, base_revision=args.base_revision, **names, **options
    )
    print(
        f"{counts['weights']} prunable weights, {counts['blocks']:,} blocks, {counts['wrong_blocks']:,} not {pattern}"
    )
    if offenders:
        for sentence in offenders[:MOST_OFFENDERS]:
            print(f"  {sentence}")
        noted = noted_pattern(noted_of(args.model, args.revision))
        other = noted is not None and noted.is_nm and noted != pattern
        hint = f" It was exported as {noted}: `pattern={noted}` checks that." if other else ""
        raise RunError(f"{args.model} fails the check: {len(offenders)} findings, the first above.{hint}")
    if args.target:
        sparse, dense = dense_weights(args.model, args.target, **options)
        print(f"{args.target} can take {sparse} of {sparse + len(dense)} weights")
        for sentence in dense:
            print(f"  {sentence}")
        counts |= {"sparse_weights": sparse, "dense_weights": len(dense)}
    print_json({"model": args.model, "base": args.base, **counts})
