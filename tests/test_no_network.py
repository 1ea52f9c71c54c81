"""No telemetry: every command on local inputs works where nothing beyond this machine can be reached, and asks nobody.

The whole suite runs so (`tests/guard`); here the Hub is on, as it is for a user, and each command is a process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shown_errors import noted

COMMANDS = (  # `demo` runs these same ones, and is tested for itself
    "prepare rows.jsonl --tokenizer {model} --block-size 128 --validation-split 0.3 --output blocks",
    "patch-attention {model} --block-size 128",
    "plan-devices {model} --cpu 8GiB --output plan.json",
    "train --model {model} --blocks blocks --max-steps 2 --eval-steps 1 --track tensorboard --output run",
    "merge run --output merged",
    "chat merged --prompt Hi --max-new-tokens 2",
    "evaluate run --blocks blocks",
    "doctor --only packages --only machine --only variables",
)


@pytest.mark.timeout(900)  # eight processes, most of which import torch
def test_every_command_works_without_a_network_and_asks_for_none(
    tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environ |= {"LORAKIT_TESTS_SEEN": str(seen), "COLUMNS": "100"}
    for command in COMMANDS:
        name, *words = command.format(model=tiny_llama).split()
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", name, *words], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert noted(seen, "connections") == []
