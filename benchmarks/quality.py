"""Quality of masks: dense, every baseline and ProxSparse on the same calibration text, in one table.

    python benchmarks/quality.py                                             the table of BENCHMARKS.md
    python benchmarks/quality.py --rows dense wanda default --samples 50     some rows, another budget
    python benchmarks/quality.py --rows masked masked-lr2 --seeds 0 1 2      variants, several seeds
    python benchmarks/quality.py --rows dense wanda default --pattern 4:8 --permute auto --device cuda
    python benchmarks/quality.py --rows paper-tuning                         every variant of the paper's method

Each row runs in its own process, so that its peak memory can be measured. It is written to the JSON file when it is
done, and the same command again runs only what is missing.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import print_table
from transformers import set_seed

from proxsparse.baselines import METHODS, Pattern, maskllm, roi
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.baselines.sampling import one_shot_prior
from proxsparse.commands.flags import LearnParser
from proxsparse.evaluation.last_word import last_word_accuracy
from proxsparse.evaluation.perplexity import perplexity
from proxsparse.learning.learn import learn
from proxsparse.mask import apply_mask
from proxsparse.model.channels import PERMUTE, PERMUTE_HELP
from proxsparse.model.loading import EMBEDDED, load_model, load_tokenizer
from proxsparse.model.ordering import order_channels
from proxsparse.record import atomic_path, git_commit, read_json, versions, write_json
from proxsparse.text import calibration_windows, evaluation_windows

PAPER, TUNING = "paper-relative", "paper-tuning"
# Variants of the learner: name -> flags of end-to-end/main.py.
# What the default was before it had layer-wise steps; rows whose names begin with "masked" are of this time.
BEFORE = "--method masked --layer_rate 0 --learning_rate 0.01"
LEARNED: dict[str, str] = {
    "default": "--method masked",
    "default-single-layers": "--layer_span 1",
    "default-layers-always": "--layer_span 1 --layer_steps 1000000",
    "default-layers-200": "--layer_steps 200",
    "default-layers-400": "--layer_steps 400",
    "masked": BEFORE,
    "paper": "--method paper --lambda_value 0.25 --learning_rate 1e-4",
    # One change to it each.
    "masked-lr/4": f"{BEFORE} --learning_rate 0.0025",
    "masked-lr/2": f"{BEFORE} --learning_rate 0.005",
    "masked-lr2": f"{BEFORE} --learning_rate 0.02",
    "masked-lr4": f"{BEFORE} --learning_rate 0.04",
    "masked-noprox": f"{BEFORE} --lambda_value 0",
    "masked-prox5": f"{BEFORE} --lambda_value 0.01",
    "masked-prox25": f"{BEFORE} --lambda_value 0.05",
    "masked-auto": f"{BEFORE} --lambda_value auto",
    "masked-weight": f"{BEFORE} --score weight",
    "masked-lm": f"{BEFORE} --distill 0",
    "masked-half": f"{BEFORE} --distill 0.5",
    "masked-adamw": f"{BEFORE} --optim adamw_torch_fused",
    "masked-adamw-nomomentum": f"{BEFORE} --optim adamw_torch_fused --adam_beta1 0",
    "masked-adamw-beta2-99": f"{BEFORE} --optim adamw_torch_fused --adam_beta2 0.99",
    "masked-t2": f"{BEFORE} --temperature 2",
    "masked-t0.7": f"{BEFORE} --temperature 0.7",
    # Steps from the paper's method towards the default.
    "paper-activation": "--method paper --score activation --relative true --lambda_value 0.02 --learning_rate 5e-4 "
    "--lambda_ramp 0.5 --train_only_pruned true",
    "paper-activation-distill": "--method paper --score activation --relative true --lambda_value 0.02 "
    "--learning_rate 5e-4 --lambda_ramp 0.5 --train_only_pruned true --distill 1",
    # The paper's method with relative settings: small steps, the default, then one change in it each.
    PAPER: "--method paper --relative true --lambda_value 0.02 --learning_rate 5e-4 --lambda_ramp 0.5",
    f"{PAPER}-default": "--method paper",
    **{f"{PAPER}-lr{rate}": f"--method paper --relative true --learning_rate {rate}" for rate in (0.0025, 0.01)},
    **{f"{PAPER}-lambda{value}": f"--method paper --relative true --lambda_value {value}" for value in (0.01, 0.05)},
    **{f"{PAPER}-ramp{share}": f"--method paper --lambda_ramp {share}" for share in (0, 1)},
    **{
        f"{PAPER}-lambda2-{value}": f"--method paper --project_lambda2 1 --lambda2_value {value} --epsilon 0.5"
        for value in (1e-4, 1e-3, 1e-2)
    },
    f"{PAPER}-pruned-only": "--method paper --train_only_pruned true",
    "paper-lambda2": "--method paper --lambda_value 0.25 --learning_rate 1e-4 --project_lambda2 1 --lambda2_value 0.25 "
    "--epsilon 0.5",
}
# Variants of the default that learn from another text; each is measured on the same held-out texts as the others.
TEXT_OF: dict[str, str] = {
    "masked-self": "self",
    "masked-wiki3-self1": "wiki:3,self:1",
    "masked-wiki1-self1": "wiki:1,self:1",
    "maskllm-self": "self",
}
LEARNED |= {row: BEFORE for row in TEXT_OF if row.startswith("masked")}
# One-shot baselines: name -> (method, options of prune_layerwise).
BASELINES: dict[str, tuple[str, dict]] = {
    "magnitude": ("magnitude", {"update": False}),
    "wanda": ("wanda", {"update": False}),
    "wanda-dense": ("wanda", {"update": False, "dense_inputs": True}),
    "sparsegpt-mask": ("sparsegpt", {"update": False}),
    "admm-mask": ("admm", {"update": False}),
    "sparsegpt": ("sparsegpt", {"update": True}),
    "admm": ("admm", {"update": True}),
}
# MaskLLM: name -> changes to its settings, which are those of its paper.
MASKLLM: dict[str, dict] = {
    "maskllm": {},
    "maskllm-lr/2": {"learning_rate": 2.5e-4},
    "maskllm-lr2": {"learning_rate": 1e-3},
    "maskllm-lr10": {"learning_rate": 5e-3},
    "maskllm-self": {},
    "maskllm-exp": {"cooling": "exponential"},
    "maskllm-exp-lr2": {"cooling": "exponential", "learning_rate": 1e-3},
    "maskllm-exp-lr4": {"cooling": "exponential", "learning_rate": 2e-3},
    "maskllm-exp-early": {"cooling": "exponential", "cooled_by": 0.75},
    "maskllm-exp-cold": {"cooling": "exponential", "tau": (1.0, 0.05)},
    "maskllm-exp-warm": {"cooling": "exponential", "tau": (4.0, 0.2)},
    "maskllm-exp-warm-lr2": {"cooling": "exponential", "tau": (4.0, 0.2), "learning_rate": 1e-3},
}
# RoI: name -> changes to its settings.
ROI: dict[str, dict] = {
    "roi": {},
    "roi-lr/2": {"learning_rate": 5e-4},
    "roi-lr2": {"learning_rate": 2e-3},
    "roi-lr4": {"learning_rate": 4e-3},
    "roi-lr8": {"learning_rate": 8e-3},
    "roi-noprior": {"prior": None},
    "roi-noprior-lr4": {"prior": None, "learning_rate": 4e-3},
    "roi-linear": {"cooling": "linear"},
    "roi-late": {"cooled_by": 1.0},
    "roi-hot": {"tau": (4.0, 0.05)},
    "roi-hot-lr2": {"tau": (4.0, 0.05), "learning_rate": 2e-3},
    "roi-hot-lr4": {"tau": (4.0, 0.05), "learning_rate": 4e-3},
    "roi-kappa1": {"kappa": (1.0, 500.0)},
    "roi-kappa1-lr4": {"kappa": (1.0, 500.0), "learning_rate": 4e-3},
    "roi-weak": {"prior_strength": 3.0},
    "roi-cold": {"tau": (1.0, 0.05)},
    "roi-clipped": {"max_grad_norm": 1.0},
    # What is the default now, under the name that it was measured by.
    "roi-strong-unclipped": {"prior_strength": 6.0, "tau": (1.0, 0.2), "max_grad_norm": 0.0},
}
# What rows are told apart by since there is a choice, and what older ones were measured with.
LATER = {"pattern": "2:4", "permute": "none", "device": "cpu", "split": "auto", "bf16": "false"}
DEFAULT_ROWS = ["dense", *BASELINES, "maskllm", "paper", "default"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--text", default="wiki", help="calibration text")
    parser.add_argument("--eval", nargs="+", default=["wiki", "news"], help="held-out texts")
    parser.add_argument(
        "--rows", nargs="+", default=DEFAULT_ROWS, choices=["dense", *BASELINES, *MASKLLM, *ROI, *LEARNED, TUNING]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=None, help="evaluation windows per text; default: all")
    parser.add_argument(
        "--bf16", default="false", choices=["true", "false"], help="bfloat16 autocast while calibrating"
    )
    parser.add_argument(
        "--split", default="auto", choices=["auto", "heldout"], help="auto: held-out only of the calibration text"
    )
    parser.add_argument("--pattern", default="2:4", help="N:M of every row but dense; default: %(default)s")
    parser.add_argument("--permute", default="none", choices=PERMUTE, help=f"{PERMUTE_HELP}; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--output", default="benchmarks/results/quality_smollm2-135m.json")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args, args.one, args.seeds[0])))
        return 0
    output = Path(args.output)
    record = read_json(output) if output.is_file() else {"rows": []}
    variants = [name for name in LEARNED if name.startswith(PAPER)]
    rows = [name for row in args.rows for name in (variants if row == TUNING else [row])]
    for row in rows:
        for seed in args.seeds:
            key = {"row": row, "seed": seed, "samples": args.samples, "ctx_len": args.ctx_len, "windows": args.windows}
            key |= {name: getattr(args, name) for name in LATER}
            if any(all((LATER | done)[k] == v for k, v in key.items()) for done in record["rows"]):
                continue
            print(f"... {row}, seed {seed}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--one", row, "--seeds", str(seed), "--model", args.model]
            command += ["--text", args.text, "--samples", str(args.samples), "--ctx_len", str(args.ctx_len)]
            command += ["--bf16", args.bf16, "--pattern", args.pattern, "--permute", args.permute]
            command += ["--device", args.device, "--split", args.split, "--eval", *args.eval]
            command += ["--windows", str(args.windows)] if args.windows else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
                return 1
            record["rows"].append(key | json.loads(done.stdout.splitlines()[-1]))
            record |= {"model": args.model, "text": args.text, "versions": versions()}
            write_json(output, record)
            print(summary(record["rows"][-1]), file=sys.stderr, flush=True)
    show(record)
    draw(record, output.with_suffix(".png"))
    return 0


def measure(args: argparse.Namespace, row: str, seed: int) -> dict:
    """One row: prune or learn, then evaluate on the held-out texts."""
    tokenizer = load_tokenizer(args.model)
    start = time.perf_counter()
    updated, tokens, pattern = False, args.samples * args.ctx_len, Pattern.parse(args.pattern)
    options, text_of = {"device": args.device}, TEXT_OF.get(row, args.text)
    if row in LEARNED:
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--model {args.model} --dataset {args.text} --ctx_len {args.ctx_len} --samples {args.samples}"
            flags += f" --seed {seed} --output_dir {folder} --save_strategy no --bf16 {args.bf16}"
            flags += f" --pattern {pattern} --permute {args.permute} {LEARNED[row]}"
            flags += " --device cpu" if args.device == "cpu" else ""
            config = LearnParser().parse(flags.split()).config
            set_seed(seed)
            learned = load_model(args.model, **options)
            windows = calibration_windows(text_of, tokenizer, args.ctx_len, args.samples, seed, learned)
            mask, history = learn(learned, tokenizer, windows, config, {"model": args.model})
            extra = {"share_24": history[-2].get("share_24")}
            del learned
        model = load_model(args.model, dtype=torch.float32, **options)
        apply_mask(model, mask)
    elif row == "dense":
        model, extra, tokens = load_model(args.model, dtype=torch.float32, **options), {}, 0
    else:
        model, extra, bf16 = load_model(args.model, dtype=torch.float32, **options), {}, args.bf16 == "true"
        windows = calibration_windows(text_of, tokenizer, args.ctx_len, args.samples, seed, model)
        if args.permute == "auto":
            order_channels(model, windows if row != "magnitude" else None, pattern=pattern)
        if row in MASKLLM or row in ROI:
            prior = one_shot_prior(model, windows, METHODS["sparsegpt"](), pattern, bf16=bf16)
            with tempfile.TemporaryDirectory() as folder:
                settings = {"seed": seed, "bf16": bf16, "save_strategy": "no", "prior": prior} | (MASKLLM | ROI)[row]
                settings |= {"pattern": pattern}
                learner = roi if row in ROI else maskllm
                apply_mask(model, learner.learn_mask(model, tokenizer, windows, folder, **settings))
        else:
            name, how = BASELINES[row]
            updated = how["update"]
            prune_layerwise(model, windows, METHODS[name](), pattern, bf16=bf16, **how)
            tokens = 0 if name == "magnitude" else tokens
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        extra |= {"gpu": torch.cuda.get_device_name()}
    result = {
        "updated": updated,
        "tokens": tokens,
        "seconds": seconds,
        "peak_gib": peak,
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
    } | extra
    dense = load_model(args.model, dtype=torch.float32, **options)
    for text in args.eval:
        split = "heldout" if text == args.text or args.split == "heldout" else "all"
        windows = evaluation_windows(text, tokenizer, args.ctx_len, split, args.windows)
        found = perplexity(model, windows)
        accuracy, words = last_word_accuracy(model, tokenizer, windows)
        agreement, divergence = compare(model, dense, windows[:: max(1, len(windows) // 8)])
        result[text] = {
            "perplexity": found.perplexity,
            "standard_error": found.standard_error,
            "windows": found.windows,
            "top1": agreement,
            "kl": divergence,
            "last_word": accuracy,
            "last_words": words,
        }
    return result


@torch.no_grad()
def compare(model, dense, windows) -> tuple[float, float]:
    """Share of positions with the same most likely token as the dense model, and KL(dense || model) in nats."""
    same, divergence, count = 0, 0.0, 0
    for window in windows.to(model.device):
        ours = model(input_ids=window[None]).logits[0].float().log_softmax(-1)
        theirs = dense(input_ids=window[None]).logits[0].float().log_softmax(-1)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += (theirs.exp() * (theirs - ours)).sum().item()
        count += len(window)
    return same / count, divergence / count


def label(row: dict) -> str:
    """Name of a row, and what it was measured with where that is not what older rows have."""
    return ", ".join([row["row"], *(str(row[name]) for name, value in LATER.items() if row.get(name, value) != value)])


def summary(row: dict) -> str:
    texts = {k: v for k, v in row.items() if isinstance(v, dict)}
    return (
        f"{label(row)}: "
        + ", ".join(f"{t} {v['perplexity']:.2f}" for t, v in texts.items())
        + f", {row['seconds']:.0f} s"
    )


def show(record: dict) -> None:
    """Print the table, mean over seeds."""
    rows = record["rows"]
    texts = [k for k, v in rows[0].items() if isinstance(v, dict)]
    heads = ["method", "weights updated", "tokens", "seeds", "seconds", "peak GiB"]
    heads += [head for text in texts for head in (f"{text} perplexity", "top-1", "KL")]
    table = []
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((label(row), row["samples"], row["ctx_len"], row["windows"]), []).append(row)
    for (name, *_), members in groups.items():
        cells = [name, "yes" if members[0]["updated"] else "no", f"{members[0]['tokens']:,}", str(len(members))]
        cells += [f"{mean(m['seconds'] for m in members):.0f}", f"{mean(m['peak_gib'] for m in members):.1f}"]
        for text in texts:
            values = [m[text]["perplexity"] for m in members]
            spread = f" +- {stdev(values):.2f}" if len(values) > 1 else ""
            cells += [f"{mean(values):.2f}{spread}", f"{mean(m[text]['top1'] for m in members):.1%}"]
            cells += [f"{mean(m[text]['kl'] for m in members):.3f}"]
        table.append(cells)
    print_table(f"{record['model']}, 2:4 unless said, calibrated on {record['text']}", heads, table)


def draw(record: dict, path: Path) -> None:
    """Picture of the table: perplexity by method, a logarithmic axis, one bar per text."""
    texts = [k for k, v in record["rows"][0].items() if isinstance(v, dict)]
    groups: dict[str, list[dict]] = {}
    several = len({row["samples"] for row in record["rows"]}) > 1
    for row in record["rows"]:
        budget = f", {row['samples']} samples" if several else ""
        groups.setdefault(f"{label(row)}{', weights updated' if row['updated'] else ''}{budget}", []).append(row)
    order = sorted(groups, key=lambda name: mean(m[texts[0]]["perplexity"] for m in groups[name]))
    figure, axis = plt.subplots(figsize=(9, 0.6 + 0.42 * len(order)), layout="constrained")
    height = 0.8 / len(texts)
    for i, text in enumerate(texts):
        values = [mean(m[text]["perplexity"] for m in groups[name]) for name in order]
        bars = axis.barh(
            [k + (i - (len(texts) - 1) / 2) * height for k in range(len(order))], values, height, label=text
        )
        axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    axis.set(xscale="log", xlabel="perplexity", yticks=range(len(order)), yticklabels=order)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
