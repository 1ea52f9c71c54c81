"""The folders that doctor tries out: what it makes goes away again, and nothing else."""

from pathlib import Path

import pytest

from lorakit.core.doctor import storage


def test_what_is_made_for_a_trial_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    with storage._own_folder(tmp_path / "a" / "b" / "c") as own:
        (own / "trial").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []
    with storage._own_folder(tmp_path / "a" / "b" / "c") as own:
        (own / "trial").write_bytes(b"x")
        (tmp_path / "a" / "theirs").write_text("a download")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "theirs"]


def test_what_was_there_stays_although_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with storage._own_folder(tmp_path / "there"):
        pass
    with storage._own_folder(tmp_path / "there" / "new"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_place_that_cant_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"), storage._own_folder(tmp_path / "a" / ("b" * 300)):
        pass
    assert list(tmp_path.iterdir()) == []
