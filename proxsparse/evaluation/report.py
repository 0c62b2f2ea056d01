"""Tables, pictures and the one-page report of a run."""

import base64
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from proxsparse.evaluation.zero_shot import accuracy
from proxsparse.mask import Mask
from proxsparse.model.prunable import layer_kind
from proxsparse.record import atomic_path

BLUE, RED, GREEN = "#3b6fb6", "#c0504d", "#5a9e6f"


def perplexity_table(title: str, rows: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Table of perplexities: one row per model, one column per text.

    Args:
        rows: model -> text -> fields of ``proxsparse.evaluation.perplexity.Perplexity``.
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


def accuracy_table(results: dict[str, dict[str, float]]) -> Table:
    """Table of zero-shot accuracies and their mean.

    Args:
        results: the result of ``proxsparse.evaluation.zero_shot.zero_shot``.
    """
    table = Table(title="zero-shot accuracy")
    for head in ("task", "accuracy", "standard error"):
        table.add_column(head, justify="left" if head == "task" else "right")
    for task, found in results.items():
        error = found.get("acc_stderr")
        table.add_row(task, f"{accuracy(found):.2%}", "" if error is None else f"{error:.2%}")
    mean = sum(map(accuracy, results.values())) / max(1, len(results))
    table.add_row("mean", f"{mean:.2%}", "", style="bold")
    return table


def draw_run(history: list[dict[str, Any]], path: Path | str, title: str) -> None:
    """Picture of a run over its steps: loss, mask churn, and for 2:4 the share of such blocks (all, and by layer).

    Args:
        history: the Trainer's log history.
        path: the PNG to write, atomically.
    """
    logs = [entry for entry in history if "mask_churn" in entry]
    steps = [entry["step"] for entry in logs]
    reached = [(entry["step"], 100 * entry["share_24"]) for entry in logs if "share_24" in entry]
    figure, axes = plt.subplots(2 if reached else 1, 2, figsize=(11, 7 if reached else 3.8), layout="constrained")
    loss, churn, *shares = axes.flat
    figure.suptitle(title)
    kind = "kl" if logs and "kl" in logs[0] else "lm_loss"
    label = "KL to the dense model (nats)" if kind == "kl" else "language-model loss (nats)"
    losses = [float(entry.get(kind, entry.get("loss", 0.0))) for entry in logs]
    loss.plot(steps, losses, color=BLUE, alpha=0.35)
    loss.plot(steps, _smooth(losses), color=BLUE)
    errors = [(entry["step"], float(entry["layer_error"])) for entry in logs if "layer_error" in entry]
    if errors:
        loss.plot(*zip(*errors, strict=True), color=GREEN, label="relative error of the layers' own outputs")
        loss.legend(frameon=False)
    # A few large errors at the beginning would flatten everything else.
    highest = 1.1 * max(max(losses, default=0.0), 2 * median(error for _, error in errors)) if errors else None
    loss.set(title=label, ylim=(0, highest))
    churn.plot(steps[1:], [100 * entry["mask_churn"] for entry in logs[1:]], color=RED)
    churn.set(title="mask entries changed since the last log (%)", ylim=(0, None))
    if reached:
        shares[0].plot(*zip(*reached, strict=True), color=GREEN)
        shares[0].set(title="learned blocks already 2:4 (%)", ylim=(0, 100))
    for axis in (loss, churn, *shares[:1]):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    layers = [(e["step"], e["share_24_by_layer"]) for e in logs if "share_24_by_layer" in e]
    if layers:
        by_layer = np.array([[np.nan if s is None else 100 * s for s in found] for _, found in layers]).T
        edges = [layers[0][0] - 1, *(step for step, _ in layers)]
        image = shares[1].pcolormesh(edges, np.arange(len(by_layer) + 1) - 0.5, by_layer, cmap="viridis", vmin=0)
        shares[1].set(title="learned blocks already 2:4, by layer (%)", ylabel="layer")
        shares[1].invert_yaxis()
        shares[1].yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=shares[1])
    for axis in axes.flat:
        axis.set_xlabel("step")
    with atomic_path(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    plt.close(figure)


def draw_kinds(sparse: dict[str, float], agreement: dict[str, dict[str, float]], path: Path | str) -> None:
    """Picture of what differs between layer kinds.

    Args:
        sparse: layer kind -> share of the learned weights' blocks that are 2:4; empty: not shown.
        agreement: name of another mask -> layer kind -> share of entries that both masks decide alike.
    """
    kinds = [kind for kind in sparse or next(iter(agreement.values())) if kind != "all"]
    panels = [("learned blocks that are 2:4 (%)", {"": sparse})] if sparse else []
    panels += [("mask entries alike (%)", agreement)] if agreement else []
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 3.8), layout="constrained", squeeze=False)
    for axis, (title, bars) in zip(axes[0], panels, strict=True):
        height = 0.8 / len(bars)
        for i, (name, values) in enumerate(bars.items()):
            places = [k + (i - (len(bars) - 1) / 2) * height for k in range(len(kinds))]
            color = GREEN if not name else (BLUE, RED)[i % 2]
            axis.barh(places, [100 * values[kind] for kind in kinds], height, label=name, color=color)
        axis.set(title=title, xlim=(0, 100), yticks=range(len(kinds)), yticklabels=kinds)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        if any(bars):
            axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(bars))
    with atomic_path(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")
    plt.close(figure)


def agreement_by_kind(ours: Mask, other: Mask) -> dict[str, float]:
    """Share of mask entries that two masks of one model decide alike, by layer kind and over 'all'.

    Two random 2:4 masks agree on a half.
    """
    alike: dict[str, list[int]] = {}
    for name in ours.tensors.keys() & other.tensors.keys():
        if ours.tensors[name].shape != other.tensors[name].shape:
            continue
        same = ours.tensors[name] == other.tensors[name]
        for kind in (layer_kind(name), "all"):
            count = alike.setdefault(kind, [0, 0])
            count[0] += int(same.sum())
            count[1] += same.numel()
    return {kind: same / total for kind, (same, total) in sorted(alike.items())}


def write_html(
    path: Path | str,
    title: str,
    subtitle: str,
    rows: dict[str, dict[str, dict[str, float]]],
    run_picture: Path,
    kinds_picture: Path | None,
    settings: dict[str, Any],
    versions: dict[str, str],
    pattern: str = "2:4",
) -> None:
    """One self-contained page: it loads nothing from a network.

    Args:
        rows: model -> text -> fields of ``proxsparse.evaluation.perplexity.Perplexity``; the last one is the run's own.
    """
    template = files("proxsparse.evaluation").joinpath("templates/report.html").read_text(encoding="utf-8")
    texts = list(next(iter(rows.values()))) if rows else []
    cells = [
        (name, [f"{found[t]['perplexity']:.2f} +- {found[t]['standard_error']:.2f}" for t in texts])
        for name, found in rows.items()
    ]
    page = jinja2.Environment(autoescape=True).from_string(template).render(
        title=title, subtitle=subtitle, texts=texts, rows=cells, run_picture=_encoded(run_picture),
        kinds_picture=kinds_picture and _encoded(kinds_picture), masked=settings.get("masked_forward"),
        settings=list(settings.items()), versions=list(versions.items()),
        pattern=pattern,
    )  # fmt: skip
    with atomic_path(path) as scratch:
        scratch.write_text(page, encoding="utf-8")


def _encoded(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode("ascii")


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
