"""Tables and pictures of a run."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from proxsparse.record import atomic_path

BLUE, RED, GREEN = "#3b6fb6", "#c0504d", "#5a9e6f"


def perplexity_table(title: str, rows: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Table of perplexities: one row a model, one column a text.

    Args:
        rows: model -> text -> fields of ``proxsparse.perplexity.Perplexity``.
    """
    texts = list(next(iter(rows.values())))
    table = Table(title=title)
    table.add_column("weights")
    for text in texts:
        table.add_column(f"{text} perplexity", justify="right")
    for name, found in rows.items():
        cells = [f"{found[t]['perplexity']:.2f} +- {found[t]['standard_error']:.2f}" for t in texts]
        table.add_row(name, *cells)
    return table


def draw_run(history: list[dict[str, Any]], path: Path | str, title: str) -> None:
    """Picture of a run: loss, share of 2:4 blocks and mask churn over steps.

    Args:
        history: the Trainer's log history.
        path: of the PNG, written atomically.
    """
    logs = [entry for entry in history if "share_24" in entry]
    steps = [entry["step"] for entry in logs]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    figure.suptitle(title)
    kind = "kl" if logs and "kl" in logs[0] else "lm_loss"
    label = "KL to the dense model (nats)" if kind == "kl" else "language-model loss (nats)"
    losses = [float(entry.get(kind, entry.get("loss", 0.0))) for entry in logs]
    axes[0].plot(steps, losses, color=BLUE, alpha=0.35)
    axes[0].plot(steps, _smooth(losses), color=BLUE)
    axes[0].set(title=label, ylim=(0, None))
    axes[1].plot(steps, [100 * entry["share_24"] for entry in logs], color=GREEN)
    axes[1].set(title="blocks already 2:4 (%)", ylim=(0, 100))
    axes[2].plot(steps[1:], [100 * entry["mask_churn"] for entry in logs[1:]], color=RED)
    axes[2].set(title="mask entries changed since the last log (%)", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    plt.close(figure)


def _smooth(values: list[float], weight: float = 0.7) -> list[float]:
    """Exponential moving average."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else weight * smoothed[-1] + (1 - weight) * value)
    return smoothed


def draw_path(lams: list[float], curves: list[list[float]], block: list[float], path: Path | str) -> None:
    """Picture of one block under the operator, over lambda.

    Args:
        curves: for each of the four weights, its value at every lambda.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for curve, start in zip(curves, block, strict=True):
        axis.plot(lams, curve, label=f"w = {start:g}", linewidth=2)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="lambda", ylabel="weight after the operator", title="one block of four under the 2:4 operator")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    with atomic_path(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    plt.close(figure)
