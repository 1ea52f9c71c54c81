"""What a run leaves on its way: checkpoints that hold the adapter, the optimizer's states and a few counters."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorakit.core import adapters, artifacts
from lorakit.core.artifacts import Artifact
from lorakit.core.config import Engine, TrainConfig
from lorakit.core.errors import ArtifactDamaged
from lorakit.core.events import Notice, Report
from lorakit.core.untrusted import read_json_object
from lorakit.core.weights import read_header

CHECKPOINTS = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

EXTENDS = ("epochs", "max_steps")
"""The settings that --extend may change."""


def other_work_hint(found: Mapping[str, object]) -> str:
    """How the run that is there goes on where that little differs, by what it was made with; else what replaces it."""
    usual = "choose another --output, or add --overwrite"
    if not found.keys() <= {*EXTENDS, "effective_batch_size"}:
        return usual
    options = []
    if "effective_batch_size" in found:  # what the processes and their micro-steps come to, where it isn't given
        options.append(f"--effective-batch-size {found['effective_batch_size']}, which sets the accumulation")
    if not found.keys() <= {"effective_batch_size"}:
        options.append("--extend for more steps")
    return f"{usual}; or go on with {' and '.join(options)}"


_FIRST_LOSS_SCALE = 2.0**16


@dataclass
class State:
    """What a checkpoint carries besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan
    loss_scale: float = _FIRST_LOSS_SCALE
    loss_scale_age: int = 0
    attention: str = ""
    """The implementation that the first step was computed with: the others are too."""
    dtype: str = ""
    """The number type of the base that it was computed with."""
    engine: Engine = "standard"
    """What it was computed with."""
    calibrated: bool = False
    """Whether the base was rounded by what goes through it."""
    not_calibrated: str = ""
    """The fingerprint of the names of matrices that couldn't be, where others were."""
    batch_size: int = 0
    """The blocks of a micro-step that it was computed with."""
    best_step: int = 0
    best_loss: float | None = None
    evaluations_without_better: int = 0
    stopped_early: bool = False
    learning_rate: dict[str, Any] = field(default_factory=dict)
    """What the schedule remembers of evaluations."""

    def __post_init__(self) -> None:
        """Raises ValueError where its numbers don't go together."""
        counted = [self.step, self.tokens, self.seconds, self.loss_scale_age, self.evaluations_without_better]
        if min(*counted, self.batch_size) < 0 or not self.loss_scale > 0 or not 0 <= self.best_step <= self.step:
            raise ValueError("numbers that no run comes to")
        if (self.best_step > 0) != (self.best_loss is not None):
            raise ValueError("a best step without its loss, or a loss without its step")


class Checkpoints:
    """The checkpoints of one run folder; the caller holds its lock."""

    def __init__(self, folder: Path, config: TrainConfig, parents: Mapping[str, str], report: Report) -> None:
        self._folder, self._config, self._parents, self._report = folder / CHECKPOINTS, config, parents, report

    def newest(self, may_differ: Collection[str]) -> Artifact | None:
        """The newest whole checkpoint, of this very work. A damaged one is passed over, kept, and said."""
        damaged: ArtifactDamaged | None = None
        for folder in self._all()[::-1]:
            try:
                checkpoint = artifacts.open_artifact(folder, "checkpoint")
            except ArtifactDamaged as error:
                damaged = error
                aside = artifacts.set_aside(folder)
                self._report(Notice(f"passed over a damaged checkpoint, kept as {aside.name}: {error.message}"))
                continue
            artifacts.refuse_other_work(checkpoint, self._config, self._parents, other_work_hint, may_differ)
            return checkpoint
        if damaged is not None:
            raise ArtifactDamaged(damaged.message, "no checkpoint is whole; the same command again begins anew")
        return None

    def last_saved(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        return max((int(path.name[5:]) for path in self._all()), default=0)

    def save(self, adapter: Mapping[str, bytes], states: Mapping[str, Tensor], state: State) -> None:
        """Commit a checkpoint of this step, if there is none yet."""
        folder = self._at(state.step)
        if not folder.exists():
            content = json.dumps(vars(state)).encode()
            files = {**adapter, OPTIMIZER: safetensors.torch.save(dict(states)), STATE: content}
            artifacts.commit(
                folder, "checkpoint", files.items(), config=self._config, parents=self._parents, facts=vars(state)
            )

    def remove_oldest(self, best_step: int) -> None:
        """Remove all but the newest, and the best."""
        kept = self._all()
        for old in kept[: -self._config.saving.keep_checkpoints]:
            if old != self._at(best_step):
                artifacts.remove(old)

    def adapter_of(self, step: int) -> dict[str, Tensor]:
        """The adapter's tensors in the checkpoint of a step."""
        checkpoint = artifacts.open_artifact(self._at(step), "checkpoint")
        return _tensors(checkpoint.path / adapters.WEIGHTS)

    @property
    def size_bytes(self) -> int:
        """What all checkpoints take on the disk."""
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def _at(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-????????"))


def read(checkpoint: Artifact) -> tuple[dict[str, Tensor], dict[str, Tensor], State]:
    """The adapter's tensors, the optimizer's states and the counters of a checkpoint. Raises InputRefused and
    ArtifactDamaged where its hashes are right and it isn't what lorakit writes."""
    weights, states = (_tensors(checkpoint.path / name) for name in (adapters.WEIGHTS, OPTIMIZER))
    path = checkpoint.path / STATE
    return weights, states, artifacts.as_dataclass(State, read_json_object(path, ""), path)


def _tensors(path: Path) -> dict[str, Tensor]:
    read_header(path)
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"{path}: found {error}, need tensors", "remove this checkpoint") from None
