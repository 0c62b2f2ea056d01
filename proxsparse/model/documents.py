"""Documents in local files: plain text, JSON lines, Parquet and Arrow, alone or in folders.

    .txt                       one document per file
    .jsonl, .ndjson, .json     one document per row: the string in its field 'text', whatever the other fields hold
    .parquet, .arrow           one document per row: the string in the column 'text'; no other column is read

Text and JSON may be zipped: .gz, .bz2, .xz or .zst follows. Endings are read in either case. In folders, names that
begin with a dot are skipped, and so are tables without 'text' next to files that have text.
"""

import logging
import mmap
import os
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from proxsparse.errors import UsageError
from proxsparse.model.rows import NoTextColumn, Rows, Table, json_rows, long_json, long_table
from proxsparse.model.zipped import ENDINGS, LONG, contents, inner_name, not_utf8
from proxsparse.record import stamp_of

logger = logging.getLogger(__name__)

JSON = (".jsonl", ".json", ".ndjson")
TABLES = (".parquet", ".arrow")
# What the package datasets and clones of data sets write next to the rows.
METADATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
PIECE = 1 << 16  # bytes of a piece
AT_ONCE = 1 << 12  # documents, where all are read one after the other
SOME_AT_ONCE = 512  # documents, where they are read in a random order
MANY = 1 << 20  # documents; of more, only those that are needed are shuffled
SPLITS = ("calibration", "heldout", "all")
HELD_OUT = 8  # one document in eight
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
            return Documents(self.sources, [self.chosen[i] for i in range(len(self))[index]])
        return self.take([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[str]:
        start, size = 0, 1  # who looks at the first only does not wait for more
        while start < len(self):
            yield from self.take(range(start, min(start + size, len(self))))
            start, size = start + size, min(2 * size, AT_ONCE)

    def take(self, indices: Sequence[int]) -> list[str]:
        """Several documents: those that lie together in a file are read together."""
        of_source: dict[int, list[int]] = {}  # -> places in the result
        places = [self.chosen[index] for index in indices]
        for i, place in enumerate(places):
            of_source.setdefault(bisect_right(self.ends, place), []).append(i)
        found = [""] * len(places)
        for number, own in of_source.items():
            source = self.sources[number]
            inside = [places[i] - self.ends[number] + len(source) for i in own]
            texts = source.take(inside) if isinstance(source, (Rows, Documents)) else [source[n] for n in inside]
            for i, text in zip(own, texts, strict=True):
                found[i] = text
        return found


class Pieces(Sequence[str]):
    """A long plain text as many documents. No object is made per piece: a text of gigabytes has many."""

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self.data, self.path = data, path
        _piece(data, path, 0)  # what is no text at all is refused at once

    def __len__(self) -> int:
        return len(self.data) // PIECE

    def __getitem__(self, index: Any) -> Any:
        return _piece(self.data, self.path, range(len(self))[index])


def read_local(path: Path, in_pieces: bool = False) -> Documents:
    """Documents of a file, or of all files of a folder in the order of their paths; blank ones are left out.

    Args:
        in_pieces: a document of more than ``LONG`` bytes counts as many of about ``PIECE`` bytes, cut after a
            paragraph, a line or a word. Of a long file, documents are read and checked when they are asked for, and the
            first at once; a row without text is then a blank document.

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
            if file != path and file.name not in METADATA:
                logger.warning("passed over: %s", error)
    documents = Documents(sources)
    if any(document.strip() for document in documents):
        return documents
    raise without or UsageError(f"There is no text in {path}.", "dataset")


def text_stamp(path: Path) -> str:
    """``stamp_of`` the files that a text is read from."""
    return stamp_of(_readable(path), path)


def _readable(path: Path) -> list[Path]:
    if path.is_dir():
        # The package datasets leaves results of its own between the rows that it saved.
        files = sorted(p for p in _below(path) if not (p.suffix == ".arrow" and p.name.startswith("cache-")))
    else:
        files = [path]
    found = [p for p in files if inner_name(p).endswith((".txt", *JSON)) or p.suffix.lower() in TABLES]
    if not found:
        what = "has no" if path.is_dir() else "is no"
        raise UsageError(
            f"{path} {what} .txt, .jsonl, .json, .ndjson, .parquet or .arrow file (the first four may be zipped: "
            f"{', '.join(ENDINGS)}): convert or rename it.",
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
    table = path.suffix.lower() in TABLES
    if not table and inner_name(path).endswith(".txt"):
        return [_plain(path, in_pieces)]
    if in_pieces and (found := long_table(path) if table else long_json(path)) is not None:
        return [found]
    sources: list[Sequence[str]] = []
    short: list[str] = []
    for row in Table(path) if table else json_rows(path):
        if in_pieces and len(row) > LONG:
            sources += [short, Pieces(row.encode(), path)]
            short = []
        elif row.strip():
            short.append(row)
    return [*sources, short]


# Plain text.


def _plain(path: Path, in_pieces: bool) -> Sequence[str]:
    data = contents(path)
    if in_pieces and len(data) > LONG:
        return Pieces(data, path)
    text = _decode(data[:], path)
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
        raise not_utf8(path, start + error.start) from error
    if "\0" in text:
        raise UsageError(f"{path} is a binary file, not text.", "dataset")
    return text


# Some of the documents.


def split_of(documents: Sequence[str], split: str) -> Sequence[str]:
    """One part of a corpus that has no split of its own: every eighth document, or the last eighth of a short one."""
    if split == "all":
        return documents
    held_out = split == "heldout"
    if len(documents) >= HELD_OUT:
        return Documents([documents], _Numbers(len(documents), held_out))
    cuts = [len(d) - len(d) // HELD_OUT for d in documents]
    return [d[cut:] if held_out else d[:cut] for d, cut in zip(documents, cuts, strict=True)]


class _Numbers(Sequence[int]):
    """Numbers of the documents of one part; no list of them is made, as a large file has millions."""

    def __init__(self, count: int, held_out: bool):
        self.held_out, self.size = held_out, count // HELD_OUT if held_out else count - count // HELD_OUT

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        place = range(self.size)[index]
        return place * HELD_OUT + HELD_OUT - 1 if self.held_out else place + place // (HELD_OUT - 1)


def shuffled(documents: Sequence[str], rng: random.Random, first: int) -> Iterator[list[str]]:
    """The documents in a random order, some at a time, which are read together.

    Args:
        first: how many are read at first: not many more than will be needed.
    """
    order: Iterable[int]
    if len(documents) <= MANY:
        order = list(range(len(documents)))
        rng.shuffle(order)
    else:
        order = _drawn(len(documents), rng)
    numbers, size = iter(order), min(first, SOME_AT_ONCE)
    while some := list(islice(numbers, size)):
        yield documents.take(some) if isinstance(documents, Documents) else [documents[i] for i in some]
        size = min(2 * size, SOME_AT_ONCE)


def _drawn(count: int, rng: random.Random) -> Iterator[int]:
    """The numbers below ``count`` in a random order: what is drawn changes places with the first that is left."""
    moved: dict[int, int] = {}
    for place in range(count):
        drawn = rng.randrange(place, count)
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.pop(place, place)
