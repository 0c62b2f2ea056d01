"""Size of SmolLM2-135M in every form of ``proxsparse export``, and how long our own forms take to load.

    python benchmarks/exports.py

The mask is magnitude's, because sizes do not depend on which weights are kept. Loading ends when every weight of the
model is in memory; the best of three counts, with the files in the operating system's cache. Only other programs read
npz. It writes benchmarks/results/exports.json.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import best_seconds, print_table, write_record
from torch import nn

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.mask import apply_mask, load_mask
from proxsparse.model.loading import EMBEDDED, load_model, load_tokenizer

REPEAT = 3


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        base, mask = Path(name, "base"), Path(name, "magnitude")
        load_model(EMBEDDED, dtype=torch.float32).save_pretrained(base)
        load_tokenizer(EMBEDDED).save_pretrained(base)
        run("prune", "--model", base, "--prune_method", "magnitude", "--save", mask)
        loaders: dict[str, Callable[[Path], nn.Module] | None] = {
            "dense": lambda folder: load_model(str(folder)),
            "compact": lambda folder: proxsparse.load(str(folder)),
            "compact, sparse modules": lambda folder: proxsparse.load(str(folder), sparse=True),
            "compact int8": lambda folder: proxsparse.load(str(folder)),
            "compact int8, sparse modules": lambda folder: proxsparse.load(str(folder), sparse=True),
            "mask": partial(under_mask, base),
            "npz": None,
        }
        for form, loader in loaders.items():
            form, _, how = form.partition(", ")
            folder = Path(name, form)
            if not folder.exists():
                kind, *quantize = form.split()
                flags = ["--form", kind, *(["--quantize", *quantize] if quantize else [])]
                run("export", "--model", base, "--mask", mask, "--to", folder, *flags)
            row = {"form": form, "loaded": how or "dense", "bytes": sum(f.stat().st_size for f in folder.iterdir())}
            rows.append(row | {"seconds": best_time(loader, folder) if loader else None})
    print_table("SmolLM2-135M, float32", ("form", "loaded as", "MB", "load, s"), map(cells, rows), text_columns=2)
    write_record("exports", {"rows": rows})
    return 0


def cells(row: dict) -> list[str]:
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
    return [row["form"], row["loaded"] if seconds else "", f"{row['bytes'] / 1e6:.1f}", seconds]


def run(*words: object) -> None:
    if console([str(word) for word in words]):
        raise SystemExit(1)


def under_mask(base: Path, folder: Path) -> nn.Module:
    model = load_model(str(base))
    apply_mask(model, load_mask(folder))
    return model


def best_time(loader: Callable[[Path], nn.Module], folder: Path) -> float:
    """Seconds to load and to touch every weight, because mapped files are read only then."""

    def load_and_touch() -> None:
        for weight in loader(folder).state_dict().values():
            weight.float().sum()

    return best_seconds(load_and_touch, REPEAT)


if __name__ == "__main__":
    sys.exit(main())
