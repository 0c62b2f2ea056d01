"""One table and one picture of a run.

    python eval/report.py --run runs/demo --rows dense=runs/demo/dense.json "ProxSparse 2:4=runs/demo/proxsparse.json"

The rows are results that eval/ppl.py and eval/eval_mask_ppl.py wrote with --output.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from proxsparse.commands.common import Parser, existing_folder, print_json
from proxsparse.errors import UsageError, command
from proxsparse.record import read_json
from proxsparse.report import draw_run, perplexity_table


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="folder of the run")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME=FILE", help="results to tabulate, in order")
    args = parser.parse_args(argv)
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
    settings = read_json(run / "run.json")["settings"]
    title = (
        f"{settings['model']}: {settings['samples']} samples of {settings['ctx_len']} tokens of {settings['dataset']}"
    )
    picture = run / "run.png"
    draw_run(read_json(run / "history.json"), picture, title)
    if rows:
        Console().print(perplexity_table(title, rows))
    summary = {name: {t: round(f["perplexity"], 2) for t, f in found.items()} for name, found in rows.items()}
    print(f"picture of the run: {picture}")
    print_json({"run": str(run), "picture": str(picture), **summary})
