"""Where numba keeps compiled loops: next to the code or in the home folder, which containers may not allow."""

import atexit
import logging
import shutil
import tempfile
from pathlib import Path

import numba

from proxsparse.record import usual_cache, writable

logger = logging.getLogger(__name__)


def choose_cache() -> None:
    """Give numba a new temporary folder where it could write to no other. Call it before a loop is decorated.

    The folder is a process's own, and loops are then compiled by every process: what numba reads from its cache is
    pickled code, so that no folder will do that other users could have filled.
    """
    given, home = numba.config.CACHE_DIR, usual_cache()  # type: ignore[attr-defined]
    own = Path(__file__).parent / "__pycache__"
    usual = [Path(given)] if given else [own, home / "numba"] if home else [own]
    if any(map(writable, usual)):
        return
    if given:
        logger.warning("NUMBA_CACHE_DIR is %s, which can't be written to: compiled loops are not kept", given)
    folder = tempfile.mkdtemp(prefix="proxsparse-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
