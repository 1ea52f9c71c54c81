"""Optimizers: each name's class and numbers, their states kept whole, and learning rates beside transformers' own."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
import transformers
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lorakit.core.config import Optimizer, Scheduler, TrainConfig
from lorakit.core.errors import UsageError
from lorakit.core.training.optimizers import LearningRate, load_states, make_optimizer, pages_nothing, states_of
from tests.core.training.conftest import Opened, Train, adapter_bytes, lines_of, losses, optimizer_bytes

# bitsandbytes says so for each state; lorakit refuses these on a CPU before they are made
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

CLASSES = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw": bnb.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "lion": bnb.optim.Lion32bit,
    "lion_8bit": bnb.optim.Lion8bit,
    "paged_lion": bnb.optim.PagedLion32bit,
    "paged_lion_8bit": bnb.optim.PagedLion8bit,
    "sgd": torch.optim.SGD,
}
KINDS = list(get_args(Optimizer))
Parameters = dict[str, torch.nn.Parameter]


def config_of(**values: object) -> TrainConfig:
    return TrainConfig.resolve((None, {"model": "m", "blocks": "b", **values}))


def parameters() -> Parameters:
    """Matrices of LoRA's kind: two that an 8-bit optimizer keeps in 8 bits, and one that is too small for that."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a.lora_A.weight": (16, 300), "a.lora_B.weight": (512, 16), "b.lora_A.weight": (16, 64)}
    return {name: torch.nn.Parameter(torch.randn(size, generator=generator)) for name, size in sizes.items()}


def steps(optimizer: torch.optim.Optimizer, trained: Parameters, numbers: range) -> None:
    """Steps with gradients that depend on the step and the parameters alone."""
    for number in numbers:
        for name, parameter in trained.items():
            generator = torch.Generator().manual_seed(1000 * number + len(name))
            parameter.grad = 0.1 * parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimizer.step()


# Which optimizer, with which numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_its_optimizer_over_all_parameters(kind: str) -> None:
    trained = parameters()
    optimizer = make_optimizer(config_of(optimizer=kind, learning_rate=3e-3, weight_decay=0.25), trained)
    assert type(optimizer) is CLASSES[kind]
    [group] = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained.values()]
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0.25)
    if kind == "sgd":
        assert group["momentum"] == 0
    else:
        assert tuple(group["betas"]) == ((0.9, 0.99) if "lion" in kind else (0.9, 0.999))
    if "adamw" in kind:
        assert group["eps"] == 1e-8


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "lion_8bit", "sgd"])
def test_a_run_has_the_optimizer_that_was_asked_for(kind: str, opened: Opened) -> None:
    run = opened(optimizer=kind, weight_decay=0.125, learning_rate=1e-3)
    assert type(run.optimizer) is CLASSES[kind]
    [group] = run.optimizer.param_groups
    assert (group["weight_decay"], group["lr"]) == (0.125, 1e-3)
    assert group["params"] == list(run.parameters.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("paged")])
def test_a_paged_optimizer_without_a_gpu_is_refused_by_name(kind: str, opened: Opened) -> None:
    with pytest.raises(UsageError, match=f"optimizer: found {kind} without a GPU, need {kind.removeprefix('paged_')}"):
        opened(optimizer=kind)


def test_paged_states_that_are_all_too_small_are_noticed() -> None:
    large = {"x": torch.nn.Parameter(torch.zeros(100, 1000))}
    small = {"x": torch.nn.Parameter(torch.zeros(100, 999))}
    assert pages_nothing(config_of(optimizer="paged_adamw"), small)
    assert not pages_nothing(config_of(optimizer="paged_adamw"), {**small, "y": large["x"]})
    assert not pages_nothing(config_of(optimizer="adamw"), small)


def test_weight_decay_is_decoupled_in_every_optimizer() -> None:
    """With no gradient each step takes lr · decay of a weight, whatever the optimizer divides gradients by."""
    for kind in KINDS:
        trained = parameters()
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        optimizer = make_optimizer(config_of(optimizer=kind, learning_rate=0.1, weight_decay=0.5), trained)
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, parameter in trained.items():
            torch.testing.assert_close(parameter.detach(), before[name] * 0.95, msg=f"{kind}, {name}")


def test_bitsandbytes_adamw_in_32_bits_is_torchs() -> None:
    first, second = parameters(), parameters()
    for kind, trained in (("adamw", first), ("paged_adamw", second)):
        steps(
            make_optimizer(config_of(optimizer=kind, weight_decay=0.1, learning_rate=1e-2), trained), trained, range(30)
        )
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_lion_is_the_papers() -> None:
    """Chen et al. 2023, algorithm 2: w ← w − lr · (sign(β₁m + (1 − β₁)g) + λw), m ← β₂m + (1 − β₂)g."""
    trained, reference = parameters(), parameters()
    optimizer = make_optimizer(config_of(optimizer="lion", weight_decay=0.1, learning_rate=1e-2), trained)
    momenta = {name: torch.zeros_like(parameter) for name, parameter in reference.items()}
    for number in range(20):
        steps(optimizer, trained, range(number, number + 1))
        for name, weight in reference.items():
            gradient, m = trained[name].grad, momenta[name]
            assert gradient is not None
            with torch.no_grad():
                weight -= 1e-2 * (torch.sign(0.9 * m + 0.1 * gradient) + 0.1 * weight)
            m.mul_(0.99).add_(0.01 * gradient)
    for name in trained:
        torch.testing.assert_close(trained[name], reference[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "exact"), [("adamw_8bit", "adamw"), ("lion_8bit", "lion")])
def test_states_in_8_bits_go_nearly_the_same_way(kind: str, exact: str) -> None:
    """How far 50 steps of 8 bits end from those of 32, as a share of the way; what is too small for 8 bits is equal."""
    found = {}
    for name in (kind, exact):
        found[name] = parameters()
        steps(make_optimizer(config_of(optimizer=name, learning_rate=1e-2), found[name]), found[name], range(50))
    begun = parameters()
    for name in begun:
        way, off = found[exact][name] - begun[name], found[kind][name] - found[exact][name]
        share = float((off.norm() / way.norm()).detach())
        assert share < (1e-4 if name.startswith("b") else 0.12), name
        assert name.startswith("b") or share > 0


# States


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_were_written_and_read_go_on_to_the_same_bytes(kind: str) -> None:
    config = config_of(optimizer=kind, weight_decay=0.1, learning_rate=1e-2)
    undisturbed, stopped = parameters(), parameters()
    optimizer = make_optimizer(config, undisturbed)
    steps(optimizer, undisturbed, range(9))
    first = make_optimizer(config, stopped)
    steps(first, stopped, range(4))
    content = safetensors.torch.save(states_of(first, stopped))
    kept = {name: parameter.detach().clone() for name, parameter in stopped.items()}
    again = {name: torch.nn.Parameter(torch.full_like(tensor, 7.0)) for name, tensor in kept.items()}
    second = make_optimizer(config, again)
    load_states(second, again, safetensors.torch.load(content))
    assert second.param_groups[0]["lr"] == 1e-2
    with torch.no_grad():
        for name, parameter in again.items():
            parameter.copy_(kept[name])
    assert safetensors.torch.save(states_of(second, again)) == content
    steps(second, again, range(4, 9))
    for name in undisturbed:
        assert torch.equal(again[name], undisturbed[name]), name
    assert safetensors.torch.save(states_of(second, again)) == safetensors.torch.save(states_of(optimizer, undisturbed))


def tensors_in(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Every state by what the optimizer itself calls it."""
    for state in optimizer.state.values():
        yield from state.items()


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_kept_by_its_name_and_a_shared_table_once(kind: str) -> None:
    trained = parameters()
    optimizer = make_optimizer(config_of(optimizer=kind), trained)
    steps(optimizer, trained, range(2))
    found = states_of(optimizer, trained)
    tables = {id(value): key for key, value in tensors_in(optimizer) if key.startswith("qmap")}
    expected = {f"shared.{key}" for key in tables.values()}
    expected |= {
        f"{key}.{name}" for name, p in trained.items() for key in optimizer.state[p] if not key.startswith("qmap")
    }
    assert set(found) == expected
    assert len(tables) == (0 if "8bit" not in kind else 1 if "lion" in kind else 2)
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            kept = found[f"shared.{key}" if key.startswith("qmap") else f"{key}.{name}"]
            assert torch.equal(kept, torch.as_tensor(value))


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion", "sgd"])
def test_a_run_that_was_stopped_ends_with_the_same_adapter_and_states(
    kind: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorakit.core.training.loop as loop

    # rank 64: in 8 bits from 4,096 elements
    command = ("--optimizer", kind, "--rank", 64, "--max-steps", 6, "--save-steps", 3, "--weight-decay", 0.1)
    train("whole", *command)
    original = loop.Run._step

    def dies_at_five(run: loop.Run) -> dict[str, Any]:
        if run.state.step == 4:
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(loop.Run, "_step", dies_at_five)
    assert train("stopped", *command).code == 130
    monkeypatch.undo()
    assert train("stopped", *command).json["resumed_from"] == 3
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")
    assert optimizer_bytes(tmp_path / "stopped", 6) == optimizer_bytes(tmp_path / "whole", 6)
    kept = safetensors.torch.load(optimizer_bytes(tmp_path / "whole", 6))
    assert any(tensor.dtype is torch.uint8 for tensor in kept.values()) is (kind == "adamw_8bit")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


# Learning rates


ARGUMENTS = {
    "cosine": "num_cycles=1.5",
    "cosine_with_restarts": "num_cycles=3",
    "polynomial": "lr_end=1e-6,power=2",
    "inverse_sqrt": "timescale=20",
    "cosine_with_min_lr": "min_lr=1e-4,num_cycles=0.4",
    "cosine_warmup_with_min_lr": "min_lr_rate=0.2",
    "warmup_stable_decay": "num_decay_steps=12,decay_type=1-sqrt,min_lr_ratio=0.1",
}
"""Arguments that aren't the defaults."""


WITHOUT = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")


def test_every_schedule_of_transformers_is_there() -> None:
    """But greedy, which is no course: it takes losses of training and looks for a rate."""
    there_are = {kind.value for kind in transformers.SchedulerType}
    assert set(get_args(Scheduler)) == there_are - {"greedy"}
    assert {*WITHOUT, *ARGUMENTS, "reduce_lr_on_plateau"} == set(get_args(Scheduler))


@pytest.mark.parametrize(("kind", "given"), [*((kind, "") for kind in WITHOUT), *ARGUMENTS.items()])
def test_after_warm_up_a_schedule_is_transformers_own(kind: str, given: str) -> None:
    total, warmup, highest = 50, 6, 2e-3
    config = config_of(
        lr_scheduler_type=kind, lr_scheduler_kwargs=given, warmup_ratio=warmup / total, learning_rate=highest
    )
    found = LearningRate(config, total)
    pairs = [pair.split("=") for pair in given.split(",") if pair]
    words = {name: value if name == "decay_type" else float(value) for name, value in pairs}
    words = {name: int(value) if name in ("num_decay_steps", "timescale") else value for name, value in words.items()}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=highest)
    reference = transformers.get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=words)
    rates = []
    for _ in range(total):
        rates.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert [found.at(step) for step in range(warmup, total)] == pytest.approx(rates[warmup:], rel=1e-12)
    assert [found.at(step) for step in range(warmup)] == pytest.approx(
        [highest * (step + 1) / warmup for step in range(warmup)]
    )
    order = [30, 3, 49, 7, 0]  # asked in any order
    assert [found.at(step) for step in order] == [found.at(step) for step in order]


def test_warmup_stable_decay_takes_its_stable_steps() -> None:
    given = "num_stable_steps=10,num_decay_steps=5,decay_type=linear"
    config = config_of(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=given, warmup_ratio=0.1)
    found = LearningRate(config, 50)
    rates = [found.at(step) / 2e-4 for step in range(50)]
    assert rates[5:16] == pytest.approx([1.0] * 11)
    assert rates[16:20] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates[20:] == pytest.approx([0.0] * 30)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("polynomial", "power=large"),
        ("polynomial", "lr_end=1"),
        ("polynomial", "lr_end=-1"),
        ("cosine_with_min_lr", "min_lr=1e-5,min_lr_rate=0.1"),
        ("warmup_stable_decay", "num_decay_steps=10,decay_type=steep"),
        ("warmup_stable_decay", "num_decay_steps=ten"),
        ("inverse_sqrt", "timescale=0"),
        ("reduce_lr_on_plateau", "factor=2"),
        ("reduce_lr_on_plateau", "factor=half"),
    ],
)
def test_what_a_schedule_cant_take_is_a_usage_error(kind: str, arguments: str) -> None:
    config = config_of(lr_scheduler_type=kind, lr_scheduler_kwargs=arguments, eval_steps=1)
    with pytest.raises(UsageError, match=f"lr_scheduler_kwargs: found .+, need what {kind} can take"):
        LearningRate(config, 50)


def test_a_plateau_lowers_the_rate_as_torchs_own_does() -> None:
    heard = [3.0, 2.5, 2.6, 2.55, 2.7, 2.4, 2.41, 2.42, 2.43, 2.44, 2.45, 1.0]
    config = config_of(
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs="factor=0.5,patience=1,cooldown=1,min_lr=1e-4,threshold=0.01",
        learning_rate=1e-3,
        eval_steps=1,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    reference = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, cooldown=1, min_lr=1e-4, threshold=0.01)
    found, rates = LearningRate(config, 100), []
    for number, loss in enumerate(heard):
        reference.step(loss)
        found.hear(loss)
        rates.append(found.at(50))
        assert rates[-1] == optimizer.param_groups[0]["lr"]
        memory = json.loads(json.dumps(found.memory), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        if number % 2:  # goes on in another process
            found = LearningRate(config, 100)
            found.remember(memory)
            assert found.at(50) == rates[-1]
    assert len(set(rates)) > 2
    assert found.at(0) == pytest.approx(1e-3 / 3)  # warm-up stays what it was


def test_other_schedules_remember_nothing() -> None:
    found = LearningRate(config_of(), 10)
    found.hear(3.0)
    assert found.memory == {}


def test_the_learning_rate_rises_then_falls_to_its_end(train: Train, tmp_path: Path) -> None:
    train("run", "--max-steps", 10, "--warmup-ratio", "0.4", "--learning-rate", "1e-3")
    rates = [line["learning_rate"] * 1e3 for line in lines_of(tmp_path / "run")]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_the_rate_of_a_step_is_the_optimizers(opened: Opened) -> None:
    run = opened(lr_scheduler_type="cosine", max_steps=8, warmup_ratio=0.25)
    for step in range(3):
        line = run._step()
        assert line["learning_rate"] == run.optimizer.param_groups[0]["lr"] == run.learning_rate.at(step)


def test_gradients_are_scaled_down_to_the_norm_that_was_asked_for(opened: Opened) -> None:
    run = opened(max_grad_norm=1e-3, optimizer="sgd", learning_rate=1.0, warmup_ratio=0)
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    line = run._step()
    assert line["grad_norm"] > 1e-2  # as it was
    moved = [(run.parameters[name].detach() - before[name]).square().sum() for name in before]
    assert math.sqrt(float(sum(moved))) == pytest.approx(1e-3, rel=1e-3)
