"""Optimizers by the names of `--optimizer`, their states by the names of what they belong to, and learning rates."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lorakit.core.config import TrainConfig
from lorakit.core.errors import UsageError, first_line
from lorakit.core.memory import PAGED_ELEMENTS
from lorakit.core.parallel import put, whole

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_LION_BETAS = (0.9, 0.99)  # Chen et al. 2023, Symbolic Discovery of Optimization Algorithms

_SHARED = "shared"

Parameters = Mapping[str, torch.nn.Parameter]


def make_optimizer(config: TrainConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` over all trained parameters."""
    kind, decay = config.optimizer_kind.optimizer, config.optimizer.weight_decay
    trained = list(parameters.values())
    usual: dict[str, Any] = {"lr": config.optimizer.learning_rate, "weight_decay": decay}
    # fused: without, another fp32 copy of the adapter in every step
    fused = all(parameter.device.type == "cuda" for parameter in trained)
    if kind == "adamw":
        return torch.optim.AdamW(trained, betas=_BETAS, eps=_EPSILON, fused=fused, **usual)
    if kind == "sgd":
        return torch.optim.SGD(trained, fused=fused, **usual)
    import bitsandbytes as bnb

    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "lion": bnb.optim.Lion32bit,
        "lion_8bit": bnb.optim.Lion8bit,
        "paged_lion": bnb.optim.PagedLion32bit,
        "paged_lion_8bit": bnb.optim.PagedLion8bit,
    }
    if "lion" in kind:
        return classes[kind](trained, betas=_LION_BETAS, **usual)
    return classes[kind](trained, betas=_BETAS, eps=_EPSILON, **usual)


def pages_nothing(config: TrainConfig, parameters: Parameters) -> bool:
    """Whether a paged optimizer was asked for whose states are all too small to be paged."""
    paged = config.optimizer_kind.optimizer.startswith("paged")
    return paged and all(parameter.numel() < PAGED_ELEMENTS for parameter in parameters.values())


def states_of(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """Every state by `key.name of the parameter`; a tensor that several share once, by `shared.key`. In one process's
    whole tensors, also where they are cut into shards: every process has to ask."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor):
                found[f"{key}.{name}"] = torch.tensor(value)
            elif _is_table(key):
                found[f"{_SHARED}.{key}"] = whole(value)
            else:
                found[f"{key}.{name}"] = whole(value)
    return found


def load_states(optimizer: torch.optim.Optimizer, parameters: Parameters, states: Mapping[str, Tensor]) -> None:
    """Put back what `states_of` gave. The optimizer makes its tensors itself, of its own kinds and in its own memory,
    in a step that changes nothing; then they are overwritten."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            kept = states[f"{_SHARED}.{key}" if _is_table(key) else f"{key}.{name}"]
            if isinstance(value, Tensor):
                put(kept, value)
            else:
                optimizer.state[parameter][key] = type(value)(kept.item())


def _is_table(key: str) -> bool:
    """Whether a state is bitsandbytes' table of what 8 bits mean, one for all parameters."""
    return key.startswith("qmap")


class LearningRate:
    """transformers' schedule as a function of the step, counted from 0, so that a run can go on anywhere. Only
    reduce_lr_on_plateau remembers something: what it heard of evaluations."""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        """Raises UsageError where the schedule can't take its arguments."""
        kind, pairs = config.optimizer.lr_scheduler_type, config.optimizer.lr_scheduler_kwargs
        given = {name.strip(): _value(value.strip()) for name, _, value in (pair.partition("=") for pair in pairs)}
        self._highest = config.optimizer.learning_rate
        self._warmup_steps = math.ceil(config.optimizer.warmup_ratio * steps)
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self._highest)
        try:
            self._scheduler = transformers.get_scheduler(
                kind,
                nothing,
                num_warmup_steps=self._warmup_steps,
                num_training_steps=None if "num_stable_steps" in given else steps,  # of both it would warn
                scheduler_specific_kwargs=given,
            )
            looked_at = {self._warmup_steps, steps - 1, *range(self._warmup_steps, steps, max(steps // 100, 1))}
            for rate in map(self.at, sorted(looked_at)):
                if not 0 <= rate <= self._highest * (1 + 1e-9):
                    raise ValueError(f"a learning rate of {rate:g} with --learning-rate {self._highest:g}")
        except (ValueError, TypeError, ArithmeticError) as error:
            found = ", ".join(pairs) or "none"
            raise UsageError(
                f"lr_scheduler_kwargs: found {found}, need what {kind} can take ({first_line(error)})",
                "correct --lr-scheduler-kwargs",
            ) from None

    @property
    def _plateau(self) -> ReduceLROnPlateau | None:
        return self._scheduler if isinstance(self._scheduler, ReduceLROnPlateau) else None

    def at(self, step: int) -> float:
        """The learning rate of a step. A step counts as its own end of warm-up, so that the first one learns."""
        if step < self._warmup_steps:
            return self._highest * (step + 1) / self._warmup_steps
        if self._plateau is not None:
            return float(self._plateau.optimizer.param_groups[0]["lr"])
        return self._highest * float(self._scheduler.lr_lambdas[0](step))

    def hear(self, loss: float) -> None:
        """Take notice of a loss over the held-out blocks."""
        if self._plateau is not None:
            self._plateau.step(loss)

    @property
    def memory(self) -> dict[str, Any]:
        """What has to be kept to go on; numbers and words only."""
        if self._plateau is None:
            return {}
        kept = {name: value for name, value in self._plateau.state_dict().items() if name != "mode_worse"}  # infinity
        return {**kept, "lr": self._plateau.optimizer.param_groups[0]["lr"]}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Put back what `memory` gave."""
        if self._plateau is not None and memory:
            kept = dict(memory)
            self._plateau.optimizer.param_groups[0]["lr"] = kept.pop("lr")
            self._plateau.load_state_dict(kept)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
