"""Linear layers of 16 bits in, layers of 8 or 4 bits out: bitsandbytes' own, or rows of 8-bit codes; and what those are
made of, as tensors by name."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.core.errors import NonFinite
from lorakit.core.fast.storage import FrozenLinear

_BLOCK, _NESTED_BLOCK = 64, 256  # numbers for each scale of 4 bits, and scales for each scale of theirs: bitsandbytes'


class Quantizing(NamedTuple):
    """How a base's linear layers are kept."""

    kind: str
    """none, fp8, int8, nf4 or fp4, as `--quantize` has them."""
    dtype: torch.dtype
    double_quantization: bool = True
    int8_threshold: float = 6.0
    by_rows: bool = False
    """8-bit codes by lorakit's own layer: floats always, integers for the fast engine, which keeps columns apart by
    their number, not as LLM.int8 does by a threshold."""
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


def stacks(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Matrices that are no linear layers, by name: transformers keeps those of experts in parameters of three
    dimensions, which are neither quantized nor given LoRA."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and min(parameter.shape[1:]) > 1
    }


def unquantized(model: PreTrainedModel) -> str | None:
    """One line on what stays as it is in a quantized base beside its head and embedding; None where nothing does."""
    found = stacks(model)
    if not found:
        return None
    kept_bytes, dtype = sum(parameter.nbytes for parameter in found.values()), next(iter(found.values())).dtype
    return (
        f"{kept_bytes / 2**20:,.1f} MiB of the base stay in {str(dtype).removeprefix('torch.')}: experts aren't "
        f"quantized ({len(found)} stacks of matrices, {next(iter(found))} the first)"
    )


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


def weight_of(layer: Any) -> Tensor:
    """The matrix of a linear layer, [N, K]: GPT-2's lies the other way round."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _turned(layer: Any) -> torch.nn.Linear:
    """GPT-2's linear layer as torch's."""
    weight = weight_of(layer)
    with torch.device("meta"):
        made = torch.nn.Linear(*weight.shape[::-1])
    made.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    made.bias = torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made


def _by_bitsandbytes(linear: Any, how: Quantizing) -> torch.nn.Module:
    if how.kind != "int8":
        return _of_4_bits(linear, how, linear.weight.detach())
    import bitsandbytes as bnb

    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    with torch.device("meta"):
        made: Any = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=how.int8_threshold)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
    made.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    if bias:
        made.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made


def _of_4_bits(linear: Any, how: Quantizing, weight: Tensor, state: Any = None) -> torch.nn.Module:
    """bitsandbytes' layer beside a linear one, over numbers that it quantizes, or over codes with their state."""
    import bitsandbytes as bnb

    size, bias = (linear.in_features, linear.out_features), linear.bias is not None
    given: dict[str, Any] = {"quant_type": how.kind, "quant_storage": how.dtype if how.sharded else torch.uint8}
    with torch.device("meta"):
        made: Any = bnb.nn.Linear4bit(*size, bias, compute_dtype=how.dtype, **given)
    made.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_state=state,
        compress_statistics=how.double_quantization,
        module=made,
        bnb_quantized=state is not None,
        **given,
    )
    if state is None:
        made.weight = made.weight.to(weight.device)
    else:
        made.quant_state = state
    # it would lay 4-bit weights out anew for a CPU's inference, at the first evaluation of a run: with other
    # rounding, and only where sizes are multiples of 64 (Linear4bit.forward, 0.50)
    made.support_avx512bf16_for_cpu = False
    if bias:
        made.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    return made


def stored(layer: Any) -> dict[str, Tensor]:
    """What a quantized layer is made of, but its bias; nothing of another layer, nor of LLM.int8's."""
    if isinstance(layer, FrozenLinear):
        return {"codes": layer.weight.data, "scales": layer.scale}
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None:
        return {}
    found = {"codes": layer.weight.data.view(torch.uint8).flatten(), "scales": state.absmax}
    if state.nested:
        nested = state.state2
        found |= {"nested_scales": nested.absmax, "nested_code": nested.code, "nested_offset": state.offset}
    return found


def stored_as(layer: Any, how: Quantizing) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number type (as safetensors calls it) and shape of each of the tensors that `stored` will give of a linear layer
    when it is quantized."""
    outputs, inputs = _size(layer)
    if how.by_rows:
        return {"codes": ("I8", (outputs, inputs)), "scales": ("F32", (outputs,))}
    numbers = outputs * inputs
    blocks = math.ceil(numbers / _BLOCK)
    codes = {"codes": ("U8", ((numbers + 1) // 2,))}
    if not how.double_quantization:
        return {**codes, "scales": ("F32", (blocks,))}
    nested = {"nested_scales": ("F32", (math.ceil(blocks / _NESTED_BLOCK),)), "nested_code": ("F32", (256,))}
    return {**codes, "scales": ("U8", (blocks,)), **nested, "nested_offset": ("F32", ())}


def from_stored(layer: Any, how: Quantizing, tensors: dict[str, Tensor], device: torch.device) -> torch.nn.Module:
    """The quantized layer of a linear layer, of what `stored` gave of it before, which lies on the device. Of the
    linear layer its bias alone is read."""
    outputs, inputs = _size(layer)
    linear = torch.nn.Linear(inputs, outputs, bias=False, device="meta", dtype=how.dtype)
    if layer.bias is not None:
        linear.bias = torch.nn.Parameter(layer.bias.detach().to(device, how.dtype), requires_grad=False)
    if how.by_rows:
        return FrozenLinear(linear, how.kind, (tensors["codes"], tensors["scales"]))
    from bitsandbytes import functional

    nested: Any = {}
    if how.double_quantization:
        scales, code, offset = (tensors[f"nested_{part}"] for part in ("scales", "code", "offset"))
        state2 = functional.QuantState(scales, code=code, blocksize=_NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": offset, "state2": state2}
    table, shape = functional.get_4bit_type(how.kind, device=device), torch.Size([outputs, inputs])
    state = functional.QuantState(tensors["scales"], shape, table, _BLOCK, how.kind, how.dtype, **nested)
    codes = tensors["codes"].view(how.dtype if how.sharded else torch.uint8)[:, None]
    return _of_4_bits(linear, how, codes, state)


def _size(layer: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    outputs, inputs = weight_of(layer).shape
    return outputs, inputs


def say_how(model: PreTrainedModel, how: Quantizing) -> None:
    """What PEFT asks a model, to wrap bitsandbytes' layers by its own."""
    model.is_loaded_in_8bit = how.kind == "int8" and not how.by_rows
    model.is_loaded_in_4bit = how.kind in ("nf4", "fp4")
