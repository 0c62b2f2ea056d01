"""Perplexity of any checkpoint, and the share of its blocks that are 2:4, or of the pattern it was exported with.

    python eval/ppl.py --model smollm2-135m --dataset wiki news --ctx_len 512
    python eval/ppl.py --model runs/demo/pruned --dataset wikitext2 c4 c4_new
    python eval/ppl.py --model meta-llama/Llama-2-7b-hf --dataset my_text.txt \\
        --output ppl.json
    python eval/ppl.py --run runs/demo
                               (the dense model of a run, on its text)
    python eval/ppl.py --run runs/demo --model runs/demo/recovered
                               (what recover made, for the run's report)
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import RunParser, add_model_arguments, add_output_argument, load, write_result
from proxsparse.commands.measuring import (
    add_evaluation_arguments,
    as_record,
    decisive_of,
    done_already,
    evaluate,
    evaluation_of,
    windows_of,
)
from proxsparse.errors import UsageError
from proxsparse.learning.folder import DENSE, RECOVERED, Run
from proxsparse.mask import noted_pattern
from proxsparse.model.hub import commit_of, noted_of
from proxsparse.model.prunable import find_prunable, sparsity_by_kind
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern


def arguments() -> Parser:
    parser = RunParser(_from_run, description=__doc__)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    add_output_argument(parser)
    return parser


def _from_run(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    found = evaluation_of(run)
    if args.model in (None, found["model"]):
        return found | {"output": str(run.result_file(DENSE))}
    if Path(args.model).resolve() == run.recovered_folder.resolve():
        return found | {"output": str(run.result_file(RECOVERED))}
    return found


@command(arguments)
def main(args: argparse.Namespace) -> None:
    if done_already(args, f"perplexity of {args.model}", decisive_of(args)):
        return
    windows = windows_of(args, evaluating=True)
    model = load(args, evaluating=True)
    pattern, shares = sparse_blocks(model)
    report_sparsity(pattern, shares)
    results = evaluate(model, windows, args)
    found = {"perplexity": as_record(results), f"blocks_{pattern.n}{pattern.m}": shares}
    write_result(model, args, **found, measured=decisive_of(args))
    print_json({"model": args.model, **{text: round(r.perplexity, 4) for text, r in results.items()}})


def sparse_blocks(model: PreTrainedModel) -> tuple[Pattern, dict[str, float]]:
    """A model's pattern, and the share of blocks that have it: of every layer kind, and over 'all'.

    Nothing has a share where there are no such blocks.
    """
    pattern = noted_pattern(noted_of(model.config._name_or_path, commit_of(model))) or TWO_OF_FOUR
    if not pattern.is_nm:  # it has no blocks of one kind
        return pattern, {}
    try:
        coded = getattr(model, "hf_quantizer", None) is not None  # its weights are no numbers to count zeros of
        targets = [] if coded else find_prunable(model, multiple=1)
    except UsageError:  # nothing to prune; its perplexity can be measured all the same
        return pattern, {}
    blocks = [t for t in targets if t.weight.shape[t.in_dim] % pattern.m == 0]
    sparsity = sparsity_by_kind({t.name: t.weight for t in blocks}, blocks, pattern.m) if blocks else {}
    return pattern, {kind: sum(row[pattern.m - pattern.n :]) for kind, row in sparsity.items()}


def report_sparsity(pattern: Pattern, shares: dict[str, float]) -> None:
    """Say in one line how sparse the model is, and by layer kind where the kinds differ."""
    if not shares:
        return
    print(f"{pattern} blocks: {shares['all']:.2%} of the prunable weights")
    if max(shares.values()) - min(shares.values()) > 0.005:
        for kind, share in shares.items():
            print(f"  {kind}: {share:.2%}")
