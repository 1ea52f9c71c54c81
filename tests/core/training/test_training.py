"""Where a run goes on: the same work, other work, a replaced run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.training import loop
from tests.conftest import Ran
from tests.core.training.conftest import Train, adapter_bytes, losses

Cli = Callable[..., Ran]


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
