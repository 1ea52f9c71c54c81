"""A model's shape from its config alone: every module with its name and size, no weights. No torch.

Built-in shapes lie in data/shapes/*.json, a file a family, with the fields of each model's own config.json.
The layouts are those of transformers' LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lorakit.core.errors import HubFailed, InputRefused
from lorakit.core.hub import config_folder
from lorakit.core.untrusted import read_json_object
from lorakit.core.weights import NUM_LAYERS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The model types whose modules are known here; others are laid out by transformers itself."""

_FOLDER = Path(__file__).parents[1] / "data" / "shapes"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config fields of what some models do to logits after the head."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Module:
    """One module that holds parameters or buffers. A linear layer's weight is [out_features, in_features]; a norm's
    has out_features elements; `layer` is the decoder layer that it belongs to, None outside of them."""

    name: str
    kind: Literal["embedding", "linear", "norm", "buffer"]
    out_features: int
    in_features: int = 1
    bias: bool = False
    layer: int | None = None

    @property
    def weight_elements(self) -> int:
        return 0 if self.kind == "buffer" else self.out_features * self.in_features

    @property
    def parameters(self) -> int:
        return self.weight_elements + (self.out_features if self.bias else 0)


@dataclass(frozen=True)
class Shape:
    """A decoder-only language model. `head` names the module that makes the logits; `tied`: its weight is the
    embedding's. `known`: one of FAMILIES, so that its layers compute what memory.py counts."""

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    head: str
    modules: tuple[Module, ...]
    known: bool

    @cached_property
    def parameters(self) -> int:
        """All parameters, a tied weight once."""
        return sum(module.parameters for module in self.modules if not (self.tied and module.name == self.head))

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qk_norms(self) -> bool:
        """Whether queries and keys are normed by head, as Qwen3's are."""
        return any(module.name.endswith(".q_norm") for module in self.modules)

    def layer_modules(self, layer: int | None) -> Iterator[Module]:
        """The modules of one decoder layer; of None, those outside of all layers."""
        return (module for module in self.modules if module.layer == layer)

    def targets(self, names: Sequence[str], layers: Sequence[int] = ()) -> tuple[Module, ...]:
        """The linear modules that get LoRA: `all-linear` is every one but the head, as in PEFT; else by name, or whose
        whole name a regular expression matches; of some layers only where `layers` are given.

        Raises InputRefused where a name matches none, or a layer isn't there, listing what there is.
        """
        linears = [module for module in self.modules if module.kind == "linear"]
        if layers and max(layers) >= self.num_layers:
            raise InputRefused(
                f"layers_to_transform: found {max(layers)}, need layers of {self.name}: 0 to {self.num_layers - 1}",
                "correct --layers-to-transform",
            )
        there = [module for module in linears if not layers or module.layer in layers]
        if tuple(names) == ("all-linear",):
            return tuple(module for module in there if module.name != self.head)
        for name in names:
            if not any(is_called(module.name, name) for module in there):
                there_are = sorted({module.name.rpartition(".")[2] for module in linears if module.name != self.head})
                raise InputRefused(
                    f"target_modules: found {name!r}, which matches no linear layer of {self.name}; "
                    f"need some of {', '.join(there_are)}",
                    "correct --target-modules, or leave it out: all-linear",
                )
        found = tuple(module for module in there if any(is_called(module.name, name) for name in names))
        if self.tied and any(module.name == self.head for module in found):
            raise InputRefused(
                f"target_modules: found {self.head}, whose weight is the embedding's too; need layers of their own",
                "leave it out of --target-modules",
            )
        return found


def is_called(module: str, name: str) -> bool:
    """Whether a name of --target-modules means a module: its own name, the end of it, or a regular expression."""
    from lorakit.core.config import is_pattern  # pydantic would take longer than all that Tab asks of this room

    if is_pattern(name):
        return re.fullmatch(name, module) is not None
    return module == name or module.endswith(f".{name}")


def built_in() -> dict[str, dict[str, Any]]:
    """Every built-in config by its short name; `ids` lists the hub ids that it stands for."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(_FOLDER.glob("*.json")):
        found |= json.loads(path.read_bytes())
    return found


def config_of(name: str) -> dict[str, Any]:
    """The config of a model: a folder's, a built-in one by short name or hub id, or the Hub's (config.json only).

    Raises InputRefused, HubFailed.
    """
    if not Path(name).exists():
        for short, config in built_in().items():
            if name.lower() in (short, *(hub_id.lower() for hub_id in config["ids"])):
                return config
    try:
        folder = config_folder(name)
    except (HubFailed, InputRefused) as error:
        near = difflib.get_close_matches(name.lower(), built_in(), n=1)
        raise type(error)(error.message, f"did you mean {near[0]}?" if near else error.hint) from None
    return read_json_object(folder / "config.json", "a model folder has a config.json")


def shape_of(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape of a model of FAMILIES. Raises InputRefused: a mixture of experts, or a config that lacks fields."""
    refuse_uncounted(name, config)
    family = config.get("model_type")
    more = [field for field in ("num_key_value_heads", "head_dim") if config.get(field) is not None]
    lacking = [field for field in (*_SIZES, *more) if not _is_size(config.get(field))]
    if not lacking and config["num_attention_heads"] % (config.get("num_key_value_heads") or 1):
        lacking = ["num_key_value_heads that divide num_attention_heads"]
    if family not in FAMILIES or lacking:
        found = f"a config without {', '.join(lacking)} (as whole numbers)" if lacking else f"the model type {family!r}"
        raise InputRefused(
            f"{name}: found {found}, need the config.json of a causal language model ({', '.join(FAMILIES)})",
            "give the model's own folder or hub id",
        )
    heads = int(config["num_attention_heads"])
    usual_head_dim = 128 if family == "qwen3" else int(config["hidden_size"]) // heads
    sizes: dict[str, int] = {
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_layers": int(config["num_hidden_layers"]),
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or usual_head_dim),
        "vocab_size": int(config["vocab_size"]),
    }
    modules = tuple(_modules(family, config, sizes))
    tied = config.get("tie_word_embeddings") is True
    return Shape(name, str(family), **sizes, tied=tied, head="lm_head", modules=modules, known=True)


def refuse_uncounted(name: str, config: Mapping[str, Any]) -> None:
    """Raises InputRefused where a config is of what isn't counted: a mixture of experts, weights that are quantized
    already, images, logits that are changed after the head (all of them exist at once), layers without end."""
    others = {
        "quantization_config": "weights that are quantized already",
        "vision_config": "images beside text",
        **dict.fromkeys(CHANGES_LOGITS, "logits that are scaled or soft-capped"),
    }
    if (found := next((words for field, words in others.items() if config.get(field)), None)) is not None:
        raise InputRefused(
            f"{name}: found {found} ({config.get('model_type')}), need a plain 16-bit language model",
            "choose the 16- or 32-bit base of a model of the Llama family",
        )
    experts = next((config[field] for field in _EXPERTS if config.get(field)), None)
    if experts is not None:
        raise InputRefused(
            f"{name}: found a mixture of {experts} experts ({config.get('model_type')}), need a dense model",
            "choose a dense model: memory of mixtures isn't counted yet",
        )
    for field in NUM_LAYERS:
        if isinstance(config.get(field), int) and config[field] > _MAX_LAYERS:
            raise InputRefused(
                f"{name}: found {field} = {config[field]}, need at most {_MAX_LAYERS:,}",
                "give the model's own folder or hub id",
            )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**40


def _modules(family: str, config: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[Module]:
    """The modules in the order of transformers' own `named_modules`."""
    h, i, v, d = (sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = sizes["num_heads"] * d, sizes["num_kv_heads"] * d
    bias = bool(config.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    qkv_bias = bias or family == "qwen2"
    mlp_bias = family == "llama" and bool(config.get("mlp_bias", False))
    yield Module("model.embed_tokens", "embedding", v, h)
    for layer in range(sizes["num_layers"]):
        at = f"model.layers.{layer}"
        yield Module(f"{at}.self_attn.q_proj", "linear", q, h, qkv_bias, layer)
        yield Module(f"{at}.self_attn.k_proj", "linear", kv, h, qkv_bias, layer)
        yield Module(f"{at}.self_attn.v_proj", "linear", kv, h, qkv_bias, layer)
        yield Module(f"{at}.self_attn.o_proj", "linear", h, q, bias, layer)
        if family == "qwen3":
            yield Module(f"{at}.self_attn.q_norm", "norm", d, layer=layer)
            yield Module(f"{at}.self_attn.k_norm", "norm", d, layer=layer)
        yield Module(f"{at}.mlp.gate_proj", "linear", i, h, mlp_bias, layer)
        yield Module(f"{at}.mlp.up_proj", "linear", i, h, mlp_bias, layer)
        yield Module(f"{at}.mlp.down_proj", "linear", h, i, mlp_bias, layer)
        yield Module(f"{at}.input_layernorm", "norm", h, layer=layer)
        yield Module(f"{at}.post_attention_layernorm", "norm", h, layer=layer)
    yield Module("model.norm", "norm", h)
    yield Module("model.rotary_emb", "buffer", d // 2)
    yield Module("lm_head", "linear", v, h)
