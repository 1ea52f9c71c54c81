"""A small whole model of a model's own kind, with real heads and random weights in fp32: what only a whole model shows.

Each kind of layer that the model has is there once. Documents may be mixed by more than attention, a layer may not hand
positions on, and what a cache keeps is seen in what is said next.

Shapes by suffix: B rows, T tokens of a row, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit.core.attention.implementations import Shape, guard, keep_apart, smaller
from lorakit.core.errors import InputRefused
from lorakit.core.tokenization import quiet_libraries

_VOCABULARY = 199
_DOCUMENTS = (9, 1, 14)
_NEW_TOKENS = 8
_CHANGES = (7, 14, 21, 28)
"""What is added to ids, for other tokens in their place."""


def miniature(config: Any, shape: Shape, implementation: str, device: torch.device) -> Any:
    """The model, with lorakit's guard. Raises whatever transformers raises where it can't be built so small."""
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    kinds *= 2 if len(kinds) == 1 else 1
    torch.manual_seed(0)
    with quiet_libraries():  # which advise about the ids of special tokens in so small a vocabulary
        small = smaller(
            config,
            hidden_size=8 * shape.num_heads,
            intermediate_size=64,
            vocab_size=_VOCABULARY,
            num_hidden_layers=len(kinds) or 2,
            layer_types=kinds,
            head_dim=shape.head_dim,
        )
        small.pad_token_id, small.bos_token_id, small.eos_token_id = 0, None, None
        model = AutoModelForCausalLM.from_config(small, attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that a leak isn't lost in rounding
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    guard(model)
    return model.to(device, torch.float32).eval()


def answers_alike_with_a_cache(model: Any) -> bool:
    """Whether the likeliest next tokens are the same with a KV cache as without, one row padded on the left."""
    prompt_BT = torch.randint(1, _VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(prompt_BT)
    mask_BT[0, :3] = 0
    device = next(model.parameters()).device
    given = {"attention_mask": mask_BT.to(device), "max_new_tokens": _NEW_TOKENS, "do_sample": False}
    said = [model.generate(prompt_BT.to(device), use_cache=use_cache, **given) for use_cache in (True, False)]
    return torch.equal(*said)


def leak(model: Any, **more: Tensor) -> float:
    """How much the logits of packed documents change with what stands in the first: not at all where they are apart,
    but for rounding."""
    first = _DOCUMENTS[0]
    return _change(model, slice(first), slice(first, None), _CHANGES[0], **more)


def rounding(model: Any) -> float:
    """How much the logits of packed documents change with what stands in the last, which no causal model sees before
    it. Not at all in most: the same sizes are rounded alike. But experts multiply as many tokens as come to them."""
    last = _DOCUMENTS[-1]
    return max(_change(model, slice(-last, None), slice(-last), by) for by in _CHANGES)


def _change(model: Any, changed: slice, seen: slice, by: int, **more: Tensor) -> float:
    """The largest change of the logits at some positions when other tokens stand at others."""
    ids_BT, positions_BT = _packed(model)
    other_BT = ids_BT.clone()
    other_BT[:, changed] = (other_BT[:, changed] + by) % _VOCABULARY
    with torch.no_grad():
        logits = [model(input_ids=ids, position_ids=positions_BT, **more).logits for ids in (ids_BT, other_BT)]
    return float((logits[0] - logits[1])[:, seen].abs().max())


def leak_by_mask(model: Any) -> tuple[float, bool]:
    """What an all-ones attention mask does to packed documents without the guard, and whether the guard refuses it."""
    ids_BT, _ = _packed(model)
    mask = {"attention_mask": torch.ones_like(ids_BT)}
    try:
        leak(model, **mask)
        refused = False
    except InputRefused:
        refused = True
    hooks = model.base_model._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if hook is keep_apart]:
        del hooks[number]
    leaked = leak(model, **mask)
    guard(model)
    return leaked, refused


def _packed(model: Any) -> tuple[Tensor, Tensor]:
    """Token ids and restarting positions of one row."""
    device = next(model.parameters()).device
    ids_BT = torch.randint(1, _VOCABULARY, (1, sum(_DOCUMENTS)), generator=torch.Generator().manual_seed(1))
    positions_BT = torch.cat([torch.arange(length) for length in _DOCUMENTS])[None]
    return ids_BT.to(device), positions_BT.to(device)
