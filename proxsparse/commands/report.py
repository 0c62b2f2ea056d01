"""The report of a run: a table, pictures, and report.html with all of it on one self-contained page.

    python eval/report.py --run runs/demo --rows dense=runs/demo/dense.json "ProxSparse 2:4=runs/demo/proxsparse.json"
    python eval/report.py --run runs/demo --compare Wanda=runs/demo/wanda magnitude=runs/demo/magnitude

The rows are results that eval/ppl.py and eval/eval_mask_ppl.py wrote with --output; --compare takes other masks, and
shows how far the run's own agrees with them, by layer kind.
"""

import argparse
from pathlib import Path

from rich.console import Console

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    existing_folder,
)
from proxsparse.errors import UsageError
from proxsparse.evaluation.report import agreement_by_kind, draw_kinds, draw_run, perplexity_table, write_html
from proxsparse.mask import load_mask
from proxsparse.record import read_json

# The settings that a reader of the report asks for first.
SHOWN = (
    "model", "dataset", "samples", "ctx_len", "batch_size", "seed", "method", "lambda_value", "target_share",
    "learning_rate", "score", "masked_forward", "distill", "relative", "lambda_ramp", "lambda2_value", "epsilon",
    "train_only_pruned", "dtype", "bf16", "optim",
)  # fmt: skip


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of the run")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME=FILE", help="results to tabulate, in order")
    parser.add_argument("--compare", nargs="*", default=[], metavar="NAME=MASK", help="other masks of the same model")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    run = existing_folder(args.run, "run")
    rows = {}
    for row in args.rows:
        name, equals, file = row.rpartition("=")
        if not equals or not Path(file).is_file():
            raise UsageError(f"--rows takes NAME=FILE with an existing file; got {row!r}.")
        rows[name] = read_json(file)["perplexity"]
        first = next(iter(rows.values()))
        if set(rows[name]) != set(first):
            raise UsageError(
                f"--rows must measure the same texts; {name} has {', '.join(rows[name])}, not {', '.join(first)}."
            )
    others = {}
    for entry in args.compare:
        name, equals, file = entry.rpartition("=")
        if not equals:
            raise UsageError(f"--compare takes NAME=MASK; got {entry!r}.")
        others[name] = load_mask(file)
    if not (run / "run.json").is_file() or not (run / "history.json").is_file():
        raise UsageError(f"--run: {run} holds no finished run (run.json and history.json are written by learning).")
    record = read_json(run / "run.json")
    settings = record["settings"]
    title = (
        f"{settings['model']}: {settings['samples']} samples of {settings['ctx_len']} tokens of {settings['dataset']}"
    )
    picture = run / "run.png"
    draw_run(read_json(run / "history.json"), picture, title)
    kinds = None
    zeros = read_json(run / "blocks.json")["zeros"] if (run / "blocks.json").is_file() else {}
    if zeros or others:
        kinds = run / "kinds.png"
        own = load_mask(run) if others else None
        agreement = {name: agreement_by_kind(own, other) for name, other in others.items()} if own else {}
        draw_kinds({kind: sum(shares[2:]) for kind, shares in zeros.items()}, agreement, kinds)
    subtitle = f"2:4 mask, method {settings['method']}, commit {record.get('commit') or 'unknown'}"
    shown = {name: settings[name] for name in SHOWN if settings.get(name) not in (None, "")}
    if settings["lambda_value"] != "auto":
        shown.pop("target_share", None)
    write_html(run / "report.html", title, subtitle, rows, picture, kinds, shown, record["versions"])
    if rows:
        Console().print(perplexity_table(title, rows))
    summary = {name: {t: round(f["perplexity"], 2) for t, f in found.items()} for name, found in rows.items()}
    print(f"report: {run / 'report.html'}, picture of the run: {picture}")
    print_json({"run": str(run), "picture": str(picture), **summary})
