"""Apply a mask to the original weights: measure the perplexity, save the pruned checkpoint.

python eval/eval_mask_ppl.py --model smollm2-135m --mask runs/demo/mask.safetensors --dataset wiki news --ctx_len 512
python eval/eval_mask_ppl.py --mask runs/demo/mask.safetensors --save runs/demo/pruned --no_eval
"""

import argparse

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    add_evaluation_arguments,
    add_mask_argument,
    add_model_arguments,
    add_output_argument,
    as_record,
    evaluate,
    load,
    put_mask,
    read_mask,
    write_result,
)
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import UsageError


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_mask_argument(parser, required=True)
    parser.add_argument("--save", default=None, metavar="FOLDER", help="write the pruned checkpoint here")
    parser.add_argument("--no_eval", action="store_true", help="do not measure the perplexity")
    add_output_argument(parser)
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    if args.no_eval and not args.save:
        raise UsageError("--no_eval without --save leaves nothing to do; give --save FOLDER.")
    mask = read_mask(args)
    model, tokenizer = load(args)
    put_mask(model, mask, args)
    if args.save and mask is not None:
        save_pruned(model, mask, args.save, tokenizer=tokenizer)
        print(f"pruned checkpoint written to {args.save}")
    results = {} if args.no_eval else evaluate(model, tokenizer, args)
    write_result(model, args, perplexity=as_record(results))
    print_json(
        {"model": args.model, "mask": args.mask, **{text: round(r.perplexity, 4) for text, r in results.items()}}
    )
