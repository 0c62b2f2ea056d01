"""Checkpoints that count only when they are complete.

The Trainer writes a checkpoint file by file; a run killed in between leaves a folder that looks like one. A marker is
written last, with the size of every file, and only folders with a true marker are resumed from.
"""

import logging
from pathlib import Path

from transformers import TrainerCallback

from proxsparse.record import read_json, write_json

logger = logging.getLogger(__name__)
MARKER = "complete.json"


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete once the Trainer has written all of it."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / MARKER, {"sizes": _sizes(folder)})


def last_complete_checkpoint(output_dir: Path | str) -> str | None:
    """Newest complete checkpoint of a run, or None. Incomplete ones are passed over, and said so."""
    found = None
    for folder in sorted(Path(output_dir).glob("checkpoint-*"), key=_step):
        if is_complete(folder):
            found = str(folder)
        else:
            logger.warning("%s was not written to its end and is not used", folder)
    return found


def is_complete(folder: Path) -> bool:
    """Whether every file that was written is there in full."""
    try:
        recorded = read_json(folder / MARKER)["sizes"]
        return bool(recorded) and all((folder / name).stat().st_size == size for name, size in recorded.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARKER)
    return {str(p.relative_to(folder)): p.stat().st_size for p in files}


def _step(folder: Path) -> int:
    tail = folder.name.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else -1
