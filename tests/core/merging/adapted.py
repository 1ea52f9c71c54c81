"""Adapters of every kind, made by peft itself with random numbers, and what peft makes of them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LISTED: Mapping[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "rank 1": {"target_modules": "all-linear", "r": 1, "lora_alpha": 3},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"k_proj": 5, "model.layers.0.mlp.down_proj": 1},
    },
    "patterns and rslora": {"target_modules": "all-linear", "rank_pattern": {"v_proj": 9}, "use_rslora": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 319, 7]},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]},
    },
    "longer vocabulary": {"target_modules": ["q_proj"], "resized": 331},
    "longer vocabulary, saved": {
        "target_modules": ["q_proj"],
        "resized": 331,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "longer vocabulary and LoRA on it": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "resized": 331},
    "longer vocabulary and tokens": {"target_modules": ["q_proj"], "resized": 331, "trainable_token_indices": [1, 325]},
    "shorter vocabulary": {"target_modules": ["q_proj"], "resized": 300},
    "bias": {"target_modules": "all-linear", "bias": "all"},
    "bias of LoRA's": {"target_modules": ["q_proj"], "lora_bias": True},
}
"""What peft is asked for; `resized` is the vocabulary that the base is given before."""

BIASED = ("bias", "bias of LoRA's")
"""Which of them need a base that has biases."""

TIED: Mapping[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied LoRA": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding, saved head": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "head, saved embedding": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    "longer vocabulary, saved head": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
        "resized": 331,
    },
    "saved and tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 319, 7]},
    "longer vocabulary": {"target_modules": ["q_proj"], "resized": 331},
    "longer vocabulary and LoRA on it": {"target_modules": ["embed_tokens"], "resized": 331},
    "longer vocabulary and tokens": {"target_modules": ["q_proj"], "resized": 331, "trainable_token_indices": [1, 325]},
}
"""The same over a base whose head is its embedding."""
STAY_TIED = ("plain", "tied LoRA", "saved and tied", "tokens", "longer vocabulary", "longer vocabulary and tokens")


def make_adapter(folder: Path, base: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter made by peft alone, all that it trains drawn at random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    resized = given.pop("resized", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if resized is not None:
            model.resize_token_embeddings(resized, mean_resizing=False)
        adapted = get_peft_model(model, LoraConfig(**given))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
                seed += 1
        adapted.save_pretrained(folder, save_embedding_layers="auto" if resized is None else True)
    return folder


def adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Base + adapter by peft."""
    import json

    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        rows = {
            t.shape[0]
            for n, t in load_file(adapter / "adapter_model.safetensors").items()
            if n.endswith(("embed_tokens.weight", "embed_tokens.base_layer.weight"))
        }
        rows |= {
            t.shape[0]
            for n, t in load_file(adapter / "adapter_model.safetensors").items()
            if n.endswith("embed_tokens.token_adapter.base_layer.weight")
        }
        if rows:
            model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        json.loads((adapter / "adapter_config.json").read_text())
        return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 300)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found
