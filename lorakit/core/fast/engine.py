"""How a model gets the fast engine."""

from typing import Any

import torch

from lorakit.core.engines import computes_in_fp8
from lorakit.core.fast.layers import Products, speed_up
from lorakit.core.model import decoder_layers, prepare_compiling


def make_fast(model: Any, quantize: str) -> None:
    """Have the decoder layers of a model, with LoRA in them or without, be computed by the fast engine."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    # who asks for fp32 gets products in fp32
    products: Products = "exact"
    if model.dtype is torch.bfloat16 and on_gpu:
        if quantize == "int8":
            products = "int8"
        elif quantize in ("fp8", "nf4", "fp4") and computes_in_fp8(device):
            products = "fp8"
    if on_gpu:
        prepare_compiling()
    for layer in decoder_layers(model):
        speed_up(layer, products=products, compiled=on_gpu)


def is_fast(model: Any) -> bool:
    """Whether the fast engine computes the decoder layers of a model."""
    return any(hasattr(layer, "fast") for layer in decoder_layers(model))
