"""Rows of JSON and of tables: the string in the field or column 'text', whatever the others hold.

Short files are read whole and checked whole. Of long ones only the places of rows are known at first, and a row is read
and checked when it is asked for, so that a sample of a large file costs what the sample needs.
"""

import contextlib
import io
import json
import mmap
import re
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from proxsparse.errors import UsageError
from proxsparse.model.zipped import LONG, contents, not_utf8, opened, unreadable, unzipping

SPACE = re.compile(r"\s*")
ROWS_AT_ONCE = 256  # of a table, while those that are wanted are picked


class NoTextColumn(UsageError):
    """A table has no 'text': an error for a file on its own, and a file to pass over in a folder."""


class Rows(Sequence[str]):
    """Rows of a long file, each read when it is asked for; '' where a row has no text.

    Of a row of more than ``LONG`` characters only that many are given. Files of such rows are read whole instead.
    """

    def take(self, numbers: Sequence[int]) -> list[str]:
        """Several rows: those that lie together in the file are read together."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        return self.take([range(len(self))[index]])[0]


# JSON.


def json_rows(path: Path) -> Iterator[str]:
    """The strings in the field 'text' of every row.

    Raises:
        UsageError: the file is damaged, or a row holds something else.
    """
    fields: list[str] | None = None
    found = False
    number = 0
    for number, row in enumerate(_json_values(path), 1):
        text = _text_of(row, path, number)
        fields = list(row) if fields is None else fields
        found = found or "text" in row
        if text is not None:
            yield text
    if number and not found:
        raise _no_text(path, fields or [])


def _text_of(row: Any, path: Path, number: int) -> str | None:
    if not isinstance(row, dict):
        raise NoTextColumn(f"{path} needs rows with a field 'text', and row {number} is {_kind(row)}.", "dataset")
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise UsageError(f"The field 'text' of {path} is {_kind(text)} in row {number}; give a string.", "dataset")
    return None if text is None else _encodable(text)


def _json_values(path: Path) -> Iterator[Any]:
    with unzipping(path), io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number > 1:
                    raise _no_json(path, f"line {number}: {error}") from error
                yield from _spread_values(line + file.read(), path)
                return
            yield from value if isinstance(value, list) else [value]


def _spread_values(text: str, path: Path) -> Iterator[Any]:
    """Values of JSON that is spread over lines: an array, or one object after the other."""
    decoder, place = json.JSONDecoder(), 0
    try:
        while (place := SPACE.match(text, place).end()) < len(text):  # type: ignore[union-attr]
            value, place = decoder.raw_decode(text, place)
            yield from value if isinstance(value, list) else [value]
    except (json.JSONDecodeError, RecursionError) as error:
        raise _no_json(path, str(error)) from error


def _no_json(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path} is not a readable json file ({reason}).", "dataset")


class JsonLines(Rows):
    """A long file with one object per line. Kept are the places of the lines: eight bytes for each.

    Raises:
        NoTextColumn: no row has a field 'text'.
    """

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self.data, self.path = data, path
        self.starts = array("q", _line_starts(data))
        if not any("text" in self._row(number) for number in range(len(self))):
            raise _no_text(path, list(self._row(0)))

    def __len__(self) -> int:
        return len(self.starts)

    def _row(self, number: int) -> Any:
        start = self.starts[number]
        end = self.data.find(b"\n", start)
        line = self.data[start : end if end >= 0 else len(self.data)]
        try:
            row = json.loads(line.decode("utf-8" if start else "utf-8-sig"))
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, start + error.start) from error
        except (ValueError, RecursionError) as error:
            raise _no_json(self.path, f"row {number + 1}: {error}") from error
        _text_of(row, self.path, number + 1)
        return row

    def take(self, numbers: Sequence[int]) -> list[str]:
        return [(_text_of(self._row(number), self.path, number + 1) or "")[:LONG] for number in numbers]


def _line_starts(data: mmap.mmap | bytes) -> Iterator[int]:
    """Where lines begin that are not empty."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if end - start > 1000 or data[start:end].strip():
            yield start
        start = end + 1


def long_json(path: Path) -> Rows | None:
    """The rows of a file that is long and has one object per line; None: it is to be read whole."""
    data = contents(path)
    if len(data) <= LONG:
        return None
    first = data[: max(data.find(b"\n"), 0)]
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    rows = JsonLines(data, path)
    return rows if len(data) <= LONG * len(rows) else None


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


def _no_text(path: Path, names: Sequence[str], count: int = 10) -> NoTextColumn:
    more = [f"{len(names) - count} more"] if len(names) > count else []
    found = ", ".join([*names[:count], *more]) or "none"
    return NoTextColumn(
        f"{path} needs a column 'text', and has {found}. Give that name to the one that holds the text.", "dataset"
    )


# Tables.


class Part(NamedTuple):
    """Rows that lie together in a file: a row group of Parquet, a batch of Arrow.

    Attributes:
        rows: how many there are.
        bytes: of their text.
        batches: gives them some at a time, as ``pyarrow.RecordBatch``.
    """

    rows: int
    bytes: int
    batches: Callable[[], Iterator[Any]]


class Table(Rows):
    """Rows of a Parquet or Arrow file, of whose columns only 'text' is read.

    Raises:
        UsageError: the file is damaged, or has no column 'text' of strings.
    """

    def __init__(self, path: Path):
        self.path = path
        with _reading(path):
            schema, parts = _parquet(path) if path.suffix.lower() == ".parquet" else _arrow(path)
            _check_column(schema, path)
            self.parts = list(parts)
        self.ends = list(accumulate(part.rows for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[str]:
        """The texts of all rows that have one."""
        with _reading(self.path):
            for part in self.parts:
                for batch in part.batches():
                    yield from (row for row in batch.column("text").to_pylist() if row is not None)

    def take(self, numbers: Sequence[int]) -> list[str]:
        found: dict[int, str] = {}
        with _reading(self.path):
            for part, own in groupby(sorted(set(numbers)), key=lambda number: bisect_right(self.ends, number)):
                found |= self._picked(part, deque(own))
        return [found[number] for number in numbers]

    def _picked(self, part: int, wanted: deque[int]) -> Iterator[tuple[int, str]]:
        place = self.ends[part] - self.parts[part].rows
        for batch in self.parts[part].batches():
            column = batch.column("text")
            while wanted and wanted[0] < place + len(batch):
                number = wanted.popleft()
                yield number, (column[number - place].as_py() or "")[:LONG]
            if not wanted:
                return
            place += len(batch)


def long_table(path: Path) -> Rows | None:
    """The rows of a table that is long; None: it is to be read whole."""
    if path.stat().st_size <= LONG:
        return None
    table = Table(path)
    return table if sum(part.bytes for part in table.parts) <= LONG * len(table) else None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What pyarrow raises on a damaged file, in a sentence."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, error) from error


def _check_column(schema: Any, path: Path) -> None:
    import pyarrow

    if "text" not in schema.names:
        raise _no_text(path, schema.names)
    held = schema.field("text").type
    values = held.value_type if pyarrow.types.is_dictionary(held) else held
    if str(values) not in ("string", "large_string", "string_view", "null"):
        raise UsageError(f"The column 'text' of {path} holds values of type {held}; give strings.", "dataset")


def _parquet(path: Path) -> tuple[Any, Iterator[Part]]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, memory_map=True)

    def parts() -> Iterator[Part]:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = (group.column(i) for i in range(group.num_columns))
            size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
            batches = partial(file.iter_batches, ROWS_AT_ONCE, row_groups=[number], columns=["text"])
            yield Part(group.num_rows, size, batches)

    return file.schema_arrow, parts()


def _arrow(path: Path) -> tuple[Any, Iterator[Part]]:
    """Both kinds of Arrow files: the stream, which the package datasets writes, and the one with a footer."""
    import pyarrow

    source = pyarrow.memory_map(str(path))

    def parts(batches: Iterator[Any]) -> Iterator[Part]:  # which are not copied: they point into the file
        for batch in batches:
            yield Part(len(batch), batch.column("text").nbytes, partial(iter, [batch]))

    try:
        stream = pyarrow.ipc.open_stream(source)
        return stream.schema, parts(iter(stream))
    except pyarrow.ArrowInvalid:
        source.seek(0)
        file = pyarrow.ipc.open_file(source)
        return file.schema, parts(file.get_batch(i) for i in range(file.num_record_batches))
