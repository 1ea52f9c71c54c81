"""Artifacts: whole or not there, every flipped byte found, nothing foreign touched, one process at a time."""

import contextlib
import json
import multiprocessing
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import artifacts, disk
from lorakit.core.config import PrepareConfig
from lorakit.core.errors import ArtifactDamaged, Busy, InputRefused, Mismatch, UsageError
from tests.conftest import Ran

CONFIG = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "owner/name"}))
OTHER = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "owner/name", "block_size": 64}))
PARENTS = {"dataset": "d" * 64}
FILES = {"blocks-00000.safetensors": b"first shard", "blocks-00001.safetensors": b"", "notes.txt": "é\n".encode()}


def commit(target: Path, files: dict[str, disk.Content] | None = None, **changed: Any) -> artifacts.Artifact:
    more: dict[str, Any] = {"config": CONFIG, "parents": PARENTS, "facts": {"rows": 3}, **changed}
    return artifacts.commit(target, "blocks", (files or FILES).items(), **more)


def claim(target: Path, config: PrepareConfig = CONFIG, *, overwrite: bool = False) -> artifacts.Artifact | None:
    return artifacts.claim(target, "blocks", config, PARENTS, overwrite=overwrite)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Whole


def test_what_was_committed_is_what_is_opened(tmp_path: Path) -> None:
    made = commit(tmp_path / "a", {"x": iter([b"in ", b"", b"pieces"])})
    opened = artifacts.open_artifact(tmp_path / "a", "blocks")
    assert (opened.kind, opened.parents, opened.facts) == ("blocks", PARENTS, {"rows": 3})
    assert opened.config == CONFIG.flat()
    assert opened.manifest == made.manifest
    assert (tmp_path / "a" / "x").read_bytes() == b"in pieces"
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["lorakit.json", "lorakit.yaml", "x"]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """Every byte of every file, the manifest's own too."""
    folder = tmp_path / "a"
    commit(folder)
    for name, before in content(folder).items():
        for place in range(len(before)):
            flipped = bytearray(before)
            flipped[place] ^= 1 << (place % 8)
            (folder / name).write_bytes(flipped)
            with pytest.raises(ArtifactDamaged) as caught:
                artifacts.open_artifact(folder, "blocks")
            assert caught.value.message.startswith(f"{folder / name}: found ")
        (folder / name).write_bytes(before)
    artifacts.open_artifact(folder, "blocks")


@pytest.mark.parametrize("name", [*FILES, "lorakit.yaml", "lorakit.json"])
def test_a_file_that_is_longer_shorter_or_gone_is_found(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    commit(folder)
    before = (folder / name).read_bytes()
    for other in (before + b"\n", before[:-1] if before else b"x"):
        (folder / name).write_bytes(other)
        with pytest.raises(ArtifactDamaged):
            artifacts.open_artifact(folder, "blocks")
    (folder / name).unlink()
    with pytest.raises(InputRefused if name == "lorakit.json" else ArtifactDamaged):
        artifacts.open_artifact(folder, "blocks")


def test_a_pipe_in_a_files_place_is_never_waited_for(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    (tmp_path / "a" / "blocks-00001.safetensors").unlink()  # of no bytes, as a pipe's size is
    os.mkfifo(tmp_path / "a" / "blocks-00001.safetensors")
    with pytest.raises(ArtifactDamaged, match="found something that is no file, need 0 bytes"):
        artifacts.open_artifact(tmp_path / "a", "blocks")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 50_000, b'{"sha256": "0"}'])
def test_a_manifest_that_is_none_is_damage(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "lorakit.json").write_bytes(raw)
    with pytest.raises(ArtifactDamaged) as caught:
        artifacts.open_artifact(tmp_path, "blocks")
    assert caught.value.exit_code == 4


def test_a_newer_format_is_told_with_who_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "FORMAT", 2)
    monkeypatch.setattr(artifacts, "__version__", "9.9.9")
    commit(tmp_path / "a")
    monkeypatch.setattr(artifacts, "FORMAT", 1)
    with pytest.raises(InputRefused, match="found format 2, need at most 1") as caught:
        artifacts.open_artifact(tmp_path / "a", "blocks")
    assert "9.9.9" in caught.value.hint


def test_another_kind_is_refused_with_the_command_that_makes_this_one(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    for folder, found in ((tmp_path / "a", "found blocks"), (tmp_path / "none", "found no such folder")):
        with pytest.raises(InputRefused, match=found) as caught:
            artifacts.open_artifact(folder, "adapter")
        assert "`lorakit train` makes adapter folders" in caught.value.hint


def test_the_same_bytes_have_the_same_fingerprint_whatever_their_settings_say(tmp_path: Path) -> None:
    one, two = commit(tmp_path / "a"), commit(tmp_path / "b", config=OTHER)
    assert one.fingerprint == two.fingerprint
    assert commit(tmp_path / "c", {**FILES, "notes.txt": b"e\n"}).fingerprint != one.fingerprint


def test_files_have_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        commit(tmp_path / "a")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o640}


# Or not there


def failing(after: str) -> Any:
    yield after, b"a shard"
    raise RuntimeError("the maker failed")


def refuse(stage: Path) -> None:
    assert sorted(os.listdir(stage)) == ["lorakit.yaml", "notes.txt"]
    raise ArtifactDamaged("not equal", "stop")


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    more: dict[str, Any] = {"config": CONFIG, "parents": {}, "facts": {}}
    with pytest.raises(RuntimeError, match="the maker failed"):
        artifacts.commit(tmp_path / "a", "blocks", failing("x"), **more)
    with pytest.raises(ArtifactDamaged, match="not equal"):
        commit(tmp_path / "a", {"notes.txt": b"e"}, check=refuse)
    assert os.listdir(tmp_path) == []


def test_what_fails_leaves_the_old_one(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    before = content(tmp_path)
    with pytest.raises(RuntimeError, match="the maker failed"):
        artifacts.commit(tmp_path / "a", "blocks", failing("x"), config=CONFIG, parents={}, facts={})
    assert content(tmp_path) == before


def test_a_new_one_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    commit(tmp_path / "a", {"y": b"new"}, config=OTHER)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["lorakit.json", "lorakit.yaml", "y"]


def test_an_empty_folder_keeps_being_that_folder(tmp_path: Path) -> None:
    """It may be a mount point, or someone's working directory."""
    (tmp_path / "a").mkdir()
    inode = (tmp_path / "a").stat().st_ino
    commit(tmp_path / "a")
    assert (tmp_path / "a").stat().st_ino == inode
    artifacts.open_artifact(tmp_path / "a", "blocks")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    commit(tmp_path / "there", config=OTHER)
    (tmp_path / "a").symlink_to("there")
    with artifacts.lock(tmp_path / "a"):
        commit(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
    assert artifacts.open_artifact(tmp_path / "there", "blocks").config["block_size"] == 2048
    assert sorted(os.listdir(tmp_path)) == ["a", "there"]


# Claiming


def test_a_new_or_empty_place_may_be_written(tmp_path: Path) -> None:
    assert claim(tmp_path / "new") is None
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    assert claim(tmp_path / "empty") is None


def test_the_same_work_is_found_again(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    found = claim(tmp_path / "a")
    assert found is not None
    assert found.facts == {"rows": 3}


def test_other_work_is_told_apart_and_may_be_overwritten(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    with pytest.raises(Mismatch) as caught:
        claim(tmp_path / "a", OTHER)
    assert "block_size: found 2048, asked for 64" in caught.value.message
    assert "--overwrite" in caught.value.hint
    assert claim(tmp_path / "a", OTHER, overwrite=True) is None
    with pytest.raises(Mismatch, match="found blocks, need a new or empty folder for adapter"):
        artifacts.claim(tmp_path / "a", "adapter", CONFIG, PARENTS, overwrite=False)


def test_damage_is_told_and_may_be_overwritten(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_bytes(b"!!!")
    with pytest.raises(ArtifactDamaged):
        claim(tmp_path / "a")
    assert claim(tmp_path / "a", overwrite=True) is None


@pytest.mark.parametrize("foreign", ["thesis.tex", ".env", "notes"])
def test_what_lies_beside_an_artifact_isnt_overwritten_with_it(foreign: str, tmp_path: Path) -> None:
    """Neither what is there before the work, nor what comes while it is done."""
    target = tmp_path / "a"
    commit(target)
    if foreign == "notes":
        (target / foreign).mkdir()
    path = target / "notes" / "deep.txt" if foreign == "notes" else target / foreign
    path.write_text("mine")
    before = content(tmp_path)
    with pytest.raises(Mismatch, match=f"found {foreign} that lorakit.json doesn't name"):
        claim(target, OTHER, overwrite=True)
    with pytest.raises(Mismatch, match=f"found {foreign} that lorakit.json doesn't name"):
        commit(target, {"y": b"new"}, config=OTHER)
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["a"]


def test_where_a_manifest_doesnt_say_what_is_lorakits_nothing_is_overwritten(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    (tmp_path / "a" / "lorakit.json").write_text("{")
    with pytest.raises(Mismatch, match=r"found blocks-00000\.safetensors and 3 more that"):
        claim(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_isnt_lorakits_is_never_touched(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    before = content(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(InputRefused, match="lorakit's, need a new or empty folder"):
            claim(tmp_path / name, overwrite=overwrite)
    assert content(tmp_path) == before


@pytest.mark.parametrize("letter", ["n", "é"])
def test_a_name_that_leaves_no_room_for_a_stages_is_told_at_once(letter: str, tmp_path: Path) -> None:
    size = len(letter.encode())
    too_long = tmp_path / (letter * (212 // size + 1))
    with pytest.raises(UsageError, match=r"bytes, need at most 211") as caught, artifacts.lock(too_long):
        pass
    assert len(caught.value.message) < 200
    assert os.listdir(tmp_path) == []
    target = tmp_path / (letter * (211 // size))
    with artifacts.lock(target):
        commit(target)
        commit(target, config=OTHER)
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.usefixtures("no_locks")
def test_the_longest_name_is_one_also_where_locks_do_nothing(tmp_path: Path) -> None:
    with artifacts.lock(tmp_path / ("n" * 211)):
        pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.fcntl, "flock", lambda *_: None)


# One process at a time


def test_a_second_process_is_told_who_holds_the_output(tmp_path: Path) -> None:
    with (
        artifacts.lock(tmp_path / "a"),
        pytest.raises(Busy, match=f"held by process {os.getpid()} on ") as caught,
        artifacts.lock(tmp_path / "a"),
    ):
        pass
    assert caught.value.exit_code == 6
    with artifacts.lock(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def add_one(folder: Path, rounds: int) -> None:
    """Read a number, add one, write it: loses counts unless one process does it at a time."""
    for _ in range(rounds):
        while True:
            try:
                with artifacts.lock(folder / "a"):
                    number = int((folder / "number").read_text())
                    (folder / "number").write_text(str(number + 1))
                break
            except Busy:
                pass


def test_many_processes_hold_it_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [multiprocessing.get_context("fork").Process(target=add_one, args=(tmp_path, 40)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "160"
    assert os.listdir(tmp_path) == ["number"]


def test_two_names_of_one_folder_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to("there")
    with artifacts.lock(tmp_path / "there"), pytest.raises(Busy), artifacts.lock(tmp_path / "a"):
        pass


# What a killed process left


def test_leftovers_go_and_neighbours_stay(tmp_path: Path) -> None:
    token = "0" * 32
    for name in (f".stage-a-{token}", f".trash-b-{token}", ".stage-a-mine", "stage-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    with artifacts.lock(tmp_path / "a"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".stage-a-mine", f".trash-b-{token}", "stage-a"]


def test_a_folder_that_may_be_someone_elses_loses_nothing_that_only_looks_like_a_leftover(tmp_path: Path) -> None:
    for name in (".trash-1000", ".stage-left", ".hidden"):
        (tmp_path / "home" / name).mkdir(parents=True)
    with artifacts.lock(tmp_path / "home"):
        pass
    assert sorted(os.listdir(tmp_path / "home")) == [".hidden", ".stage-left", ".trash-1000"]


def test_an_old_one_between_two_renames_gets_its_name_back(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    before = content(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / f".trash-a-{'0' * 32}")
    with artifacts.lock(tmp_path / "a"):
        pass
    assert content(tmp_path / "a") == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("moved", range(len(FILES) + 2))
def test_a_stage_that_was_moving_in_is_completed(moved: int, tmp_path: Path) -> None:
    commit(tmp_path / "whole")
    before = content(tmp_path / "whole")
    stage = tmp_path / "a" / f".stage-{'0' * 32}"
    shutil.copytree(tmp_path / "whole", stage)
    for name in sorted(set(before) - {"lorakit.json"})[:moved]:
        os.rename(stage / name, tmp_path / "a" / name)
    with artifacts.lock(tmp_path / "a"):
        pass
    assert content(tmp_path / "a") == before


@pytest.mark.parametrize("killed_at", range(1, 10))
def test_a_replacement_in_place_that_was_killed_is_completed(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a mount point, which can't be renamed: killed at each call, it is the old one, none, or the new one."""
    target = tmp_path / "mount"
    commit(target)
    new = {"blocks-00000.safetensors": b"new shard", "y": b"new"}
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(target))
    calls = 0
    with monkeypatch.context() as patch:

        def counted(original: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                nonlocal calls
                calls += 1
                if calls == killed_at:
                    raise KeyboardInterrupt
                original(*arguments)

            return call

        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(os, "unlink", counted(os.unlink))
        with contextlib.suppress(KeyboardInterrupt):
            commit(target, dict(new), config=OTHER)
    if artifacts.is_artifact(target):
        artifacts.open_artifact(target, "blocks")
    with artifacts.lock(target):
        pass
    assert artifacts.open_artifact(target, "blocks").config == OTHER.flat()
    assert sorted(os.listdir(target)) == ["blocks-00000.safetensors", "lorakit.json", "lorakit.yaml", "y"]
    assert (target / "blocks-00000.safetensors").read_bytes() == b"new shard"


def test_a_stage_that_wasnt_complete_goes(tmp_path: Path) -> None:
    commit(tmp_path / "whole")
    stage = tmp_path / "a" / f".stage-{'0' * 32}"
    shutil.copytree(tmp_path / "whole", stage)
    (stage / "notes.txt").write_bytes(b"")
    with artifacts.lock(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path / "a") == []


def test_a_removed_artifact_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path / "a")
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    artifacts.remove(tmp_path / "a")
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".trash-a-") for path in left] == [True]
    assert not artifacts.is_artifact(left[0])


def test_a_damaged_one_is_set_aside_whole(tmp_path: Path) -> None:
    commit(tmp_path / "step-00000002")
    before = content(tmp_path / "step-00000002")
    aside = artifacts.set_aside(tmp_path / "step-00000002")
    assert aside.name.startswith("bad-step-00000002-")
    assert content(aside) == before
    assert os.listdir(tmp_path) == [aside.name]


# From the command line


def test_the_manifest_is_json_that_anyone_reads(
    cli: Callable[..., Ran], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    made = cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", "64", "--output", "out", "--json")
    assert made.code == 0, made.err
    manifest = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert manifest["kind"] == "blocks"
    assert manifest["files"].keys() == set(os.listdir(tmp_path / "out")) - {"lorakit.json"}
    assert {"torch", "transformers", "tokenizers"} <= manifest["versions"].keys()


# One file of it


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at_call(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is done inside ends at its `number`th call that changes a name."""
    calls = 0

    def killing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return original(*given, **more)

        return call

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            patched.setattr(os, name, killing(getattr(os, name)))
        yield


@pytest.mark.parametrize("killed_at", range(1, 12))
def test_a_replaced_file_is_old_or_new_wherever_it_is_killed(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes a name: the next sweep completes it or nothing was changed, and the artifact is whole."""
    target = tmp_path / "a"
    commit(target)
    with killed_at_call(killed_at, monkeypatch):
        artifacts.amend(target, "notes.txt", b"new")
    with artifacts.lock(target):
        pass
    artifacts.open_artifact(target, "blocks")
    assert content(target).keys() == {*FILES, "lorakit.json", "lorakit.yaml"}
    assert (target / "notes.txt").read_bytes() in (FILES["notes.txt"], b"new")
    artifacts.amend(target, "notes.txt", b"new")
    assert (target / "notes.txt").read_bytes() == b"new"
    artifacts.open_artifact(target, "blocks")


def test_a_file_that_isnt_the_artifacts_or_was_changed_isnt_replaced(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    with pytest.raises(InputRefused, match=r"found no such file in lorakit\.json"):
        artifacts.amend(tmp_path / "a", "other.txt", b"new")
    (tmp_path / "a" / "notes.txt").write_bytes(b"changed")
    with pytest.raises(ArtifactDamaged, match="found other bytes than were written"):
        artifacts.amend(tmp_path / "a", "notes.txt", b"new")


@pytest.mark.parametrize("is_unfinished", [True, False], ids=["an unfinished run", "an artifact"])
@pytest.mark.parametrize("killed_at", range(1, 9))
def test_what_was_killed_while_it_was_removed_isnt_given_back(
    killed_at: int, is_unfinished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half of it would lie there as files that nobody knows."""
    target = tmp_path / "a"
    commit(target)
    if is_unfinished:
        os.unlink(target / "lorakit.json")
    whole = content(target)
    with killed_at_call(killed_at, monkeypatch):
        artifacts.remove(target)
    with artifacts.lock(target):
        assert content(target) in ({}, whole)
        assert os.listdir(tmp_path) in (["a", ".a.lock"], [".a.lock", "a"], [".a.lock"])


# Unfinished again


def test_a_reopened_artifact_is_the_unfinished_work_that_it_was(tmp_path: Path) -> None:
    commit(tmp_path / "a", keep=())
    (tmp_path / "a" / "checkpoints").mkdir()
    (tmp_path / "a" / "checkpoints" / "x").write_bytes(b"kept")
    artifacts.reopen(tmp_path / "a", ("checkpoints", "notes.txt"))
    assert content(tmp_path / "a") == {"checkpoints/x": b"kept", "notes.txt": FILES["notes.txt"]}
    unfinished = artifacts.claim(
        tmp_path / "a", "blocks", CONFIG, PARENTS, overwrite=False, unfinished=("checkpoints", "notes.txt")
    )
    assert unfinished is None


@pytest.mark.parametrize("killed_at", range(1, 14))
def test_killed_while_it_is_reopened_it_is_whole_or_unfinished(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    commit(target)
    (target / "checkpoints").mkdir()
    before = content(target)
    with killed_at_call(killed_at, monkeypatch):
        artifacts.reopen(target, ("checkpoints",))
    with artifacts.lock(target):
        pass
    assert (target / "checkpoints").is_dir()
    if artifacts.is_artifact(target):
        artifacts.open_artifact(target, "blocks")
        assert content(target) == before
    else:
        assert os.listdir(target) == ["checkpoints"]


def test_settings_that_may_differ_are_no_other_work(tmp_path: Path) -> None:
    commit(tmp_path / "a")
    with pytest.raises(Mismatch, match="block_size: found 2048, asked for 64"):
        artifacts.claim(tmp_path / "a", "blocks", OTHER, PARENTS, overwrite=False, may_differ=("pack",))
    found = artifacts.claim(tmp_path / "a", "blocks", OTHER, PARENTS, overwrite=False, may_differ=("block_size",))
    assert found is not None
    assert found.config == CONFIG.flat()
