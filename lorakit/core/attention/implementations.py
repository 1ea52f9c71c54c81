"""Every implementation of attention under one name, registered with transformers' own interface: no source and no
class is rewritten.

    eager               transformers' matrix products and softmax, on any device
    sdpa                torch's scaled_dot_product_attention, with a dense mask where rows are padded or packed
    varlen              packed documents by their lengths, without a mask: on a GPU torch's flash kernel for variable
                        lengths (torch.nn.attention.varlen), elsewhere a document at a time; all else goes to sdpa
    flex_attention      torch's compiled attention with a block mask
    flash_attention_2   the packages flash-attn and flash-attn-3, where the user has them
    flash_attention_3

Shapes by suffix: B rows, T tokens of a row, N = B·T tokens end to end, H query heads, K key heads, D width of a head.
"""

import functools
import inspect
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lorakit.core.errors import InputRefused

IMPLEMENTATIONS = ("varlen", "flash_attention_3", "flash_attention_2", "sdpa", "flex_attention", "eager")
"""In the order in which `auto` takes the first that is right, where nothing was measured."""
STOCK = tuple(name for name in IMPLEMENTATIONS if name != "varlen")
"""Those that transformers knows without lorakit."""
BY_LENGTHS = ("varlen", "flash_attention_3", "flash_attention_2")
"""Those that take packed documents by their lengths (`cu_seq_lens_q` …), and need no mask."""

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256  # of torch's flash kernels: sdp_utils.cpp, check_head_dim_size_flash


@dataclass(frozen=True)
class Shape:
    """What decides about a model's attention, from its config alone."""

    kind: str
    """The class in transformers."""
    num_heads: int
    num_key_heads: int
    head_dim: int
    sliding_window: int | None
    """How many tokens, itself included, a token sees; None where it sees all before it."""
    dropout: float

    def __str__(self) -> str:
        window = f", window of {self.sliding_window}" if self.sliding_window else ""
        return f"{self.kind}: {self.num_heads} heads of {self.head_dim}, {self.num_key_heads} key heads{window}"


def shape_of(config: Any) -> Shape:
    """The attention of a model, from its transformers config.

    Raises InputRefused where it is no plain softmax attention that goes through transformers' interface.
    """
    module: Any = attention_module(config)
    kind, name = type(module).__name__, getattr(config, "_name_or_path", "") or config.model_type
    unusual = {
        "attn_logit_softcapping": "scores that are soft-capped",
        "attention_chunk_size": "attention in chunks",
        "vision_config": "images beside text",
        "use_bidirectional_attention": "attention that also looks ahead",
    }
    found = [words for key, words in unusual.items() if getattr(config, key, None)]
    found += ["attention sinks"] if hasattr(module, "sinks") else []
    if found or not getattr(module, "is_causal", False):
        raise InputRefused(
            f"{name}: found {kind} with {' and '.join(found) or 'no causal order'}, need causal softmax attention",
            "its own implementation stays right: choose it with transformers' attn_implementation",
        )
    window = getattr(config, "sliding_window", None) if _has_sliding_layers(config) else None
    num_heads = int(config.num_attention_heads)
    return Shape(
        kind=kind,
        num_heads=num_heads,
        num_key_heads=num_heads // int(module.num_key_value_groups),
        head_dim=int(module.head_dim),
        sliding_window=int(window) if window else None,
        dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
    )


def _has_sliding_layers(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "use_sliding_window", True))


def attention_module(config: Any) -> torch.nn.Module:
    """One attention layer of a model's own class, without weights. Raises InputRefused where transformers builds none
    that goes through its attention interface."""
    name = getattr(config, "_name_or_path", "") or config.model_type
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(_one_layer(config), attn_implementation="eager")
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputRefused(
            f"{name}: found a config that transformers can't build a causal language model of ({reason})",
            "choose a text-generation model of the Llama family",
        ) from None
    needed = ("num_key_value_groups", "head_dim", "scaling")
    modules = (module for module in model.modules() if all(hasattr(module, attribute) for attribute in needed))
    module = next(modules, None)
    if module is None or not model._supports_attention_backend:
        raise InputRefused(
            f"{name}: found {type(model).__name__}, whose attention isn't made as Llama's, Mistral's, Qwen's or "
            f"Gemma's ({', '.join(needed)}, through AttentionInterface); need one like these",
            "choose a model of the Llama family",
        )
    return module


def _one_layer(config: Any) -> Any:
    """The config of such a model with one layer, one with a sliding window where some have it."""
    kinds = list(getattr(config, "layer_types", None) or [])
    kind = next((kind for kind in kinds if kind == "sliding_attention"), next(iter(kinds), None))
    return smaller(config, num_hidden_layers=1, layer_types=[kind] if kind else None)


def smaller(config: Any, **changed: Any) -> Any:
    """Another config of the same kind. Raises StrictDataclassError, ValueError where it can't be."""
    return type(config).from_dict({**config.to_dict(), **{key: value for key, value in changed.items() if value}})


def lacking(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an implementation can't train such a model on such a device; None where nothing is known against it."""
    on_gpu = device.type == "cuda"
    if shape.dropout and name in ("varlen", "flex_attention"):
        return f"attention_dropout is {shape.dropout:g} in the config, and its kernel has no dropout"
    if name == "flex_attention" and not on_gpu:
        return "no GPU here, and on a CPU it has no backward pass"
    if name == "flex_attention" and dtype not in _SIXTEEN_BITS:
        return "compiling it for fp32 takes minutes (over 100 s on an H100); it serves bf16 and fp16"
    if (missing := lacking_package(name)) is not None:
        return missing
    if name in BY_LENGTHS and on_gpu and dtype not in _SIXTEEN_BITS:
        return "flash kernels compute in bf16 and fp16 only"
    if name in BY_LENGTHS and on_gpu and shape.head_dim > _WIDEST_FLASH_HEAD:
        return f"heads are {shape.head_dim} wide, and flash kernels take {_WIDEST_FLASH_HEAD} at most"
    if name == "varlen" and on_gpu and torch.cuda.get_device_capability(device) < (8, 0):
        return "flash kernels need a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def lacking_package(name: str) -> str | None:
    """That an implementation's package isn't installed; None where it is, or none is needed."""
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        return "the package flash-attn isn't installed"
    if name == "flash_attention_3" and not is_flash_attn_3_available():
        return "the package flash-attn-3 isn't installed"
    return None


# varlen


def register() -> None:
    """Make `varlen` known to transformers, as `attn_implementation="varlen"`. Doing it twice changes nothing."""
    AttentionInterface.register("varlen", varlen_attention)
    AttentionMaskInterface.register("varlen", varlen_mask)


def varlen_mask(
    batch_size: int, q_length: int, kv_length: int, *, use_vmap: bool = False, **more: Any
) -> Tensor | None:
    """No mask where documents are told apart by their lengths or positions; sdpa's own for padding and a cache."""
    if more.get("attention_mask") is None and q_length == kv_length > 1 and not use_vmap:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, use_vmap=use_vmap, **more)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows, each document for itself; `query` is [B, H, T, D], the result [B, T, H, D].

    The documents of all rows end to end are `cu_seq_lens_q` (int32 [documents + 1], on the device) with the longest in
    `max_length_q`, as a collator computes them once a batch. Without these they are read from positions that restart,
    once a forward pass. Rows that aren't packed, padded ones and those with a cache go to sdpa.
    """
    rows, _, length, _ = query.shape
    packed = None
    if attention_mask is None and key.shape[2] == length > 1:
        if cu_seq_lens_q is not None and max_length_q is not None:
            # rows of one document each are what cuDNN is faster at: 1.8 times on an H200 at 2,048 tokens
            alone = max_length_q == length and cu_seq_lens_q.shape[0] == rows + 1
            packed = None if alone else (cu_seq_lens_q, max_length_q)
        else:
            packed = documents_in(position_ids, rows, length)
        if packed is None and sliding_window is not None and sliding_window < length:
            ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
            packed = ends, length
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    if dropout:
        raise ValueError(f"varlen: found attention_dropout {dropout}, need 0: its kernel has none")
    dtype = query.dtype
    if dtype not in _SIXTEEN_BITS and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    q_NHD, k_NKD, v_NKD = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = _flash if query.is_cuda and dtype in _SIXTEEN_BITS else _document_by_document
    out_NHD = kernel(q_NHD, k_NKD, v_NKD, *packed, scaling, sliding_window)
    return out_NHD.unflatten(0, (rows, length)), None


def _flash(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, ends: Tensor, longest: int, scaling: float, window: int | None
) -> Tensor:
    """FlashAttention-2 for variable lengths (Dao 2023), part of torch; `ends` are 0 and each document's end."""
    from torch.nn.attention.varlen import varlen_attn

    seen = (window - 1 if window else -1, 0)
    out = varlen_attn(
        *(q_NHD, k_NKD, v_NKD, ends, ends, longest, longest), scale=scaling, window_size=seen, **_fewer_key_heads()
    )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _fewer_key_heads() -> dict[str, Any]:
    """torch 2.11 takes fewer key heads than query heads without being told; later versions have to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _document_by_document(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, ends: Tensor, longest: int, scaling: float, window: int | None
) -> Tensor:
    """The same by one causal sdpa a document. On two CPU cores a third of the time of one sdpa with a dense mask."""
    lengths = ends.diff().tolist()
    outputs = []
    for q, k, v in zip(*(states.split(lengths) for states in (q_NHD, k_NKD, v_NKD)), strict=True):
        mask = None
        if window is not None and window < len(q):
            mask = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril().triu(1 - window)
        q_HTD, k_KTD, v_KTD = (states.transpose(0, 1) for states in (q, k, v))
        if mask is not None and len(q_HTD) != len(k_KTD):  # with a mask and fewer key heads, sdpa has no fused kernel
            groups = len(q_HTD) // len(k_KTD)
            k_KTD, v_KTD = (states.repeat_interleave(groups, dim=0) for states in (k_KTD, v_KTD))
        out_HTD = scaled_dot_product_attention(
            q_HTD[None],
            k_KTD[None],
            v_KTD[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=len(q_HTD) != len(k_KTD),
        )[0]
        outputs.append(out_HTD.transpose(0, 1))
    return torch.cat(outputs)


_read: tuple[weakref.ref[Tensor], int, int, tuple[Tensor, int] | None] | None = None
"""The positions that were read last, their version, for how many rows, and the documents: all layers get the same."""


def documents_in(position_ids: Tensor | None, rows: int, length: int) -> tuple[Tensor, int] | None:
    """The ends of the documents in positions that restart, and the longest; None where no row is packed."""
    global _read
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    known, version = _read, -1 if position_ids.is_inference() else position_ids._version
    if known is not None and known[0]() is position_ids and known[1:3] == (version, rows):
        return known[3]
    found = None
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    if bool(starts[:, 1:].any()):
        begins = starts.expand(rows, length).flatten().nonzero().flatten().to(torch.int32)
        ends = torch.cat((begins, begins.new_tensor([rows * length])))
        found = ends, int(ends.diff().max())
    if version >= 0:  # what changed can't be told of an inference tensor
        _read = weakref.ref(position_ids), version, rows, found
    return found


def set_implementation(model: Any, name: str) -> None:
    """Give every attention layer of a loaded model an implementation, and its backbone the mask for it. A module that
    PEFT trains whole is a copy with a config of its own, which transformers doesn't know of."""
    model.set_attn_implementation(name)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        if type(config) is type(model.config.get_text_config()):
            config._attn_implementation = name


def guard(model: Any) -> None:
    """Have a loaded model's backbone look at every batch with packed positions; doing it twice changes nothing."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    if keep_apart not in whole.base_model._forward_pre_hooks.values():
        whole.base_model.register_forward_pre_hook(keep_apart, with_kwargs=True)


@functools.cache
def _takes(kind: type) -> inspect.Signature:
    """What a class's forward pass takes; read once, since it is asked before every one."""
    return inspect.signature(kind.forward)  # type: ignore[attr-defined]


def keep_apart(
    module: Any, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A hook before a backbone's forward pass, for positions that restart (packed documents).

    transformers finds these only where neither an attention mask nor a cache is passed (masking_utils.py,
    `_preprocess_mask_arguments`): with a mask, even of ones alone, and with the cache that it makes by default, every
    document sees those before it. So a mask raises InputRefused, and no cache is made.
    """
    bound = _takes(module.__class__).bind_partial(module, *given, **named).arguments
    passed = {**bound.pop("kwargs", {}), **bound}
    mask, positions = passed.get("attention_mask"), passed.get("position_ids")
    cache = next((passed[name] for name in ("past_key_values", "cache") if passed.get(name) is not None), None)
    alone = mask is None and cache is None and passed.get("use_cache") is False
    filled = cache is not None and cache.get_seq_length() > 0
    if alone or filled or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    restarts = positions.diff(dim=1) != 1
    if isinstance(mask, Tensor):
        if mask.dim() != 2 or mask.shape[1] != positions.shape[1]:
            return None
        seen = mask.bool()
        restarts = restarts & seen[:, 1:] & seen[:, :-1]
    elif mask is not None:
        return None
    if not bool(restarts.any()):
        return None
    if mask is not None or cache is not None:
        raise InputRefused(
            f"{'attention_mask' if mask is not None else 'past_key_values'}: found one beside position_ids that "
            "restart (packed documents), need position_ids alone; with it, transformers lets each document see those "
            "before it",
            "leave it out of the batch",
        )
    return given, {**named, "use_cache": False}
