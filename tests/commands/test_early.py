"""What the file system tells is told before the libraries are imported that take seconds."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran

Cli = Callable[..., Ran]
CODE = """
import sys
from lorakit.cli import main
code = main(sys.argv[1:])
print({"torch", "transformers", "peft"} & set(sys.modules) or "light", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def here(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A folder with blocks, rows and an unfinished run."""
    given = ("--tokenizer", tiny_llama, "--block-size", 128, "--output", tmp_path / "blocks")
    assert cli("prepare", rows_file, *given).code == 0
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "run" / "checkpoints" / "step-00000007").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code", "words", "hint"),
    [
        ("train --model nope --blocks nope", 3, "nope: found no such folder", "lorakit prepare"),
        ("train --model nope --blocks run", 3, "run: found a folder without lorakit.json", "lorakit prepare"),
        ("train --model nope --blocks rows.jsonl", 3, "found a file, need a blocks folder", "hint: --dataset /"),
        ("patch-attention ./nope", 3, "nope: found no such folder", "check the path"),
        ("patch-attention --apply-to rows.jsonl", 3, "rows.jsonl: found a file", "check the path"),
        ("chat ./nope", 3, "nope: found no such folder", "check the path"),
        ("chat blocks", 3, "blocks: found blocks, need adapter", "lorakit train"),
        ("chat run", 3, "run: found an unfinished run, stopped after step 7", "it goes on"),
    ],
)
def test_a_path_that_cant_be_it_is_refused_before_anything_heavy(
    line: str, code: int, words: str, hint: str, here: Path
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CODE, *line.split()], env=os.environ, capture_output=True, text=True, check=False
    )
    assert ran.returncode == code
    assert words in ran.stderr
    assert hint in ran.stderr
    assert ran.stderr.splitlines()[-1] == "light"
