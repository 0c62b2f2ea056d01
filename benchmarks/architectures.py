"""Every decoder of transformers through the commands: a tiny model of each is pruned, learned, evaluated and exported.

    python benchmarks/architectures.py                        all that are not recorded yet
    python benchmarks/architectures.py --again --only llama mamba
    python benchmarks/architectures.py --sample 0.1 --seed 3  a random tenth

A row holds if every command ends with its result. A refusal is one sentence of ours; anything else is a fault. Each
architecture runs in a process of its own, with a time limit. Writes benchmarks/results/architectures.json after every
row, and docs/architectures.md from it at the end (``--report`` writes the page only). Needs fork: Linux or macOS.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import transformers
from tiny_models import KINDS, byte_tokenizer, tiny_model

from proxsparse.__main__ import main as console
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import coverage, find_prunable
from proxsparse.record import read_json, versions, write_json

STEPS = ("plan", "prune", "learn", "eval", "export", "check", "bench")
# What every child would import for itself: seconds each.
HEAVY = (
    "torch._dynamo",
    "trl.trainer.sft_trainer",
    "matplotlib.pyplot",
    "proxsparse.learning.trainer",
    "proxsparse.operator.kernels.cpu",
    *(f"proxsparse.commands.{step}" for step in STEPS),
)

RESULTS = Path("benchmarks/results/architectures.json")
PAGE = Path("docs/architectures.md")
LIMIT = 240  # seconds of computing per architecture; five times as long by the clock, on a busy machine
CONTEXT = 128
TEXT = (
    "The quick brown fox jumps over the lazy dog. A journey of a thousand miles begins with a single step. "
    "Some weights matter more than others, and which ones they are depends on what flows through them. "
)
OURS = re.compile(r"proxsparse\.errors\.(UsageError|RunError): ")


def commands(base: str, text: str, out: Path) -> dict[str, list[str]]:
    """Name of a step -> its command line."""
    data = ["--dataset", text, "--ctx_len", str(CONTEXT)]
    mask = str(out / "magnitude")
    learning = ["--samples", "2", "--max_steps", "2", "--use_cpu", "true", "--bf16", "false", "--save_strategy", "no"]
    return {
        "plan": ["plan", "--model", base, "--ctx_len", str(CONTEXT)],
        "prune": ["prune", "--model", base, "--prune_method", "magnitude", "--save", mask],
        "prune with wanda": [
            "prune",
            "--model",
            base,
            "--prune_method",
            "wanda",
            "--nsamples",
            "2",
            *data,
            "--save",
            str(out / "w"),
        ],
        "learn": ["learn", "--model", base, *data, *learning, "--output_dir", str(out / "run")],
        "eval": ["eval", "--model", base, "--max_windows", "2", *data],
        "export": ["export", "--model", base, "--mask", mask, "--to", str(out / "pruned")],
        "check": ["check", "--model", str(out / "pruned"), "--base", base],
        "bench": ["bench", "--model", str(out / "pruned"), "--prompt", "16", "--tokens", "2", "--repeat", "1"],
    }


def run_kind(kind: str) -> dict:
    """Row of one architecture: outcome of every step, and what is pruned."""
    row: dict = {"kind": kind, "steps": {}}
    with tempfile.TemporaryDirectory() as name:
        base, text, out = Path(name, "base"), Path(name, "text.txt"), Path(name, "out")
        text.write_text(TEXT * 40)
        made = attempt(lambda: save_tiny(kind, base))
        if made != "holds":  # transformers itself has no model of this kind to give
            return row | {"steps": {"build": made}}
        row["coverage"] = None
        with contextlib.suppress(Exception), quiet():
            model = load_model(str(base))
            row["model"] = type(model).__name__
            survey = coverage(model, find_prunable(model))
            row |= {"coverage": str(survey), "share": survey.share, "dense": survey.dense}
        for step, line in commands(str(base), str(text), out).items():
            start = time.time()
            row["steps"][step] = attempt(lambda line=line: console([*line, "--debug"]))  # type: ignore[misc]
            if os.environ.get("TIMES"):
                print(step, round(time.time() - start, 1), flush=True)
            if step in ("prune", "export") and row["steps"][step] != "holds":
                break
    return row


def save_tiny(kind: str, folder: Path) -> int:
    model = tiny_model(kind)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return 0


@contextlib.contextmanager
def quiet():
    """Collect what is printed, on both streams."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        yield said


def attempt(work: Callable[[], int]) -> str:
    """'holds', 'refused: ...' (a sentence of ours) or 'fault: ...' (an exception of anybody else)."""
    try:
        with quiet() as said:
            code = work()
    except BaseException as error:
        return f"fault: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not code:
        return "holds"
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    sentence = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    ours = any(OURS.search(line) for line in lines) or not any("Traceback" in line for line in lines)
    return f"{'refused' if ours else 'fault'}: {sentence.removeprefix('error: ')[:500]}"


def isolated(kind: str) -> dict:
    """The row, made in a process of its own that is ended after LIMIT seconds."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "row.json")
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            signal.alarm(5 * LIMIT)
            with contextlib.suppress(BaseException):
                file.write_text(json.dumps(run_kind(kind)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if file.is_file():
            return json.loads(file.read_text())
    ended = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
    why = f"no end after {LIMIT} s" if ended else f"the process ended with {status}"
    return {"kind": kind, "steps": {"all": f"fault: {why}"}}


def outcome(row: dict) -> str:
    """The worst of a row's steps: 'fault', 'refused' or 'holds'; 'not built' where transformers gives no model."""
    if "build" in row["steps"]:
        return "not built"
    words = {step.partition(":")[0] for step in row["steps"].values()}
    return next(word for word in ("fault", "refused", "holds") if word in words)


def page(rows: dict[str, dict]) -> str:
    """docs/architectures.md."""
    counts = {
        word: sum(outcome(r) == word for r in rows.values()) for word in ("holds", "refused", "fault", "not built")
    }
    lines = [
        "# Architectures",
        "",
        f"A tiny model with random weights is made of every decoder in transformers {transformers.__version__}. These",
        "commands run on each of them, on a CPU: `plan`, `prune` (magnitude and Wanda), `learn`, `eval`, `export`,",
        "`check --base` and `bench`. The table shows whether they run and which weights they prune. It does not show",
        "how good a pruned model is. `python benchmarks/architectures.py` writes this page.",
        "",
        f"There are {len(rows)} model types. All commands work for {counts['holds']} of them. For {counts['refused']}",
        f"a command refuses with one sentence. {counts['fault']} have a fault, and {counts['not built']} could not be",
        "built.",
        "",
        "*Pruned* is the pruned share of the linear weights inside the decoder layers. It is smaller here than for",
        "real models, because routers and gates are a larger part of a tiny model.",
        "",
        "| model type | pruned | left dense | commands |",
        "|---|--:|---|---|",
    ]
    for kind, row in sorted(rows.items()):
        dense = "; ".join(
            f"{reason}: {', '.join(f'`{k}`' for k in kinds)}" for reason, kinds in row.get("dense", {}).items()
        )
        share = f"{int(1000 * row['share']) / 10:.1f} %" if row.get("share") is not None else ""
        troubles = [f"{step}: {_cell(said)}" for step, said in row["steps"].items() if said != "holds"]
        lines.append(f"| {kind} | {share} | {dense} | {'<br>'.join(troubles) or 'all'} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"/\S*/(base|out|text\.txt)", r"\1", text)  # scratch folders
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the architectures, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--again", action="store_true", help="run rows that are recorded too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="write the page of what is recorded, run nothing")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    wanted = args.only or random.Random(args.seed).sample(KINDS, max(1, round(args.sample * len(KINDS))))
    rows = {r["kind"]: r for r in read_json(args.results)["rows"]} if args.results.is_file() else {}
    for module in () if args.report else HEAVY:  # once, instead of in every child
        importlib.import_module(module)
    for kind in [] if args.report else sorted(wanted):
        if kind in rows and not args.again:
            continue
        start = time.time()
        row = isolated(kind)
        if args.results.is_file():  # another run may have written rows meanwhile
            rows = {r["kind"]: r for r in read_json(args.results)["rows"]}
        rows[kind] = row
        args.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.results, {"versions": versions(), "rows": [rows[k] for k in sorted(rows)]})
        print(f"{kind}: {outcome(row)}, {time.time() - start:.0f} s", flush=True)
        for step, said in row["steps"].items():
            if said != "holds":
                print(f"    {step}: {said[:200]}", flush=True)
    args.page.write_text(page(rows))
    return 1 if any(outcome(rows[kind]) == "fault" for kind in wanted if kind in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
