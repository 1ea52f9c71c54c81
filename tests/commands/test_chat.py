"""Chat as it is typed: a pipe, one JSON object a turn, and a real terminal that Ctrl-C leaves whole."""

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import make_adapter

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat")
    return {
        "base": tiny_llama,
        "adapter": make_adapter(folder / "adapter", tiny_llama),
        "plain": make_llama(folder / "plain", chat_template=None),
        "endless": endless(folder / "endless"),
    }


def endless(folder: Path, context_tokens: int = 100_000) -> Path:
    """A model that never says one of the tokens that end an answer."""
    import safetensors.torch

    make_llama(folder, max_position_embeddings=context_tokens)
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    tensors["lm_head.weight"][256:259] = 0
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return folder


def turns(ran: Ran) -> list[dict[str, Any]]:
    assert ran.code == 0, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# A pipe


def test_each_line_of_a_pipe_is_answered(cli: Cli, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one\n/base\n/adapter\n\ntwo\n")
    found = turns(cli("chat", models["adapter"], "--max-new-tokens", 6, "--json"))
    assert [(turn["prompt"], turn["answered_by"]) for turn in found] == [
        ("one", "adapter"),
        ("one", "base"),
        ("one", "adapter"),
        ("two", "adapter"),
    ]
    assert found[0] == found[2]
    assert found[0]["answer"] != found[1]["answer"]
    keys = {"model", "prompt", "answer", "answered_by", "prompt_tokens", "completion_tokens", "finish_reason"}
    assert set(found[0]) == keys
    assert found[0]["model"] == str(models["adapter"])


def test_a_pipe_is_one_conversation(cli: Cli, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is asked after those before it and their answers, until /reset."""
    typed(monkeypatch, "one\none\n/reset\none\n")
    first, second, anew = turns(cli("chat", models["base"], "--max-new-tokens", 6, "--json"))
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert anew == first


def test_prompts_are_conversations_of_their_own(
    cli: Cli, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is read from stdin, whatever a prompt looks like."""
    typed(monkeypatch, "never asked\n")
    found = turns(cli("chat", models["base"], "--prompt", "a", "--prompt", "/exit", "--prompt", "a", "--json"))
    assert [turn["prompt"] for turn in found] == ["a", "/exit", "a"]
    assert found[0] == found[2]


def test_an_answer_is_text_on_stdout_and_all_else_is_not(cli: Cli, models: dict[str, Path]) -> None:
    given = ("chat", models["plain"], "--prompt", "hello", "--max-new-tokens", 5)
    as_json = cli(*given, "--json")
    [turn] = turns(as_json)
    assert (turn["finish_reason"], "cut at" in as_json.err) == ("length", False)
    shown = cli(*given)
    assert shown.out == turn["answer"] + "\n"
    assert shown.err.splitlines() == [
        "no chat template: what is asked is completed as plain text, each by itself",
        "(cut at 5 tokens; --max-new-tokens allows more)",
    ]
    assert cli(*given, "--quiet").err == ""


def test_a_command_of_a_pipe_that_cant_be_done_is_an_error(
    cli: Cli, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, code, words in (
        ("/base", 3, "/base: found a base or a merged model, need an adapter"),
        ("/nothing", 2, "/nothing: found no such command, need one of /base"),
    ):
        typed(monkeypatch, f"{line}\nnever asked\n")
        ran = cli("chat", models["base"])
        assert (ran.code, ran.out, ran.err.count("error:"), words in ran.err) == (code, "", 1, True)


def test_a_system_prompt_without_a_template_is_refused(cli: Cli, models: dict[str, Path]) -> None:
    ran = cli("chat", models["plain"], "--system", "Be kind.", "--prompt", "hello")
    assert (ran.code, ran.out) == (3, "")
    assert "found a system prompt and a tokenizer without a chat template" in ran.err


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_quantized_base_answers(kind: str, cli: Cli, models: dict[str, Path]) -> None:
    [turn] = turns(cli("chat", models["adapter"], "--quantize", kind, "--prompt", "a", "--max-new-tokens", 3, "--json"))
    assert turn["completion_tokens"] == 3


# A terminal


class Terminal:
    """`lorakit …` with a terminal of its own, as a shell gives it one; stdout too where it isn't a pipe."""

    def __init__(self, *arguments: object, pipe: bool = False) -> None:
        self.mine, theirs = pty.openpty()
        self.before = termios.tcgetattr(self.mine)
        command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
        stdout = subprocess.PIPE if pipe else theirs
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=stdout,
            stderr=theirs,
            text=True,
            env={**os.environ, "NO_COLOR": "1", "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._theirs = theirs
        self.seen = ""

    def until(self, words: str, times: int = 1) -> None:
        """Read until the words have been shown so often."""
        limit = time.monotonic() + 30
        while self.seen.count(words) < times:
            assert time.monotonic() < limit, self.seen
            if select.select([self.mine], [], [], 0.2)[0]:
                self.seen += os.read(self.mine, 4096).decode(errors="replace")
            else:
                assert self.process.poll() is None, self.seen

    def type(self, text: str) -> None:
        os.write(self.mine, text.encode())

    def left(self) -> tuple[int, bool]:
        """The exit code, and whether the terminal is as it was."""
        code = self.process.wait(30)
        return code, termios.tcgetattr(self.mine) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.mine)
        os.close(self._theirs)
        if self.process.stdout:
            self.process.stdout.close()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: object, **more: Any) -> Terminal:
        opened.append(Terminal(*arguments, **more))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_ends_an_answer_and_keeps_the_prompt(models: dict[str, Path], terminal: Callable[..., Terminal]) -> None:
    """Then twice at the prompt leaves. The answer would have taken minutes; what follows is still answered."""
    shell = terminal("chat", models["endless"], "--max-new-tokens", 50_000, "--json", pipe=True)
    shell.until("> ")
    shell.type("hello\n")
    time.sleep(1)
    shell.type("\x03")
    shell.until("> ", 2)
    shell.type("/nothing\n")
    shell.until("/nothing: found no such command")
    shell.until("> ", 3)
    shell.type("\x03")
    shell.until("Ctrl-C once more")
    shell.until("> ", 4)
    shell.type("/reset\n")
    shell.until("forgotten")
    shell.until("> ", 5)
    shell.type("\x03")
    shell.until("Ctrl-C once more", 2)
    shell.until("> ", 6)
    shell.type("\x03")
    assert shell.left() == (0, True)
    assert shell.process.stdout is not None
    [turn] = [json.loads(line) for line in shell.process.stdout.read().splitlines()]
    assert (turn["prompt"], turn["finish_reason"]) == ("hello", "interrupted")
    assert 0 < turn["completion_tokens"] < 50_000


@pytest.mark.parametrize("ending", ["/exit\n", "\x04", "\x03"])
def test_a_line_can_be_edited_and_taken_back(
    ending: str, models: dict[str, Path], terminal: Callable[..., Terminal]
) -> None:
    """By readline, whose settings of the terminal are put back at every end."""
    pytest.importorskip("readline")
    shell = terminal("chat", models["base"], "--max-new-tokens", 2)
    shell.until("/exit     leave")
    shell.until("> ")
    shell.type("/systen\x7fm Be kind\x01\x05.\n")
    shell.until("system prompt: Be kind.")
    shell.type("\x1b[A!\n")
    shell.until("system prompt: Be kind.!")
    shell.until("> ", 3)
    for _ in range(30 if ending == "\x03" else 1):
        # readline sleeps on where a signal comes just before it begins to wait for keys: a person presses again
        shell.type(ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            shell.process.wait(1)
            break
    if ending == "\x03":
        shell.until("Ctrl-C once more")
    assert shell.left() == (0, True)


def test_a_termination_ends_an_answer_with_its_own_code(
    models: dict[str, Path], terminal: Callable[..., Terminal]
) -> None:
    shell = terminal("chat", models["endless"], "--max-new-tokens", 50_000)
    shell.until("> ")
    shell.type("hello\n")
    time.sleep(1)
    shell.process.send_signal(signal.SIGTERM)
    shell.until("stopped by SIGTERM")
    assert shell.left() == (75, True)


def test_an_answer_that_the_context_cuts_says_so(cli: Cli, tmp_path: Path) -> None:
    ran = cli("chat", endless(tmp_path / "short", 100), "--prompt", "a", "--max-new-tokens", 100_000)
    cut = [line for line in ran.err.splitlines() if line.startswith("(cut")]
    assert len(cut) == 1
    assert cut[0].endswith(" tokens; the model's context is full)")


@pytest.mark.parametrize("option", [("--top-p", 0.5), ("--top-k", 3)])
def test_what_only_sampling_uses_needs_a_temperature(cli: Cli, option: tuple[str, float]) -> None:
    ran = cli("chat", "m", *option)
    assert ran.code == 2
    assert f"found {option[0]} with --temperature 0, need a higher --temperature" in ran.err
