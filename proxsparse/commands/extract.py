"""Extract the mask from a learned checkpoint: the two largest scores of every block of four.

    python end-to-end/mask_op.py --checkpoint runs/mine/checkpoint-100 --output runs/mine/mask.safetensors
    python end-to-end/mask_op.py --checkpoint runs/mine            (its last complete checkpoint)

Prints how many zeros the blocks of the learned weights have, by layer kind: the closer to two in every block, the less
the final choice of the mask changes.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import (
    existing_folder,
)
from proxsparse.errors import UsageError
from proxsparse.learning.trainer import ZEROS_FILE
from proxsparse.mask import MASK_FILE, Mask, extract_mask, load_mask, save_mask, sparsity_by_kind
from proxsparse.model.inputs import NORMS_FILE
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import find_prunable
from proxsparse.record import read_json, versions, write_json
from proxsparse.resume import last_complete_checkpoint


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint", "--model", required=True, metavar="FOLDER", help="learned checkpoint, or the folder of a run"
    )
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="default: mask.safetensors in the folder of the run"
    )
    parser.add_argument("--include", default=None, help="only weights whose name has this expression")
    parser.add_argument("--exclude", default=None, help="leave out weights whose name has this expression")
    parser.add_argument("--record", default=None, metavar="FILE", help="write the shares of zeros as JSON")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    checkpoint, run = locate(args.checkpoint)
    settings = read_json(run / "run.json")["settings"] if (run / "run.json").is_file() else {}
    sharded = (checkpoint / ZEROS_FILE).is_file()
    if sharded and (args.include or args.exclude):
        raise UsageError(
            "--include and --exclude: the mask of a sharded run is extracted while it learns; give them there."
        )
    if sharded:  # the run has taken the mask from its shards itself
        mask, shares = load_mask(checkpoint / MASK_FILE), read_json(checkpoint / ZEROS_FILE)
    else:
        include, exclude = args.include or settings.get("include"), args.exclude or settings.get("exclude")
        mask, shares = extract(checkpoint, run, settings, include, exclude)
    mask.base_model = settings.get("model", "")
    mask.info = {
        k: settings[k] for k in ("method", "lambda_value", "score", "dataset", "samples", "seed") if k in settings
    }
    print_zeros(shares)
    output = Path(args.output) if args.output else run / MASK_FILE
    save_mask(mask, output)
    if args.record:
        write_json(args.record, {"checkpoint": str(checkpoint), "zeros": shares, "versions": versions()})
    print_json({"mask": str(output), "weights": len(mask.tensors), "blocks_24": sum(shares["all"][2:])})


def extract(
    checkpoint: Path, run: Path, settings: dict, include: str | None, exclude: str | None
) -> tuple[Mask, dict[str, list[float]]]:
    """Mask of a learned checkpoint, and its shares of blocks with 0 to 4 zeros."""
    model = load_model(str(checkpoint))
    targets = find_prunable(model, include, exclude)
    weights = {t.name: t.weight.detach() for t in targets}
    norms = None
    if (run / NORMS_FILE).is_file() and settings.get("score") != "weight":
        norms = load_file(run / NORMS_FILE)
    elif settings.get("score") == "activation":
        raise UsageError(f"--checkpoint: this run scored weights by their inputs, and {run / NORMS_FILE} is missing.")
    elif not settings:
        print(f"note: neither run.json nor {NORMS_FILE} is beside the checkpoint: blocks compare plain magnitudes")
    return extract_mask(weights, targets, norms), sparsity_by_kind(weights, targets)


def locate(folder: str) -> tuple[Path, Path]:
    """(checkpoint, folder of its run) of either."""
    path = existing_folder(folder, "checkpoint")
    if (path / "config.json").is_file() or (path / ZEROS_FILE).is_file():
        return path, path.parent if (path.parent / "run.json").is_file() else path
    checkpoint = last_complete_checkpoint(path)
    if checkpoint is None:
        raise UsageError(f"--checkpoint: {folder} is neither a checkpoint nor a run with a complete checkpoint.")
    return Path(checkpoint), path


def print_zeros(shares: dict[str, list[float]]) -> None:
    """Table of the share of blocks with 0 to 4 zeros."""
    table = Table(title="zeros in the blocks of the learned weights")
    table.add_column("layer kind")
    for zeros in range(5):
        table.add_column(f"{zeros}", justify="right")
    for kind, row in shares.items():
        table.add_row(kind, *(f"{share:.1%}" for share in row), style="bold" if kind == "all" else None)
    Console().print(table)
