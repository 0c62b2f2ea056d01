"""Models on the Hub: what it says of them before their weights are downloaded, their files, and their notes."""

import contextlib
import functools
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError
from transformers import PreTrainedModel
from transformers.utils import cached_file

from proxsparse.errors import RunError, UsageError, doing
from proxsparse.model.channels import ORDER_FILE
from proxsparse.model.checkpoint import INDEX, SINGLE, Checkpoint, index_files
from proxsparse.model.compact import is_compact
from proxsparse.model.hub_errors import UNREACHABLE, clear_errors
from proxsparse.model.source import model_source
from proxsparse.record import OWN, origin_of

COMMIT = "_proxsparse_commit"  # on a model that was loaded from the Hub
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")

_unreachable: set[str] = set()  # endpoints that gave no answer: each further question would wait for half a minute


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A small file of a Hub model, from the cache or downloaded; None: it has none, or the Hub can't be reached."""
    here = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(here, str):
        return Path(here)
    if constants.ENDPOINT in _unreachable:
        return None
    try:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # transformers' own, of whatever the Hub's client raised
        _unreachable.add(constants.ENDPOINT)
        return None
    return Path(found) if found else None


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
    commit = found.folder.name
    if not Path(found.name).is_dir() and found.folder.parent.name == "snapshots" and not constants.HF_HUB_OFFLINE:
        with contextlib.suppress(OSError, *UNREACHABLE):
            snapshot_download(found.name, revision=commit, allow_patterns=[*SMALL_FILES, ORDER_FILE, OWN])


def noted_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """``origin_of`` a model's files on this machine; empty where there are none."""
    try:
        found = Checkpoint.find(name, revision) if name else None
    except UsageError:  # the folder that it came from is gone
        return {}
    return {} if found is None else origin_of(found.folder)
