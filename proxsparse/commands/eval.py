"""Perplexity of any checkpoint.

python eval/ppl.py --model smollm2-135m --dataset wiki news --ctx_len 512
python eval/ppl.py --model runs/demo/pruned --dataset wikitext2 c4 c4_new --ctx_len 4096 --batch_size 4
python eval/ppl.py --model meta-llama/Llama-2-7b-hf --dataset my_text.txt --output ppl.json
"""

import argparse

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    add_evaluation_arguments,
    add_model_arguments,
    add_output_argument,
    as_record,
    evaluate,
    load,
    write_result,
)
from proxsparse.mask import sparsity_by_kind
from proxsparse.model.prunable import find_prunable


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_output_argument(parser)
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    model, tokenizer = load(args, evaluating=True)
    coded = getattr(model, "hf_quantizer", None) is not None  # its weights are no numbers to count zeros of
    targets = [] if coded else find_prunable(model, multiple=1)
    blocks = [t for t in targets if t.weight.shape[t.in_dim] % 4 == 0]
    sparsity = sparsity_by_kind({t.name: t.weight for t in blocks}, blocks) if blocks else {}
    shares = {kind: sum(row[2:]) for kind, row in sparsity.items()}
    report_sparsity(shares)
    results = evaluate(model, tokenizer, args)
    write_result(model, args, perplexity=as_record(results), blocks_24=shares)
    print_json({"model": args.model, **{text: round(r.perplexity, 4) for text, r in results.items()}})


def report_sparsity(shares: dict[str, float]) -> None:
    """Say in one line how sparse the model is, and by layer kind where the kinds differ."""
    if not shares:
        return
    print(f"2:4 blocks: {shares['all']:.2%} of the prunable weights")
    if max(shares.values()) - min(shares.values()) > 0.005:
        for kind, share in shares.items():
            print(f"  {kind}: {share:.2%}")
