"""A merge killed at any moment: never a model that can be read and is wrong, and the same command finishes."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core import artifacts
from lorakit.core.errors import InputRefused
from tests.bench import merge as bench
from tests.conftest import Ran

Cli = Callable[..., Ran]

CONFIG = {**bench.TINYLLAMA, "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}


def killed(cli: Cli, tmp_path: Path, times: int) -> None:
    """Kill the same merge at random moments, all of them on one output with what each left behind."""
    base = bench.make_base(tmp_path / "base", CONFIG, 3)
    adapter = bench.make_adapter(tmp_path / "adapter", base, CONFIG, 8)
    assert cli("merge", adapter, "--output", tmp_path / "reference").code == 0
    reference = artifacts.read_manifest(tmp_path / "reference")["files"]
    output = tmp_path / "box" / "merged"
    command = [sys.executable, "-m", "lorakit", "merge", str(adapter), "--output", str(output), "--quiet"]
    started = time.monotonic()
    subprocess.run([*command[:-2], str(tmp_path / "timed"), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    seconds, chance = time.monotonic() - started, random.Random(0)
    struck = whole = 0
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, seconds * 1.1))
        process.kill()
        struck += process.wait() < 0
        try:
            found = artifacts.open_artifact(output, "merged model").manifest["files"]
        except InputRefused:
            assert not output.exists() or not any(output.iterdir())
            continue
        whole += 1
        assert {name: found[name] for name in found if name.endswith(".safetensors")} == {
            name: entry for name, entry in reference.items() if name.endswith(".safetensors")
        }
        artifacts.remove(output)
    assert struck > times / 2
    ran = cli("merge", adapter, "--output", output, "--json")
    assert ran.code == 0, ran.err
    assert os.listdir(tmp_path / "box") == ["merged"], "what the killed ones left is gone"
    artifacts.open_artifact(output, "merged model")


def test_killed_a_few_times(cli: Cli, tmp_path: Path) -> None:
    killed(cli, tmp_path, 8)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_two_hundred_times(cli: Cli, tmp_path: Path) -> None:
    killed(cli, tmp_path, 200)
