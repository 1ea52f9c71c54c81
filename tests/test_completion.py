"""What Tab offers, asked as each shell asks: by environment variables, a line an offer."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.cli import COMMANDS
from lorakit.core.config import CONFIGS
from lorakit.core.shapes import built_in
from lorakit.options import recipes
from tests.conftest import Ran, make_tokenizer

HEAVY = {
    *("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "tokenizers", "huggingface_hub"),
    *("numpy", "safetensors", "lorakit.core.config", "lorakit.console"),
}


def complete(shell: str, line: str, *, check: bool = True) -> str:
    """What a shell is answered for a line that the cursor stands at the end of."""
    words = line.split(" ")
    asked = {"_LORAKIT_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        asked |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        asked |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = (
        "import sys; from lorakit.cli import main; code = main([]); "
        f"print(*sorted({HEAVY} & set(sys.modules)), end='', file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert not check or (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def offered(shell: str, line: str) -> list[str]:
    """The words alone, without what each shell is told of them."""
    answer = complete(shell, line)
    if shell == "zsh":
        return (
            [] if answer.strip() == "_files" else re.findall(r'^(?:.*\(\()?"(.*?)"(?::"|\)\)|$)', answer, re.MULTILINE)
        )
    return [word.split("\t")[0] for word in answer.splitlines() if word]


SHELLS = pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])


@SHELLS
def test_commands_are_offered(shell: str) -> None:
    assert offered(shell, "lorakit ") == list(COMMANDS)
    assert offered(shell, "lorakit p") == ["prepare", "patch-attention", "plan-devices"]


@pytest.mark.parametrize(
    ("shell", "name"), [*(("bash", name) for name in COMMANDS), ("zsh", "train"), ("fish", "train")]
)
def test_every_option_is_offered_in_one_line_each(shell: str, name: str) -> None:
    found = offered(shell, f"lorakit {name} --")
    shown = {knob.label for knob in CONFIGS[name].settings().values() if knob.field.default is not True}
    assert {label for label in shown if label.startswith("--")} <= set(found)
    assert {"--json", "--quiet", "--verbose", "--config", "--help"} <= set(found)
    assert all(re.fullmatch(r"--[a-z0-9-]+", word) for word in found)


@SHELLS
def test_choices_are_offered(shell: str) -> None:
    assert offered(shell, "lorakit train --quantize ") == ["none", "int8", "nf4", "fp4", "fp8"]
    assert offered(shell, "lorakit train --model m --quantize n") == ["none", "nf4"]
    assert offered(shell, "lorakit train --optimizer paged_l") == ["paged_lion", "paged_lion_8bit"]
    assert offered(shell, "lorakit doctor --only n") == ["nf4", "nccl"]
    assert offered(shell, "lorakit prepare --template chat") == ["chat", "chatml"]


@SHELLS
def test_recipes_and_built_in_models_are_offered(shell: str) -> None:
    assert offered(shell, "lorakit train --config ") == list(recipes())
    assert offered(shell, "lorakit plan-devices llama-3") == [name for name in built_in() if name.startswith("llama-3")]


@SHELLS
@pytest.mark.parametrize(
    "line", ["prepare ", "train --dataset ", "train --plan x", "merge --output ", "chat --config "]
)
def test_files_are_left_to_the_shell(shell: str, line: str) -> None:
    assert offered(shell, f"lorakit {line}") == []


def folder_with(path: Path, name: str, content: object = ()) -> Path:
    path.mkdir(parents=True)
    (path / name).write_text(json.dumps(content))
    return path


def manifest(kind: str, **config: object) -> dict[str, object]:
    return {"kind": kind, "config": config}


@SHELLS
def test_folders_that_hold_what_is_asked_for_are_offered(shell: str, tmp_path: Path) -> None:
    folder_with(tmp_path / "runs" / "mine", "adapter_config.json")
    folder_with(tmp_path / "runs" / "deep" / "er" / "est", "adapter_config.json")
    folder_with(tmp_path / "runs" / ".stage-mine", "adapter_config.json")
    folder_with(tmp_path / "merged", "config.json")
    folder_with(tmp_path / "rows-blocks", "lorakit.json", manifest("blocks"))
    folder_with(tmp_path / "broken", "lorakit.json", "{")
    assert offered(shell, "lorakit merge ") == ["runs/mine"]
    assert offered(shell, "lorakit merge runs/") == ["runs/mine", "runs/deep/er/est"]
    assert offered(shell, "lorakit merge runs/deep/er/e") == ["runs/deep/er/est"]
    assert offered(shell, f"lorakit merge {tmp_path}/ru") == [f"{tmp_path}/runs/mine"]
    assert offered(shell, "lorakit chat ") == ["merged", "runs/mine"]
    assert offered(shell, "lorakit train --model ") == ["merged"]
    assert offered(shell, "lorakit train --blocks ") == ["rows-blocks"]
    assert offered(shell, "lorakit train --adapter ") == ["runs/mine"]
    assert offered(shell, "lorakit merge nowhere/") == []


@pytest.mark.parametrize("content", ["[" * 100_000, '{"config": []}', '{"config": {"dataset": 3}}', "[]", "\0"])
def test_a_manifest_of_nonsense_is_passed_over(content: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "cache" / "blocks" / "odd", tmp_path / "odd"):
        folder.mkdir(parents=True)
        (folder / "lorakit.json").write_text(content)
    assert offered("bash", "lorakit train --blocks ") == []


def test_blocks_in_the_cache_are_offered_with_what_they_were_made_of(
    cli: Callable[..., Ran], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LORAKIT_CACHE", str(cache))
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    ran = cli("prepare", "rows.jsonl", "--tokenizer", "tokenizer", "--block-size", "64", "--json")
    path = ran.json["path"]
    assert path.startswith(str(cache / "blocks"))
    assert complete("fish", "lorakit train --blocks ").splitlines() == [f"{path}\trows.jsonl, blocks of 64 tokens"]
    assert complete("bash", f"lorakit train --blocks {path[:-3]}").splitlines() == [path]


def test_a_quote_that_is_open_is_no_failure() -> None:
    assert complete("zsh", "lorakit train --model 'my", check=False).count("Traceback") == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_given_a_script_that_asks_so(shell: str) -> None:
    environ = {**os.environ, "_LORAKIT_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-m", "lorakit"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert f"complete_{shell}" in done.stdout
    assert "_LORAKIT_COMPLETE" in done.stdout


def test_bash_completes_by_its_own_script(tmp_path: Path) -> None:
    """The script in a real bash, which calls `lorakit` as it is found on PATH."""
    program = tmp_path / "bin" / "lorakit"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lorakit "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_LORAKIT_COMPLETE=source_bash lorakit)"; COMP_WORDS=(lorakit train --quantize n); COMP_CWORD=3; '
        '_lorakit_completion lorakit; printf "%s\\n" "${COMPREPLY[@]}"; complete -p lorakit'
    )
    environ = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["none", "nf4", "complete -o default -F _lorakit_completion lorakit"]
