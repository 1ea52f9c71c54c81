"""What every test stands on: a folder of its own, no network, a tiny Llama with a byte-level tokenizer, the CLI.

After the whole suite: every place in lorakit that makes an error was reached, and nobody asked for the network.
"""

import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# The same numbers on every machine: tests run on the CPU, also where there is a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tiny models gain nothing from more threads, and threads that wait for a busy core cost tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it once, when it is imported
# A shell has what it starts in its background ignore Ctrl-C, and what that starts too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# This process and all that it starts are watched, see there.
_SEEN: dict[str, bool] = {}
_PROBLEMS: list[str] = []
if "LORAKIT_TESTS_SEEN" not in os.environ:
    os.environ["LORAKIT_TESTS_SEEN"] = tempfile.mkdtemp(prefix="lorakit-tests-")
    _SEEN["own"] = True
runpy.run_path(str(Path(__file__).parent / "guard" / "sitecustomize.py"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """After the whole suite, see `tests/shown_errors.py`: what is wrong fails it. Errors of what a machine has no tools
    for (a compiler, the right to mount) are shown by other tests too, so that it is judged everywhere but off Linux."""
    config = session.config
    if hasattr(config, "workerinput"):  # a process of pytest-xdist's: the one that started it asks for all
        return
    own, folder = _SEEN.pop("own", None), Path(os.environ["LORAKIT_TESTS_SEEN"])
    parts = ("keyword", "lf", "failedfirst", "deselect", "ignore", "ignore_glob", "collectonly", "stepwise")
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    if whole and session.exitstatus == 0 and not any(getattr(config.option, part, None) for part in parts):
        from tests.shown_errors import problems

        _PROBLEMS.extend(problems(folder))
        if _PROBLEMS and sys.platform == "linux":
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if own:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _PROBLEMS:
        terminalreporter.section("what the whole suite has shown", red=True)
        for problem in _PROBLEMS:
            terminalreporter.write_line(problem)


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the user's is read or written, and the Hub is never asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("LORAKIT_DEBUG", raising=False)
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in handlers.items():
        signal.signal(which, handler)


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command line in this process: cli("prepare", path, "--json").

    A failure that isn't a LorakitError would be exit code 1; a test that expects another code therefore fails on it.
    """
    from lorakit.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
        code = main([str(argument) for argument in arguments])
        for which, handler in handlers.items():  # a command that is over hears no signal, the rest of the test does
            signal.signal(which, handler)
        captured = capsys.readouterr()
        return Ran(int(code), captured.out, captured.err)

    return run


def make_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Any:
    """A byte-level tokenizer (a token a byte) saved in `folder`: ids 0–255, then pad, begin and end of turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def _gpt2_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, encoder.py)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _gpt2_bytes()


def unmasked(name: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    return bytes(BYTES[sign] for sign in name)


def make_llama(folder: Path, *, seed: int = 0, chat_template: str | None = CHATML, **config: Any) -> Path:
    """A Llama of two layers with random weights and the byte-level tokenizer, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: Mapping[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": 258,
        "bos_token_id": 257,
        "pad_token_id": 256,
    }
    torch.manual_seed(seed)
    max_shard_size = config.pop("max_shard_size", "1GB")
    dtype = config.pop("dtype", torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(folder, chat_template)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama; read only."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."} for a in range(6) for b in range(4)
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """A JSONL file of 24 prompt/completion rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path
