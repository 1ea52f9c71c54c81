"""What a run leaves on its way, whole or passed over."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

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
