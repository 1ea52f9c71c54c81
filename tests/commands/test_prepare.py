"""`lorakit prepare` as it is typed: what it shows, what --json holds, and what the rest of the line makes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core.templates import builtin_source
from tests.conftest import ROWS, Ran, make_llama

Cli = Callable[..., Ran]

KEYS = {
    *("path", "blocks", "validation_blocks", "tokens", "trained_tokens", "fill", "format", "template", "cached"),
    *("rows", "validation_rows", "rejected", "documents", "split", "truncated", "answers_truncated", "dropped"),
    *("dropped_by_reason", "pieces_dropped", "ends_trained", "double_bos", "lengths", "longest_tokens", "longest_row"),
    *("preview", "seconds"),
}


@pytest.fixture
def options(tiny_llama: Path) -> list[object]:
    return ["--tokenizer", tiny_llama, "--block-size", 128]


def test_json_holds_every_figure(cli: Cli, rows_file: Path, options: list[object]) -> None:
    found = cli("prepare", rows_file, *options, "--json").json
    assert set(found) == KEYS
    assert (found["rows"], found["documents"], found["dropped"], found["preview"]) == (24, 24, 0, [])
    assert sum(found["lengths"].values()) == 24


def test_a_preview_shows_what_is_trained_in_brackets(cli: Cli, rows_file: Path, options: list[object]) -> None:
    ran = cli("prepare", rows_file, *options, "--preview", 2)
    first = f"{rows_file}:1\n<|im_start|>user\nWhat is 0 plus 0?<|im_end|>\n<|im_start|>assistant\n"
    assert ran.out.startswith(first + "[0 plus 0 is 0.<|im_end|>]\n")
    assert f"{rows_file}:2\n" in ran.out
    assert f"{rows_file}:3\n" not in ran.out
    assert "blocks  " in ran.out, "the figures follow"
    again = cli("prepare", rows_file, *options, "--preview", 1, "--preview-ids")
    assert "made before" in again.out
    assert "[0 plus 0 is 0.<|im_end|>] {15 " in again.out


def test_a_preview_is_in_the_json_too(cli: Cli, rows_file: Path, options: list[object]) -> None:
    [row] = cli("prepare", rows_file, *options, "--preview", 1, "--json").json["preview"]
    assert row["place"] == f"{rows_file}:1"
    assert [run["trained"] for run in row["runs"]] == [False, True, False]
    assert row["runs"][1]["text"] == "0 plus 0 is 0.<|im_end|>"
    assert len(row["runs"][1]["ids"]) == 15


def test_the_same_rows_from_any_file_have_the_same_blocks(
    cli: Cli, rows_file: Path, options: list[object], tmp_path: Path
) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows_file.read_bytes()))
    (tmp_path / "rows.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "folder" / "data").mkdir(parents=True)
    (tmp_path / "folder" / "data" / "train.tsv").write_text(
        "prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in ROWS)
    )
    (tmp_path / "folder" / "data" / "test.tsv").write_text("prompt\tcompletion\nnot\tthis\n")
    expected = None
    for name in ("rows.jsonl", "rows.parquet", "rows.jsonl.gz", "rows.json", "folder", "folder/data/tr*.tsv"):
        ran = cli("prepare", name, *options, "--output", tmp_path / "out" / name.replace("/", "-"), "--json")
        assert ran.code == 0, ran.err
        raw = (Path(ran.json["path"]) / "blocks-00000.safetensors").read_bytes()
        expected = expected or raw
        assert raw == expected, name


def test_columns_and_format_can_be_said(cli: Cli, options: list[object], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"frage": "a?", "antwort": "b!"}\n')
    ran = cli("prepare", "rows.jsonl", *options, "--columns", "prompt=frage,completion=antwort", "--preview", 1)
    assert ran.code == 0, ran.err
    assert "[b!<|im_end|>]" in ran.out
    assert "read as prompt/completion rows" in ran.err
    (tmp_path / "both.jsonl").write_text('{"prompt": "a", "completion": "b", "text": "c"}\n')
    ran = cli("prepare", "both.jsonl", *options, "--format", "text", "--preview", 1)
    assert "\n[c<|im_end|>]" not in ran.out.replace("c[", "")
    assert "read as text rows" in ran.err


def test_what_rows_were_rendered_by_goes_with_the_adapter(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """chat asks as training did, also where that isn't the base's own template."""
    for template, source in (("alpaca", builtin_source("alpaca")), ("none", None)):
        blocks = cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", 512, "--template", template)
        assert blocks.code == 0, blocks.err
        run, merged = tmp_path / f"run-{template}", tmp_path / f"merged-{template}"
        command = ("train", "--model", tiny_llama, "--dataset", rows_file, "--block-size", 512, "--max-steps", 1)
        assert cli(*command, "--template", template, "--output", run).code == 0
        assert cli("merge", run, "--output", merged).code == 0
        for folder in (run, merged):
            kept = (folder / "chat_template.jinja").read_text()
            assert kept == source if source else "message['content']" in kept


def test_a_large_set_may_be_prepared_in_parts(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    lines = rows_file.read_text().splitlines(keepends=True)
    given: list[object] = []
    for name, part in (("a", lines[:12]), ("b", lines[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        options = ("--tokenizer", tiny_llama, "--block-size", 128, "--output", tmp_path / name)
        assert cli("prepare", f"{name}.jsonl", *options).code == 0
        given += ["--blocks", tmp_path / name]
    ran = cli("train", "--model", tiny_llama, *given, "--output", "run", "--json")
    assert ran.code == 0, ran.err
    blocks = sum(json.loads((tmp_path / name / "lorakit.json").read_text())["facts"]["blocks"] for name in ("a", "b"))
    assert ran.json["steps"] == blocks
    swapped = cli("train", "--model", tiny_llama, *given[2:], *given[:2], "--output", "run")
    assert swapped.code == 5, "another order is another run"


def test_held_out_rows_are_what_evaluate_looks_at(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", tiny_llama, "--block-size", 128, "--output", tmp_path / "blocks")
    prepared = cli("prepare", rows_file, *options, "--validation-split", 0.25, "--json").json
    assert 0 < prepared["validation_blocks"] < prepared["blocks"]
    ran = cli("evaluate", tiny_llama, "--blocks", tmp_path / "blocks", "--json")
    assert "over the held-out blocks" in ran.err
    assert 0 < ran.json["tokens"] < prepared["trained_tokens"] / 2


def test_blocks_of_another_models_tokenizer_dont_train(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    other = make_llama(tmp_path / "other", chat_template="{{ messages[0].content }}")
    options = ("--block-size", 128, "--template", "chatml", "--output", tmp_path / "blocks")
    assert cli("prepare", rows_file, "--tokenizer", other, *options).code == 0
    ran = cli("train", "--model", tiny_llama, "--blocks", tmp_path / "blocks", "--output", "run")
    assert ran.code == 5
    assert "blocks of another tokenizer" in ran.err


@pytest.mark.parametrize(("count", "rows"), [(1, "1 row"), (2, "2 rows")])
def test_one_row_is_a_row(count: int, rows: str, cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    long, bad = {"prompt": "a" * 40, "completion": "b" * 40}, {"prompt": "a", "completion": ""}
    (tmp_path / "few.jsonl").write_text((json.dumps(long) + "\n" + json.dumps(bad) + "\n") * count)
    ran = cli("prepare", "few.jsonl", "--tokenizer", tiny_llama, "--block-size", 64, "--on-bad-row", "skip")
    assert f"{rows} longer than a block" in ran.out
    assert f"{rows}, in " in ran.out
