"""Records of a run: files that appear whole or not at all, and the versions and commit that explain a number."""

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from proxsparse.errors import RunError, UsageError

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

# Marks folders that may be replaced by a newer export. In a checkpoint it says where mask and weights come from.
OWN, FILES = ".written-by-proxsparse", "files"  # in a folder that was written, with the names of its files
HELD, REPLACED = ".held", "replaced"  # in a temporary folder: locked by the process that writes there; what was there
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "huggingface_hub", "safetensors", "numba")


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary file or folder next to ``path``, renamed to ``path`` when the block ends without an error.

    What processes left behind that were killed while they wrote to the same path is deleted first.

    Raises:
        UsageError: a file would replace a folder, or a folder would replace one that holds files of the user.
    """
    path = Path(os.path.realpath(path))
    refuse_to_overwrite(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_left_behind(path)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    held = (scratch / HELD).open("w")
    with contextlib.suppress(OSError):
        lock(held)
    try:
        inner = scratch / path.name
        yield inner
        _let_be_read(scratch)
        if inner.is_dir():
            note = origin_of(inner) | {FILES: _names(inner)}
            (inner / OWN).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        elif path.is_dir():
            raise UsageError(f"{path} is a folder, and a file was to be written there; name a file.")
        if path.is_dir():
            _swap(inner, path, aside=scratch / REPLACED)
        else:
            os.replace(inner, path)
    finally:
        held.close()
        shutil.rmtree(scratch, ignore_errors=True)


def lock(file: IO) -> bool:
    """Lock a file until the process ends or closes it; False where another one has it.

    Raises:
        OSError: there are no such locks in this system, or in this file system.
    """
    if fcntl is None:
        raise OSError("no locks")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _delete_left_behind(path: Path) -> None:
    """Delete temporary folders of a path whose process is gone."""
    for held in path.parent.glob(f".{glob.escape(path.name)}.*/{HELD}"):
        with contextlib.suppress(OSError), held.open("r+") as file:
            # One that was made just now may not be locked yet; one killed while it swapped has what was replaced.
            old = time.time() - held.stat().st_mtime > 60 and not (held.parent / REPLACED).exists()
            if old and lock(file):
                shutil.rmtree(held.parent, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    """Files in a folder and below, but for hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(name) for name in names if not any(part.startswith(".") for part in name.parts))


def _swap(new: Path, path: Path, aside: Path) -> None:
    """Put a folder in another one's place; where that fails, the other one is put back."""
    os.replace(path, aside)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(aside, path)
        raise


def _let_be_read(folder: Path) -> None:
    """Give every file the permissions of any new one: safetensors writes files that only their owner can read."""
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def refuse_to_overwrite(path: Path) -> None:
    """Refuse a folder that holds anything but what ``atomic_path`` wrote into it.

    Raises:
        UsageError: the folder holds something else, or is to be made below a file.
    """
    below = next((parent for parent in path.parents if parent.is_file()), None)
    if below is not None:
        raise UsageError(f"{path} can't be written, because {below} is a file; choose another folder.")
    if path.is_dir() and any(path.iterdir()) and not (path / OWN).is_file():
        raise UsageError(f"{path} is a folder that holds something else; choose a new one, so that nothing is lost.")
    written = origin_of(path).get(FILES) if path.is_dir() else None
    added = sorted(set(_names(path)) - set(written)) if written else []  # older versions wrote no list
    if added:
        raise UsageError(
            f"{path} holds {added[0]}, which was added to it; choose a new folder, so that nothing is lost."
        )


def refuse_folder(folder: Path | str, *sources: str | None) -> None:
    """Refuse, before any work is done, a folder that can't be written in the end.

    Args:
        folder: to be written as a whole.
        sources: what the work reads, names of models among them; None: nothing.

    Raises:
        UsageError: it is a file, it holds something else, or it holds what is read and would be replaced.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UsageError(f"{folder} is a file; name a new folder.")
    for source in sources:
        if not source or not folder.is_dir() or not os.path.exists(source):
            continue
        place = Path(source).resolve()
        if folder.resolve() in (place, *place.parents):
            raise UsageError(f"{folder} is read, so it can't be replaced by what is made of it; name another folder.")
    refuse_to_overwrite(folder)


def refuse_trained(folder: Path | str, info: Mapping[str, Any]) -> None:
    """Refuse to replace weights that were trained by others: whoever wants them gone deletes the folder.

    Args:
        info: of the mask whose model is written there.

    Raises:
        UsageError: the folder holds such weights.
    """
    noted = (origin_of(folder).get("info") or {}).get("weights_updated")
    if isinstance(noted, str) and noted != info.get("weights_updated"):
        raise UsageError(
            f"{folder} holds weights that were trained ({noted}); choose a new folder, so that nothing is lost."
        )


def usual_cache() -> Path | None:
    """The user's folder for caches; None where there is no home folder, as in containers with a user of no name."""
    found = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return found if found.is_absolute() else None


def writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_json(path: Path | str, record: Any) -> None:
    """Write JSON atomically, with a final newline."""
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(record, indent=2, sort_keys=False, default=str) + "\n", encoding="utf-8")


def origin_of(folder: Path | str) -> dict[str, Any]:
    """What ``save_pruned`` noted of a checkpoint: the mask's base_model, pattern and info, and which weights are dense.

    It is empty where nothing was noted.
    """
    path = Path(folder) / OWN
    if not path.is_file() or not path.stat().st_size:
        return {}
    return read_record(path)


def stamp_of(files: Iterable[Path], root: Path) -> str:
    """SHA-256 of the names, sizes and times of change of files: another one says that one of them may have changed.

    Args:
        root: the folder that the files lie in, or the file itself; names are relative to it.
    """
    found = hashlib.sha256()
    for file in files:
        about = file.stat()
        found.update(f"{file.relative_to(root)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return found.hexdigest()


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_record(path: Path | str, kind: type = dict, needs: str | None = None) -> Any:
    """JSON that a command wrote.

    Args:
        kind: what it holds.
        needs: a name that it must have.

    Raises:
        RunError: it is damaged; names it.
    """
    try:
        found: Any = read_json(path)
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): delete it, and give the command that wrote it again.") from error
    if not isinstance(found, kind) or (needs and needs not in found):  # type: ignore[operator]
        raise RunError(f"{path} holds something else than a result of these commands: delete it, or name another file.")
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; missing packages are left out."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("proxsparse", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with '+' if files are changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
