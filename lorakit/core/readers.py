"""Data files of every known kind → their rows as they stand, in chunks, each row with its place.

Nothing of a row is looked at here but where it begins and ends.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

from lorakit.core import records
from lorakit.core.errors import InputRefused, disk_failed, first_line
from lorakit.core.hub import DATA_KINDS, PACKINGS

MAX_JSON_BYTES = 2**30
"""The largest file that is read whole: JSON, and a table that was compressed as a file."""

_CHUNK_BYTES = 256 * 2**10
_CHUNK_ROWS = 1000
_TEXT_BYTES = 2**20
_BUFFER_BYTES = 2**18
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

_Raw = bytes | dict[str, Any]
_Piece = tuple[list[_Raw], int]
"""Raw rows, and how many bytes of the file were read when they ended."""


@dataclass(frozen=True)
class Chunk:
    """Raw rows of one file, in order: lines of JSONL as unparsed bytes (blank ones are b""), or rows of a table."""

    name: str
    """Of the file, as messages show it."""
    first: int
    """The number of the first raw row in its file, counted from 1: its line where `in_lines`, else its row."""
    raws: list[bytes | dict[str, Any]]
    in_lines: bool
    done_bytes: int
    """Of the dataset's `size_bytes`, read when this chunk ended; compressed bytes count as compressed."""

    def place(self, index: int) -> str:
        """Where raws[index] stands, for messages."""
        number = self.first + index
        return f"{self.name}:{number}" if self.in_lines else f"{self.name}: row {number}"


@dataclass(frozen=True)
class File:
    """A data file; `kind` is a value of DATA_KINDS."""

    path: Path
    name: str
    kind: str


def kind_of(name: str) -> str | None:
    """The kind that a file's name says, whatever its case."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in PACKINGS:
        suffix = os.path.splitext(stem)[1]
    return DATA_KINDS.get(suffix)


def _packing(file: File) -> str:
    """The suffix of the file's compression, or ""."""
    suffix = file.path.suffix.lower()
    return suffix if suffix in PACKINGS else ""


def read_chunks(file: File, before_bytes: int) -> Iterator[Chunk]:
    """The raw rows of a file, in order; `before_bytes` is the size of the files before it.

    Raises InputRefused naming the file (and line or row) where it is damaged or isn't what its kind says, DiskFailed
    where the disk fails.
    """
    first = 1
    kind = "jsonl" if file.kind == "json" and _is_jsonl(file) else file.kind
    for raws, done_bytes in _READERS[kind](file):
        yield Chunk(file.name, first, raws, kind == "jsonl", before_bytes + done_bytes)
        first += len(raws)


def size_bytes_of(file: File) -> int:
    """As it lies on disk. Raises DiskFailed."""
    try:
        return file.path.stat().st_size
    except OSError as error:
        raise disk_failed(error, file.path) from error


def _damaged(file: File, error: BaseException) -> InputRefused:
    what = {".gz": "gzip ", ".zst": "zstd "}.get(_packing(file), "") + {"txt": "text"}.get(file.kind, file.kind)
    return InputRefused(
        f"{file.name}: found a damaged {what} file ({first_line(error)[:200]}), need a whole one",
        "get or write the file again",
    )


@contextmanager
def _opened(file: File) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The file's unpacked bytes, and how many bytes of it were read so far.

    What fails while it is read becomes InputRefused (damage) or DiskFailed (the disk).
    """
    try:
        with file.path.open("rb", buffering=_BUFFER_BYTES) as raw:
            match _packing(file):
                case ".gz":
                    stream: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
                case ".zst":
                    import pyarrow

                    stream = io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), _BUFFER_BYTES)
                case _:
                    stream = raw
            yield stream, raw.tell
    except OSError as error:
        if error.errno is None:  # of gzip or pyarrow, about the content
            raise _damaged(file, error) from None
        raise disk_failed(error, file.path) from error
    except (EOFError, zlib.error) as error:
        raise _damaged(file, error) from None


def _numbered_lines(file: File, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each line with its end, counted from 1. Raises InputRefused where one is too long to be a row."""
    for number in count(1):
        line = stream.readline(records.MAX_ROW_BYTES + 1)
        if not line:
            return
        if len(line) > records.MAX_ROW_BYTES:
            raise InputRefused(
                f"{file.name}:{number}: found a row over {records.MAX_ROW_BYTES / 2**20:.0f} MiB, need less",
                "split that row, or check that the file has one row a line",
            )
        yield number, line


def _jsonl(file: File) -> Iterator[_Piece]:
    raws: list[_Raw] = []
    held_bytes = 0
    with _opened(file) as (stream, done_bytes):
        for _, line in _numbered_lines(file, stream):
            raws.append(line.strip())
            held_bytes += len(line)
            if held_bytes >= _CHUNK_BYTES or len(raws) >= _CHUNK_ROWS:
                yield raws, done_bytes()
                raws, held_bytes = [], 0
        if raws:
            yield raws, done_bytes()


def _is_jsonl(file: File) -> bool:
    """Whether a file that is named JSON has an object on its first line, and more after it."""
    with _opened(file) as (stream, _):
        first = b""
        while not first and (line := stream.readline(records.MAX_ROW_BYTES + 1)):
            first = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not first.startswith(b"{") or len(first) > records.MAX_ROW_BYTES:
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        while line := stream.readline(_BUFFER_BYTES):
            if line.strip():
                return True
        return False


def _json(file: File) -> Iterator[_Piece]:
    raw = _whole(file, "convert it to JSONL, which is read a line at a time")
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        return
    rows = _rows_in(records.parse_json(raw, file.name), file.name)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputRefused(
                f"{file.name}: row {index + 1}: found {_short(row)}, need an object", "correct or remove that row"
            )
    step = _rows_at_once(len(rows), len(raw))
    size_bytes = size_bytes_of(file)
    for start in range(0, len(rows), step):
        raws = rows[start : start + step]
        yield raws, size_bytes * (start + len(raws)) // len(rows)


def _rows_in(value: Any, name: str) -> list[Any]:
    """The rows of a JSON file: its array, or its object where that is a row, or the only list of objects in it."""
    if isinstance(value, list):
        return value
    hint = "write the rows as a JSON array of objects, or as JSONL"
    if not isinstance(value, dict):
        raise InputRefused(f"{name}: found {_short(value)}, need an array of objects", hint)
    if _is_row(value):
        return [value]
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    of_objects = [key for key, items in lists.items() if items and all(isinstance(item, dict) for item in items)]
    if len(of_objects) == 1:
        return lists[of_objects[0]]
    if of_objects:
        found = f"several lists of objects ({', '.join(of_objects)})"
    else:
        found = f"an object {'of columns' if lists else 'without a list of objects'} ({', '.join(value) or 'empty'})"
    raise InputRefused(f"{name}: found {found}, need an array of objects", hint)


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether an object is one row of a known format: lists of rows or columns aren't, lists of turns are."""
    lists = [item for item in value.values() if isinstance(item, list)]
    turns = [
        item for item in lists if item and all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in item)
    ]
    try:
        records.detect_format(value, "")
    except InputRefused:
        return False
    return bool(turns) or not lists


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(file: File, hint: str) -> bytes:
    """All of the file's unpacked bytes. Raises InputRefused where they are over MAX_JSON_BYTES."""
    pieces, left_bytes = [], MAX_JSON_BYTES + 1
    with _opened(file) as (stream, _):
        while left_bytes and (piece := stream.read(min(left_bytes, 16 * 2**20))):
            pieces.append(piece)
            left_bytes -= len(piece)
    if not left_bytes:
        raise InputRefused(f"{file.name}: found over {MAX_JSON_BYTES / 2**30:.0f} GiB, need less", hint)
    return b"".join(pieces)


def _rows_at_once(rows: int, size_bytes: int) -> int:
    return max(1, min(_CHUNK_ROWS, rows * _CHUNK_BYTES // max(1, size_bytes)))


def _csv(file: File) -> Iterator[_Piece]:
    hint = "write it with quotes around fields that hold separators, quotes or line breaks"
    csv.field_size_limit(records.MAX_ROW_BYTES)
    header: list[str] = []
    raws: list[_Raw] = []
    number = held_bytes = 0
    with _opened(file) as (stream, done_bytes):
        lines = _decoded(file, stream)
        reader = csv.reader(lines, "excel-tab" if file.kind == "tsv" else "excel", strict=True)
        try:
            for fields in reader:
                if not fields:
                    continue  # a blank line
                if not header:
                    header = _checked_columns(fields, file.name)
                    _refuse_delimiter(header, file)
                    continue
                number += 1
                if len(fields) != len(header):
                    raise InputRefused(
                        f"{file.name}: row {number} (line {reader.line_num}): found {len(fields)} fields, "
                        f"need {len(header)}: {', '.join(header)}",
                        hint,
                    )
                raws.append(dict(zip(header, fields, strict=True)))
                held_bytes += sum(map(len, fields))
                if held_bytes >= _CHUNK_BYTES or len(raws) >= _CHUNK_ROWS:
                    yield raws, done_bytes()
                    raws, held_bytes = [], 0
        except csv.Error as error:
            raise InputRefused(
                f"{file.name}: row {number + 1} (line {reader.line_num}): found {error}, need {file.kind.upper()}", hint
            ) from None
        if raws:
            yield raws, done_bytes()


def _refuse_delimiter(header: Sequence[str], file: File) -> None:
    """Raises InputRefused where the only column's name is a whole header with another delimiter."""
    names = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    own = "\t" if file.kind == "tsv" else ","
    other = next((sign for sign in names if sign in header[0]), None) if len(header) == 1 else None
    if other is not None:
        hint = "name it .tsv" if other == "\t" else f"write it with {names[own]} (pandas: read_csv(…, sep={other!r}))"
        raise InputRefused(
            f"{file.name}: found columns separated by {names[other]} ({header[0]}), need {names[own]} in {file.kind}",
            hint,
        )


def _decoded(file: File, stream: IO[bytes]) -> Iterator[str]:
    for number, line in _numbered_lines(file, stream):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise records.not_utf8(f"{file.name}:{number}", error) from None


def _checked_columns(columns: Sequence[str], name: str) -> list[str]:
    if not all(columns):
        raise InputRefused(
            f"{name}: found a column without a name ({', '.join(map(repr, columns))}), need a header that names all",
            "name the columns in the first line (with pandas: to_csv(..., index=False))",
        )
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise InputRefused(f"{name}: found the column {twice[0]} twice, need each once", "rename or remove one of them")
    return list(columns)


def _txt(file: File) -> Iterator[_Piece]:
    start = 0
    with _opened(file) as (stream, done_bytes):
        while piece := stream.read(_TEXT_BYTES):
            if not piece.endswith(b"\n"):
                piece += stream.readline(records.MAX_ROW_BYTES + 1)
            if len(piece) > _TEXT_BYTES + records.MAX_ROW_BYTES:
                raise InputRefused(
                    f"{file.name}: found a line over {records.MAX_ROW_BYTES / 2**20:.0f} MiB, need less",
                    "break the text into lines",
                )
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                raise records.not_utf8(f"{file.name}: offset {start + error.start}", error) from None
            yield [{"text": text.removeprefix("\ufeff") if start == 0 else text}], done_bytes()
            start += len(piece)


def _table(batches: Callable[[File, Any], Iterable[tuple[Any, float]]]) -> Callable[[File], Iterator[_Piece]]:
    """A reader from one that gives Arrow batches, each with the share of the file that has been read at its end."""

    def read(file: File) -> Iterator[_Piece]:
        import pyarrow

        size_bytes = size_bytes_of(file)
        try:
            if _packing(file):
                source = pyarrow.BufferReader(_whole(file, "unpack it"))
            else:
                source = pyarrow.OSFile(os.fsencode(file.path))
            with source:
                for batch, share in batches(file, source):
                    batch.validate(full=True)  # damaged offsets would lead to_pylist out of the buffers
                    step = _rows_at_once(batch.num_rows, batch.nbytes)
                    for start in range(0, batch.num_rows, step):
                        yield batch.slice(start, step).to_pylist(), int(size_bytes * share)
        except MemoryError:
            raise
        except OSError as error:
            raise _damaged(file, error) if error.errno is None else disk_failed(error, file.path) from error
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # bytes that aren't text, or no date
            raise _damaged(file, error) from None

    return read


def _parquet_batches(file: File, source: Any) -> Iterator[tuple[Any, float]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
    _checked_columns(table.schema_arrow.names, file.name)
    rows = 0
    for batch in table.iter_batches(_CHUNK_ROWS):
        rows += batch.num_rows
        yield batch, rows / max(rows, table.metadata.num_rows)


def _arrow_batches(file: File, source: Any) -> Iterator[tuple[Any, float]]:
    """Of an IPC stream, or of an IPC file, which begins with its magic."""
    import pyarrow

    size = source.size()
    source.seek(max(0, size - len(_STREAM_END)))
    end = source.read()
    source.seek(0)
    begin = source.read(8)
    source.seek(0)
    if begin.startswith(b"ARROW1"):
        table = pyarrow.ipc.open_file(source)
        _checked_columns(table.schema.names, file.name)
        for index in range(table.num_record_batches):
            yield table.get_batch(index), (index + 1) / table.num_record_batches
        return
    if begin.startswith(_STREAM_END[:4]) and end != _STREAM_END:
        raise pyarrow.ArrowInvalid("no end of stream")  # cut between two batches, which the reader takes for the end
    stream = pyarrow.ipc.open_stream(source)
    _checked_columns(stream.schema.names, file.name)
    for batch in stream:
        yield batch, min(1.0, source.tell() / size)


_READERS: Mapping[str, Callable[[File], Iterator[_Piece]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "txt": _txt,
    "parquet": _table(_parquet_batches),
    "arrow": _table(_arrow_batches),
}
