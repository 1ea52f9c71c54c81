"""Data files of every kind → the same rows, in order, each with its place; damage is refused, never a crash."""

import csv
import errno
import gzip
import io
import json
import os
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.core import records
from lorakit.core.errors import DiskFailed, InputRefused, LorakitError
from lorakit.core.events import Notice, Progress
from lorakit.core.hub import DATA_KINDS
from lorakit.core.sources import Dataset, open_dataset

Rows = list[dict[str, Any]]

ROWS: Rows = [
    {"prompt": "What is 1 + 1?", "completion": "2"},
    {"prompt": 'a "quoted", comma\nand a line\tbreak', "completion": "ünï — 😀"},
    {"prompt": " spaces ", "completion": "'"},
]


def opened(*names: object, **choices: Any) -> Dataset:
    return open_dataset([str(name) for name in names], report=lambda event: None, **choices)


def rows_of(dataset: Dataset) -> Rows:
    """Rows as a consumer reads them: lines parsed, blank ones passed over."""
    raws = [raw for chunk in dataset.chunks() for raw in chunk.raws]
    return [json.loads(raw) if isinstance(raw, bytes) else raw for raw in raws if raw != b""]


def read(*names: object, **choices: Any) -> Rows:
    return rows_of(opened(*names, **choices))


def texts(*names: object, **choices: Any) -> list[str]:
    return [row["text"] for row in read(*names, **choices)]


def refusal(*names: object, **choices: Any) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        read(*names, **choices)
    assert caught.value.hint
    assert "found " in caught.value.message
    assert "need " in caught.value.message
    return caught.value


def notices(*names: object, **choices: Any) -> list[str]:
    told: list[Notice | Progress] = []
    open_dataset([str(name) for name in names], report=told.append, **choices)
    return [event.text for event in told if isinstance(event, Notice)]


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def jsonl(*values: str) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


def tree(folder: Path, *paths: str) -> Path:
    """A folder of JSONL files, each with its own path as its only row."""
    for path in paths:
        put(folder / path, jsonl(path))
    return folder


def separated(rows: Rows, delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: Rows, new: Callable[..., Any] = pyarrow.ipc.new_stream, rows_at_once: int = 1000) -> bytes:
    sink, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table, rows_at_once)
    return sink.getvalue().to_pybytes()


def feather(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), sink, compression="lz4")
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


WRITERS: Mapping[str, Callable[[Rows], bytes]] = {
    "rows.jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "rows.ndjson": lambda rows: b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows),
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "data.json": lambda rows: json.dumps({"version": "1", "data": rows}, indent=2).encode(),
    "lines.json": lambda rows: b"\n" + b"".join(json.dumps(row).encode() + b"\n" for row in [*rows, rows[0]])[:-1],
    "rows.csv": lambda rows: separated(rows, ","),
    "BOM.CSV": lambda rows: b"\xef\xbb\xbf" + separated(rows, ","),
    "rows.tsv": lambda rows: separated(rows, "\t"),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "file.arrow": lambda rows: arrow(rows, pyarrow.ipc.new_file),
    "rows.feather": feather,
}
PACKERS: Mapping[str, Callable[[bytes], bytes]] = {"": lambda content: content, ".gz": gzip.compress, ".zst": zstd}


# Every kind


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(name: str, packing: str, tmp_path: Path) -> None:
    path = put(tmp_path / f"{name}{packing}", PACKERS[packing](WRITERS[name](ROWS)))
    assert read(path) == (ROWS if name != "lines.json" else [*ROWS, ROWS[0]])


@given(
    rows=st.lists(
        st.fixed_dictionaries({"a": st.text(), "b": st.text(min_size=1)}).filter(
            lambda row: not {"\r", "\0"} & set(row["a"] + row["b"])
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_from_every_kind(rows: Rows, tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        expected = [*rows, rows[0]] if name == "lines.json" else rows
        assert read(put(tmp_path / name, write(rows))) == expected, name


def test_a_suffix_of_every_known_kind_is_tried_here() -> None:
    tried = {os.path.splitext(name.lower())[1] for name in WRITERS} | {".txt", ".text", ".md"}
    assert tried == set(DATA_KINDS)


def test_values_that_json_cant_hold_stay_as_they_are(tmp_path: Path) -> None:
    rows = [{"a": b"\xff", "b": [{"c": 1.5}], "d": None}]
    assert read(put(tmp_path / "a.parquet", parquet(rows))) == rows
    assert read(put(tmp_path / "a.arrow", arrow(rows))) == rows


@pytest.mark.parametrize("name", ["a.txt", "a.text", "a.md"])
@pytest.mark.parametrize("packing", PACKERS)
def test_a_text_is_cut_at_line_ends(name: str, packing: str, tmp_path: Path) -> None:
    lines = [f"line {number} ünï\n" for number in range(200_000)]
    path = put(tmp_path / f"{name}{packing}", PACKERS[packing](b"\xef\xbb\xbf" + "".join(lines).encode()))
    chunks = list(opened(path).chunks())
    pieces = [raw["text"] for chunk in chunks for raw in chunk.raws if isinstance(raw, dict)]
    assert "".join(pieces) == "".join(lines)
    assert len(pieces) == -(-len("".join(lines).encode()) // 2**20)
    assert all(piece.endswith("\n") for piece in pieces)
    assert [chunk.place(0) for chunk in chunks] == [f"{path}: row {number + 1}" for number in range(len(pieces))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.csv.zst"])
def test_an_empty_file_has_no_rows(name: str, tmp_path: Path) -> None:
    assert list(opened(put(tmp_path / name, b"")).chunks()) == []


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_without_rows_has_none(name: str, tmp_path: Path) -> None:
    empty = pyarrow.schema([("text", pyarrow.string())]).empty_table()
    sink = pyarrow.BufferOutputStream()
    if name == "a.parquet":
        pyarrow.parquet.write_table(empty, sink)
    else:
        with pyarrow.ipc.new_stream(sink, empty.schema) as writer:
            writer.write_table(empty)
    assert read(put(tmp_path / name, sink.getvalue().to_pybytes())) == []


# Chunks


def test_blank_lines_are_kept_so_that_numbers_hold(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", b'\n{"text": "a"}\n \t\r\n\n{"text": "b"}')
    chunk = next(opened(path).chunks())
    assert chunk.raws == [b"", b'{"text": "a"}', b"", b"", b'{"text": "b"}']
    assert chunk.in_lines
    assert [chunk.place(index) for index in (1, 4)] == [f"{path}:2", f"{path}:5"]


def test_lines_arent_parsed(tmp_path: Path) -> None:
    assert next(opened(put(tmp_path / "a.jsonl", b"{not json\n\xff\n")).chunks()).raws == [b"{not json", b"\xff"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "file.arrow"])
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("length", [1, 3000])
def test_chunks_are_small_numbered_and_counted(name: str, packing: str, length: int, tmp_path: Path) -> None:
    rows = [{"text": f"{number}" + "x" * length} for number in range(2500)]
    path = put(tmp_path / f"{name}{packing}", PACKERS[packing](WRITERS[name](rows)))
    dataset = opened(path, path)
    chunks = list(dataset.chunks())
    assert rows_of(dataset) == rows * 2
    seen = 0
    for chunk in chunks:
        assert 1 <= len(chunk.raws) <= 1000
        assert len(pickle.dumps(chunk)) < 2**20
        assert chunk.first == seen % 2500 + 1
        seen += len(chunk.raws)
        assert pickle.loads(pickle.dumps(chunk)) == chunk
    done = [chunk.done_bytes for chunk in chunks]
    assert done == sorted(done)
    assert dataset.size_bytes == 2 * path.stat().st_size
    assert dataset.size_bytes - 8 <= done[-1] <= dataset.size_bytes  # a stream's end mark comes after its rows


def test_rows_of_tables_are_numbered_without_the_header(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", b"text\n\na\nb\n")
    chunk = next(opened(path).chunks())
    assert (chunk.place(0), chunk.place(1), chunk.in_lines) == (f"{path}: row 1", f"{path}: row 2", False)


# Refused content


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_FILES: Sequence[tuple[str, bytes, str]] = [
    ("a.json", b'{"prompt": ["a"], "completion": ["b"]}', "an object of columns (prompt, completion)"),
    ("a.json", b'{"a": [{}], "b": [{}]}', "several lists of objects (a, b)"),
    ("a.json", b'{"a": 1}', "an object without a list of objects (a)"),
    ("a.json", b'[{"text": "a"}, 5]', "row 2: found 5"),
    ("a.json", b'"text"', 'found "text"'),
    ("a.json", b'[{"text": "a"}', "need a JSON object"),
    ("a.json", b'[{"text": NaN}]', "NaN"),
    ("a.json", b'[{"text": 1, "text": 2}]', "a key twice"),
    ("a.json", b'[{"text": "\xff"}]', "0xff"),
    ("a.json", b"[" + DEEP + b"]", "nesting too deep"),
    ("a.csv", b"a,b\n1,2\n3\n", "row 2 (line 3): found 1 fields, need 2: a, b"),
    ("a.csv", b"a,b\n1,2,3\n", "row 1 (line 2): found 3 fields"),
    ("a.csv", b",text\n0,a\n", "a column without a name"),
    ("a.csv", b"a,b,a\n1,2,3\n", "the column a twice"),
    ("a.csv", b'a,b\n1,"2\n', "unexpected end of data"),
    ("a.csv", b'a,b\n1,"2"3\n', "row 1 (line 2)"),
    ("a.csv", b"a,b\r1,2\r", "new-line character"),
    ("a.csv", b"a\nx\n\xe9\n", "a.csv:3: found byte 0xe9"),
    ("a.tsv", b"a\tb\n1,2\n", "row 1 (line 2): found 1 fields"),
    ("a.txt", b"x" * 2**20 + b"\n" + b"abc\xff", f"a.txt: offset {2**20 + 4}: found byte 0xff"),
    ("a.txt", "text".encode("utf-16"), "found text in UTF-16, need UTF-8"),
    ("a.csv", "a,b\n1,2\n".encode("utf-16"), "found text in UTF-16, need UTF-8"),
    ("a.csv", "a,b\n1,é\n".encode("latin-1"), "a.csv:2: found byte 0xe9 that isn't UTF-8 ('é' in Latin-1"),
    ("a.csv", b"prompt;completion\n1;2\n", "columns separated by semicolons (prompt;completion), need commas in csv"),
    ("a.csv", b"prompt\tcompletion\n1\t2\n", "columns separated by tabs"),
    ("a.tsv", b"prompt,completion\n1,2\n", "columns separated by commas (prompt,completion), need tabs in tsv"),
    ("a.parquet", b"", "damaged parquet"),
    ("a.arrow", b"", "damaged arrow"),
    ("a.parquet", b"PAR1 and no more", "damaged parquet"),
    ("a.arrow", b"ARROW1 and no more", "damaged arrow"),
    ("a.arrow", b"text" * 20, "damaged arrow"),
    ("a.jsonl.gz", b"no gzip", "damaged gzip jsonl"),
    ("a.jsonl.zst", b"no zstd at all", "damaged zstd jsonl"),
    ("a.parquet.gz", gzip.compress(b"no parquet"), "damaged gzip parquet"),
]


@pytest.mark.parametrize(("name", "content", "found"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_isnt_what_it_should_be_is_refused_by_name(
    name: str, content: bytes, found: str, tmp_path: Path
) -> None:
    path = put(tmp_path / name, content)
    message = refusal(path).message
    assert message.startswith(str(path))
    assert found in message


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "file.arrow", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_file_that_was_cut_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    stem, packing = os.path.splitext(name)
    rows = [{"text": f"row {number}"} for number in range(40)]
    write = WRITERS[stem if packing in PACKERS else name]
    whole = PACKERS[packing if packing in PACKERS else ""](write(rows))
    if name.endswith("arrow"):
        whole = arrow(rows, pyarrow.ipc.new_stream if stem == "rows" else pyarrow.ipc.new_file, rows_at_once=10)
    for length in range(1, len(whole), max(1, len(whole) // 150)):
        path = put(tmp_path / name, whole[:length])
        assert str(path) in refusal(path).message


def test_a_stream_that_was_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    whole = arrow([{"text": "a"}, {"text": "b"}], rows_at_once=1)
    with pyarrow.ipc.open_stream(whole[:-8]) as stream:
        assert stream.read_all().num_rows == 2  # to pyarrow it is whole
    assert "no end of stream" in refusal(put(tmp_path / "a.arrow", whole[:-8])).message


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "file.arrow", "rows.jsonl.gz"])
def test_flipped_bits_are_refused_or_read_and_nothing_else(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"row {number}"} for number in range(300)]
    whole = gzip.compress(WRITERS["rows.jsonl"](rows)) if name.endswith(".gz") else WRITERS[name](rows)
    chance = random.Random(0)
    refused = []
    for _ in range(150):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        try:
            list(opened(put(tmp_path / name, bytes(content))).chunks())
        except LorakitError as error:
            refused.append(error.message)
    assert len(refused) > 30
    assert all(name in message for message in refused)


def test_a_line_or_file_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 100)
    long = b'{"text": "' + b"x" * 100 + b'"}\n'
    assert f"{tmp_path}/a.jsonl:2: found a row over" in refusal(put(tmp_path / "a.jsonl", b"{}\n" + long)).message
    assert "a.csv:2: found a row over" in refusal(put(tmp_path / "a.csv", b"text\n" + long)).message
    monkeypatch.setattr("lorakit.core.readers.MAX_JSON_BYTES", 1000)
    error = refusal(put(tmp_path / "a.json", b"[" + b" " * 1000 + b"]"))
    assert "a.json: found over" in error.message
    assert "JSONL" in error.hint
    bomb = put(tmp_path / "bomb.json.gz", gzip.compress(b"[" + b" " * 10**6 + b"]"))
    assert "found over" in refusal(bomb).message


def test_a_quote_that_is_never_closed_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 1000)
    path = put(tmp_path / "a.csv", b'text\n"' + b"never closed\n" * 1000)
    try:
        assert "field larger than field limit" in refusal(path).message
    finally:
        csv.field_size_limit(64 * 2**20)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_failing_disk_is_named_as_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(put(tmp_path / name, gzip.compress(jsonl("a"))))

    def fail(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DiskFailed, match="Input/output error"):
        list(dataset.chunks())
    with pytest.raises(DiskFailed, match="Input/output error"):
        dataset.fingerprint()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_has_gone_is_told(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, b"{}")
    dataset = opened(path)
    path.unlink()
    with pytest.raises(DiskFailed, match=name):
        list(dataset.chunks())
    with pytest.raises(DiskFailed, match=name):
        assert dataset.size_bytes


# JSON that is one row


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "messages": TURNS},
        {"messages": TURNS, "tools": [{"name": "add"}], "tags": ["x"]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"chosen": TURNS, "rejected": TURNS},
        {"prompt": "a", "completion": "b"},
        {"text": "a"},
    ],
)
def test_an_object_that_is_a_row_is_one_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.json", json.dumps(row, indent=1).encode())) == [row]


@pytest.mark.parametrize("of", [{"text": "about"}, {"messages": []}, {}])
def test_an_object_with_one_list_of_rows_is_those_rows(of: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}]
    assert read(put(tmp_path / "a.json", json.dumps({**of, "data": rows}).encode())) == rows


# JSON that is JSONL


@pytest.mark.parametrize(
    ("content", "in_lines"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', True),
        (b'\xef\xbb\xbf\n{"text": "a"}\n\n{"text": "b"}', True),
        (b'[{"text": "a"},\n{"text": "b"}]', False),
        (b'{"rows":\n[{"text": "a"}, {"text": "b"}]}', False),
        (b'{"rows": [{"text": "a"}, {"text": "b"}]}\n\n', False),
    ],
)
def test_json_lines_in_a_json_file_are_read_as_lines(content: bytes, in_lines: bool, tmp_path: Path) -> None:
    dataset = opened(put(tmp_path / "a.json", content))
    assert {chunk.in_lines for chunk in dataset.chunks()} == {in_lines}
    raws = [raw for chunk in dataset.chunks() for raw in chunk.raws if raw]
    assert [records.parse_row(raw, "x").columns["text"] for raw in raws if raw != b"\xef\xbb\xbf"] == ["a", "b"]
