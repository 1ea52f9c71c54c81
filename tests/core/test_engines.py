"""Which engine computes a run, and why not the fast one."""

from typing import Any

import pytest
import torch

from lorakit.core import engines
from lorakit.core.engines import ON_REQUEST, choose, lacking, lacking_on
from lorakit.core.errors import EnvironmentUnusable
from lorakit.core.events import Notice

LLAMA = {"model_type": "llama"}
CPU, GPU = torch.device("cpu"), torch.device("cuda")

REFUSED: list[tuple[dict[str, Any], str, dict[str, Any], dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "bf16", {}, {}, "the model type is 'gpt2', not one of llama"),
    ({**LLAMA, "attention_dropout": 0.1}, "bf16", {}, {}, "the model has attention_dropout 0.1"),
    ({**LLAMA, "attention_dropout": "much"}, "bf16", {}, {}, "the model has attention_dropout much"),
    (LLAMA, "fp16", {}, {}, "it is --dtype fp16"),
    (LLAMA, "bf16", {"lora_dropout": 0.05}, {}, "LoRA has a dropout of 0.05, not 0"),
    (LLAMA, "bf16", {"use_dora": True}, {}, "LoRA is DoRA (--use-dora)"),
    (LLAMA, "bf16", {"lora_bias": True}, {}, "the adapter trains biases"),
    (LLAMA, "bf16", {"bias": "all"}, {}, "the adapter trains biases"),
    (LLAMA, "bf16", {"modules_to_save": ["norm", "lm_head", "down_proj"]}, {}, "--modules-to-save has down_proj, norm"),
    (LLAMA, "bf16", {}, {"parallel": "fsdp"}, "the work is shared by --parallel fsdp"),
    (LLAMA, "bf16", {}, {"parallel": "split"}, "the work is shared by --parallel split"),
    (LLAMA, "bf16", {}, {"layout": "--plan"}, "--plan lays layers out over devices"),
    (LLAMA, "bf16", {}, {"int8_threshold": 5.0}, "--int8-threshold is 5, and as many columns as ever are kept apart"),
]


@pytest.mark.parametrize(("model", "dtype", "lora", "others", "reason"), REFUSED)
def test_what_it_cant_do_is_named(
    model: dict[str, Any], dtype: str, lora: dict[str, Any], others: dict[str, Any], reason: str
) -> None:
    """Of LoRA in the settings as of that in an adapter, whichever it is."""
    for both in ((lora, {}), ({}, lora)):
        found = lacking(model, dtype, *both, **others)
        assert found is not None
        assert found.startswith(reason)


def test_what_it_can_do_has_nothing_to_be_named() -> None:
    settings = {"lora_dropout": 0.0, "use_dora": False, "modules_to_save": []}
    adapter = {"modules_to_save": ["lm_head"], "bias": "none", "lora_dropout": 0.0, "rank_pattern": {"q_proj": 3}}
    assert lacking(LLAMA, "bf16", settings, adapter, parallel="ddp") is None
    assert lacking({**LLAMA, "attention_dropout": None}, "fp32") is None


@pytest.mark.parametrize(
    ("capability", "quantize", "reason"),
    [
        ((7, 5), "none", "A card has compute capability 7.5, below 8.0"),
        ((8, 0), "nf4", None),
        ((8, 6), "fp8", "A card has no 8-bit floats (compute capability 8.9)"),
        ((8, 9), "fp8", None),
        ((9, 0), "fp8", None),
    ],
)
def test_what_a_gpu_lacks_is_named(
    capability: tuple[int, int], quantize: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gpu(monkeypatch, capability)
    monkeypatch.setattr(engines, "_failing", lambda device, quantize: None)
    assert lacking_on(GPU, quantize) == reason


def make_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, triton: bool = True) -> None:
    """What torch says where there is a card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if triton else None)


def test_without_triton_there_is_none_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpu(monkeypatch, (9, 0), triton=False)
    assert lacking_on(GPU, "none") == "triton isn't installed"


def test_kernels_that_fail_are_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here triton isn't even there, which is what fails first."""
    make_gpu(monkeypatch, (9, 0))
    assert str(lacking_on(GPU, "none")).startswith("its kernels don't run here (")


def test_the_fast_one_is_taken_on_a_gpu_where_nothing_is_lacking() -> None:
    said: list[Any] = []
    assert choose("auto", {}, lambda: None, GPU, said.append) == "fast"
    assert choose("auto", {}, lambda: None, CPU, said.append) == "standard"
    assert choose("auto", {}, lambda: "it is so", GPU, said.append) == "standard"
    assert choose("fast", ON_REQUEST, lambda: None, CPU, said.append) == "fast"
    assert said == [
        Notice("engine: fast"),
        Notice("engine: standard, since there is no GPU"),
        Notice("engine: standard, since it is so"),
        Notice("engine: fast"),
    ]


def test_where_it_is_needed_and_lacks_something_there_is_no_other() -> None:
    with pytest.raises(EnvironmentUnusable) as caught:
        choose("fast", {**ON_REQUEST, "another": "wait"}, lambda: "it is so", GPU, lambda _: None)
    assert caught.value.message == "--engine fast: found that it is so; need what the fast engine can do"
    assert caught.value.hint == "change that, or leave out --engine"


def test_for_the_standard_one_no_kernel_is_tried() -> None:
    def tried() -> str:
        raise AssertionError("asked what the fast engine lacks")

    assert choose("standard", {}, tried, GPU, lambda _: None) == "standard"
