"""Processes that train together: the losses of one, the same samples in the same order, shards that are shards, and
failures that all hear of. Two processes on one CPU, over gloo; most of it in one start (two_processes.py)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorakit.core.environment import Worker
from lorakit.core.errors import EnvironmentUnusable, InputRefused, Stopped, UsageError
from lorakit.core.model import load_base
from lorakit.core.parallel import World, alone, clip_gradients, joined, put, scales_to, whole
from lorakit.core.training import loop
from lorakit.core.weights import open_weights
from tests.conftest import ROWS, make_llama
from tests.core.training.conftest import adapter_bytes, lines_of, losses, optimizer_bytes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = Path(__file__).with_name("two_processes.py")

KINDS: Mapping[str, tuple[str, ...]] = {
    "fp32": ("--dtype", "fp32"),
    "nf4": ("--dtype", "fp32", "--quantize", "nf4", "--no-calibrate"),  # as fsdp has it
    "bf16": ("--dtype", "bf16"),
    "fp16": ("--dtype", "fp16"),
    "int8": ("--dtype", "fp32", "--quantize", "int8"),
    "fast": ("--dtype", "fp32", "--quantize", "fp8", "--engine", "fast"),
}
EXACT = {"fp32": 1e-5, "nf4": 1e-5, "bf16": 2e-3, "fp16": 2e-3, "int8": 2e-3, "fast": 1e-5}
"""How far losses may be from one process's, as a share: 16 bits and int8's dynamic scales see other sums."""

COMMON = ("--effective-batch-size", "4", "--learning-rate", "5e-3", "--rank", "8", "--keep-checkpoints", "9")


@dataclass(frozen=True)
class Place:
    """A folder with a model, blocks of documents of unequal lengths, and what was trained there."""

    folder: Path

    def command(self, name: str, *options: object) -> list[str]:
        given = ["--model", self.folder / "model", "--blocks", self.folder / "blocks", "--output", self.folder / name]
        return [str(part) for part in (*given, *COMMON, *options)]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


def run_all(place: Place, tasks: Mapping[str, Any], name: str, timeout: int = 280) -> list[dict[str, Any]]:
    """What each of two processes saw of these tasks, in one start."""
    listed, results = place / f"{name}.json", place / f"{name}-results"
    listed.write_text(json.dumps(tasks))
    ran = subprocess.run(
        [*TORCHRUN, str(SCRIPT), str(listed), str(results)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(Path(f"{results}-{rank}.json").read_text()) for rank in (0, 1)]


def lorakit(*arguments: object) -> int:
    """A command line in this process, outside of a test: the signals stay those of pytest."""
    from lorakit.cli import main

    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main([str(argument) for argument in arguments])
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def alone_at(place: Place, name: str, *options: object, stop_at: int | None = None) -> None:
    """The same run by this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        step = loop.Run._step

        def stops(run: loop.Run) -> Any:
            if run.state.step == stop_at:
                raise KeyboardInterrupt
            return step(run)

        patch.setattr(loop.Run, "_step", stops)
        assert lorakit("train", *place.command(name, *options)) == (0 if stop_at is None else 130)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        make_llama(folder / "model")
        rows = [{**row, "completion": row["completion"] * (1 + number % 3)} for number, row in enumerate(ROWS)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = [
            folder / "rows.jsonl",
            "--tokenizer",
            folder / "model",
            "--block-size",
            160,
            "--output",
            folder / "blocks",
        ]
        assert lorakit("prepare", *given, "--validation-split", "0.55") == 0
        yield Place(folder)


EPOCHS = 3.2
STEPS = ("--epochs", str(EPOCHS), "--eval-steps", "3")
"""Of nine blocks, by fours: windows across epochs, and a last one of which a process gets nothing."""
NOT_SHARDED = ("int8", "fast")
PAIRS = [(way, kind) for way in ("ddp", "fsdp") for kind in KINDS if way == "ddp" or kind not in NOT_SHARDED]


@pytest.fixture(scope="module")
def ran(place: Place) -> list[dict[str, Any]]:
    """What two processes saw of all that is asked of them below."""
    alone_at(place, "from-one", *KINDS["fp32"], *STEPS, "--save-steps", 2, stop_at=5)
    tasks: dict[str, Any] = {"telling": {"check": "telling"}, "gradients": {"check": "gradients"}}
    for parallel, kind in PAIRS:
        name = f"{parallel}-{kind}"
        tasks[name] = {"argv": place.command(name, "--parallel", parallel, *KINDS[kind], *STEPS)}
    usual = (*KINDS["fp32"], *STEPS, "--save-steps", 2, "--parallel")
    tasks["stopped"] = {"argv": place.command("stopped", *usual, "ddp"), "stop_at": 5}
    tasks["resumed"] = {"argv": place.command("stopped", *usual, "ddp")}
    tasks["to-one"] = {"argv": place.command("to-one", *usual, "fsdp"), "stop_at": 5}
    tasks["from-one"] = {"argv": place.command("from-one", *usual, "fsdp")}
    dropout = (*KINDS["nf4"], *STEPS, "--lora-dropout", "0.2", "--optimizer", "adamw_8bit", "--parallel", "ddp")
    tasks["dropout"] = {"argv": place.command("dropout", *dropout)}
    return run_all(place, tasks, "all")


# The losses of one process


@pytest.mark.parametrize(("parallel", "kind"), PAIRS)
def test_two_processes_have_the_losses_of_one(
    parallel: str, kind: str, place: Place, ran: list[dict[str, Any]]
) -> None:
    """Of training and of evaluation, with windows that don't fill all processes."""
    if not (place / kind).exists():
        alone_at(place, kind, *KINDS[kind], *STEPS)
    assert [one[f"{parallel}-{kind}"]["code"] for one in ran] == [0, 0]
    found = place / f"{parallel}-{kind}"
    assert len(losses(found)) == len(losses(place / kind)) > 6
    assert losses(found) == pytest.approx(losses(place / kind), rel=EXACT[kind])
    for key in ("eval_loss", "eval_tokens", "step"):
        values = [[line[key] for line in lines_of(folder, "eval_loss")] for folder in (found, place / kind)]
        assert values[0] == pytest.approx(values[1], rel=EXACT[kind])
    norms = [[line["grad_norm"] for line in lines_of(folder)] for folder in (found, place / kind)]
    assert norms[0] == pytest.approx(norms[1], rel=20 * EXACT[kind])
    assert losses(found)[-1] < losses(found)[0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_adapter_is_gathered_whole(parallel: str, place: Place, ran: list[dict[str, Any]]) -> None:
    if not (place / "fp32").exists():
        alone_at(place, "fp32", *KINDS["fp32"], *STEPS)
    expected = safetensors.torch.load(adapter_bytes(place / "fp32"))
    found = safetensors.torch.load(adapter_bytes(place / f"{parallel}-fp32"))
    assert {name: tensor.shape for name, tensor in found.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-4)
    steps = len(losses(place / "fp32"))
    states = [safetensors.torch.load(optimizer_bytes(place / name, steps)) for name in ("fp32", f"{parallel}-fp32")]
    assert {name: tensor.shape for name, tensor in states[0].items()} == {k: v.shape for k, v in states[1].items()}
    configs = [(place / name / "adapter_config.json").read_text() for name in ("fp32", f"{parallel}-fp32")]
    assert configs[0] == configs[1]


def test_dropout_and_8_bit_states_are_those_of_one_process_too(place: Place, ran: list[dict[str, Any]]) -> None:
    """Dropout is seeded by a micro-step's place in its step, whoever computes it."""
    assert [one["dropout"]["code"] for one in ran] == [0, 0]
    options = (*KINDS["nf4"], *STEPS, "--lora-dropout", "0.2", "--optimizer", "adamw_8bit")
    alone_at(place, "dropout-alone", *options)
    assert losses(place / "dropout") == pytest.approx(losses(place / "dropout-alone"), rel=1e-5)


def of_steps(ran: list[dict[str, Any]], name: str) -> list[Counter[int]]:
    """The blocks of each step, by all processes together; what is computed again for nothing counts once more."""
    steps: dict[int, Counter[int]] = {}
    for one in ran:
        for step, sums in one[name]["batches"]:
            steps.setdefault(step, Counter()).update(sums)
    return [steps[step] for step in sorted(steps)]


def test_each_step_takes_the_blocks_that_it_takes_alone(place: Place, ran: list[dict[str, Any]]) -> None:
    from lorakit.core.blocks import Blocks
    from lorakit.core.training.schedule import Schedule

    blocks = Blocks(place / "blocks")
    schedule = Schedule(len(blocks), 4, round(EPOCHS * len(blocks)), 0)
    sums = [int(blocks.batch([index]).ids_BT.sum()) for index in range(len(blocks))]
    expected = [[sums[index] for index in schedule.blocks_of_step(step)] for step in range(schedule.steps)]
    assert len(expected[-1]) % 2 == 1  # one process has nothing to do
    assert len(Blocks(place / "blocks", "validation")) == 3  # of the last turn too
    for name in ("ddp-fp32", "fsdp-fp32"):
        for step, (indices, found) in enumerate(zip(expected, of_steps(ran, name), strict=True)):
            twice = Counter(indices[-1:]) if name == "fsdp-fp32" and len(indices) % 2 else Counter()
            assert found == Counter(indices) + twice, step
        for rank, one in enumerate(ran):
            mine = [total for step, totals in one[name]["batches"] if step == 1 for total in totals]
            assert mine == expected[1][rank::2]


# Shards


@pytest.mark.parametrize("kind", ["fp32", "nf4", "bf16"])
def test_fsdp_cuts_every_layer_in_two(kind: str, ran: list[dict[str, Any]]) -> None:
    layers: dict[int, list[tuple[int, int]]] = {}
    for rank, one in enumerate(ran):
        for name, (sharded, local, total) in one[f"fsdp-{kind}"]["parameters"].items():
            assert sharded is (".layers." in name), name
            assert sharded or local == total
            if sharded:
                layers.setdefault(rank, []).append((local, total))
                assert local == pytest.approx(total / 2, rel=0.15), name
    assert [sum(local for local, _ in layers[rank]) for rank in (0, 1)] == pytest.approx(
        [sum(total for _, total in layers[rank]) / 2 for rank in (0, 1)], rel=0.01
    )
    for local, total in zip(*(layers[rank] for rank in (0, 1)), strict=True):
        assert local[0] + total[0] == local[1]
    assert not any(sharded for sharded, _, _ in ran[0]["ddp-fp32"]["parameters"].values())


# Going on with another number of processes


@pytest.mark.parametrize(("name", "resumed_from"), [("from-one", 4), ("to-one", 4)])
def test_a_run_goes_on_with_another_number_of_processes(
    name: str, resumed_from: int, place: Place, ran: list[dict[str, Any]]
) -> None:
    """One process to two with shards, and back: the same samples in the same order, and nearly the same losses."""
    if not (place / "fp32").exists():
        alone_at(place, "fp32", *KINDS["fp32"], *STEPS)
    if name == "to-one":
        assert [one[name]["code"] for one in ran] == [130, 130]
        alone_at(place, name, *KINDS["fp32"], *STEPS, "--save-steps", 2)
    else:
        assert [one[name]["code"] for one in ran] == [0, 0]
        assert of_steps(ran, name) == of_steps(ran, "fsdp-fp32")[resumed_from:]
    assert losses(place / name) == pytest.approx(losses(place / "fp32"), rel=1e-5)
    manifest = json.loads((place / name / "lorakit.json").read_text())
    assert manifest["facts"]["resumed_from"] == resumed_from


def test_two_processes_that_were_stopped_end_with_the_bytes_of_those_that_were_not(
    place: Place, ran: list[dict[str, Any]]
) -> None:
    assert [one["stopped"]["code"] for one in ran] == [130, 130]
    assert [one["resumed"]["code"] for one in ran] == [0, 0]
    assert adapter_bytes(place / "stopped") == adapter_bytes(place / "ddp-fp32")
    assert losses(place / "stopped") == losses(place / "ddp-fp32")
    steps = len(losses(place / "stopped"))
    assert optimizer_bytes(place / "stopped", steps) == optimizer_bytes(place / "ddp-fp32", steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("blocks_of_a_step", [2, 8])
def test_two_processes_that_were_stopped_after_any_step_end_with_the_same_bytes(
    parallel: str, blocks_of_a_step: int, place: Place
) -> None:
    last, name = 60, f"{parallel}-{blocks_of_a_step}"
    options = ("--max-steps", last, "--save-steps", 1, "--lora-dropout", 0.2, "--dtype", "fp32", "--parallel", parallel)
    options += ("--effective-batch-size", blocks_of_a_step, "--keep-checkpoints", last)
    tasks: dict[str, Any] = {"whole": {"argv": place.command(f"{name}-whole", *options)}}
    for step in range(1, last):
        kept = f"checkpoints/step-{step:08d}"
        copy = [str(place / f"{name}-whole" / kept), str(place / f"{name}-{step}" / kept)]
        tasks[str(step)] = {"argv": place.command(f"{name}-{step}", *options), "copy": copy}
    seen = run_all(place, tasks, name, timeout=1500)
    assert {one[task]["code"] for one in seen for task in tasks} == {0}
    for step in range(1, last):
        found, expected = place / f"{name}-{step}", place / f"{name}-whole"
        assert json.loads((found / "lorakit.json").read_text())["facts"]["resumed_from"] == step
        assert adapter_bytes(found) == adapter_bytes(expected), step
        assert optimizer_bytes(found, last) == optimizer_bytes(expected, last), step
        assert losses(found) == losses(expected)[step:], step


# What processes tell each other


def test_all_hear_what_each_tells(ran: list[dict[str, Any]]) -> None:
    for one in ran:
        told = one["telling"]
        assert [value["rank"] for value in told["gathered"]] == [0, 1]
        assert [len(value["long"]) for value in told["gathered"]] == [0, 1000]
        assert told["shared"] == ["of", 0]
        assert told["fine"] == {"kind": None}
        assert told["after"] == [0, 1]


def test_a_process_that_fails_is_heard_by_all_with_its_name(ran: list[dict[str, Any]]) -> None:
    first, second = (one["telling"] for one in ran)
    assert second["one"]["kind"] == "InputRefused"
    assert first["one"]["kind"] == "RankFailed"
    for one in (first, second):  # the first process speaks for both, and all end with the exit code of the failure
        assert (one["one"]["shared"], one["one"]["code"]) == (True, 3)
    assert first["one"]["message"] == "rank 1: found a hole, need a wall"
    assert first["one"]["hint"] == "mend it"
    assert first["nested"] == ["RankFailed", "rank 1: found an inner hole"]
    assert second["nested"] == ["InputRefused", "found an inner hole"]


def test_one_process_speaks_of_what_all_found(ran: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(ran):
        assert one["telling"]["alike"]["kind"] == "UsageError"
        assert one["telling"]["alike"]["shared"] is True
        assert one["telling"]["apart"]["shared"] is False
        assert one["telling"]["apart"]["kind"] == ("UsageError", "InputRefused")[rank]


def test_gradients_are_summed_and_means_are_means(ran: list[dict[str, Any]]) -> None:
    expected = {
        "a": [[float(2 * (5 * row + column) + 10) for column in range(5)] for row in range(3)],
        "b": [float(2 * at + 10 + 2) for at in range(4)],
        "c": [float(at + 10 + 2) for at in range(2)],  # of the second process alone
    }
    for one in ran:
        assert one["gradients"]["summed"] == expected
        halves = {name: (torch.tensor(value) / 2).tolist() for name, value in expected.items()}
        assert one["gradients"]["meant"] == halves


def test_shards_and_whole_gradients_are_clipped_by_one_norm(ran: list[dict[str, Any]]) -> None:
    shards, others = (torch.arange(15.0).view(5, 3) - 4) * 2, torch.tensor([1.0, -2.0, 3.0, 4.0])
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in (shards, others)]
    for parameter, gradient in zip(parameters, (shards, others), strict=True):
        parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 2.5))
    for one in ran:
        assert one["gradients"]["norm"] == pytest.approx(norm, rel=1e-6)
        for found, parameter in zip(one["gradients"]["clipped"], parameters, strict=True):
            torch.testing.assert_close(torch.tensor(found), parameter.grad)
        assert one["gradients"]["put"] == [[7.0] * 3] * 5
    assert [one["gradients"]["local"] for one in ran] == [9, 6]


# One process


def test_alone_nothing_is_exchanged() -> None:
    world = alone(torch.device("cpu"))
    assert (world.rank, world.size, world.parallel, world.is_first, world.mean_over) == (0, 1, None, True, 1)
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert world.share("x") == "x"
    with pytest.raises(InputRefused) as caught, world.together():
        raise InputRefused("found", "hint")
    assert not caught.value.shared
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    world.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1, 1]
    assert clip_gradients([parameter], 1e-3).item() == pytest.approx(2**0.5)
    with torch.no_grad():
        put(torch.tensor([3.0, 4.0]), parameter)
    assert whole(parameter).tolist() == [3, 4]


@pytest.mark.parametrize("worker", [None, Worker(0, 1, 0, 1)])
def test_one_process_joins_nobody(worker: Worker | None) -> None:
    with joined(worker, "ddp", torch.device("cpu"), lambda: None) as world:
        assert world == alone(torch.device("cpu"))


def test_fewer_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(EnvironmentUnusable, match="found 2 GPUs for 4 processes, need one for each"),
        joined(Worker(1, 4, 1, 4), "ddp", torch.device("cuda"), lambda: None),
    ):
        pass


# What doesn't go together


@pytest.mark.parametrize(
    ("parallel", "values", "words"),
    [
        ("fsdp", {"optimizer": "adamw_8bit"}, "found adamw_8bit with --parallel fsdp, need adamw or sgd"),
        ("fsdp", {"optimizer": "lion"}, "found lion with --parallel fsdp, need adamw or sgd"),
        ("ddp", {"optimizer": "paged_adamw"}, "found paged_adamw without a GPU, need adamw"),
    ],
)
def test_what_many_processes_cant_do_is_refused_before_a_model_is_loaded(
    parallel: str, values: dict[str, object], words: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=words):
        run_in(place, World(0, 2, torch.device("cpu"), parallel), **values)  # type: ignore[arg-type]


def test_more_processes_than_blocks_are_refused(place: Place) -> None:
    with pytest.raises(UsageError, match=r"found 99 processes for \d+ blocks, need at most as many"):
        run_in(place, World(0, 99, torch.device("cpu"), "ddp"))


LOOKING = """
import signal, torch
from lorakit.core.environment import Worker
from lorakit.core.parallel import joined
for which in (signal.SIGTERM, signal.SIGINT):
    signal.signal(which, lambda *_: None)  # a flag that is looked at after each step
print("looking", flush=True)
with joined(Worker(1, 2, 1, 2), "ddp", torch.device("cpu"), lambda: None):
    print("found")
"""


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_one_that_is_gone_is_ended_by_a_signal(which: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = [sys.executable, "-c", LOOKING]
    environment = {**os.environ, **rank}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"looking\n"
        time.sleep(1)
        process.send_signal(which)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        process.kill()
    assert process.returncode == -which


@pytest.mark.parametrize(("asked", "code"), [("terminate", 75), ("interrupt", 130)])
def test_a_process_that_was_told_to_stop_before_looks_for_nobody(asked: str, code: int) -> None:
    """Not even where it came so late that only the flag knows: none comes again, and the other may be gone for it."""
    told = []

    def should_stop() -> str | None:
        told.append(signal.getsignal(signal.SIGTERM))
        return asked

    before = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as stopped, joined(Worker(1, 2, 1, 2), "ddp", torch.device("cpu"), should_stop):
        pass
    assert stopped.value.exit_code == code
    assert told == [signal.SIG_DFL], "asked once a signal that comes ends the process by itself"
    assert [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)] == before


def run_in(place: Place, world: World, **values: object) -> loop.Run:
    from lorakit.core.blocks import Blocks
    from lorakit.core.config import TrainConfig
    from lorakit.core.weights import open_weights

    given = {"model": str(place / "model"), "blocks": place / "blocks", "parallel": world.parallel, **values}
    config = TrainConfig.resolve((None, given))
    blocks, weights = Blocks([place / "blocks"]), open_weights(place / "model")
    return loop.Run(config, place / "x", blocks, weights, None, {}, None, world, lambda _: None)


# The command line itself


def torchrun(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, "-m", "lorakit", "train", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LORAKIT_CACHE": str(place / "cache")},
    )


def test_torchrun_starts_lorakit_itself(place: Place, ran: list[dict[str, Any]]) -> None:
    """The same bytes as those of the processes above."""
    done = torchrun(place, *place.command("torchrun", "--parallel", "ddp", *KINDS["fp32"], *STEPS))
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(place / "torchrun") == adapter_bytes(place / "ddp-fp32")
    assert losses(place / "torchrun") == losses(place / "ddp-fp32")


def test_scales_of_4_bit_weights_go_where_their_shards_are(tiny_llama: Path) -> None:
    """They are no parameters: FSDP leaves them behind. The meta device stands for a GPU."""
    base = load_base(open_weights(tiny_llama), torch.float32, torch.device("cpu"), "nf4")
    scales_to(torch.device("meta"), base.model.layers)
    scales = [module.quant_state for module in base.modules() if getattr(module, "quant_state", None) is not None]
    assert len(scales) == 14
    for one in scales:
        there = (one.absmax, one.code, one.offset, one.state2.absmax, one.state2.code)
        assert {tensor.device.type for tensor in there} == {"meta"}
