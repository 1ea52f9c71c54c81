"""Whole command lines on bad input: an exit code, one error, one hint, and nothing that lay there before is changed."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main
from lorakit.core import disk
from tests.conftest import CHATML, ROWS, Ran, make_llama
from tests.core.test_hub import Hub, point_at

Cli = Callable[..., Ran]

TRAINING = "--max-steps 1 --rank 4 --no-gradient-checkpointing"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Mapping[str, Path]:
    """Good things by name, made once and only read: rows, bases, blocks, an adapter."""
    folder = tmp_path_factory.mktemp("shelf")
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "good.jsonl").write_text(rows)
    shutil.copytree(tiny_llama, folder / "base")
    make_llama(folder / "other", seed=1)
    make_llama(folder / "spoken", chat_template=CHATML.replace("<|im_end|>", "<|im_end|> "))
    shutil.copytree(tiny_llama, folder / "encoder")
    config = json.loads((tiny_llama / "config.json").read_text())
    (folder / "encoder" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    for line in (
        "prepare {0}/good.jsonl --tokenizer {0}/base --block-size 128 --output {0}/blocks",
        "prepare {0}/good.jsonl --tokenizer {0}/spoken --block-size 128 --output {0}/spoken-blocks",
        "train --model {0}/base --blocks {0}/blocks --output {0}/adapter " + TRAINING,
    ):
        assert main(shlex.split(line.format(folder))) == 0
    for which, handler in handlers.items():
        signal.signal(which, handler)
    return {path.stem: path for path in folder.iterdir() if not path.name.startswith(".")}


@dataclass(frozen=True)
class Case:
    """A command line, what it ends with, and words that its message must hold. `{name}` is a thing on the shelf."""

    line: str
    code: int
    words: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    """Files that are written first: (path, content)."""
    copies: tuple[str, ...] = ()
    """Things on the shelf that are copied to the working folder first."""


GOOD_ROW = '{"prompt": "a", "completion": "b"}\n'

CASES: Mapping[str, Case] = {
    # the command line and its settings file
    "misspelt option": Case("prepare {good} --tokenizer {base} --blok-size 64", 2, ("--blok-size", "--block-size")),
    "misspelt command": Case("preprae {good} --tokenizer {base}", 2, ("preprae", "prepare")),
    "misspelt key": Case(
        "train --model {base} --blocks {blocks} --config run.yaml --output out",
        2,
        ("run.yaml: found the unknown key 'learning_rte'", "did you mean 'learning_rate'?"),
        (("run.yaml", "learning_rte: 1.0e-3\n"),),
    ),
    "key twice": Case(
        "prepare {good} --tokenizer {base} --config run.yaml --output out",
        2,
        ("run.yaml", "the key 'pack' twice"),
        (("run.yaml", "pack: none\npack: best-fit\n"),),
    ),
    "several bad values": Case(
        "train --model {base} --blocks {blocks} --output out --rank 0 --learning-rate nan --dtype int4",
        2,
        ("--rank: found '0'", "--learning-rate: found 'nan'", "--dtype: found 'int4', need one of auto, bf16"),
    ),
    "bad value in a file": Case(
        "prepare {good} --tokenizer {base} --config run.yaml --output out",
        2,
        ("run.yaml: overwrite: found 'perhaps'", "true or false"),
        (("run.yaml", "overwrite: perhaps\n"),),
    ),
    "nothing to train on given": Case("train --model {base} --output out", 2, ("--blocks", "--dataset")),
    "blocks and a dataset": Case(
        "train --model {base} --blocks {blocks} --dataset {good} --output out", 2, ("--blocks and --dataset",)
    ),
    "packing beside blocks": Case(
        "train --model {base} --blocks {blocks} --block-size 64 --output out", 2, ("--block-size", "lorakit prepare")
    ),
    "settings that contradict": Case(
        "train --model {base} --blocks {blocks} --output out --parallel fsdp --quantize int8 --load-best-model-at-end "
        "--num-machines 2",
        2,
        (
            "--parallel fsdp with --quantize int8, need none, nf4 or fp4",
            "--load-best-model-at-end without evaluations, need --eval-steps",
            "one of --num-machines and --rendezvous, need both",
        ),
    ),
    "evaluations of nothing": Case(
        "train --model {base} --blocks {blocks} --output out --eval-steps 2 --optimizer paged_lion",
        2,
        ("found no held-out blocks", "--validation-split", "found paged_lion without a GPU, need lion"),
    ),
    "a schedule's arguments that can't be": Case(
        "train --model {base} --blocks {blocks} --output out --lr-scheduler-type polynomial "
        "--lr-scheduler-kwargs power=much",
        2,
        ("lr_scheduler_kwargs", "power=much", "polynomial"),
    ),
    "a pattern that is none": Case(
        "train --model {base} --blocks {blocks} --output out --target-modules [q_proj",
        2,
        ("--target-modules: found '[q_proj', need names separated by commas, or one regular expression",),
    ),
    # rows
    "missing column": Case(
        "prepare rows.jsonl --tokenizer {base} --output out",
        3,
        ("rows.jsonl:2", "prompt, answer", "need completion"),
        (("rows.jsonl", GOOD_ROW + '{"prompt": "a", "answer": "b"}\n'),),
    ),
    "unknown columns": Case(
        "prepare rows.jsonl --tokenizer {base} --output out",
        3,
        ("rows.jsonl:1", "asked, answer", "prompt + completion", "--columns"),
        (("rows.jsonl", '{"asked": "a", "answer": "b"}\n'),),
    ),
    "empty dataset": Case(
        "prepare rows.jsonl --tokenizer {base} --output out",
        3,
        ("rows.jsonl", "found no rows"),
        (("rows.jsonl", "\n\n"),),
    ),
    "not JSON": Case(
        "prepare rows.jsonl --tokenizer {base} --output out",
        3,
        ("rows.jsonl:3", "need a JSON object"),
        (("rows.jsonl", GOOD_ROW * 2 + "prompt,completion\n"),),
    ),
    "half a character": Case(
        "prepare rows.jsonl --tokenizer {base} --output out",
        3,
        ("rows.jsonl:1", "surrogate"),
        (("rows.jsonl", '{"text": "\\ud83d"}\n'),),
    ),
    "an empty answer": Case(
        "train --model {base} --dataset rows.jsonl --output out",
        3,
        ("rows.jsonl:2: completion: found",),
        (("rows.jsonl", GOOD_ROW + '{"prompt": "a", "completion": ""}\n'),),
    ),
    "no such dataset": Case("prepare missing.jsonl --tokenizer {base} --output out", 3, ("missing.jsonl", "no such")),
    "blocks as dataset": Case("prepare {blocks} --tokenizer {base} --output out", 3, ("blocks folder", "--blocks")),
    # models
    "no model there": Case(
        "train --model ./missing --blocks {blocks} --output out", 3, ("./missing", "no such folder")
    ),
    "no causal language model": Case(
        "train --model {encoder} --blocks {blocks} --output out", 3, ("BertModel", "causal language model")
    ),
    "pickle files only": Case(
        "train --model {0}/m --blocks {blocks} --output out",
        3,
        ("only pickle files (pytorch_model.bin)", "save_pretrained"),
        (("m/config.json", '{"architectures": ["LlamaForCausalLM"]}'), ("m/pytorch_model.bin", "pickle")),
    ),
    "a cut off model": Case(
        "train --model {0}/m --blocks {blocks} --output out",
        4,
        ("model.safetensors", "need a whole safetensors file"),
        (("m/config.json", '{"architectures": ["LlamaForCausalLM"]}'), ("m/model.safetensors", "\x08")),
    ),
    "no tokenizer there": Case("prepare {good} --tokenizer {blocks} --output out", 3, ("tokenizer", "tokenizer.json")),
    "a module that isn't there": Case(
        "train --model {base} --blocks {blocks} --target-modules q_proj,w_proj --output out",
        3,
        ("'w_proj'", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ),
    "a layer that isn't there": Case(
        "train --model {base} --blocks {blocks} --layers-to-transform 0-7 --output out", 3, ("found 7", "0 to 1")
    ),
    "a token that is there": Case(
        "prepare {good} --tokenizer {base} --add-tokens <pad> --output out", 3, ("'<pad>'", "need new ones")
    ),
    "no adapter to begin with": Case(
        "train --model {base} --blocks {blocks} --adapter {base} --output out", 3, ("adapter_config.json",)
    ),
    "an adapter of another base to begin with": Case(
        "train --model {other} --blocks {blocks} --adapter {adapter} --output out", 5, ("trained on",)
    ),
    "a whole model with --base": Case("chat {base} --base {base} --prompt Hi", 3, ("--base", "whole model")),
    # adapters and blocks of something else
    "merge onto another base": Case("merge {adapter} --base {other} --output out", 5, ("other", "trained on")),
    "chat on another base": Case("chat {adapter} --base {other} --prompt Hi", 5, ("other", "trained on")),
    "evaluate on another base": Case(
        "evaluate {adapter} --base {other} --blocks {blocks}", 5, ("other", "trained on", "--base")
    ),
    "no adapter": Case("merge {base} --output out", 3, ("adapter_config.json", "need an adapter")),
    "a base as blocks": Case("train --model {base} --blocks {base} --output out", 3, ("need a lorakit artifact",)),
    "an adapter as blocks": Case("evaluate {base} --blocks {adapter}", 3, ("found adapter, need blocks",)),
    "blocks of another template": Case(
        "train --model {base} --blocks {spoken-blocks} --output out " + TRAINING,
        5,
        ("blocks of another tokenizer, chat template or added tokens", "lorakit prepare"),
    ),
    # outputs that are taken
    "other settings for a run": Case(
        "train --model {base} --blocks {blocks} --output adapter --max-steps 1 --rank 8 --no-gradient-checkpointing",
        5,
        ("rank: found 4, asked for 8", "--overwrite"),
        copies=("adapter",),
    ),
    "other data for a run": Case(
        "train --model {spoken} --blocks {spoken-blocks} --output adapter " + TRAINING,
        5,
        ("blocks: found",),
        copies=("adapter",),
    ),
    "other settings for blocks": Case(
        "prepare {good} --tokenizer {base} --block-size 64 --output blocks",
        5,
        ("block_size: found 128, asked for 64", "--overwrite"),
        copies=("blocks",),
    ),
    "an adapter where blocks go": Case(
        "prepare {good} --tokenizer {base} --output adapter", 5, ("found adapter",), copies=("adapter",)
    ),
    "foreign files where blocks go": Case(
        "prepare {good} --tokenizer {base} --output out --overwrite",
        3,
        ("not lorakit's",),
        (("out/thesis.txt", "mine"),),
    ),
    "foreign files where an adapter goes": Case(
        "train --model {base} --blocks {blocks} --output out --overwrite", 3, ("not",), (("out/thesis.txt", "mine"),)
    ),
    "foreign files where a model goes": Case(
        "merge {adapter} --output out --overwrite", 3, ("not lorakit's",), (("out/thesis.txt", "mine"),)
    ),
    "a file where blocks go": Case(
        "prepare {good} --tokenizer {base} --output out --overwrite", 3, ("a file that",), (("out", "mine"),)
    ),
    "a folder below a file": Case(
        "prepare {good} --tokenizer {base} --output file/out", 7, ("file",), (("file", "mine"),)
    ),
    "a model inside its base": Case("merge {adapter} --base {base} --output {base}/merged", 2, ("--output", "inside")),
    "a model inside its adapter": Case("merge {adapter} --output {adapter}/merged", 2, ("--output", "inside")),
    "numbers that run away": Case(
        "train --model {base} --blocks {blocks} --output out --learning-rate 1000 --weight-decay 1000 --max-steps 12 "
        "--warmup-ratio 0 --rank 4 --no-gradient-checkpointing",
        8,
        ("step", "need numbers", "--learning-rate"),
    ),
}


def tree(*folders: Path) -> dict[str, str]:
    """The hash of every file below some folders (a link's: of where it points)."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_symlink():
                found[str(path)] = str(path.readlink())
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused(ran: Ran, code: int, words: tuple[str, ...]) -> None:
    """Asserts an exit code, one error with these words, one hint, and nothing else of note."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    lines = ran.err.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    hints = [number for number, line in enumerate(lines) if line.startswith("hint: ")]
    assert (len(errors), len(hints)) == (1, 1), ran.err
    assert errors[0] < hints[0]
    assert "Traceback" not in ran.err
    assert "found a bug" not in ran.err
    assert lines[hints[0]] != "hint: "
    assert [word for word in words if word not in ran.err] == [], ran.err


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    before = tree(*folders)
    yield
    after = tree(*folders)
    assert {path: after.get(path) for path in before} == before
    left = [path for path in set(after) - set(before) if re_leftover(path)]
    assert left == []


def re_leftover(path: str) -> bool:
    """Whether a file is one that lorakit should have taken away again."""
    return any(part.startswith((".stage-", ".trash-")) or part.endswith(".lock") for part in Path(path).parts)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_command_line_is_explained_and_does_no_harm(
    name: str, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path
) -> None:
    case = CASES[name]
    for place, content in case.files:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(content)
    for thing in case.copies:
        shutil.copytree(shelf[thing], tmp_path / thing)
    with unchanged(tmp_path, shelf["base"].parent):
        refused(cli(*shlex.split(case.line.format(tmp_path, **shelf))), case.code, case.words)
    if "--output out" in case.line and case.code != 8:
        made = tmp_path / "out"
        assert not (made / "lorakit.json").exists()
        assert {path.name for path in made.glob("*")} == {Path(p).name for p, _ in case.files if p.startswith("out/")}


@pytest.mark.parametrize(
    "name", ["no causal language model", "not JSON", "misspelt key", "foreign files where blocks go"]
)
def test_json_changes_nothing_about_a_failure(name: str, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    for place, content in case.files:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(content)
    line = shlex.split(case.line.format(tmp_path, **shelf))
    refused(cli(*line, "--json", "--quiet"), case.code, case.words)


# Disks

OUTPUTS = {
    "prepare": "prepare {good} --tokenizer {base} --block-size 65536 --output {0}/out",
    "train": "train --model {base} --blocks {blocks} --output {0}/out " + TRAINING,
    "merge": "merge {adapter} --base {base} --output {0}/out",
}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own that holds one file."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no mount allowed here: {done.stderr.strip()}")
    try:
        (folder / "mine.txt").write_text("mine")
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def needs_mount() -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a disk takes root")


@pytest.mark.usefixtures("needs_mount")
@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("inside", [False, True], ids=["in a folder", "the mount itself"])
def test_a_disk_that_is_read_only(
    command: str, inside: bool, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=8m") as place:
        if inside:
            (place / "mine.txt").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        line = OUTPUTS[command].format(place, **shelf)
        with unchanged(tmp_path, shelf["base"].parent):
            ran = cli(
                *shlex.split(line.removesuffix("/out") if inside else line.replace("/out ", " " if inside else "/out "))
            )
            refused(ran, 7, (str(place), "Read-only file system", "--output"))


@pytest.mark.usefixtures("needs_mount")
@pytest.mark.parametrize("command", OUTPUTS)
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    command: str, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=64k") as place:
        with unchanged(tmp_path, shelf["base"].parent):
            refused(cli(*shlex.split(OUTPUTS[command].format(place, **shelf))), 7, (str(place), "free", "need"))
        assert {path.name for path in place.rglob("*") if path.is_file()} == {"mine.txt"}


@pytest.mark.usefixtures("needs_mount")
@pytest.mark.parametrize(("command", "files"), [("prepare", 6), ("train", 9), ("merge", 7)])
def test_a_disk_that_gets_full_on_the_way(
    command: str, files: int, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path
) -> None:
    """It has room for bytes but only for a few files, which no one can ask for beforehand."""
    with mounted(tmp_path / "disk", f"size=8m,nr_inodes={files}") as place:
        line = shlex.split(OUTPUTS[command].format(place, **shelf))
        with unchanged(tmp_path, shelf["base"].parent):
            refused(cli(*line), 7, (str(place), "No space left on device", "free some space"))
        assert not (place / "out" / "lorakit.json").exists()
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(place)], check=True)
        assert cli(*line).code == 0, "the same command again is the recovery"
        assert (place / "out" / "lorakit.json").is_file()
        assert (place / "mine.txt").read_text() == "mine"


# Others at work


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_another_process_writes(
    command: str, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path
) -> None:
    with disk.held(tmp_path / ".out.lock"):
        line = shlex.split(OUTPUTS[command].format(tmp_path, **shelf))
        with unchanged(shelf["base"].parent):
            refused(cli(*line), 6, (str(os.getpid()), "another --output"))
    assert not (tmp_path / "out").exists()


# The Hub

HUB_LINES = {
    "prepare": "prepare {good} --tokenizer owner/tiny --output out",
    "train": "train --model owner/tiny --blocks {blocks} --output out",
    "merge": "merge owner/tiny --output out",
    "base of merge": "merge {adapter} --base owner/tiny --output out",
    "chat": "chat owner/tiny --prompt Hi",
    "evaluate": "evaluate owner/tiny --blocks {blocks}",
}


@pytest.mark.parametrize("name", HUB_LINES)
def test_a_hub_id_without_a_network(
    name: str, cli: Cli, shelf: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub() as server:
        closed = f"http://127.0.0.1:{server.server_port}"
    point_at(closed, tmp_path, monkeypatch)
    with unchanged(tmp_path, shelf["base"].parent):
        refused(cli(*shlex.split(HUB_LINES[name].format(**shelf))), 12, ("owner/tiny", "network"))
    assert not list(tmp_path.glob("out/*"))


# Damage


def damaged(path: Path, change: Callable[[bytearray], Any]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def flip(raw: bytearray) -> None:
    raw[len(raw) // 2] ^= 1


@pytest.mark.parametrize(
    ("line", "thing", "file"),
    [
        ("train --model {base} --blocks {0}/blocks --output out", "blocks", "blocks-00000.safetensors"),
        ("evaluate {base} --blocks {0}/blocks", "blocks", "lorakit.json"),
        ("prepare {good} --tokenizer {base} --block-size 128 --output {0}/blocks", "blocks", "lorakit.yaml"),
        ("merge {0}/adapter --base {base} --output out", "adapter", "adapter_model.safetensors"),
        ("chat {0}/adapter --base {base} --prompt Hi", "adapter", "adapter_config.json"),
        ("evaluate {0}/adapter --base {base} --blocks {blocks}", "adapter", "lorakit.json"),
    ],
)
@pytest.mark.parametrize("change", [flip, lambda raw: raw.pop()], ids=["flipped", "cut"])
def test_a_damaged_file_is_named_and_not_used(
    line: str,
    thing: str,
    file: str,
    change: Callable[[bytearray], Any],
    cli: Cli,
    shelf: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(shelf[thing], tmp_path / thing)
    damaged(tmp_path / thing / file, change)
    with unchanged(tmp_path, shelf["base"].parent):
        refused(cli(*shlex.split(line.format(tmp_path, **shelf))), 4, (str(tmp_path / thing / file),))


def test_the_shelf_holds_what_works(cli: Cli, shelf: Mapping[str, Path], tmp_path: Path) -> None:
    """Were the good things bad, the failures above would prove nothing."""
    with unchanged(shelf["base"].parent):
        for line in OUTPUTS.values():
            small = line.replace("--block-size 65536", "--block-size 128").replace("/out", "/" + line.split()[0])
            ran = cli(*shlex.split(small.format(tmp_path, **shelf)))
            assert ran.code == 0, ran.err
        assert cli(*shlex.split("evaluate {adapter} --base {base} --blocks {blocks}".format(**shelf))).code == 0
