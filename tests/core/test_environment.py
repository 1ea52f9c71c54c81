"""The cache folder: lorakit's own variable first, then the platform's habit."""

import os
import sys
from pathlib import Path

import pytest

from lorakit.core import environment
from lorakit.core.environment import (
    Worker,
    cache_folder,
    let_gpu_memory_grow,
    patched_transformers,
    ready_for_workers,
    worker,
)
from lorakit.core.errors import EnvironmentUnusable


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORAKIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "platform", "linux")


def test_lorakits_variable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LORAKIT_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_a_relative_or_home_folder_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", "here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("LORAKIT_CACHE", "~/there")
    assert cache_folder() == tmp_path / "home" / "there"


def test_an_empty_variable_is_no_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("LORAKIT_CACHE", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "lorakit"


def test_linux_keeps_the_cache_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "home" / ".cache" / "lorakit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lorakit"


def test_a_mac_keeps_the_cache_in_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "home" / "Library" / "Caches" / "lorakit"


def test_asking_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "new"))
    assert not cache_folder().exists()


def test_torchs_gpu_memory_grows_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    monkeypatch.delenv(new, raising=False)
    monkeypatch.setenv(old, "backend:native")
    let_gpu_memory_grow()
    assert new not in os.environ
    monkeypatch.delenv(old)
    monkeypatch.setenv(new, "")
    let_gpu_memory_grow()
    assert os.environ[new] == ""
    monkeypatch.delenv(new)
    let_gpu_memory_grow()
    assert os.environ[new] == "expandable_segments:True"
    monkeypatch.setenv(new, "")  # so that what was set here is taken back


# A transformers that was edited by hand


def test_the_installed_transformers_is_as_it_was_installed() -> None:
    assert patched_transformers() is None


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"x = scaled_dot_product_attention(q, k, v)", "calls scaled_dot_product_attention itself"), (b"x", "was edited")],
)
def test_an_edited_source_is_named_with_the_way_back(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import hashlib
    import importlib.metadata

    path = tmp_path / "transformers" / "models" / "llama" / "modeling_llama.py"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"as installed")
    recorded = base64.urlsafe_b64encode(hashlib.sha256(b"as installed").digest()).rstrip(b"=").decode()
    info = tmp_path / "transformers-5.99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.99\n")
    (info / "RECORD").write_text(f"transformers/models/llama/modeling_llama.py,sha256={recorded},12\n")
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    assert patched_transformers() is None
    path.write_bytes(content)
    said = str(patched_transformers())
    assert words in said
    assert "pip install --force-reinstall --no-deps transformers==5.99" in said


@pytest.mark.parametrize(
    ("visible", "free"),
    [(None, [3, 5]), ("1", [5]), ("1,0", [5, 3]), ("-1", []), ("", []), ("0,7,1", [3]), ("GPU-abc", [3, 5])],
)
def test_the_gpus_that_count_are_those_that_cuda_shows(
    visible: str | None, free: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lorakit.core.environment import free_gpu_bytes

    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '3\\n5\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert free_gpu_bytes() == [size * 2**20 for size in free]


# A place in a parallel run

PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in (*PLACE, *MEETING):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_worker_knows_its_place_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, PLACE | MEETING)
    assert worker() == Worker(rank=3, world_size=4, local_rank=1, local_world_size=2)


@pytest.mark.parametrize("values", [{}, MEETING, dict.fromkeys(PLACE, "")])
def test_without_a_place_a_process_is_alone(values: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, values)
    assert worker() is None


@pytest.mark.parametrize("name", [*PLACE, *MEETING])
def test_a_place_with_a_part_missing_is_refused_and_how_to_be_alone_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = PLACE | MEETING
    del values[name]
    set_all(monkeypatch, values)
    with pytest.raises(EnvironmentUnusable, match=f"need {name} beside it") as caught:
        worker()
    assert "env -u" in caught.value.hint
    assert f"-u {name} " not in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "4"),
        ("RANK", "-1"),
        ("RANK", "first"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "5"),
        ("WORLD_SIZE", "9" * 5000),
        ("LOCAL_RANK", "²"),
    ],
)
def test_places_that_cant_be_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, PLACE | MEETING | {name: value})
    with pytest.raises(EnvironmentUnusable, match="need ranks below their world sizes"):
        worker()


def test_cores_are_shared_between_workers_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "TORCHELASTIC_SIGNALS_TO_HANDLE")
    for name in names:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    ready_for_workers(3)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    ready_for_workers(9)
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    ready_for_workers(2)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCH_CPP_LOG_LEVEL"]) == ("5", "INFO")
