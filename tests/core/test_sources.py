"""Files, folders, patterns and Hub datasets → the same rows, in one order, each with its place; or a refusal."""

import json
import os
import random
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from lorakit.core import sources
from lorakit.core.errors import HubFailed
from tests.core.test_hub import COMMIT, OTHER_COMMIT, Hub, hub
from tests.core.test_readers import (
    ROWS,
    arrow,
    jsonl,
    notices,
    opened,
    parquet,
    put,
    read,
    refusal,
    rows_of,
    texts,
    tree,
)

__all__ = ["hub"]  # a fixture

# Names


def test_names_are_read_one_after_the_other(tmp_path: Path) -> None:
    tree(tmp_path, "b.jsonl", "a.jsonl", "folder/train.jsonl")
    dataset = opened("b.jsonl", "folder", "a.jsonl", "b.jsonl")
    assert dataset.names == ("b.jsonl", "folder", "a.jsonl", "b.jsonl")
    assert [row["text"] for row in rows_of(dataset)] == ["b.jsonl", "folder/train.jsonl", "a.jsonl", "b.jsonl"]
    assert [file.name for file in dataset.files] == ["b.jsonl", "folder/train.jsonl", "a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("d/*.jsonl", ["d/10.jsonl", "d/9.jsonl", "d/Z.jsonl", "d/a.jsonl"]),
        ("d/[0-9].jsonl", ["d/9.jsonl"]),
        ("d/?.jsonl", ["d/9.jsonl", "d/Z.jsonl", "d/a.jsonl"]),
        ("d/**/*.jsonl", ["d/10.jsonl", "d/9.jsonl", "d/Z.jsonl", "d/a.jsonl", "d/s/b.jsonl"]),
    ],
)
def test_a_pattern_is_its_files_in_code_point_order(pattern: str, found: list[str], tmp_path: Path) -> None:
    tree(tmp_path, "d/a.jsonl", "d/10.jsonl", "d/9.jsonl", "d/Z.jsonl", "d/s/b.jsonl")
    assert texts(pattern) == found


def test_a_pattern_gives_each_file_once_however_many_names_links_give_it(tmp_path: Path) -> None:
    tree(tmp_path, "d/s/b.jsonl", "d/z.jsonl")
    (tmp_path / "d" / "loop").symlink_to(".")
    (tmp_path / "d" / "a.jsonl").symlink_to("z.jsonl")
    assert texts("d/**/*.jsonl") == ["d/z.jsonl", "d/s/b.jsonl"]
    assert [file.name for file in opened("d/**/*.jsonl").files] == ["d/a.jsonl", "d/s/b.jsonl"]
    assert texts("d/z.jsonl", "d/z.jsonl") == ["d/z.jsonl"] * 2, "what is named twice is wanted twice"


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    tree(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert texts("a[1].jsonl") == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["no/*.jsonl"], "no file that matches"),
        (["a\0/*"], "no file that matches"),
        (["table.xlsx"], "unknown kind, need one of .jsonl"),
        (["*"], "unknown kind"),
        (["missing.jsonl"], "no such file"),
        (["owner/missing.csv.gz"], "no such file"),
        (["./missing"], "no such file"),
        (["/no/such/place"], "no such file"),
        (["a/b/c"], "no such file"),
        (["x" * 5000], "no such file"),
        (["a\0b"], "no such file"),
        ([""], "no such file"),
        (["pipe"], "neither a file nor a folder"),
        (["nowhere"], "neither a file nor a folder"),
        (["empty"], "no data files"),
        ([], "no dataset"),
    ],
)
def test_a_name_of_nothing_that_can_be_read_is_refused(names: list[str], found: str, tmp_path: Path) -> None:
    put(tmp_path / "table.xlsx", b"PK")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "empty").mkdir()
    assert found in refusal(*names).message


@pytest.mark.parametrize(
    ("choice", "need"),
    [("split", "a folder or hub id"), ("subset", "a folder or hub id"), ("revision", "a hub id")],
)
def test_a_choice_that_no_name_can_follow_is_refused(choice: str, need: str, tmp_path: Path) -> None:
    tree(tmp_path, "a.jsonl")
    assert f"need {need}" in refusal("a.jsonl", **{choice: "x"}).message


# Folders


def test_a_folder_is_its_data_files_without_what_is_about_them(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", "b.jsonl", "a/z.jsonl", "a.jsonl", "a-b/c.jsonl")
    for about in ("README.md", "LICENSE", "LICENSE.txt", "dataset_infos.json", "dataset_info.json", "state.json"):
        put(folder / about, b"{}")
    for about in (".hidden.jsonl", ".cache/x.jsonl", "x.lock", "requirements.txt", "docs/x.md", "picture.png"):
        put(folder / about, b"{}")
    (folder / "state.json").unlink()
    assert texts(folder) == ["a-b/c.jsonl", "a.jsonl", "a/z.jsonl", "b.jsonl"]


def test_a_folder_of_texts_is_read_as_such(tmp_path: Path) -> None:
    put(tmp_path / "d" / "a.txt", b"A")
    put(tmp_path / "d" / "b.md", b"B")
    assert texts("d") == ["A", "B"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    tree(tmp_path, "elsewhere/b.jsonl", "d/a.jsonl")
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "round").symlink_to(tmp_path / "d")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "d")
    assert texts("d") == ["d/a.jsonl", "elsewhere/b.jsonl"]


SPLITS = [
    ("train.jsonl", "train"),
    ("training.jsonl", "train"),
    ("train-00000-of-00002.jsonl", "train"),
    ("data/test.jsonl", "test"),
    ("test_0.jsonl", "test"),
    ("testing/a.jsonl", "test"),
    ("my-eval.jsonl", "test"),
    ("evaluation.v2.jsonl", "test"),
    ("validation1.jsonl", "validation"),
    ("valid/0.jsonl", "validation"),
    ("a_val.jsonl", "validation"),
    ("Dev.jsonl", "validation"),
    ("test/train.jsonl", "train"),
    ("train/dev.jsonl", "validation"),
    ("pretrain.jsonl", "train"),
    ("latest.jsonl", "train"),
    ("devices.jsonl", "train"),
    ("contest/a.jsonl", "train"),
    ("rows.jsonl", "train"),
]


@pytest.mark.parametrize(("path", "split"), SPLITS)
def test_a_split_is_told_from_whole_words_of_a_path(path: str, split: str, tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", path)
    assert texts(folder, split=split) == [path]
    others = {"train", "validation", "test"} - {split}
    for other in others:
        assert f"found the splits {split}; need {other}" in refusal(folder, split=other).message


def test_a_split_is_chosen_and_told(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", "test.jsonl", "train-1.jsonl", "train-0.jsonl")
    assert texts("d") == ["train-0.jsonl", "train-1.jsonl"]
    assert notices("d") == ["d: split train of train, test (2 files)"]
    assert texts("d", split="test") == ["test.jsonl"]
    assert notices("d", split="test") == []
    (folder / "train-0.jsonl").unlink()
    (folder / "train-1.jsonl").unlink()
    assert texts("d") == ["test.jsonl"]
    assert notices("d") == []
    tree(folder, "dev.jsonl")
    assert "found the splits validation, test; need one of them" in refusal("d").message


def test_a_subset_is_a_sub_folder_where_nothing_else_is_said(tmp_path: Path) -> None:
    tree(tmp_path / "d", "en/train.jsonl", "en/test.jsonl", "test/train.jsonl", "de/x.jsonl", "rows.jsonl")
    assert texts("d", subset="en") == ["en/train.jsonl"]
    assert texts("d", subset="en/", split="test") == ["en/test.jsonl"]
    assert texts("d", subset="test") == ["test/train.jsonl"]
    for missing in ("fr", "..", "/", "e", ""):
        assert f"found the subsets de, en, test; need {missing}" in refusal("d", subset=missing).message


# README


def readme(folder: Path, configs: str) -> Path:
    put(folder / "README.md", f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# Text\n---\n".encode())
    return folder


TWO = """
- config_name: first
  data_files:
  - split: train
    path: [data/b*.jsonl, data/a.jsonl, "data/*.jsonl"]
  - split: odd name
    path: other/**
- config_name: second
  default: true
  data_files: "**/x.jsonl"
- config_name: third
  data_files: ["data/[ab].jsonl", other/y.jsonl]
- config_name: fourth
  data_dir: other
"""
PATHS = (
    "data/a.jsonl",
    "data/b.jsonl",
    "data/b2.jsonl",
    "data/deep/b3.jsonl",
    "other/x.jsonl",
    "other/y.jsonl",
    "other/deep/z.jsonl",
)


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ({}, ["other/x.jsonl"]),
        ({"subset": "first"}, ["data/b.jsonl", "data/b2.jsonl", "data/a.jsonl"]),
        ({"subset": "first", "split": "odd name"}, ["other/deep/z.jsonl", "other/x.jsonl", "other/y.jsonl"]),
        ({"subset": "third"}, ["data/a.jsonl", "data/b.jsonl", "other/y.jsonl"]),
        ({"subset": "fourth"}, ["other/deep/z.jsonl", "other/x.jsonl", "other/y.jsonl"]),
    ],
)
def test_a_readme_names_subsets_and_their_files(choices: dict[str, str], found: list[str], tmp_path: Path) -> None:
    assert texts(readme(tree(tmp_path / "d", *PATHS), TWO), **choices) == found


def test_the_default_subset_is_marked_or_named_or_the_only_one(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", "a.jsonl", "b.jsonl")
    one, two = (f"- {{config_name: {name}, data_files: {file}}}" for name, file in (("x", "a.jsonl"), ("y", "b.jsonl")))
    assert texts(readme(folder, one)) == ["a.jsonl"]
    named = "- {config_name: default, data_files: b.jsonl}"
    assert texts(readme(folder, f"{one}\n{named}")) == ["b.jsonl"]
    readme(folder, f"{one}\n{two}")
    assert "found the subsets x, y; need one of them" in refusal(folder).message
    assert "found the subsets x, y; need z" in refusal(folder, subset="z").message
    assert texts(folder, subset="y") == ["b.jsonl"]


@pytest.mark.parametrize(
    ("configs", "found"),
    [
        ("- {config_name: a, data_files: ../secret.jsonl}", "need one inside the dataset's folder"),
        ("- {config_name: a, data_files: /etc/secret.jsonl}", "need one inside the dataset's folder"),
        ("- {config_name: a, data_files: 'https://x.org/a.jsonl'}", "need one inside the dataset's folder"),
        ("- {config_name: a, data_dir: ../elsewhere}", "need one inside the dataset's folder"),
        ("- {config_name: a, data_files: linked.jsonl}", "a link out of the dataset's folder"),
        ("- {config_name: a, data_files: '*.jsonl'}", "a link out of the dataset's folder"),
        ("- {config_name: a, data_files: no*.jsonl}", "no data file that README.md's patterns for split train match"),
        ("- {config_name: a, data_files: '[z-a].jsonl'}", "the pattern '[z-a].jsonl', need a glob pattern"),
        ("- {config_name: a, data_files: 5}", "data_files of '5'"),
        ("- {config_name: a, data_files: [{split: train}]}", "data_files of"),
        ("- {config_name: a, data_files: [{path: [1]}]}", "data_files of"),
        ("- {config_name: a, data_files: []}", "no data files"),
        ("- a", "configs: found no list of subsets"),
        ("  a: b", "configs: found no list of subsets"),
        ("- {a: 'b", "front matter that isn't plain YAML (found unexpected end of stream in line 4"),
        ("- {a: &x [b], c: *x}", "front matter that isn't plain YAML (an alias"),
        ("- {a: b, a: c}", "front matter that isn't plain YAML (the key 'a' twice"),
        ("- {config_name: [a]}", "configs: found ['a'], need text"),
        ("- {config_name: null}", "configs: found None, need text"),
        ("- {config_name: a, data_dir: [b]}", "configs: found ['b'], need text"),
        ("- {config_name: a, data_files: [{split: {}, path: a.jsonl}]}", "configs: found {}, need text"),
    ],
)
def test_a_readme_that_leads_astray_is_refused(configs: str, found: str, tmp_path: Path) -> None:
    folder = readme(tree(tmp_path / "d", "a.jsonl"), configs)
    put(tmp_path / "secret.jsonl", jsonl("secret"))
    (folder / "linked.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert found in refusal(folder).message


def test_a_pattern_of_a_readme_that_backtracks_without_end_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CPU_SECONDS", 1.0)
    pattern = "**/*a" * 12 + "b"
    folder = readme(tree(tmp_path / "d", f"{'a' * 60}.jsonl"), f"- {{config_name: a, data_files: '{pattern}'}}")
    began = time.process_time()
    refused = refusal(folder)
    assert "which takes over 1 s to match; need a simple one" in refused.message
    assert refused.hint == "name the data files themselves"
    assert time.process_time() - began < 3


@pytest.mark.parametrize("text", ["# No front matter", "---\nlicense: mit\n---\n", "---\n---\n", "---\nno end", "\xff"])
def test_a_readme_without_subsets_says_nothing(text: str, tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", "a.jsonl")
    put(folder / "README.md", text.encode("latin-1"))
    assert texts(folder) == ["a.jsonl"]


def test_a_readme_of_a_few_lines_that_means_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 12)]
    folder = tree(tmp_path / "d", "a.jsonl")
    put(folder / "README.md", "\n".join(["---", *lines, "configs: [{config_name: *a11}]", "---"]).encode())
    began = time.process_time()
    assert "an alias" in refusal(folder).message
    assert time.process_time() - began < 1


def test_a_readme_that_is_no_file_says_nothing(tmp_path: Path) -> None:
    folder = tree(tmp_path / "d", "a.jsonl")
    os.mkfifo(folder / "README.md")
    assert texts(folder) == ["a.jsonl"]


def test_names_of_numbers_in_a_readme_are_meant_as_text(tmp_path: Path) -> None:
    folder = readme(tree(tmp_path / "d", "2024/a.jsonl"), "- {config_name: 2024-01-02, data_dir: 2024}")
    assert texts(folder, subset="2024-01-02") == ["2024/a.jsonl"]


# save_to_disk


def saved(folder: Path, *names: str, split: str = "train") -> Path:
    """As datasets.save_to_disk writes it: an Arrow stream a file, listed in this order."""
    for name in names:
        put(folder / name, arrow([{"text": f"{split} {name}"}]))
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_indices_data_files": None}
    put(folder / "state.json", json.dumps(state).encode())
    put(folder / "dataset_info.json", b"{}")
    return folder


def test_a_saved_dataset_is_its_files_in_its_order(tmp_path: Path) -> None:
    saved(tmp_path / "d", "data-1.arrow", "data-0.arrow")
    put(tmp_path / "d" / "stray.arrow", arrow([{"text": "stray"}]))
    assert texts("d") == texts("d", split="train") == ["train data-1.arrow", "train data-0.arrow"]
    assert "found the splits train; need test" in refusal("d", split="test").message
    assert "no subsets" in refusal("d", subset="x").message


def test_what_datasets_itself_saves_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"text": f"row {number}", "many": [{"a": number}]} for number in range(50)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk("one", num_shards=3)
    assert read("one") == rows
    datasets.DatasetDict({"train": whole, "test": whole.select([3, 1])}).save_to_disk("several")
    assert read("several") == rows
    assert read("several", split="test") == [rows[3], rows[1]]


def test_a_saved_dict_has_a_folder_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "d" / split, "data.arrow", split=split)
    put(tmp_path / "d" / "dataset_dict.json", b'{"splits": ["train", "test"]}')
    assert texts("d") == ["train data.arrow"]
    assert texts("d", split="test") == ["test data.arrow"]
    assert "found the splits train, test; need dev" in refusal("d", split="dev").message
    assert len(notices("d")) == 1


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("state.json", b'{"_data_files": [{"filename": "../secret.arrow"}]}', "inside the dataset's folder"),
        ("state.json", b'{"_data_files": [{"filename": "/etc/passwd"}]}', "inside the dataset's folder"),
        ("state.json", b'{"_data_files": [{"filename": "linked.arrow"}]}', "a link out of the dataset's folder"),
        ("state.json", b'{"_data_files": [{"filename": "round.arrow"}]}', "no such file"),
        ("state.json", b'{"_data_files": [{"filename": "gone.arrow"}]}', "no such file"),
        ("state.json", b'{"_data_files": ["data.arrow"]}', "no list of data files"),
        ("state.json", b"{}", "no list of data files"),
        ("state.json", b"[]", "need a JSON object"),
        ("state.json", b"{", "need JSON"),
        ("state.json", b"{}" + b" " * 2**22, "found over 4 MiB"),
        ("state.json", b'{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}', "chosen by indices"),
        ("dataset_dict.json", b'{"splits": "train"}', "no list of splits"),
        ("dataset_dict.json", b'{"splits": []}', "found the splits none"),
        ("dataset_dict.json", b'{"splits": ["gone"]}', "gone: found no state.json, need one"),
        ("dataset_dict.json", b'{"splits": [".."]}', "inside the dataset's folder"),
    ],
)
def test_a_saved_dataset_that_leads_astray_is_refused(name: str, content: bytes, found: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "d", "data.arrow")
    put(tmp_path / "secret.arrow", arrow([{"text": "secret"}]))
    (folder / "linked.arrow").symlink_to(tmp_path / "secret.arrow")
    (folder / "round.arrow").symlink_to("round.arrow")
    put(folder / name, content)
    assert found in refusal(folder).message


# The Hub


def test_a_hub_dataset_is_its_files_by_their_place_there(hub: Hub) -> None:
    files = {"data/train-0.parquet": parquet(ROWS[:2]), "data/test-0.parquet": parquet(ROWS[2:]), "x.py": b"1/0"}
    hub.datasets = {("owner/rows", "main"): (COMMIT, files), ("owner/rows", "v2"): (OTHER_COMMIT, {"a.jsonl": b"{}"})}
    dataset = opened("owner/rows", timeout_seconds=2.0)
    assert rows_of(dataset) == ROWS[:2]
    assert [file.name for file in dataset.files] == ["owner/rows/data/train-0.parquet"]
    assert read("owner/rows", split="test") == ROWS[2:]
    assert read("owner/rows", revision="v2") == [{}]
    assert len(notices("owner/rows")) == 1
    assert notices("owner/rows")[0].startswith("owner/rows: split train of train, test")
    assert "x.py" not in hub.downloaded


def test_a_hub_datasets_readme_counts_although_its_files_are_links(hub: Hub) -> None:
    text = b"---\nconfigs:\n- {config_name: a, data_files: [{split: train, path: 'rows/*.jsonl'}]}\n---\n"
    files = {"README.md": text, "rows/x.jsonl": jsonl("x"), "other.jsonl": jsonl("other")}
    hub.datasets = {("owner/rows", "main"): (COMMIT, files)}
    assert texts("owner/rows") == ["x"]
    assert texts(opened("owner/rows").files[0].path.parents[1]) == ["x"]


def test_a_dataset_of_a_script_is_what_the_hub_made_of_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"README.md": b"# Rows", "rows.py": b"1/0", "dataset_infos.json": b"{}"}
    made = {
        "default/train/0000.parquet": parquet([{"text": "0"}]),
        "default/train/0001.parquet": parquet([{"text": "1"}]),
        "default/test_x/0000.parquet": parquet([{"text": "t"}]),
        "other/partial-train/0000.parquet": parquet([{"text": "o"}]),
    }
    hub.datasets = {
        ("owner/rows", "main"): (COMMIT, script),
        ("owner/rows", "refs/convert/parquet"): (OTHER_COMMIT, made),
    }
    assert texts("owner/rows") == ["0", "1"]
    assert texts("owner/rows", split="test_x") == ["t"]
    assert texts("owner/rows", subset="other") == ["o"]
    assert "the Hub made" in notices("owner/rows")[0]
    assert "no data files" in refusal("owner/rows", revision="main").message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.asked.clear()
    assert texts("owner/rows") == ["0", "1"]
    assert hub.asked == []


def test_a_name_that_is_nowhere_is_told(hub: Hub) -> None:
    with pytest.raises(HubFailed, match="neither a local folder nor a dataset on the Hub"):
        opened("owner/none", timeout_seconds=2.0)
    hub.asked.clear()
    for name in ("./x", "x.jsonl", "owner/x.parquet", "/x/y"):
        assert "found no such file" in refusal(name).message
    assert hub.asked == []


def test_a_folder_comes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    tree(tmp_path / "owner" / "rows", "a.jsonl")
    assert texts("owner/rows") == ["a.jsonl"]
    assert hub.asked == []


# Fingerprints and order


def test_a_fingerprint_is_of_the_bytes_and_their_order_alone(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a.jsonl", jsonl("a")), put(tmp_path / "b.jsonl", jsonl("b"))
    before = opened(first, second).fingerprint()
    assert opened(first, second).fingerprint() == before
    assert opened(second, first).fingerprint() != before
    assert opened(first).fingerprint() != before
    os.utime(first, (1, 1))
    moved = put(tmp_path / "elsewhere" / "z.ndjson", first.read_bytes())
    assert opened(first, second).fingerprint() == opened(moved, second).fingerprint() == before
    other_kind = put(tmp_path / "a.txt", first.read_bytes())
    assert opened(other_kind, second).fingerprint() != before


def test_one_changed_byte_shows_although_size_and_time_are_kept(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", jsonl("a" * 10_000))
    times = path.stat()
    dataset = opened(path)
    before = dataset.fingerprint()
    path.write_bytes(path.read_bytes().replace(b"aaaa", b"aaba", 1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert dataset.fingerprint() != before


def test_the_order_of_files_isnt_that_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}/{letter}.jsonl" for number in (1, 10, 2) for letter in "bBa"]
    tree(tmp_path / "d", *names)
    scandir = os.scandir
    for seed in range(5):
        chance = random.Random(seed)
        monkeypatch.setattr(os, "scandir", lambda path, c=chance: sorted(scandir(path), key=lambda _: c.random()))
        assert texts("d") == sorted(names)
