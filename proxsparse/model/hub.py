"""Models on the Hub: what it says of them before their weights are downloaded, their files, and their notes."""

import contextlib
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from transformers import PreTrainedModel
from transformers.utils import cached_file

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.model.channels import ORDER_FILE
from proxsparse.model.checkpoint import INDEX, SINGLE, Checkpoint, index_files
from proxsparse.model.compact import is_compact
from proxsparse.model.hub_errors import SILENT, UNREACHABLE, causes, clear_errors, quiet_log
from proxsparse.model.source import model_source
from proxsparse.record import OWN, origin_of

COMMIT = "_proxsparse_commit"  # on a model that was loaded from the Hub
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
# Seconds for which the Hub is not asked again after it gave no answer. Its client waits half of that for each answer.
WAIT = 60.0
_silent_since: dict[str, float] = {}  # by endpoint


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A small file of a Hub model, from the cache or downloaded; None: it has none, or the Hub can't be reached."""
    here = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(here, str):
        return Path(here)
    absent = here is not None and re.fullmatch(r"[0-9a-f]{40}", revision or "")  # and a commit does not change
    if absent or not _may_answer():
        return None
    with contextlib.suppress(OSError), _asking():
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None
    return None


def _may_answer() -> bool:
    """Whether the Hub may be asked: the user has not switched it off, and it was not silent just now."""
    silent = time.monotonic() - _silent_since.get(constants.ENDPOINT, -WAIT) < WAIT
    return not (silent or constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Inside, the Hub is asked, without its client's lines about every attempt; that it is silent is remembered."""
    try:
        with quiet_log("huggingface_hub"):
            yield
    except (OSError, *UNREACHABLE) as error:
        if any(isinstance(cause, (LocalEntryNotFoundError, *SILENT)) for cause in causes(error)):
            _silent_since[constants.ENDPOINT] = time.monotonic()
        raise


@functools.cache
def hub_tensors(name: str, revision: str | None = None) -> tuple[tuple[str, str, str], ...]:
    """File, name and dtype (as safetensors names it) of every tensor of a Hub model, from the heads of its files.

    Nothing where the Hub can't be reached or the model has no safetensors: what loads the model says so.
    """
    try:
        files = HfApi().get_safetensors_metadata(name, revision=revision).files_metadata
    except (NotASafetensorsRepoError, SafetensorsParsingError, HFValidationError, OSError, *UNREACHABLE):
        return ()
    return tuple((file, key, tensor.dtype) for file, head in files.items() for key, tensor in head.tensors.items())


def notes_from_hub(model: PreTrainedModel, name: str, revision: str | None) -> Path | None:
    """The folder with the notes of a pruned model on the Hub; None: it has none.

    The model remembers its commit, by which its own files are found again, whatever the branch names by then.
    """
    here = Checkpoint.find(name, revision)
    commit = here.folder.name if here else revision
    setattr(model, COMMIT, commit)
    with clear_errors(name):
        found = [hub_file(name, file, commit) for file in (ORDER_FILE, OWN)]
    return next((path.parent for path in found if path), None)


def commit_of(model: PreTrainedModel) -> str | None:
    """The commit, or else the revision, that a model was loaded from; None for folders, and where it is not known."""
    return getattr(model, COMMIT, None)


def fetch(name: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a model, with all of its files: from here, or downloaded from the Hub.

    Raises:
        UsageError, RunError: one sentence on what is missing.
    """
    found = Checkpoint.find(name, revision)
    source, extra = model_source(name)
    folder = Path(source)
    if found is None and not extra and not Path(source).is_dir():
        with doing(f"downloading {name}"), clear_errors(name):
            folder = Path(
                snapshot_download(source, revision=revision, allow_patterns=[*SMALL_FILES, ORDER_FILE, OWN, SINGLE])
            )
            if is_compact(folder):
                snapshot_download(source, revision=revision, allow_patterns=["compact*.safetensors"])
            elif not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
                shards = [path.name for path in index_files(folder / INDEX)]
                snapshot_download(source, revision=revision, allow_patterns=shards)
            found = Checkpoint.find(name, revision)
    elif found is not None:
        add_small_files(found)
    if found is None:
        absent = [file.name for file in Checkpoint(folder).files if not file.is_file()]
        what = f"lacks {len(absent)} of its files, as {absent[0]}" if absent else "has no safetensors weights"
        raise RunError(f"The model {name} {what}: get it again (pickle files can run code, so they are not loaded).")
    return found


def add_small_files(found: Checkpoint) -> None:
    """Download what a model on the Hub has next to its weights, which alone are in the cache where others loaded it."""
    if not Path(found.name).is_dir() and found.folder.parent.name == "snapshots":
        _add_small_files(found.name, found.folder.name)


@functools.cache
def _add_small_files(name: str, commit: str) -> None:
    if _may_answer():
        with contextlib.suppress(OSError, *UNREACHABLE), _asking():
            snapshot_download(name, revision=commit, allow_patterns=[*SMALL_FILES, ORDER_FILE, OWN])


def noted_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """``origin_of`` a model's files on this machine; empty where there are none."""
    try:
        found = Checkpoint.find(name, revision) if name else None
    except UsageError:  # the folder that it came from is gone
        return {}
    return {} if found is None else origin_of(found.folder)
