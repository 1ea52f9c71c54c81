"""Who gets the fast engine, and why not."""

from typing import Any

import pytest
import torch

from lorakit.core.config import TrainConfig
from lorakit.core.fast import engine
from lorakit.core.fast.engine import lacking

LLAMA = {"model_type": "llama"}


def config(**values: object) -> TrainConfig:
    return TrainConfig.resolve((None, {"model": "m", "blocks": "b", **values}))


REFUSED: list[tuple[dict[str, object], dict[str, Any], torch.dtype, str]] = [
    ({}, {"model_type": "gpt2"}, torch.bfloat16, "the model type is 'gpt2'"),
    ({}, {**LLAMA, "attention_dropout": 0.1}, torch.bfloat16, "attention_dropout 0.1"),
    ({"lora_dropout": 0.05}, LLAMA, torch.bfloat16, "a dropout of 0.05"),
    ({"use_dora": True}, LLAMA, torch.bfloat16, "--use-dora"),
    ({"modules_to_save": "lm_head,norm"}, LLAMA, torch.bfloat16, "--modules-to-save has norm"),
    ({"parallel": "fsdp", "num_processes": 2}, LLAMA, torch.bfloat16, "--parallel fsdp"),
    ({"parallel": "split"}, LLAMA, torch.bfloat16, "--parallel split"),
    ({"plan": "plan.json"}, LLAMA, torch.bfloat16, "--plan"),
    ({}, LLAMA, torch.float16, "--dtype fp16"),
    ({"quantize": "int8", "int8_threshold": 5.0}, LLAMA, torch.bfloat16, "--int8-threshold is 5"),
]


@pytest.mark.parametrize(("values", "model", "dtype", "reason"), REFUSED)
def test_what_it_cant_do_is_named(
    values: dict[str, object], model: dict[str, Any], dtype: torch.dtype, reason: str
) -> None:
    found = lacking(config(**values), model, {}, dtype, torch.device("cpu"))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_dropout": 0.5}, "a dropout of 0.5"),
        ({"lora_bias": True}, "trains biases"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["down_proj"]}, "down_proj"),
        ({"modules_to_save": ["lm_head"], "bias": "none", "lora_dropout": 0.0, "rank_pattern": {"q_proj": 3}}, None),
    ],
)
def test_what_an_adapter_brings_that_it_cant_do_is_named(adapter: dict[str, Any], reason: str | None) -> None:
    found = lacking(config(adapter="a"), LLAMA, adapter, torch.bfloat16, torch.device("cpu"))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    ("capability", "quantize", "reason"),
    [
        ((7, 5), "none", "compute capability 7.5, below 8.0"),
        ((8, 0), "nf4", None),
        ((8, 6), "fp8", "no 8-bit floats"),
        ((8, 9), "fp8", None),
        ((9, 0), "fp8", None),
    ],
)
def test_what_a_gpu_lacks_is_named(
    capability: tuple[int, int], quantize: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(engine, "_failing", lambda _: None)
    found = lacking(config(quantize=quantize), LLAMA, {}, torch.bfloat16, torch.device("cuda"))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_without_triton_there_is_none_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert lacking(config(), LLAMA, {}, torch.bfloat16, torch.device("cuda")) == "triton isn't installed"


def test_kernels_that_fail_are_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here triton isn't even there, which is what fails first."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    found = lacking(config(), LLAMA, {}, torch.bfloat16, torch.device("cuda"))
    assert found is not None
    assert found.startswith("its kernels don't run here (")
