"""Where a run goes on: the same work, other work, a replaced run."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import artifacts, disk, hub, training
from lorakit.core.blocks import Blocks
from lorakit.core.training import loop
from tests.conftest import make_llama
from tests.core.training.conftest import Train, adapter_bytes, lines_of, loss_by_documents, losses


def test_the_same_command_on_a_finished_run_is_already_done(train: Train, tmp_path: Path) -> None:
    first = train("run", "--max-steps", 2)
    stamp = (tmp_path / "run" / "lorakit.json").stat().st_mtime_ns
    again = train("run", "--max-steps", 2, "--save-steps", 1)  # how often it saves decides nothing
    assert again.code == 0
    assert again.json["already_done"] is True
    assert again.json["last_loss"] == first.json["last_loss"]
    assert (tmp_path / "run" / "lorakit.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_on_a_run_are_refused_and_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    train("run", "--max-steps", 4, "--save-steps", 2)
    if not finished:
        (tmp_path / "run" / "lorakit.json").unlink()
        for path in (tmp_path / "run").iterdir():
            if path.name not in ("checkpoints", "metrics.jsonl"):
                path.unlink()
    ran = train("run", "--max-steps", 4, "--rank", 4)
    assert ran.code == 5
    assert "rank: found 16, asked for 4" in ran.err


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        (("--max-steps", 9), "; or go on with --extend for more steps"),
        (("--effective-batch-size", 3), "; or go on with --effective-batch-size 2, which sets the accumulation"),
        (("--max-steps", 9, "--learning-rate", "1e-3"), ""),
        (("--rank", 4), ""),
    ],
)
def test_what_lets_a_run_go_on_is_hinted_at_where_it_does(train: Train, other: tuple[Any, ...], hint: str) -> None:
    """--extend changes the number of steps alone; more processes change the blocks of a step unless they are given."""
    train("run", "--max-steps", 2, "--gradient-accumulation-steps", 2)
    again = () if "--effective-batch-size" in other else ("--gradient-accumulation-steps", 2)
    ran = train("run", *(() if "--max-steps" in other else ("--max-steps", 2)), *again, *other)
    assert ran.code == 5
    assert ran.err.splitlines()[-1] == f"hint: choose another --output, or add --overwrite{hint}"


def test_another_base_is_told_by_the_beginning_of_its_fingerprint(
    train: Train, tmp_path: Path, tiny_llama: Path
) -> None:
    train("run", "--max-steps", 1)
    make_llama(tmp_path / "other", seed=5)
    ran = train("run", "--max-steps", 1, "--model", tmp_path / "other")
    assert ran.code == 5
    assert re.search(r"base: found '[0-9a-f]{8}…', asked for '[0-9a-f]{8}…'\n", ran.err)
    assert "--extend" not in ran.err


def test_overwrite_keeps_the_old_run_until_the_new_one_is_whole(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run", "--max-steps", 2)
    old = adapter_bytes(tmp_path / "run")
    original = loop.Run._finish

    def dies(run: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Run, "_finish", dies)
    assert train("run", "--max-steps", 3, "--overwrite").code == 130
    assert adapter_bytes(tmp_path / "run") == old
    monkeypatch.setattr(loop.Run, "_finish", original)
    ran = train("run", "--max-steps", 3, "--overwrite")
    assert ran.json["resumed_from"] == 3
    assert ran.json["path"] == str(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_files_that_arent_the_runs_are_refused_before_the_training_that_would_take_them_away(
    train: Train, tmp_path: Path
) -> None:
    train("run", "--max-steps", 2)
    (tmp_path / "run" / "notes.md").write_text("what I saw")
    ran = train("run", "--max-steps", 3, "--overwrite")
    assert ran.code == 5
    assert "found notes.md that lorakit.json doesn't name" in ran.err
    assert (tmp_path / "run" / "notes.md").read_text() == "what I saw"
    assert len(losses(tmp_path / "run")) == 2
    assert [path.name for path in tmp_path.glob("*run*")] == ["run"]
    (tmp_path / "run" / "notes.md").unlink()
    assert train("run", "--max-steps", 3, "--overwrite").code == 0


def test_a_mount_point_is_refused_before_the_training_that_would_replace_its_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run", "--max-steps", 2)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "run"))
    ran = train("run", "--max-steps", 3, "--overwrite")
    assert ran.code == 5
    assert "found another run on a mount point" in ran.err
    assert len(losses(tmp_path / "run")) == 2
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


# More steps


CONSTANT = ("--lr-scheduler-type", "constant", "--warmup-ratio", 0, "--save-steps", 2)
"""What makes a run of more steps begin as one of fewer does."""


def test_more_steps_need_to_be_asked_for(train: Train) -> None:
    train("run", *CONSTANT, "--max-steps", 4)
    ran = train("run", *CONSTANT, "--max-steps", 7)
    assert ran.code == 5
    assert "max_steps: found 4, asked for 7" in ran.err
    ran = train("run", *CONSTANT, "--max-steps", 7, "--extend", "--rank", 8)
    assert ran.code == 5
    assert "rank: found 16, asked for 8" in ran.err
    assert "max_steps" not in ran.err


@pytest.mark.parametrize("finished", [True, False])
def test_an_extended_run_is_the_longer_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    longer = (*CONSTANT, "--max-steps", 7, "--lora-dropout", 0.2)
    train("whole", *longer)
    if not finished:
        monkeypatch.setattr(loop.Run, "_finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    shorter = train("run", *CONSTANT, "--max-steps", 4, "--lora-dropout", 0.2)
    assert shorter.code == (0 if finished else 130)
    monkeypatch.undo()
    ran = train("run", *longer, "--extend")
    assert ran.code == 0, ran.err
    assert (ran.json["resumed_from"], ran.json["steps"]) == (4, 7)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert train("run", *longer).json["already_done"]
    assert train("run", *longer, "--extend").json["already_done"]
    fewer = train("run", *CONSTANT, "--max-steps", 5, "--lora-dropout", 0.2, "--extend")
    assert fewer.code == 2
    assert "with 7 steps already, need more than these" in fewer.err


def test_epochs_can_be_extended_too(train: Train, blocks: Path) -> None:
    count = len(Blocks(blocks))
    assert train("run", "--epochs", 1).json["steps"] == count
    assert train("run", "--epochs", 1.5, "--extend").json["steps"] == round(1.5 * count)


def test_after_a_short_last_step_a_run_goes_on_with_the_blocks_that_come_next(
    train: Train, blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch takes every block once, however the steps lie; also where the extended part is killed."""
    taken: list[int] = []
    original = Blocks.batch

    def watched(self: Blocks, indices: Any) -> Any:
        taken.extend(indices)
        return original(self, indices)

    monkeypatch.setattr(Blocks, "batch", watched)
    count = len(Blocks(blocks))
    size = next(size for size in range(3, 9) if count % size)
    options = (
        "--effective-batch-size",
        size,
        "--lr-scheduler-type",
        "constant",
        "--warmup-ratio",
        0,
        "--save-steps",
        1,
    )
    assert train("run", *options).json["steps"] == -(-count // size)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    assert train("run", *options, "--epochs", 1 + 0.5 / count, "--extend").code == 2  # not even one more block
    ran = train("run", *options, "--epochs", 2, "--extend")
    assert ran.json["steps"] == 2 * -(-count // size)
    assert [sorted(taken[:count]), sorted(taken[count:])] == [list(range(count))] * 2
    assert taken[:count] != taken[count:]
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, ran.json["steps"] + 1))
    epochs = [min(size * step, count) / count for step in range(1, -(-count // size) + 1)]
    assert [line["epoch"] for line in lines] == pytest.approx([*epochs, *(1 + epoch for epoch in epochs)], abs=1e-6)
    assert train("run", *options, "--epochs", 2).json["already_done"]

    monkeypatch.setattr(loop.Run, "_finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    third = -(-count // size) + 1
    assert train("killed", *options, "--max-steps", third, "--extend").code == 130
    monkeypatch.undo()
    del taken[:]
    monkeypatch.setattr(Blocks, "batch", watched)
    again = train("killed", *options, "--epochs", 2, "--extend")
    assert again.json["resumed_from"] == third
    assert len(taken) == count - size
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "run")


@pytest.mark.parametrize("engine", ["auto", "standard"])
def test_a_run_from_before_there_were_engines_goes_on_with_the_standard_one(
    engine: str, train: Train, tmp_path: Path
) -> None:
    assert train("run", *CONSTANT, "--max-steps", 4).code == 0
    for folder in (tmp_path / "run", *(tmp_path / "run" / "checkpoints").iterdir()):
        forget_engine(folder)
    assert train("run", *CONSTANT, "--max-steps", 4, "--engine", engine).json["already_done"]
    fast = train("run", *CONSTANT, "--max-steps", 6, "--extend", "--engine", "fast")
    assert fast.code == 5
    assert "engine: found 'standard', asked for 'fast'" in fast.err
    ran = train("run", *CONSTANT, "--max-steps", 6, "--extend", "--engine", engine)
    assert (ran.code, ran.json["resumed_from"], ran.json["engine"]) == (0, 4, "standard")
    assert train("whole", *CONSTANT, "--max-steps", 6).code == 0
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def forget_engine(folder: Path) -> None:
    """An artifact as it was before the setting."""
    manifest = dict(artifacts.read_manifest(folder))
    del manifest["config"]["engine"], manifest["facts"]["engine"]
    if (state := folder / "state.json").exists():
        kept = json.loads(state.read_text())
        del kept["engine"]
        state.write_text(json.dumps(kept))
        manifest["files"]["state.json"] = disk.described(state)
    (folder / artifacts.MANIFEST).write_bytes(artifacts._manifest_bytes(manifest))


def test_a_finished_run_that_fails_to_go_on_is_still_the_unfinished_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its first step: nothing of what it had learned is lost, and the same command goes on."""
    train("run", *CONSTANT, "--max-steps", 4)
    monkeypatch.setattr(loop.Run, "_step", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train("run", *CONSTANT, "--max-steps", 6, "--extend").code == 130
    monkeypatch.undo()
    assert train("run", *CONSTANT, "--max-steps", 6, "--extend").json["resumed_from"] == 4


def test_an_adapter_is_there_until_more_steps_can_begin(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("run", *CONSTANT, "--max-steps", 4)
    before = adapter_bytes(tmp_path / "run")
    monkeypatch.setattr(loop.Run, "_load", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert train("run", *CONSTANT, "--max-steps", 6, "--extend").code == 9
    assert adapter_bytes(tmp_path / "run") == before
    assert train("run", *CONSTANT, "--max-steps", 4).json["already_done"]


def test_a_finished_run_without_its_checkpoints_isnt_begun_anew(train: Train, tmp_path: Path) -> None:
    train("run", *CONSTANT, "--max-steps", 4)
    before = adapter_bytes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    ran = train("run", *CONSTANT, "--max-steps", 6, "--extend")
    assert ran.code == 3
    assert "found an adapter without its checkpoints" in ran.err
    assert adapter_bytes(tmp_path / "run") == before
    assert (tmp_path / "run" / "lorakit.json").exists()


def test_a_run_that_stopped_early_goes_on_when_it_is_extended(
    train: Train, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = [9.0, 3.0, 3.5, 2.0, 1.0]
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (heard.pop(0), 100))
    command = ("--eval-steps", 2, "--early-stopping-patience", 1)
    assert train("run", "--max-steps", 6, *command, data=held_out).json["steps"] == 4
    ran = train("run", "--max-steps", 8, *command, "--extend", data=held_out)
    assert (ran.json["resumed_from"], ran.json["steps"], ran.json["best_step"]) == (4, 8, 8)


# Beginning with an adapter


def test_a_run_begins_with_an_adapter(train: Train, tmp_path: Path, tiny_llama: Path, held_out: Path) -> None:
    """Its matrices, its rank and targets; the loss before the first step is plain peft's of base and adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train("first", "--max-steps", 12, "--rank", 4, "--lora-alpha", 6, "--target-modules", "q_proj,up_proj")
    options = ("--max-steps", 3, "--eval-steps", 3, "--adapter", tmp_path / "first")
    ran = train("second", *options, data=held_out)
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 6, ["q_proj", "up_proj"])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "first")
    expected, _ = loss_by_documents(loaded, Blocks(held_out, "validation"))
    assert lines_of(tmp_path / "second", "eval_loss")[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert adapter_bytes(tmp_path / "second") != adapter_bytes(tmp_path / "first")
    assert "rank 4, alpha 6, targets q_proj, up_proj" in (tmp_path / "second" / "README.md").read_text()
    assert train("second", *options, data=held_out).json["already_done"]
    train("third", "--max-steps", 1, "--rank", 4, "--lora-alpha", 6, "--target-modules", "q_proj,up_proj")
    ran = train("second", "--max-steps", 3, "--eval-steps", 3, "--adapter", tmp_path / "third", data=held_out)
    assert ran.code == 5
    assert "adapter: found " in ran.err


def test_an_adapter_may_come_from_the_hub(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("first", "--max-steps", 1)
    original = hub.model_folder
    folders = {"owner/adapter": tmp_path / "first"}
    monkeypatch.setattr(training, "model_folder", lambda name, **named: folders.get(name) or original(name, **named))
    ran = train("second", "--max-steps", 1, "--adapter", "owner/adapter")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    "beside",
    [
        ("--rank", 8),
        ("--lora-alpha", 8, "--lora-dropout", 0.1),
        ("--target-modules", "q_proj"),
        ("--layers-to-transform", 1),
        ("--use-rslora",),
        ("--modules-to-save", "lm_head"),
    ],
    ids=str,
)
def test_what_an_adapter_says_itself_isnt_said_beside_it(
    beside: tuple[object, ...], train: Train, tmp_path: Path
) -> None:
    train("first", "--max-steps", 1)
    ran = train("second", "--max-steps", 1, "--adapter", tmp_path / "first", *beside)
    assert ran.code == 2
    assert all(str(option) in ran.err for option in beside if str(option).startswith("--"))
    assert "beside --adapter" in ran.err


@pytest.mark.parametrize(
    ("first", "added", "code"),
    [
        ((), "<new>", 2),
        (("--modules-to-save", "lm_head"), "<new>", 2),  # its embedding would stay as it began
        (("--add-tokens", "<new>"), "<new>,<more>", 2),
        (("--add-tokens", "<new>"), "<new>", 0),
        (("--modules-to-save", "embed_tokens,lm_head"), "<new>", 0),
    ],
    ids=str,
)
def test_new_tokens_that_an_adapter_wouldnt_learn_are_refused_before_the_base_is_loaded(
    first: tuple[str, ...],
    added: str,
    code: int,
    train: Train,
    cli: Any,
    rows_file: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for tokens in {added, "<new>"}:
        given = ("--tokenizer", tiny_llama, "--block-size", 128, "--add-tokens", tokens)
        assert cli("prepare", rows_file, *given, "--output", tmp_path / tokens).code == 0
    data = {"data": tmp_path / "<new>"} if "--add-tokens" in first else {}
    assert train("first", "--max-steps", 1, *first, **data).code == 0
    if code:
        monkeypatch.setattr(loop, "load_base", lambda *_, **__: pytest.fail("the base is loaded"))
    beside = ("--adapter", tmp_path / "first", "--add-tokens", added)
    ran = train("second", "--max-steps", 1, *beside, data=tmp_path / added)
    assert ran.code == code, ran.err
    if code:
        lacking = added.split(",")[-1]
        assert f"error: --add-tokens: found {lacking}, which {tmp_path / 'first'} has no rows for" in ran.err


def test_an_adapter_that_isnt_there_or_is_for_another_base_is_refused(train: Train, tmp_path: Path) -> None:
    assert train("run", "--max-steps", 1, "--adapter", tmp_path / "nothing").code == 3
    other = make_llama(tmp_path / "other", seed=1)
    assert train("first", "--max-steps", 1, model=other).code == 0
    ran = train("run", "--max-steps", 1, "--adapter", tmp_path / "first")
    assert ran.code == 5
    assert "need the one that" in ran.err
