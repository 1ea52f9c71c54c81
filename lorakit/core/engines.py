"""Which engine computes a model's decoder layers, and why not the fast one. No torch until a GPU is asked."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorakit.core.config import AskedEngine, Engine, ModelSection
from lorakit.core.errors import EnvironmentUnusable, first_line
from lorakit.core.events import Notice, Report
from lorakit.core.shapes import FAMILIES

if TYPE_CHECKING:
    import torch

ON_REQUEST = {"--engine fast": "change that, or leave out --engine"}
"""What `choose` is told where the fast engine was asked for by name."""

_INT8_THRESHOLD = ModelSection.model_fields["int8_threshold"].default
_LEAST, _FP8 = (8, 0), (8, 9)  # compute capabilities: bf16 tensor cores; those of 8-bit floats
_OUTSIDE = {"embed_tokens", "lm_head"}
"""Modules outside of the layers, which may be trained whole."""


def choose(
    asked: AskedEngine,
    needed: Mapping[str, str],
    lacks: Callable[[], str | None],
    device: "torch.device",
    report: Report,
) -> Engine:
    """The engine that is asked for; of auto the fast one on a GPU where nothing is lacking. `needed` names what only
    that can do, with what to do where it can't be had; `lacks` says why it can't.

    Raises EnvironmentUnusable where it is needed and can't be had."""
    if asked == "standard":
        return "standard"  # nothing to find out: on a GPU that compiles kernels
    reason = lacks()
    for what, hint in needed.items():
        if reason is not None:
            raise EnvironmentUnusable(f"{what}: found that {reason}; need what the fast engine can do", hint)
    if not needed and reason is None and device.type != "cuda":
        reason = "there is no GPU"  # where it would be no faster
    chosen: Engine = "fast" if reason is None else "standard"
    report(Notice(f"engine: {chosen}" + (f", since {reason}" if reason else "")))
    return chosen


def lacking(
    model: Mapping[str, Any],
    dtype: str,
    *lora: Mapping[str, Any],
    parallel: str | None = None,
    layout: str | None = None,
    int8_threshold: float = _INT8_THRESHOLD,
) -> str | None:
    """Why the fast engine can't compute with these settings, or None.

    `model` is the base's config.json; each of `lora` says by the names of adapter_config.json what LoRA is, in settings
    or in an adapter; `layout` is the option by which layers are laid out over devices.
    """
    family, dropout = model.get("model_type"), model.get("attention_dropout") or 0
    saved = sorted({name for one in lora for name in one.get("modules_to_save") or ()} - _OUTSIDE)
    lora_dropout = next((found for one in lora if (found := one.get("lora_dropout"))), 0)
    reasons = {
        f"the model type is {family!r}, not one of {', '.join(FAMILIES)}": family not in FAMILIES,
        f"the model has attention_dropout {dropout}": dropout != 0,  # whatever a config holds
        f"LoRA has a dropout of {lora_dropout}, not 0": lora_dropout != 0,
        "LoRA is DoRA (--use-dora)": any(one.get("use_dora") for one in lora),
        "the adapter trains biases": any(one.get("lora_bias") or one.get("bias") not in (None, "none") for one in lora),
        f"--modules-to-save has {', '.join(saved)}": bool(saved),
        f"the work is shared by --parallel {parallel}": parallel in ("fsdp", "split"),
        f"{layout} lays layers out over devices": layout is not None,
        "it is --dtype fp16": dtype == "fp16",
        f"--int8-threshold is {int8_threshold:g}, and as many columns as ever are kept apart": int8_threshold
        != _INT8_THRESHOLD,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def lacking_on(device: "torch.device", quantize: str) -> str | None:
    """Why the fast engine can't compute there, or None. On a GPU its kernels are tried."""
    if device.type != "cuda":
        return None
    import torch

    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if capability < _LEAST:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, below 8.0"
    if quantize == "fp8" and capability < _FP8:
        return f"{name} has no 8-bit floats (compute capability 8.9)"
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    return _failing(device, quantize)


def computes_in_fp8(device: "torch.device") -> bool:
    """Whether a device multiplies 8-bit floats."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8


def _failing(device: "torch.device", quantize: str) -> str | None:
    """Why the kernels don't run on a GPU, or None: what Triton can't compile there is found before a run, not in it."""
    try:
        import torch

        from lorakit.core.fast import kernels
        from lorakit.core.fast.linear import HOPPER

        numbers = torch.ones(96, 64, device=device, dtype=torch.bfloat16)
        half = numbers[:, :32].contiguous()
        if quantize == "int8":
            integers, ones = numbers.to(torch.int8), torch.ones(96, device=device)
            kernels.product_of_integers(integers, ones, integers, ones, half, half, half, half, (96,))
        kernels.cross_entropy(numbers.clone(), torch.zeros(96, device=device, dtype=torch.int64))
        kernels.transposed(numbers.view(torch.uint8))
        if computes_in_fp8(device):  # Triton knows 8-bit floats there only, as the engine uses them
            codes, scale = kernels.rows_to_fp8([numbers], None)
            packed, table = numbers.view(torch.uint8)[:, :32].contiguous(), torch.ones(16, device=device)
            kernels.of_dy([half, half], table.repeat(4), half, numbers[:64, :16].contiguous())
            kernels.fp8_of_4_bits(packed, table[:1].expand(96).contiguous(), table, codes, scale.flatten())
        if torch.cuda.get_device_capability(device) == HOPPER:
            kernels.product(codes[:1], scale[:1], codes, scale.flatten(), None, None, (96,))
        torch.cuda.synchronize(device)
    except Exception as error:  # of Triton, its compiler, the driver: each its own
        return f"its kernels don't run here ({first_line(error)})"
    return None
