"""What a run leaves on its way, whole or passed over."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from lorakit.core import artifacts, disk
from lorakit.core.training import loop
from lorakit.core.training.checkpoints import Checkpoints
from tests.core.training.conftest import Train, adapter_bytes


def test_what_a_killed_run_left_goes_with_the_next_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between saving a checkpoint and removing an older one, or while removing it: before and after the end."""
    command = ("run", "--max-steps", 4, "--save-steps", 2, "--keep-checkpoints", 1)

    def dies(checkpoints: Any, best_step: int) -> None:
        if checkpoints.last_saved() == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "remove_oldest", dies)
    assert train(*command).code == 130
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 2
    monkeypatch.undo()
    for _ in range(2):
        shutil.copytree(tmp_path / "blocks", tmp_path / "run" / "checkpoints" / f".trash-step-00000002-{'0' * 32}")
        assert train(*command).code == 0
        assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000004"]


def test_a_damaged_checkpoint_is_passed_over_and_kept(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("whole", "--max-steps", 6, "--save-steps", 2)
    monkeypatch.setattr(loop.Run, "_finish", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    train("run", "--max-steps", 6, "--save-steps", 2)
    monkeypatch.undo()
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    ran = train("run", "--max-steps", 6, "--save-steps", 2)
    assert ran.json["resumed_from"] == 4
    assert "passed over a damaged checkpoint" in ran.err
    assert len(list((tmp_path / "run" / "checkpoints").glob("bad-step-00000006-*"))) == 1
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def lost(state: Any, tensors: Any) -> None:
    del tensors[min(tensors)]


def of_one_number(state: Any, tensors: Any) -> None:
    tensors.update({name: tensor.flatten()[:1].clone() for name, tensor in tensors.items()})


def without_the_loss(state: Any, tensors: Any) -> None:
    state["best_step"] = 2


def behind_the_start(state: Any, tensors: Any) -> None:
    state["step"] = -1


def in_words(state: Any, tensors: Any) -> None:
    state["step"] = "two"


@pytest.mark.parametrize(
    ("change", "code"), [(lost, 4), (of_one_number, 4), (without_the_loss, 3), (behind_the_start, 3), (in_words, 3)]
)
def test_a_checkpoint_that_someone_made_is_refused_though_its_hashes_are_right(
    change: Callable[[Any, Any], None], code: int, train: Train, tmp_path: Path
) -> None:
    train("whole", "--max-steps", 4, "--save-steps", 2, "--keep-checkpoints", 2)
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000002", folder)
    state, tensors = json.loads((folder / "state.json").read_bytes()), folder / "optimizer.safetensors"
    content = safetensors.torch.load(tensors.read_bytes())
    change(state, content)
    (folder / "state.json").write_text(json.dumps(state))
    tensors.write_bytes(safetensors.torch.save(content))
    manifest = dict(artifacts.read_manifest(folder))
    manifest["files"] = {name: disk.described(folder / name) for name in manifest["files"]}
    (folder / artifacts.MANIFEST).write_bytes(artifacts._manifest_bytes(manifest))
    ran = train("run", "--max-steps", 4, "--save-steps", 2, "--keep-checkpoints", 2)
    assert ran.code == code, ran.err
    assert ran.err.count("error: ") == 1
