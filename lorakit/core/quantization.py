"""Linear layers of 16 bits in, layers of 8 or 4 bits out: bitsandbytes' own, or rows of 8-bit codes."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.core.errors import NonFinite
from lorakit.core.fast.storage import FrozenLinear


class Quantizing(NamedTuple):
    """How a base's linear layers are kept."""

    kind: str
    """none, fp8, int8, nf4 or fp4, as `--quantize` has them."""
    dtype: torch.dtype
    double_quantization: bool = True
    int8_threshold: float = 6.0
    by_rows: bool = False
    """8-bit codes by lorakit's own layer: floats always, integers for the fast engine, which keeps no outliers apart
    as LLM.int8 does."""
    sharded: bool = False
    """4-bit codes as numbers that may be parameters with gradients: FSDP of torch 2.11 shards nothing else."""

    @staticmethod
    def is_by_rows(kind: str, *, fast: bool) -> bool:
        return kind == "fp8" or (fast and kind == "int8")


def linear_layers(model: PreTrainedModel, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What is quantized of a module, by name: all its linear layers but the head, that aren't yet."""
    head = model.get_output_embeddings()
    return {
        name: found
        for name, found in module.named_modules()
        if isinstance(found, torch.nn.Linear | Conv1D) and found is not head and found.weight.is_floating_point()
    }


def move(module: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, recurse: bool = True) -> None:
    """Bring a module to a device, its floats to a number type; buffers keep theirs, as from_pretrained has it."""
    for parameter in module.parameters(recurse):
        parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
    for buffer in module.buffers(recurse):
        buffer.data = buffer.data.to(device)


def quantize_layers(model: PreTrainedModel, where: str, how: Quantizing, device: torch.device) -> None:
    """Put quantized layers in place of the linear layers of the module that `where` names (of all: ""), which may be
    one itself; one after the other, each quantized on the device.

    Raises NonFinite.
    """
    if how.kind == "none":
        return
    for name in list(linear_layers(model, model.get_submodule(where))):  # names: layers would all be held in 16 bits
        whole = ".".join(part for part in (where, name) if part)
        model.set_submodule(whole, quantized(model.get_submodule(whole).to(device, how.dtype), how, whole))


def quantized(layer: Any, how: Quantizing, name: str = "a linear layer") -> torch.nn.Module:
    """The quantized layer of a linear layer, made where that lies. Raises NonFinite."""
    linear = _turned(layer) if isinstance(layer, Conv1D) else layer
    numbers = linear.weight.to(torch.float16) if how.kind == "int8" else linear.weight  # int8's scales are made in fp16
    if not bool(torch.isfinite(numbers).all()):  # which would become a number like any other
        raise NonFinite(
            f"{name}.weight: found NaN or infinity in the base's weights, need numbers that {how.kind} holds",
            "download the model again, or choose another",
        )
    return FrozenLinear(linear, how.kind) if how.by_rows else _by_bitsandbytes(linear, how)


def _turned(layer: Any) -> torch.nn.Linear:
    """GPT-2's linear layer, whose weight lies the other way round, as torch's."""
    inputs, outputs = layer.weight.shape
    with torch.device("meta"):
        made = torch.nn.Linear(inputs, outputs)
    made.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
    made.bias = torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made


def _by_bitsandbytes(linear: Any, how: Quantizing) -> torch.nn.Module:
    import bitsandbytes as bnb

    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight, device = linear.weight.detach(), linear.weight.device
    with torch.device("meta"):
        made: Any
        if how.kind == "int8":
            made = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=how.int8_threshold)
        else:
            storage = how.dtype if how.sharded else torch.uint8
            given: dict[str, Any] = {"quant_type": how.kind, "quant_storage": storage}
            made = bnb.nn.Linear4bit(*size, bias, compute_dtype=how.dtype, **given)
    if how.kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        made.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    else:
        made.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=how.double_quantization,
            module=made,
            **given,
        ).to(device)
        # it would lay 4-bit weights out anew for a CPU's inference, at the first evaluation of a run: with other
        # rounding, and only where sizes are multiples of 64 (Linear4bit.forward, 0.50)
        made.support_avx512bf16_for_cpu = False
    if bias:
        made.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made


def say_how(model: PreTrainedModel, how: Quantizing) -> None:
    """What PEFT asks a model, to wrap bitsandbytes' layers by its own."""
    model.is_loaded_in_8bit = how.kind == "int8" and not how.by_rows
    model.is_loaded_in_4bit = how.kind in ("nf4", "fp4")
