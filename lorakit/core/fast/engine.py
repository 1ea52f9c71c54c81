"""Who can have the fast engine, and how a model gets it."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.core.config import TrainConfig
from lorakit.core.errors import first_line
from lorakit.core.fast.layers import speed_up
from lorakit.core.fast.linear import HOPPER
from lorakit.core.model import compile_layers, decoder_layers
from lorakit.core.shapes import FAMILIES

_INT8_THRESHOLD = 6.0  # the option's default
_LEAST, _FP8 = (8, 0), (8, 9)  # compute capabilities: bf16 tensor cores; those of 8-bit floats
_OUTSIDE = {"embed_tokens", "lm_head"}
"""Modules outside of the layers, which may be trained whole."""


def lacking(config: TrainConfig, model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a run can't have the fast engine, or None; `model` is the base's config.json."""
    family, dropout = model.get("model_type"), model.get("attention_dropout") or 0
    saved = sorted(set(config.lora_kind.modules_to_save) - _OUTSIDE)
    parallel = config.devices.parallel
    reasons = {
        f"the model type is {family!r}, not one of {', '.join(FAMILIES)}": family not in FAMILIES,
        f"the model has attention_dropout {dropout}": dropout > 0,
        f"--lora-dropout is {config.lora.lora_dropout:g}, not 0": config.lora.lora_dropout > 0,
        "--use-dora": config.lora_kind.use_dora,
        f"--modules-to-save {','.join(saved)}": bool(saved),
        f"--parallel {parallel}": parallel in ("fsdp", "split"),
        "--plan lays layers out over devices": config.devices.plan is not None,
        "--dtype fp16": dtype is torch.float16,
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

        codes, scale = kernels.rows_to_fp8(torch.ones(96, 64, device=device, dtype=torch.bfloat16), None)
        if torch.cuda.get_device_capability(device) == HOPPER:
            kernels.product(codes[:1], scale[:1], codes, scale.flatten(), None, None, (96,))
        torch.cuda.synchronize(device)
    except Exception as error:  # of Triton, its compiler, the driver: each its own
        return f"its kernels don't run here ({first_line(error)})"
    return None


def make_fast(model: Any, quantize: str) -> None:
    """Have a PEFT model's decoder layers compute training steps by the fast engine."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    in_fp8 = on_gpu and quantize in ("fp8", "nf4", "fp4") and torch.cuda.get_device_capability(device) >= _FP8
    for layer in decoder_layers(model):
        speed_up(layer, in_fp8=in_fp8)
    if on_gpu:
        compile_layers(model)
