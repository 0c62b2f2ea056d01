"""Folders of runs: whose they are, and checkpoints that count only when they are complete.

A run claims its folder with a record of its settings. A run with other settings is refused there.

The Trainer writes a checkpoint file by file; a run killed in between leaves a folder that looks like one. A marker is
written last, with the size and checksum of every file, and only folders that agree with their marker are resumed from.
Old checkpoints are removed after the new one has its marker, never before.
"""

import contextlib
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.record import lock, read_json, write_json

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)
MARKER = "complete.json"
RUN_FILE = "run.json"
LOCK = ".lock"  # held while a process learns
MODEL_ONLY = "save_only_model"  # the Trainer's setting, kept in the marker


def claim(
    folder: Path | str,
    record: dict[str, Any],
    decisive: Iterable[str] | None = None,
    *,
    write: bool = True,
    earlier: Mapping[str, Any] | None = None,
) -> None:
    """Write down what a run is made of; refuse the folder of another one.

    Args:
        folder: folder of the run; it need not exist.
        record: its ``settings`` are compared, name by name; what else it holds is kept for readers.
        decisive: names of the settings that make it another run; None: all. Names that an older record lacks are
            passed over.
        earlier: what settings were, before there was a choice, which older records lack.
        write: False only compares, as in all processes but the first.

    Raises:
        UsageError: a setting differs; names it, with both values where they are short. Or the folder holds a model,
            whose files would be taken for the run's.
        RunError: the record in the folder can't be read.
    """
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"`output_dir` must be a folder; {folder} is none.", "output_dir")
    path = Path(folder) / RUN_FILE
    if path.is_file():
        try:
            before = dict(earlier or {}) | dict(read_json(path)["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}): delete it, or give another `output_dir`.") from error
        now = record["settings"]
        for name in now if decisive is None else decisive:
            if name in before and not same_place(before[name], now[name]):
                values = f"`{name}={before[name]}`, now it is {now[name]}"
                differs = values if len(values) < 120 else f"another `{name}`"
                raise UsageError(
                    f"{folder} holds a run with {differs}: give another `output_dir`, or delete that folder."
                )
    elif Path(folder, "config.json").is_file():
        raise UsageError(f"{folder} holds a model, and no run: give another `output_dir`.", "output_dir")
    elif write:
        write_json(path, record)


@contextlib.contextmanager
def first_alone_in(folder: Path | str) -> Iterator[None]:
    """``alone_in``, of several processes that work together: the first takes the lock, and all hear if it can't.

    Raises:
        RunError: another run is at work there.
    """
    with contextlib.ExitStack() as stack:
        _of_the_first(lambda: stack.enter_context(alone_in(folder)))
        yield


@contextlib.contextmanager
def alone_in(folder: Path | str) -> Iterator[None]:
    """Inside, no other process works in the folder of a run. The lock ends with the process, however it ends.

    Raises:
        RunError: another one does.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Path(folder, LOCK).open("w") as file:
        free = True
        try:
            free = lock(file)
        except OSError:
            logger.info("%s has no locks: let no second process learn there", folder)
        if not free:
            raise RunError(
                f"Another process is learning in {folder}: wait until it is done, or give another `output_dir`."
            )
        yield


def same_place(before: Any, now: Any) -> bool:
    """Equal, or two spellings of one path."""
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return bool(before == now)
    return Path(before).exists() and Path(now).exists() and Path(before).resolve() == Path(now).resolve()


def starting_point(output_dir: Path | str, asked: str | None = None) -> str | None:
    """The checkpoint that a run goes on from, or None at its start.

    Of several processes the first reads the files, whose checksums take minutes for a large model; all get its answer.

    Args:
        asked: ``resume_from_checkpoint`` of the Trainer: a folder. True and False are ignored: a run always goes on.

    Raises:
        UsageError: the folder asked for is not a complete checkpoint.
    """
    return _of_the_first(lambda: _starting_point(output_dir, asked))


def _starting_point(output_dir: Path | str, asked: str | None) -> str | None:
    if asked is None or str(asked).lower() in ("", "true", "false", "last"):
        return last_complete_checkpoint(output_dir, resuming=True)
    wrong = fault(Path(asked), resuming=True) if Path(asked).is_dir() else "there is no such folder"
    if wrong and (inside := checkpoints(asked)):
        wrong = f"it is the folder of a run, whose last checkpoint is {inside[-1]}"
    if wrong:
        raise UsageError(
            f"`resume_from_checkpoint={asked}` can't be obeyed: {wrong}. Give a checkpoint folder of a run, or "
            "leave it out: a run goes on from its last complete checkpoint by itself."
        )
    return str(asked)


def _of_the_first(find: Callable[[], str | None]) -> str | None:
    """What the first process finds, or raises, in every process: else the others would wait for it until a timeout."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find()
    found: list[Any] = [None, None]  # the answer, or why there is none
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = find()
        except Exception as error:
            found[1] = error if isinstance(error, UsageError) else RunError(f"{type(error).__name__}: {error}")
    torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def complete_checkpoints(trainer: "Trainer", write: Callable[[Path], None] | None = None) -> None:
    """Have a trainer's checkpoints marked when complete, and rotated only then.

    Args:
        write: adds the trainer's own files to the folder of a checkpoint, before it is marked; called in every process.
    """
    trainer.add_callback(CompleteCheckpoints(trainer.args.save_total_limit, write))
    trainer.args.save_total_limit = None  # the Trainer would remove the old ones first


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint when the Trainer has written all of it, then removes older ones, except the best.

    Args:
        keep: how many checkpoints are kept; None for all.
        write: see ``complete_checkpoints``.
    """

    def __init__(self, keep: int | None = None, write: Callable[[Path], None] | None = None):
        self.keep, self.write = keep, write

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with doing(f"completing the checkpoint {folder}"):
            if self.write:
                self.write(folder)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()  # every process writes files of its own
            if not state.is_world_process_zero:
                return
            write_json(folder / MARKER, {"files": _files(folder), MODEL_ONLY: getattr(args, MODEL_ONLY, False)})
        for old in self._by_worth(args.output_dir, state.global_step)[: -self.keep] if self.keep else []:
            # The best one is wanted at the end, where the run evaluates.
            if state.best_model_checkpoint is None or old.resolve() != Path(state.best_model_checkpoint).resolve():
                shutil.rmtree(old, ignore_errors=True)

    def _by_worth(self, output_dir: Path | str, step: int) -> list[Path]:
        """The checkpoints of a run, the one just written last.

        Those of later steps come first, because this run went on from an earlier one; then those that are not whole.
        """
        return sorted(checkpoints(output_dir), key=lambda c: (_step(c) <= step, (c / MARKER).is_file(), _step(c)))


def checkpoints(output_dir: Path | str) -> list[Path]:
    """Checkpoint folders of a run, oldest first, complete or not."""
    found = (p for p in Path(output_dir).glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name))
    return sorted(found, key=_step)


def last_complete_checkpoint(output_dir: Path | str, resuming: bool = False) -> str | None:
    """Newest complete checkpoint of a run, or None. A warning says what is wrong with those that are passed over.

    Args:
        resuming: a run is to go on from it, which takes more than the model.
    """
    for folder in reversed(checkpoints(output_dir)):
        wrong = fault(folder, resuming)
        if wrong is None:
            return str(folder)
        logger.warning("%s is not used: %s", folder, wrong)
    return None


def resume_hint(output_dir: Path | str) -> str:
    """The sentence that ends a failed run's error: which checkpoint to go on from."""
    folder = last_complete_checkpoint(output_dir)
    return f"The last good checkpoint is {folder}." if folder else "No checkpoint had been written yet."


def fault(folder: Path, resuming: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None where every file is there with its size and checksum.

    Args:
        resuming: see ``last_complete_checkpoint``.
    """
    if not (folder / MARKER).is_file():
        return "it was not written to its end"
    try:
        marker = read_json(folder / MARKER)
        recorded = {name: (file["bytes"], file["sha256"]) for name, file in marker["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} is damaged"
    for name, (size, _) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    for (name, (_, checksum)), found in zip(recorded.items(), _checksums(folder / n for n in recorded), strict=True):
        if found != checksum:
            return f"{name} has changed since it was written (its checksum differs)"
    if resuming and marker.get(MODEL_ONLY):
        return f"it holds the model without the optimizer's state, as `{MODEL_ONLY}=True` asked for"
    return None if recorded else f"its {MARKER} names no file"


def _files(folder: Path) -> dict[str, dict]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARKER]
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(files, _checksums(files), strict=True)
    }


def _checksums(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of files, several at a time: other processes may wait for it."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[-1])
