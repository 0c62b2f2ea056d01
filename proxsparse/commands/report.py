"""The report of a run: a table, pictures, and report.html with all of it on one self-contained page.

    python eval/report.py --run runs/demo
    python eval/report.py --run runs/demo --rows dense=runs/demo/dense.json \\
        "ProxSparse 2:4=mine.json" --compare Wanda=runs/demo/wanda

Without --rows and --compare it shows what is in the folder of the run: the dense, the pruned and the recovered model,
and the baselines that were pruned for it. --rows takes results that eval/ppl.py and eval/eval_mask_ppl.py wrote with
--output. --compare takes other masks, and shows how far the run's own mask agrees with them, by layer kind.
"""

import argparse
from pathlib import Path

from rich.console import Console

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import model_of
from proxsparse.errors import RunError, UsageError
from proxsparse.evaluation.report import agreement_by_kind, draw_kinds, draw_run, perplexity_table, write_html
from proxsparse.learning.folder import DENSE, PRUNED, RECOVERED, Run
from proxsparse.mask import Mask, load_mask, mask_file
from proxsparse.model.loading import empty_model
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.record import read_record

# The settings that a reader of the report asks for first.
SHOWN = (
    "model", "dataset", "permute", "samples", "ctx_len", "batch_size", "seed", "method", "lambda_value", "target_share",
    "learning_rate", "score", "masked_forward", "distill", "relative", "lambda_ramp", "lambda2_value", "epsilon",
    "train_only_pruned", "dtype", "bf16", "optim",
)  # fmt: skip
SHOWN_OF_TEXTS = ("perplexity", "standard_error")
TITLES = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "admm": "ADMM", "maskllm": "MaskLLM", "roi": "RoI"}


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of the run")
    parser.add_argument("--rows", nargs="*", default=None, metavar="NAME=FILE", help="results to show, in this order")
    parser.add_argument("--compare", nargs="*", default=None, metavar="NAME=MASK", help="other masks of the same model")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    results, compared = named(args.rows, "rows"), named(args.compare, "compare")
    run = Run.finished(args.run)
    rows = read_rows(results_of(run) if results is None else results)
    compared = masks_of(run) if compared is None else compared
    others = {name: read_compared(run, file) for name, file in compared.items()}
    settings = run.settings
    title = (
        f"{settings['model']}: {settings['samples']} samples of {settings['ctx_len']} tokens of {settings['dataset']}"
    )
    draw_run(read_record(run.history_file, list), run.picture, title)
    kinds = run.kinds_picture if draw_layer_kinds(run, others) else None
    subtitle = f"{run.pattern} mask, method {settings['method']}, commit {run.record.get('commit') or 'unknown'}"
    shown = {name: settings[name] for name in SHOWN if settings.get(name) not in (None, "")}
    if settings["lambda_value"] != "auto":
        shown.pop("target_share", None)
    write_html(
        run.report_file, title, subtitle, rows, run.picture, kinds, shown, run.record["versions"], str(run.pattern)
    )
    if rows:
        Console().print(perplexity_table(title, rows))
    summary = {name: {t: round(f["perplexity"], 2) for t, f in found.items()} for name, found in rows.items()}
    print(f"report: {run.report_file}, picture of the run: {run.picture}")
    print_json({"run": str(run.folder), "picture": str(run.picture), **summary})


def results_of(run: Run) -> dict[str, str]:
    """Title -> file of every result in the folder of a run, that of its own mask last."""
    pattern = run.pattern
    found = {"dense": DENSE} | {f"{TITLES.get(m, m)} {pattern}": m for m in run.baselines()}
    found |= {f"ProxSparse {pattern}, weights updated": RECOVERED, f"ProxSparse {pattern}": PRUNED}
    files = {title: run.result_file(name) for title, name in found.items()}
    return {title: str(file) for title, file in files.items() if file.is_file()}


def masks_of(run: Run) -> dict[str, str]:
    """Title -> folder of every baseline's mask in the folder of a run."""
    return {TITLES.get(method, method): str(run.baseline_folder(method)) for method in run.baselines()}


def named(entries: list[str] | None, flag: str) -> dict[str, str] | None:
    """NAME=FILE entries as a dictionary; None where the flag is not given.

    Raises:
        UsageError: an entry without a name, or without a file.
    """
    if entries is None:
        return None
    found = {}
    for entry in entries:
        name, equals, file = entry.rpartition("=")
        if not equals or not Path(file).exists():
            raise UsageError(f"--{flag} takes NAME=FILE with an existing file; got {entry!r}.")
        found[name] = file
    return found


def read_compared(run: Run, file: str) -> Mask:
    """A mask of the run's model; only npz files need the model, for the shapes of their weights."""
    path = mask_file(file)
    if path.suffix.lower() != ".npz":
        return load_mask(path)
    wanted = model_of(run)
    return load_mask(path, empty_model(wanted.pop("model"), **wanted))


def read_rows(files: dict[str, str]) -> dict[str, dict]:
    """Results by title, all of the same texts, in windows of one length.

    Raises:
        UsageError: they measure different texts, or at different context lengths.
    """
    rows = {name: _perplexities(file) for name, file in files.items()}
    for name, found in rows.items():
        first = next(iter(rows.values()))
        if set(found) != set(first):
            raise UsageError(
                f"The rows of a report must measure the same texts; {name} ({files[name]}) has {', '.join(found)}, not "
                f"{', '.join(first)}. Measure it again with the same --dataset."
            )
        for text, wanted in first.items():
            lengths = [row[text].get("ctx_len") for row in (found, first)]
            if None not in lengths and lengths[0] != lengths[1]:
                raise UsageError(
                    f"Perplexities of different context lengths can't be compared; {name} ({files[name]}) has windows "
                    f"of {lengths[0]} tokens, not {wanted['ctx_len']}. Measure it again with the same --ctx_len."
                )
    return rows


def _perplexities(file: str) -> dict[str, dict]:
    """Text -> what was measured on it, of a result's file.

    Raises:
        RunError: the file is damaged, or holds something else.
    """
    found = read_record(file, needs="perplexity")["perplexity"]
    numbers = found.values() if isinstance(found, dict) and found else [None]
    if not all(isinstance(of, dict) and isinstance(of.get(n), int | float) for of in numbers for n in SHOWN_OF_TEXTS):
        raise RunError(f"{file} is damaged: it has no perplexity and standard error for each text. Measure it again.")
    return found


def draw_layer_kinds(run: Run, others: dict[str, Mask]) -> bool:
    """Draw what differs between layer kinds, where there is something to draw."""
    # Learned weights move towards 2:4 only, so zeros of other patterns are none.
    counted = run.pattern == TWO_OF_FOUR and run.blocks_file.is_file()
    zeros = read_record(run.blocks_file, needs="zeros")["zeros"] if counted else {}
    agreement = {}
    own = load_mask(run.mask_file) if others else Mask({})
    ours = {(weight, kept.shape) for weight, kept in own.tensors.items()}
    for name, other in others.items():
        if ours.isdisjoint((weight, kept.shape) for weight, kept in other.tensors.items()):
            raise UsageError(f"The mask {name} is for a model with other weights.", "compare")
        if other.order == own.order:
            agreement[name] = agreement_by_kind(own, other)
        else:  # entry by entry they say nothing of each other
            print(f"note: {name} is not compared by layer kind: its channels stand in another order")
    if not zeros and not agreement:
        return False
    sparse = {kind: sum(shares[2:]) for kind, shares in zeros.items()}
    draw_kinds(sparse, agreement, run.kinds_picture)
    return True
