"""Documents in local files: plain text, JSON lines, Parquet and Arrow, alone or in folders.

    .txt, .txt.gz              one document per file
    .jsonl, .json (and .gz)    one document per row: the string in its field 'text', whatever the other fields hold
    .parquet, .arrow           one document per row: the string in the column 'text'; no other column is read

Endings are read in either case. In folders, names that begin with a dot are skipped, and so are tables without 'text'
next to files that have text.
"""

import contextlib
import gzip
import json
import logging
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from proxsparse.errors import UsageError

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")
TABLE_SUFFIXES = (".parquet", ".arrow")
# What the package datasets and clones of data sets write next to the rows.
METADATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
LONG = 1 << 20  # bytes; a longer plain text can be read in pieces
PIECE = 1 << 16  # bytes of a piece
REACH = 1 << 12  # bytes: how far a piece is lengthened to end at a paragraph, a line or a word


class Documents(Sequence[str]):
    """Documents of several sources, or the chosen ones of them, each read only when it is asked for."""

    def __init__(self, sources: Sequence[Sequence[str]], chosen: Sequence[int] | None = None):
        self.sources = sources
        self.ends = list(accumulate(len(source) for source in sources))
        self.chosen = range(self.ends[-1] if self.ends else 0) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Documents(self.sources, self.chosen[index])
        place = self.chosen[index]
        source = bisect_right(self.ends, place)
        return self.sources[source][place - self.ends[source]]  # counted from the source's end


class Pieces(Sequence[str]):
    """A long plain text as many documents. No object is made per piece: a text of gigabytes has many."""

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self.data, self.path = data, path
        _piece(data, path, 0)  # what is no text at all is refused at once

    def __len__(self) -> int:
        return len(self.data) // PIECE

    def __getitem__(self, index: Any) -> Any:
        return _piece(self.data, self.path, range(len(self))[index])


class NoTextColumn(UsageError):
    """A table has no 'text': an error for a file on its own, and a file to pass over in a folder."""


def read_local(path: Path, in_pieces: bool = False) -> Documents:
    """Documents of a file, or of all files of a folder in the order of their paths; blank ones are left out.

    Args:
        in_pieces: a document of more than ``LONG`` bytes counts as many of about ``PIECE`` bytes, cut after a
            paragraph, a line or a word. The pieces of a .txt are read, decoded and checked when they are asked for, and
            the first at once.

    Raises:
        UsageError: there is no text, or a file can't be read as what its name says.
    """
    sources: list[Sequence[str]] = []
    without: NoTextColumn | None = None
    for file in _readable(path):
        try:
            sources += _sources(file, in_pieces)
        except NoTextColumn as error:
            without = without or error
            if file.name not in METADATA:
                logger.warning("passed over: %s", error)
    documents = Documents(sources)
    if any(document.strip() for document in documents):
        return documents
    raise without or UsageError(f"There is no text in {path}.", "dataset")


def _readable(path: Path) -> list[Path]:
    if path.is_dir():
        # The package datasets leaves results of its own between the rows that it saved.
        files = sorted(p for p in _below(path) if not (p.suffix == ".arrow" and p.name.startswith("cache-")))
    else:
        files = [path]
    found = [p for p in files if p.name.lower().endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES))]
    if not found:
        what = "has no" if path.is_dir() else "is no"
        raise UsageError(
            f"{path} {what} .txt, .jsonl, .json, .ndjson, .parquet or .arrow file (the first four may end in .gz too): "
            "convert or rename it.",
            "dataset",
        )
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Files in a folder and the folders below it, linked ones too; no name that begins with a dot."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(place, name) for name in names if not name.startswith(".") and Path(place, name).is_file())
        seen.add(real)


def _sources(path: Path, in_pieces: bool) -> list[Sequence[str]]:
    name = path.name.lower()
    if name.endswith(TEXT_SUFFIXES):
        return [_plain(path, in_pieces)]
    rows = _json_rows(path) if name.endswith(JSON_SUFFIXES) else _table_rows(path)
    sources: list[Sequence[str]] = []
    short: list[str] = []
    for row in rows:
        if in_pieces and len(row) > LONG:
            sources += [short, Pieces(row.encode(), path)]
            short = []
        elif row.strip():
            short.append(row)
    return [*sources, short]


# Plain text.


def _plain(path: Path, in_pieces: bool) -> Sequence[str]:
    if path.name.lower().endswith(".gz"):
        with _unzipping(path, "gzip"), gzip.open(path) as file:
            data = file.read()
    elif in_pieces and path.stat().st_size > LONG:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Pieces(mapped, path)
    else:
        data = path.read_bytes()
    if in_pieces and len(data) > LONG:
        return Pieces(data, path)
    text = _decode(data, path)
    return [text] if text.strip() else []


def _piece(data: mmap.mmap | bytes, path: Path, index: int) -> str:
    start, end = _cut(data, index), _cut(data, index + 1)
    return _decode(data[start:end], path, start)


def _cut(data: mmap.mmap | bytes, index: int) -> int:
    """Byte at which a piece begins: the next paragraph, line or word after a multiple of ``PIECE``."""
    if index == 0:
        return 0
    if index == len(data) // PIECE:
        return len(data)
    start = index * PIECE
    for separator in (b"\n\n", b"\n", b" "):
        found = data.find(separator, start, start + REACH)
        if found >= 0:
            return found + len(separator)
    while data[start] & 0xC0 == 0x80:  # inside a character
        start += 1
        if start == index * PIECE + 4:  # not UTF-8, as decoding will say
            break
    return start


def _decode(data: bytes, path: Path, start: int = 0) -> str:
    """Text of the bytes that begin at byte ``start`` of the file."""
    try:
        text = data.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {start + error.start}). Convert it, for example with iconv.", "dataset"
        ) from error
    if "\0" in text:
        raise UsageError(f"{path} is a binary file, not text.", "dataset")
    return text


# Rows of JSON.


def _json_rows(path: Path) -> Iterator[str]:
    """The strings in the field 'text' of every row."""
    fields: list[str] | None = None
    found = False
    number = 0
    for number, row in enumerate(_json_values(path), 1):
        if not isinstance(row, dict):
            raise NoTextColumn(f"{path} needs rows with a field 'text', and row {number} is {_kind(row)}.", "dataset")
        fields = list(row) if fields is None else fields
        found = found or "text" in row
        text = row.get("text")
        if text is None:
            continue
        if not isinstance(text, str):
            raise UsageError(f"The field 'text' of {path} is {_kind(text)} in row {number}; give a string.", "dataset")
        yield _encodable(text)
    if number and not found:
        raise NoTextColumn(f"{path} needs a column 'text', and has {_few(fields or [])}.", "dataset")


def _json_values(path: Path) -> Iterator[Any]:
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with _unzipping(path, "json"), opened(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number > 1:
                    raise UsageError(
                        f"{path} is not a readable json file (line {number}: {error}).", "dataset"
                    ) from error
                yield from _spread_values(line + file.read(), path)
                return
            yield from value if isinstance(value, list) else [value]


def _spread_values(text: str, path: Path) -> Iterator[Any]:
    """Values of JSON that is spread over lines: an array, or one object after the other."""
    decoder, place = json.JSONDecoder(), 0
    try:
        while text[place:].strip():
            place += len(text) - place - len(text[place:].lstrip())
            value, place = decoder.raw_decode(text, place)
            yield from value if isinstance(value, list) else [value]
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not a readable json file ({error}).", "dataset") from error


@contextlib.contextmanager
def _unzipping(path: Path, kind: str) -> Iterator[None]:
    """Turn what a damaged file raises into a sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it, for example with iconv.", "dataset"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is not a readable {kind} file ({error}).", "dataset") from error


def _encodable(text: str) -> str:
    """The text, with half characters (which JSON can hold, and UTF-8 can't) replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), "a number")


def _few(names: Sequence[str], count: int = 10) -> str:
    more = [f"{len(names) - count} more"] if len(names) > count else []
    return ", ".join([*names[:count], *more]) or "none"


# Tables.


def _table_rows(path: Path) -> Iterator[str]:
    """The strings of the column 'text'."""
    import pyarrow

    kind = path.suffix.lower()[1:]
    try:
        schema, batches = _parquet(path) if kind == "parquet" else _arrow(path)
        if "text" not in schema.names:
            raise NoTextColumn(f"{path} needs a column 'text', and has {_few(schema.names)}.", "dataset")
        held = schema.field("text").type
        values = held.value_type if pyarrow.types.is_dictionary(held) else held
        if str(values) not in ("string", "large_string", "string_view", "null"):
            raise UsageError(f"The column 'text' of {path} holds values of type {held}; give strings.", "dataset")
        for batch in batches:
            yield from (row for row in batch.column("text").to_pylist() if row is not None)
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UsageError(f"{path} is not a readable {kind} file ({reason}).", "dataset") from error


def _parquet(path: Path) -> tuple[Any, Iterator[Any]]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    schema = file.schema_arrow
    return schema, file.iter_batches(columns=["text"]) if "text" in schema.names else iter(())


def _arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    """Both kinds of Arrow files: the stream, which the package datasets writes, and the one with a footer."""
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, iter(stream)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        file = pyarrow.ipc.open_file(source)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
