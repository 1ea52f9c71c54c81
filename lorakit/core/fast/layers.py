"""A decoder layer of the Llama family, computed by frozen_linear: queries, keys and values are one product, so are gate
and up. Its modules stay where they are, PEFT's matrices too, so that everything else (checkpoints, evaluation, answers
with a cache) goes on as before: only how a training step computes a layer is another.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from lorakit.core.fast.linear import frozen_linear
from lorakit.core.fast.storage import RANK_STEP, rounded, rounded_to_integers, store

Products = Literal["exact", "fp8", "int8"]
"""What frozen matrices are multiplied in: the model's number type, 8-bit floats, or, in the forward pass, integers."""

_ROUNDING: dict[Products, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "exact": lambda x: (),
    "fp8": rounded,
    "int8": rounded_to_integers,
}


class Linears:
    """Linear layers that read the same input, as one. No torch module: their parameters have their names already."""

    def __init__(self, layers: list[nn.Module], products: Products) -> None:
        self._layers = layers
        bases: list[Any] = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
        self._base, self._kind, self._ends = store(bases)
        sizes = [bases[0].in_features, *(base.out_features for base in bases)]
        self._sizes, self._biases = sizes, [base.bias for base in bases]
        # whose sizes 8-bit products need, and what calibration has left in 16 bits stays exact
        fits = all(size % 16 == 0 for size in sizes) and self._kind != "plain"
        self._round = _ROUNDING[products if fits else "exact"]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """What each of the layers gives for x [..., K]."""
        flat = x.reshape(-1, x.shape[-1])
        a, b = self._lora(flat.dtype)
        found = frozen_linear(flat, self._round(flat), self._base, self._kind, self._ends, a, b)
        parts = [part.view(*x.shape[:-1], -1) for part in found]
        for number, bias in enumerate(self._biases):
            if bias is not None:
                parts[number] = parts[number] + bias.to(x.dtype)
        return parts

    def _lora(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [P·R, K] and scale · B [N, R] of all layers, as wide as the widest; layers without LoRA have zeros."""
        found = [_matrices(layer) for layer in self._layers]
        rank = max(-(-a.shape[0] // RANK_STEP) * RANK_STEP if a is not None else 0 for a, _, _ in found)
        device, inputs = self._base[0].device, self._sizes[0]
        all_a, all_b = [], []
        for outputs, (a, b, scale) in zip(self._sizes[1:], found, strict=True):
            if a is None or b is None:
                all_a.append(torch.zeros(rank, inputs, device=device, dtype=dtype))
                all_b.append(torch.zeros(outputs, rank, device=device, dtype=dtype))
            else:
                all_a.append(pad(a, (0, 0, 0, rank - a.shape[0])).to(dtype))
                all_b.append(pad(b * scale, (0, rank - b.shape[1])).to(dtype))
        return torch.cat(all_a), torch.cat(all_b)


def _matrices(layer: Any) -> tuple[Tensor | None, Tensor | None, float]:
    """A, B and the scale of a layer's LoRA, where it has one that isn't switched off."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or not layer.active_adapters:
        return None, None, 0.0
    name = layer.active_adapters[0]
    if name not in layer.lora_A:
        return None, None, 0.0
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def speed_up(layer: Any, *, products: Products, compiled: bool) -> None:
    """Have a decoder layer with LoRA compute its training steps here, `compiled` by torch: once for all layers, which
    differ in nothing that it looks at."""
    attention, mlp = layer.self_attn, layer.mlp
    layer.fast = {
        "qkv": Linears([attention.q_proj, attention.k_proj, attention.v_proj], products),
        "o": Linears([attention.o_proj], products),
        "gate_up": Linears([mlp.gate_proj, mlp.up_proj], products),
        "down": Linears([mlp.down_proj], products),
    }
    config = attention.config
    window = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    layer.window = {"sliding_window": window} if window is not None else {}
    layer.compute = _compiled() if compiled else _compute
    layer.forward = MethodType(_forward, layer)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_compute)


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """A layer [B, T, H] as transformers calls it; answers, one token after the other, by its own code."""
    given = {"position_ids": position_ids, "position_embeddings": position_embeddings, **kwargs}
    if cache is not None or kwargs.get("past_key_values") is not None:
        cached = {"cache": cache} if cache is not None else {}
        return type(self).forward(self, hidden_states, attention_mask=attention_mask, **given, **cached)
    return self.compute(self, hidden_states, attention_mask, **given)


def _compute(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    """A layer [B, T, H] of Llama, Mistral, Qwen2 or Qwen3."""
    attention, mlp, fast = self.self_attn, self.mlp, self.fast
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q, k, v = (part.view(shape) for part in fast["qkv"](self.input_layernorm(hidden_states)))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = position_embeddings
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    given = {"position_ids": position_ids, "scaling": attention.scaling, **self.window, **kwargs}
    v = v.contiguous()  # or attention would keep all three until its backward pass, for this part of them
    attended, _ = attend(attention, q, k, v.transpose(1, 2), attention_mask, dropout=0.0, **given)
    hidden_states = hidden_states + fast["o"](attended.reshape(*hidden_states.shape[:-1], -1))[0]
    gate, up = fast["gate_up"](self.post_attention_layernorm(hidden_states))
    return hidden_states + fast["down"](mlp.act_fn(gate) * up)[0]
