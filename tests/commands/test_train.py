"""`lorakit train` as a launcher and as one of its workers: what each does, says and leaves to the other."""

import json
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import artifacts, environment, launching
from lorakit.core.config import PrepareConfig, TrainConfig
from lorakit.core.errors import InputRefused, LorakitError, NonFinite, Stopped
from lorakit.core.events import Notice, Progress, Report
from lorakit.options import read_settings
from tests.conftest import Ran

Cli = Callable[..., Ran]
PREPARE = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "any"}))


@dataclass
class Launched:
    """What a launcher would have started."""

    arguments: list[str]
    settings: Mapping[str, object]
    mode: int
    processes: tuple[int, int, str | None]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """Launches are noted instead of done; they end as `code` of the last says."""
    found: list[Launched] = []

    def launch(
        arguments: Sequence[str], num_processes: int, num_machines: int, rendezvous: str | None, report: Report
    ) -> int:
        file = Path(arguments[2])
        mode = stat.S_IMODE(file.stat().st_mode)
        processes = num_processes, num_machines, rendezvous
        found.append(Launched(list(arguments), read_settings(file), mode, processes))
        return 75

    monkeypatch.setattr(launching, "launch", launch)
    return found


@dataclass
class Training:
    """A stand-in for the training itself: what it was asked for, and how it ends."""

    error: LorakitError | None = None
    config: TrainConfig | None = None

    def __call__(
        self, config: TrainConfig, target: Path, blocks: Any, report: Report, should_stop: Callable[[], Any]
    ) -> Any:
        from lorakit.core.training import Trained

        self.config = config
        report(Notice("a notice"))
        report(Progress("training", 1, 1, "steps"))
        if self.error is not None:
            raise self.error
        return Trained(target, 1, 2.0, 1.0, 10.0, 2**20, 1.0, 0, "sdpa", "fp32", already_done=False)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    import lorakit.core.training

    training = Training()
    monkeypatch.setattr(lorakit.core.training, "train", training)
    monkeypatch.setattr(environment, "stop_with_parent", lambda: None)
    return training


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int = 2) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(world_size))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def make_blocks() -> None:
    """What a launcher looks for, at `b`."""
    with artifacts.lock(Path("b")):
        if not artifacts.is_artifact(Path("b")):
            artifacts.commit(Path("b"), "blocks", [], config=PREPARE, parents={}, facts={})


def train(cli: Cli, *options: object) -> Ran:
    make_blocks()
    return cli("train", "--model", "m", "--blocks", "b", "--output", "out", *options)


def test_more_than_one_process_is_started_with_the_resolved_settings(
    cli: Cli, launched: list[Launched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    ran = train(cli, "--parallel", "ddp", "--num-processes", 2, "--rank", 7, "--json")
    assert (ran.code, ran.out, ran.err) == (75, "", "")  # the workers have said the rest
    (job,) = launched
    assert job.arguments[:2] == ["train", "--config"]
    assert job.arguments[3:] == ["--json"]
    assert job.processes == (2, 1, None)
    assert (job.settings["rank"], job.settings["num_processes"]) == (7, 2)
    assert job.settings["blocks"] == [str(tmp_path / "b")]
    assert job.mode == 0o600
    assert list((tmp_path / "tmp").iterdir()) == []


def test_machines_and_rendezvous_reach_the_launcher(cli: Cli, launched: list[Launched]) -> None:
    machines = ("--num-machines", 2, "--rendezvous", "10.0.0.5:29500")
    train(cli, "--parallel", "fsdp", "--num-processes", 1, *machines, "--quiet")
    assert launched[0].processes == (1, 2, "10.0.0.5:29500")
    assert launched[0].arguments[3:] == ["--quiet"]


def test_a_dataset_is_prepared_once_before_workers_start(
    cli: Cli, launched: list[Launched], tiny_llama: Path, rows_file: Path
) -> None:
    packing = ("--block-size", 128, "--max-rows", 20, "--parallel", "ddp", "--num-processes", 2)
    assert cli("train", "--model", tiny_llama, "--dataset", rows_file, *packing).code == 75
    settings = launched[0].settings
    (blocks,) = settings["blocks"]  # type: ignore[misc]
    assert (Path(blocks) / "lorakit.json").exists()
    assert settings["dataset"] == []
    again = TrainConfig.resolve((None, settings))
    assert again.data.blocks == (Path(blocks),)


def test_an_accelerate_config_is_translated_before_workers_start(
    cli: Cli, launched: list[Launched], tmp_path: Path
) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    ran = train(cli, "--accelerate-config", path)
    assert ran.code == 75
    assert "MULTI_GPU becomes --parallel ddp with 2 processes" in ran.err
    assert (launched[0].settings["parallel"], launched[0].settings["accelerate_config"]) == ("ddp", None)


def test_processes_for_gpus_that_arent_there_are_an_error(cli: Cli, launched: list[Launched]) -> None:
    ran = train(cli, "--parallel", "ddp")
    assert ran.code == 11
    assert "need the number of processes" in ran.err
    assert "--num-processes" in ran.err.splitlines()[1]
    assert launched == []


def test_a_launcher_checks_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from lorakit.cli import main; code = main(sys.argv[1:]); "
        "print({'torch', 'transformers'} & set(sys.modules) or ''); sys.exit(code)"
    )
    make_blocks()
    command = [sys.executable, "-c", code, "train", "--model", "m", "--blocks", "b", "--parallel", "ddp"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (11, "")


def test_one_process_is_trained_in_this_one(cli: Cli, launched: list[Launched], training: Training) -> None:
    ran = train(cli, "--parallel", "ddp", "--num-processes", 1, "--json")
    assert (ran.code, launched) == (0, [])
    assert ran.json["steps"] == 1
    assert training.config is not None


def test_the_first_worker_speaks_and_the_others_are_silent(
    cli: Cli, launched: list[Launched], training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(monkeypatch, 0)
    first = train(cli, "--parallel", "ddp")
    assert "adapter" in first.out
    assert "a notice" in first.err
    assert json.loads(train(cli, "--parallel", "ddp", "--json").out)["last_loss"] == 1.0
    be_rank(monkeypatch, 1)
    for more in ((), ("--json",)):
        other = train(cli, "--parallel", "ddp", "--num-processes", 2, *more)
        assert (other.code, other.out, other.err) == (0, "", "")
    assert training.config is not None
    assert training.config.devices.num_processes == training.config.data_parallel_size == 2
    assert launched == []


def test_every_rank_says_its_own_error_with_its_number(
    cli: Cli, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.error = InputRefused("found [bad], need good", "make it good")
    said = []
    for rank in (0, 1):
        be_rank(monkeypatch, rank)
        ran = train(cli, "--parallel", "ddp")
        assert ran.code == 3
        said.append(ran.err.replace("a notice\n", ""))
    for rank, text in enumerate(said):
        assert text == f"rank {rank}: error: found [bad], need good\nrank {rank}: hint: make it good\n"


def test_an_error_of_all_ranks_is_said_by_the_first(
    cli: Cli, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = NonFinite("found NaN, need numbers", "lower it")
    together.shared = True
    for error in (together, Stopped("stopped after step 1, saved", "run it again")):
        training.error = error
        be_rank(monkeypatch, 0)
        first = train(cli, "--parallel", "ddp")
        assert f"\nerror: {error.message}\nhint: {error.hint}\n" in first.err
        be_rank(monkeypatch, 1)
        other = train(cli, "--parallel", "ddp")
        assert (first.code, other.code) == (error.exit_code, error.exit_code)
        assert other.err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--parallel left out, need --parallel ddp or fsdp"),
        (("--parallel", "split"), "split works in one process"),
        (("--parallel", "ddp", "--num-processes", 4), "found 2 processes on this machine"),
    ],
)
def test_settings_that_dont_fit_what_started_the_workers_are_said_once(
    options: Sequence[object], words: str, cli: Cli, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_rank(monkeypatch, 0)
    first = train(cli, *options)
    be_rank(monkeypatch, 1)
    other = train(cli, *options)
    assert (first.code, other.code, other.err) == (2, 2, "")
    assert words in first.err
    assert training.config is None


def test_half_an_environment_is_unusable(cli: Cli, training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = train(cli)
    assert ran.code == 11
    assert "found WORLD_SIZE=2 in the environment, need RANK, LOCAL_RANK" in ran.err
    assert "env -u WORLD_SIZE" in ran.err


def test_an_attention_whose_package_is_lacking_is_the_environments_fault(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = ("--block-size", 128, "--attention", "flash_attention_2", "--output", tmp_path / "run")
    ran = cli("train", "--model", tiny_llama, "--dataset", rows_file, *given)
    assert ran.code == 11
    assert "--attention flash_attention_2: found that the package flash-attn isn't installed, need it" in ran.err
    assert "hint: install it, or --attention auto" in ran.err
