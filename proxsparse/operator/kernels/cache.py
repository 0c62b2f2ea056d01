"""Where numba keeps compiled loops: next to the code or in the home folder, which containers may not allow."""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

import numba

logger = logging.getLogger(__name__)


def choose_cache() -> None:
    """Give numba a new temporary folder where it could write to no other. Call it before a loop is decorated.

    The folder is a process's own, and loops are then compiled by every process: what numba reads from its cache is
    pickled code, so that no folder will do that other users could have filled.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    given = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    usual = [Path(given)] if given else [Path(__file__).parent / "__pycache__", Path(home) / "numba"]
    if any(map(writable, usual)):
        return
    if given:
        logger.warning("NUMBA_CACHE_DIR is %s, which can't be written to: compiled loops are not kept", given)
    folder = tempfile.mkdtemp(prefix="proxsparse-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]


def writable(folder: Path) -> bool:
    """Whether a file can be made in a folder, which is made where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
