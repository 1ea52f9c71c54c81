"""Exact match: what is compared, what a row asks, and which answers are right, against hand-made cases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import InputRefused
from lorakit.core.exact_match import Matches, Reply, compared, references
from lorakit.core.preparing import Question
from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]
GSM8K = "#### (.*)"


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("  whole \n", None, "whole"),
        ("so 6 * 7 = <<6*7=42>>42\n#### 42 \nand more", GSM8K, "42"),
        ("#### 1\n#### 2", GSM8K, "1"),
        ("no mark", GSM8K, None),
        ("it is 41, or 42", r"\d+", "41"),
        ("yes", "(no)|yes", ""),
        ("x" * 5, "", ""),
    ],
)
def test_what_of_a_text_is_compared(text: str, pattern: str | None, found: str | None) -> None:
    assert compared(text, pattern) == found


def test_a_pattern_has_to_find_something_in_every_row() -> None:
    asked = [Question(f"rows:{number}", [1], f"#### {number}") for number in range(3)]
    assert references(asked, GSM8K) == ["0", "1", "2"]
    with pytest.raises(InputRefused, match=r"rows:1: found a completion without --answer-pattern .* \(2 of 3 rows\)"):
        references([asked[0], Question("rows:1", [1], "1"), Question("rows:2", [1], "#### ")], GSM8K)


def test_the_share_is_counted() -> None:
    replies = [Reply("", None, right) for right in (True, False, True, True)]
    assert (Matches(replies).right, Matches(replies).share) == (3, 0.75)
    low, high = Matches(replies).interval
    assert low < 0.75 < high


# A model whose answers are known: it was asked before, one row at a time.


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PROMPTS = ["a", "what is it?", "b c d", "one two three four five", "z"]


@pytest.fixture
def known(cli: Cli, tiny_llama: Path) -> list[str]:
    """What the tiny model says to each prompt, as chat says it."""
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    ran = cli("chat", tiny_llama, *asked, "--max-new-tokens", 10, "--json")
    return [json.loads(line)["answer"] for line in ran.out.splitlines()]


@pytest.mark.parametrize("rows_at_once", [1, 3, 8])
def test_right_are_the_rows_whose_completion_the_model_says(
    rows_at_once: int, known: list[str], cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "completion": said} for prompt, said in zip(PROMPTS, known, strict=True)]
    rows[1]["completion"] += "!"
    rows[4]["completion"] = "something else"
    path = write(tmp_path / "rows.jsonl", rows)
    given = ("--dataset", path, "--block-size", 64, "--exact-match", "--max-new-tokens", 10)
    ran = cli("evaluate", tiny_llama, *given, "--rows-at-once", rows_at_once, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert [answer["answer"] for answer in found["answers"]] == known
    assert [answer["right"] for answer in found["answers"]] == [True, False, True, True, False]
    assert (found["exact_match"], found["rows"], found["base_exact_match"]) == (0.6, 5, None)
    assert found["answers"][4]["place"] == f"{path}:5"
    assert found["answers"][4]["reference"] == "something else"


def test_a_pattern_compares_a_part_and_limit_takes_the_first_rows(
    known: list[str], cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [
        {"question": prompt, "answer": f"{said.strip()[:1]} and more"}
        for prompt, said in zip(PROMPTS, known, strict=True)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    given = ("--dataset", path, "--block-size", 64, "--exact-match", "--max-new-tokens", 10, "--limit", 3)
    found = cli("evaluate", tiny_llama, *given, "--answer-pattern", r"^\s*(\S)", "--json").json
    assert (found["rows"], found["exact_match"]) == (3, 1.0)
    shown = cli("evaluate", tiny_llama, *given, "--answer-pattern", r"^\s*(\S)")
    assert "100.0%" in shown.out
    assert ", and 3 rows, with 95 % intervals" in shown.out


def test_an_adapter_and_its_base_answer_the_same_rows(
    known: list[str], cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """The base as it answers by itself; the adapter by the template that it was trained with, as chat asks it."""
    run = tmp_path / "run"
    trained = ("train", "--model", tiny_llama, "--dataset", rows_file, "--block-size", 128, "--max-steps", 4)
    assert cli(*trained, "--learning-rate", 1e-2, "--output", run).code == 0
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": known[0]}, {"prompt": "z", "completion": "-"}])
    given = ("--dataset", path, "--block-size", 64, "--exact-match", "--max-new-tokens", 10)
    ran = cli("evaluate", run, *given, "--json")
    assert ran.code == 0, ran.err
    chat = cli("chat", run, "--prompt", "a", "--prompt", "z", "--max-new-tokens", 10, "--json")
    by_chat = [json.loads(line)["answer"] for line in chat.out.splitlines()]
    assert [answer["answer"] for answer in ran.json["answers"]] == by_chat
    assert [answer["base_answer"] for answer in ran.json["answers"]] == [known[0], known[4]]
    assert ran.json["base_exact_match"] == 0.5
    alone = cli("evaluate", tiny_llama, *given, "--json").json
    assert ran.json["base_loss"] == pytest.approx(alone["loss"], rel=1e-6)
    shown = cli("evaluate", run, *given)
    assert "its base" in shown.out
    assert "change" in shown.out


# Refused


def test_rows_that_cant_be_asked_are_one_error_each(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    plain = make_llama(tmp_path / "plain", chat_template=None)
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    pair = [{"prompt": "a", "completion": "b"}]
    cases: list[tuple[Path, list[dict[str, Any]], tuple[object, ...], int, str]] = [
        (tiny_llama, [{"text": "no completion"}], (), 3, "found no prompt with a completion"),
        (tiny_llama, [{"prompt": "a"}], (), 3, "found the columns prompt"),
        (tiny_llama, [], (), 3, "found no rows"),
        (tiny_llama, [{"prompt": "a", "completion": ""}], (), 3, "need text"),
        (plain, chat, (), 3, "no chat template"),
        (plain, [{"prompt": "", "completion": "b"}], (), 3, "found no prompt with a completion"),
        (tiny_llama, pair, ("--answer-pattern", GSM8K), 3, "found a completion without --answer-pattern '#### (.*)'"),
        (tiny_llama, pair, ("--answer-pattern", "("), 2, "--answer-pattern: found '(', need a regular expression"),
        (tiny_llama, pair, ("--max-new-tokens", 511), 3, "need at most the model's 512 together"),
    ]
    for model, rows, more, code, words in cases:
        path = write(tmp_path / "rows.jsonl", rows)
        ran = cli("evaluate", model, "--dataset", path, "--exact-match", "--block-size", 64, *more)
        assert (ran.code, ran.out, ran.err.count("error:"), ran.err.count("hint:")) == (code, "", 1, 1), ran.err
        assert words in ran.err, ran.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "found 0 of --blocks and --dataset, need exactly one of them"),
        (("--blocks", "b", "--dataset", "d"), "found 2 of --blocks and --dataset"),
        (("--blocks", "b", "--exact-match"), "found --exact-match beside --blocks, need rows to answer: --dataset"),
        (("--blocks", "b", "--limit", 3), "found --limit beside --blocks, need --dataset"),
        (("--dataset", "d", "--answer-pattern", "x"), "found --answer-pattern without --exact-match, need both"),
    ],
)
def test_options_that_need_others(options: tuple[object, ...], words: str, cli: Cli) -> None:
    ran = cli("evaluate", "m", *options)
    assert ran.code == 2
    assert words in ran.err
