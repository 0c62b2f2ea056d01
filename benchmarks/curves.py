"""Perplexity against the amount of calibration text, from files that quality.py wrote. Nothing is measured.

    python benchmarks/curves.py            the picture of BENCHMARKS.md
    python benchmarks/curves.py --files mine.json --rows default wanda --output mine.png

A line joins the rows that differ in the number of windows and the device only. Points are means over seeds, bars their
standard deviation. Rows with one amount of text have no line.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS
from matplotlib.ticker import NullFormatter, ScalarFormatter
from quality import LATER

from proxsparse.record import atomic_path, read_json

NAMES = ("budget50", "quality", "budget200", "budget400", "h100", "budgets", "layer_steps")
FILES = [RESULTS / f"{name}_smollm2-135m.json" for name in NAMES]
TITLES = {"wiki": "Wikipedia"}
CALLED = {"default": "ProxSparse", "masked": "without layer-wise steps", "maskllm": "MaskLLM", "wanda": "Wanda"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", type=Path, default=FILES)
    parser.add_argument("--rows", nargs="+", default=["default", "masked", "maskllm"])
    parser.add_argument("--output", type=Path, default=RESULTS / "curves_smollm2-135m.png")
    args = parser.parse_args(argv)
    if lacking := [str(file) for file in args.files if not file.is_file()]:
        parser.error(f"there is no file {lacking[0]}")
    rows = [row for file in args.files for row in read_json(file)["rows"] if row["row"] in args.rows]
    lines = curves(rows)
    if not lines:
        print("error: no row was measured with two amounts of text", file=sys.stderr)
        return 1
    texts = [name for name, value in rows[0].items() if isinstance(value, dict)]
    figure, axes = plt.subplots(1, len(texts), figsize=(5.5 * len(texts), 4.8), layout="constrained", squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for name, points in lines.items():
            values = {samples: [row[text]["perplexity"] for row in members] for samples, members in points.items()}
            errors = [stdev(found) if len(found) > 1 else 0.0 for found in values.values()]
            axis.errorbar(list(values), [mean(v) for v in values.values()], errors, marker="o", capsize=3, label=name)
        axis.set(
            xscale="log", yscale="log", title=TITLES.get(text, text), xlabel="calibration windows", ylabel="perplexity"
        )
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter(ScalarFormatter())
            scale.set_minor_formatter(NullFormatter())
        axis.set_xticks(sorted({samples for points in lines.values() for samples in points}))
        axis.set_yticks([tick for tick in (30, 40, 50, 60, 80, 100, 150, 200) if _inside(tick, axis.get_ylim())])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with atomic_path(args.output) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    return 0


def curves(rows: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Name of a line -> number of calibration windows -> its seeds, for lines of two points at least."""
    found: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        own = LATER | row
        parts = [CALLED.get(row["row"], row["row"]), *([own["pattern"]] if own["pattern"] != "2:4" else [])]
        parts += ["channels reordered"] if own["permute"] == "auto" else []
        parts += [f"{row['windows']} held-out windows"]
        found[", ".join(parts)][row["samples"]].append(row)
    return {name: dict(sorted(points.items())) for name, points in found.items() if len(points) > 1}


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


if __name__ == "__main__":
    sys.exit(main())
