"""Stopped after any step, a run ends with the bytes of one that wasn't; poisoned anywhere, it leaves no NaN on disk."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorakit.core.training import loop
from tests.conftest import make_llama
from tests.core.training.conftest import Train, adapter_bytes, losses, optimizer_bytes

STEPS = 60


def stopped_after_each(
    steps: list[int], options: tuple[object, ...], train: Train, folder: Path, data: Path, last: int = STEPS
) -> None:
    """Go on from the checkpoint of each of these steps, as if the run had been killed after it."""
    command = ("--max-steps", last, "--save-steps", 1, "--keep-checkpoints", last, "--lora-dropout", 0.2, *options)
    assert train("whole", *command, data=data).code == 0
    for step in steps:
        kept = folder / "stopped" / "checkpoints"
        kept.mkdir(parents=True)
        name = f"step-{step:08d}"
        shutil.copytree(folder / "whole" / "checkpoints" / name, kept / name)
        shutil.copy(folder / "whole" / "metrics.jsonl", folder / "stopped")  # with lines that will be written again
        ran = train("stopped", *command, data=data)
        assert (ran.code, ran.json["resumed_from"]) == (0, step), ran.err
        assert adapter_bytes(folder / "stopped") == adapter_bytes(folder / "whole"), step
        assert optimizer_bytes(folder / "stopped", last) == optimizer_bytes(folder / "whole", last), step
        assert losses(folder / "stopped") == losses(folder / "whole"), step
        shutil.rmtree(folder / "stopped")


OF_SHORT_FORM = {
    "accumulation 1": ((), [1, 7, 11]),
    "accumulation 4": (("--effective-batch-size", 4), [1, 7, 11]),
    "8 bits over nf4": (
        ("--effective-batch-size", 6, "--batch-size", 2, "--quantize", "nf4", "--optimizer", "adamw_8bit", "-r", 64),
        [7],
    ),
    "fp16": (("--dtype", "fp16", "--lr-scheduler-type", "cosine", "--weight-decay", 0.1), [7]),
    "whole modules": (("--use-dora", "--modules-to-save", "lm_head", "--optimizer", "lion"), [7]),
    "evaluations over int8": (("--dtype", "bf16", "--quantize", "int8", "--eval-steps", 3), [7]),
}


@pytest.mark.parametrize("name", OF_SHORT_FORM)
def test_stopped_after_some_steps_a_run_ends_with_the_same_bytes(
    name: str, train: Train, held_out: Path, tmp_path: Path
) -> None:
    options, steps = OF_SHORT_FORM[name]
    stopped_after_each(steps, options, train, tmp_path, held_out, last=12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", [(), ("--effective-batch-size", 4)], ids=["accumulation 1", "accumulation 4"])
def test_stopped_after_every_step_a_run_ends_with_the_same_bytes(
    options: tuple[object, ...], train: Train, held_out: Path, tmp_path: Path
) -> None:
    stopped_after_each(list(range(1, STEPS)), options, train, tmp_path, held_out)


# NaN


def in_loss(number: int, value: float) -> Callable[[pytest.MonkeyPatch], None]:
    """A loss that is no number, of the micro-step with this number."""

    def poison(patch: pytest.MonkeyPatch) -> None:
        original, calls = loop.loss_sum, [0]

        def poisoned(*arguments: Any) -> Any:
            calls[0] += 1
            return original(*arguments) * (value if calls[0] == number else 1)

        patch.setattr(loop, "loss_sum", poisoned)

    return poison


def in_gradient(step: int, of: int, value: float) -> Callable[[pytest.MonkeyPatch], None]:
    """One number of one gradient, in this step."""

    def poison(patch: pytest.MonkeyPatch) -> None:
        original = loop.Run._backward

        def poisoned(run: Any, *arguments: Any) -> Any:
            losses = original(run, *arguments)
            if run.state.step == step:
                list(run.parameters.values())[of].grad.view(-1)[-1] = value
            return losses

        patch.setattr(loop.Run, "_backward", poisoned)

    return poison


def in_activation(step: int, layer: int) -> Callable[[pytest.MonkeyPatch], None]:
    """One number of what a layer gives, in this step."""

    def poison(patch: pytest.MonkeyPatch) -> None:
        original = loop.Run._step

        def poisoned(run: Any) -> Any:
            if run.state.step == step:
                place = torch.zeros(64)
                place[3] = math.nan
                run.model.get_base_model().model.layers[layer].register_forward_hook(lambda _, __, out: out + place)
            return original(run)

        patch.setattr(loop.Run, "_step", poisoned)

    return poison


def in_evaluation(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    def poison(patch: pytest.MonkeyPatch) -> None:
        original = loop.Run._evaluate

        def poisoned(run: Any) -> Any:
            if run.state.step == step:
                patch.setattr(loop, "mean_loss", lambda *_: (math.nan, 10))
            return original(run)

        patch.setattr(loop.Run, "_evaluate", poisoned)

    return poison


def in_parameter(step: int, of: int) -> Callable[[pytest.MonkeyPatch], None]:
    """What an optimizer makes of good gradients."""

    def poison(patch: pytest.MonkeyPatch) -> None:
        original = loop.Run._step

        def poisoned(run: Any) -> Any:
            line = original(run)
            if run.state.step == step:
                list(run.parameters.values())[of].data.view(-1)[0] = math.inf
            return line

        patch.setattr(loop.Run, "_step", poisoned)

    return poison


POISONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[object, ...]]] = {
    **{f"loss of micro-step {n}": (in_loss(n, math.nan), ()) for n in (1, 2, 5, 8, 11)},
    "infinite loss": (in_loss(4, math.inf), ()),
    "loss in fp16": (in_loss(3, math.nan), ("--dtype", "fp16")),
    "loss over nf4": (in_loss(3, math.nan), ("--quantize", "nf4")),
    **{
        f"gradient {of} of step {step}": (in_gradient(step, of, math.nan), ())
        for step, of in ((0, 0), (2, 13), (5, 27))
    },
    "infinite gradient": (in_gradient(3, 5, -math.inf), ()),
    "gradient in fp16": (in_gradient(3, 5, math.nan), ("--dtype", "fp16")),
    "activation of the first layer": (in_activation(0, 0), ()),
    "activation of the last layer": (in_activation(3, 1), ()),
    "activation in bf16": (in_activation(2, 1), ("--dtype", "bf16")),
    "evaluation before the first step": (in_evaluation(0), ("--eval-steps", 2)),
    "evaluation": (in_evaluation(4), ("--eval-steps", 2)),
    "parameter": (in_parameter(2, 3), ()),
    "parameter after the last step": (in_parameter(6, 0), ()),
}


CLEAN: dict[tuple[object, ...], bytes] = {}
"""Adapters of runs that nothing happened to, made once."""


def numbers_on_disk(folder: Path) -> int:
    """How many files of tensors there are; all numbers in them are numbers."""
    files = list(folder.rglob("*.safetensors"))
    for path in files:
        for name, tensor in safetensors.torch.load(path.read_bytes()).items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), f"{path}: {name}"
    for path in folder.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=lambda word, path=path: pytest.fail(f"{path}: {word}"))
    return len(files)


@pytest.mark.parametrize("name", POISONS)
def test_poison_ends_a_run_before_it_reaches_the_disk(
    name: str, train: Train, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, options = POISONS[name]
    command = ("--max-steps", 6, "--save-steps", 1, "--effective-batch-size", 2, *options)
    with monkeypatch.context() as patch:
        poison(patch)
        ran = train("run", *command, data=held_out)
    assert ran.code == 8, ran.err
    assert "error: step " in ran.err
    assert not (tmp_path / "run" / "lorakit.json").exists()
    numbers_on_disk(tmp_path / "run")
    ran = train("run", *command, data=held_out)
    assert ran.code == 0, ran.err
    if options not in CLEAN:
        assert train("clean", *command, data=held_out).code == 0
        CLEAN[options] = adapter_bytes(tmp_path / "clean")
    assert adapter_bytes(tmp_path / "run") == CLEAN[options]
    assert numbers_on_disk(tmp_path / "run") > 2


def test_there_are_twenty_places() -> None:
    assert len(POISONS) == 20


@pytest.mark.parametrize(
    ("part", "options", "found"),
    [
        ("model.layers.1.mlp.up_proj", (), "step 1: found loss nan"),
        ("lm_head", (), "step 1: found loss nan"),
        ("model.norm", ("--eval-steps", 1), "step 0: found a held-out loss of nan"),
        ("model.norm", ("--quantize", "nf4"), "calibration: found a loss of nan on the first blocks"),
        ("lm_head", ("--quantize", "nf4", "--no-calibrate"), "calibration: found a loss of nan on the first blocks"),
        ("lm_head", ("--dtype", "fp16"), "step 1: found loss nan"),
    ],
    ids=str,
)
def test_a_base_with_nan_in_it_is_never_trained_and_named_as_what_is_wrong(
    part: str, options: tuple[object, ...], found: str, train: Train, held_out: Path, tmp_path: Path
) -> None:
    model = make_llama(tmp_path / "model")
    tensors = safetensors.torch.load((model / "model.safetensors").read_bytes())
    tensors[f"{part}.weight"].view(-1)[0] = math.nan
    (model / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    ran = train("run", "--max-steps", 2, *options, model=model, data=held_out)
    assert ran.code == 8
    assert f"error: {found}" in ran.err
    assert "before anything was learned, need numbers from the base" in ran.err
    hint = ran.err[ran.err.index("hint: ") :]
    assert "check the files of the model" in hint
    assert "--learning-rate" not in hint
    assert ("--dtype bf16 or fp32" in hint) is ("fp16" in options)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_learning_rate_that_no_number_survives_ends_the_run(train: Train, held_out: Path, tmp_path: Path) -> None:
    command = ("--max-steps", 9, "--save-steps", 1, "--warmup-ratio", 0, "--weight-decay", 1000)
    ran = train("run", *command, "--learning-rate", 1000, data=held_out)
    assert ran.code == 8, ran.err
    numbers_on_disk(tmp_path / "run")
