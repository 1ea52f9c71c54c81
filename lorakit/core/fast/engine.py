"""Who can have the fast engine, and how a model gets it."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.core.config import ModelSection, TrainConfig
from lorakit.core.errors import first_line
from lorakit.core.fast.layers import speed_up
from lorakit.core.fast.linear import HOPPER
from lorakit.core.model import decoder_layers, let_compilations_differ
from lorakit.core.shapes import FAMILIES

_INT8_THRESHOLD = ModelSection.model_fields["int8_threshold"].default
_LEAST, _FP8 = (8, 0), (8, 9)  # compute capabilities: bf16 tensor cores; those of 8-bit floats
_OUTSIDE = {"embed_tokens", "lm_head"}
"""Modules outside of the layers, which may be trained whole."""


def lacking(
    config: TrainConfig,
    model: Mapping[str, Any],
    adapter: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why a run can't have the fast engine, or None; `model` is the base's config.json, `adapter` the
    adapter_config.json of one that the run begins with."""
    family, dropout = model.get("model_type"), model.get("attention_dropout") or 0
    saved = sorted({*config.lora_kind.modules_to_save, *(adapter.get("modules_to_save") or ())} - _OUTSIDE)
    lora_dropout = max(config.lora.lora_dropout, adapter.get("lora_dropout") or 0)
    biases = adapter.get("lora_bias") or adapter.get("bias") not in (None, "none")
    parallel = config.devices.parallel
    reasons = {
        f"the model type is {family!r}, not one of {', '.join(FAMILIES)}": family not in FAMILIES,
        f"the model has attention_dropout {dropout}": dropout > 0,
        f"LoRA has a dropout of {lora_dropout:g}, not 0": lora_dropout > 0,
        "LoRA is DoRA (--use-dora)": bool(config.lora_kind.use_dora or adapter.get("use_dora")),
        "the adapter trains biases": bool(biases),
        f"--modules-to-save has {', '.join(saved)}": bool(saved),
        f"the work is shared by --parallel {parallel}": parallel in ("fsdp", "split"),
        "--plan lays layers out over devices": config.devices.plan is not None,
        "it is --dtype fp16": dtype is torch.float16,
        f"--int8-threshold is {config.model.int8_threshold:g}, and no outliers are kept apart": (
            config.model.int8_threshold != _INT8_THRESHOLD
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, below 8.0"
    if config.model.quantize == "fp8" and capability < _FP8:
        return f"{torch.cuda.get_device_name(device)} has no 8-bit floats (compute capability 8.9)"
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    return _failing(device)


def _failing(device: torch.device) -> str | None:
    """Why the kernels don't run on a GPU, or None: what Triton can't compile there is found before a run, not in it."""
    try:
        from lorakit.core.fast import kernels

        numbers = torch.ones(96, 64, device=device, dtype=torch.bfloat16)
        kernels.transposed(numbers.view(torch.uint8))
        capability = torch.cuda.get_device_capability(device)
        if capability >= _FP8:  # Triton knows 8-bit floats there only, as the engine uses them
            codes, scale = kernels.rows_to_fp8(numbers, None)
        if capability == HOPPER:
            kernels.product(codes[:1], scale[:1], codes, scale.flatten(), None, None, (96,))
        torch.cuda.synchronize(device)
    except Exception as error:  # of Triton, its compiler, the driver: each its own
        return f"its kernels don't run here ({first_line(error)})"
    return None


def make_fast(model: Any, quantize: str) -> None:
    """Have a PEFT model's decoder layers compute training steps by the fast engine."""
    device, in_16_bits = next(model.parameters()).device, model.get_base_model().dtype is torch.bfloat16
    on_gpu = device.type == "cuda"
    rounds = on_gpu and in_16_bits and quantize in ("fp8", "nf4", "fp4")  # who asks for fp32 gets products in fp32
    in_fp8 = rounds and torch.cuda.get_device_capability(device) >= _FP8
    if on_gpu:
        let_compilations_differ()
    for layer in decoder_layers(model):
        speed_up(layer, in_fp8=in_fp8, compiled=on_gpu)
