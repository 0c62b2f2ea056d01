"""Bytes of text files, unzipped where their names say that they are zipped. Those of long files stay on the disk."""

import bz2
import contextlib
import gzip
import io
import lzma
import mmap
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxsparse.errors import UsageError

ENDINGS = (".gz", ".bz2", ".xz", ".zst")
LONG = 1 << 20  # bytes; of a longer file, only the parts that are asked for are read


def inner_name(path: Path) -> str:
    """Name of the file inside, in lower case: 'text.jsonl' of Text.JSONL.gz."""
    name = path.name.lower()
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def opened(path: Path) -> Any:
    """The file, open to be read from its beginning to its end, unzipped."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow

            raw: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
            return io.BufferedReader(raw)
        case _:
            return path.open("rb")


def contents(path: Path) -> mmap.mmap | bytes:
    """Bytes of a file; those of a long zipped one are unzipped into a temporary file without a name."""
    with unzipping(path), opened(path) as file:
        start = file.read(LONG + 1)
        if len(start) <= LONG:
            return start
        if inner_name(path) == path.name.lower():
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with tempfile.TemporaryFile() as scratch:
            scratch.write(start)
            shutil.copyfileobj(file, scratch, LONG)
            scratch.flush()
            return mmap.mmap(scratch.fileno(), 0, access=mmap.ACCESS_READ)


@contextlib.contextmanager
def unzipping(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a sentence.

    Raises:
        UsageError: names the file.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise unreadable(path, error) from error
    except (OSError, ValueError) as error:
        # gzip, bz2 and pyarrow raise errors of the operating system without its number.
        if isinstance(error, UsageError) or getattr(error, "errno", None) is not None:
            raise
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception | str) -> UsageError:
    kind = path.suffix[1:].lower()
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UsageError(f"{path} is not a readable {kind} file ({first}).", "dataset")


def not_utf8(path: Path, place: int) -> UsageError:
    """The sentence for a byte that is none of UTF-8.

    Args:
        place: number of the byte in the file.
    """
    return UsageError(f"{path} is not UTF-8 text (byte {place}). Convert it, for example with iconv.", "dataset")
