"""What tests of training stand on: tiny blocks, `train` and `plan-devices` on them, and a run that is ready to step."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.core.artifacts import Artifact
from lorakit.core.blocks import Blocks
from lorakit.core.config import TrainConfig
from lorakit.core.parallel import alone
from lorakit.core.training.loop import Run
from lorakit.core.weights import open_weights
from tests.conftest import Ran

Cli = Callable[..., Ran]
Train = Callable[..., Ran]
Opened = Callable[..., Run]


@pytest.fixture
def blocks(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "blocks"
    assert cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", 128, "--output", folder).code == 0
    return folder


@pytest.fixture
def held_out(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> Path:
    """Blocks of which some are held out."""
    folder = tmp_path / "with-held-out"
    given = ("--tokenizer", tiny_llama, "--block-size", 128, "--validation-split", 0.3, "--output", folder)
    assert cli("prepare", rows_file, *given).code == 0
    return folder


@pytest.fixture
def uneven(cli: Cli, tiny_llama: Path, tmp_path: Path) -> Path:
    """Blocks whose documents are of very different lengths."""
    rows = [{"prompt": "Say x." * (1 + n % 4), "completion": f"{n} is x." * (1 + n * n % 13)} for n in range(40)]
    (tmp_path / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "uneven"
    given = ("--tokenizer", tiny_llama, "--block-size", 192, "--output", folder)
    assert cli("prepare", tmp_path / "uneven.jsonl", *given).code == 0
    return folder


@pytest.fixture
def train(cli: Cli, tiny_llama: Path, blocks: Path, tmp_path: Path) -> Train:
    """Train on the tiny blocks: train("name", options…) writes tmp_path/name."""

    def run(name: str, *options: object, model: Path = tiny_llama, data: Path = blocks) -> Ran:
        given = ("--model", model, "--blocks", data, "--output", tmp_path / name, "--learning-rate", "5e-3", "--json")
        return cli("train", *given, *options)

    return run


@pytest.fixture
def opened(tiny_llama: Path, blocks: Path, tmp_path: Path) -> Opened:
    """A run that has loaded everything and done no step: opened(rank=4, …)."""

    def make(*, data: Path = blocks, checkpoint: Artifact | None = None, **values: object) -> Run:
        config = TrainConfig.resolve((None, {"model": str(tiny_llama), "blocks": data, **values})).settled()
        weights = open_weights(Path(config.model.model))
        world, said = alone(torch.device("cpu")), []
        return Run(config, tmp_path / "run", Blocks([data]), weights, None, {}, checkpoint, world, said.append)

    return make


@pytest.fixture
def plan(cli: Cli, tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A plan file for the tiny model, by the command: plan(options…)."""

    def run(*options: object, model: object = tiny_llama) -> Path:
        path = tmp_path / "plan.json"
        given = (model, "--block-size", 128, "--output", path, *options)
        assert cli("plan-devices", *(given if "--gpus" in options else (*given, "--cpu", "8GiB"))).code == 0
        return path

    return run


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def lines_of(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold `key`: of steps, or of evaluations (eval_loss)."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines_of(folder)]


def optimizer_bytes(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors").read_bytes()


def loss_by_documents(model: Any, blocks: Blocks, indices: Sequence[int] | None = None) -> tuple[float, int]:
    """transformers' own loss of each document alone, over all trained tokens, and how many they are."""
    total, count = 0.0, 0
    for index in range(len(blocks)) if indices is None else indices:
        tokens, trained, document = (array.astype(np.int64) for array in blocks.arrays(index))
        for number in np.unique(document):
            ids = torch.from_numpy(tokens[document == number])[None]
            labels = torch.where(torch.from_numpy(trained[document == number])[None] == 1, ids, -100)
            targets = int((labels[:, 1:] != -100).sum())
            if targets:
                with torch.no_grad():
                    total += model(input_ids=ids, labels=labels).loss.item() * targets
                count += targets
    return total / count, count
