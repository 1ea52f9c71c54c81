"""Shapes: every built-in one against transformers' own model on the meta device and the count its makers published."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import shapes
from lorakit.core.errors import HubFailed, InputRefused
from lorakit.core.shapes import Shape, built_in, config_of, shape_of

# The parameters of the safetensors files on the Hub, a tied weight once.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


def shape(name: str) -> Shape:
    return shape_of(name, config_of(name))


def on_meta(config: dict[str, Any]) -> Any:
    """transformers' own model of a config, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("ids", "model_type")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_shape_has_the_parameters_that_were_published(name: str) -> None:
    assert shape(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", built_in())
def test_a_built_in_shape_is_transformers_model(name: str) -> None:
    """Parameter by parameter, name by name, with two layers; every layer is alike."""
    config = {**built_in()[name], "num_hidden_layers": 2}
    model, ours = on_meta(config), shape_of(name, config)
    theirs = {key: tuple(parameter.shape) for key, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[int, ...]] = {}
    for module in ours.modules:
        if module.kind != "buffer":
            one = (module.out_features,) if module.kind == "norm" else (module.out_features, module.in_features)
            found[f"{module.name}.weight"] = one
        if module.bias:
            found[f"{module.name}.bias"] = (module.out_features,)
    assert found == theirs
    assert ours.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert ours.tied is (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert model.get_output_embeddings() is model.get_submodule(ours.head)
    buffers = {key.rpartition(".")[0] for key, _ in model.named_buffers()}
    assert buffers == {module.name for module in ours.modules if module.kind == "buffer"}


@pytest.mark.parametrize("field", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 8}])
def test_rarer_fields_of_a_config_count(field: dict[str, Any]) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = {"model_type": "llama", **sizes, "num_attention_heads": 4, **field}
    assert shape_of("m", config).parameters == on_meta(config).num_parameters()


def test_a_short_name_and_each_hub_id_are_the_same_model() -> None:
    for short, config in built_in().items():
        assert all(config_of(name) == config for name in (short, short.upper(), *config["ids"]))


def test_a_folder_beats_a_built_in_name(tmp_path: Path) -> None:
    (tmp_path / "llama-7b").mkdir()
    own = {**config_of("smollm2-135m"), "num_hidden_layers": 3}
    (tmp_path / "llama-7b" / "config.json").write_text(json.dumps(own))
    assert config_of("llama-7b") == own


def test_only_the_config_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(name: str, **how: Any) -> str:
        asked.append((name, how["allow_patterns"]))
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert config_of("owner/unknown-7b") == {"model_type": "llama"}
    assert asked == [("owner/unknown-7b", ["config.json"])]


def test_an_unknown_model_offline_is_told_so() -> None:
    with pytest.raises(HubFailed, match="owner/unknown-7b: found no such folder and no answer of the Hub"):
        config_of("owner/unknown-7b")


def test_all_linear_layers_but_the_head_get_lora() -> None:
    llama = shape("llama-7b")
    assert len(llama.targets(["all-linear"])) == 7 * 32
    names = {module.name for module in llama.targets(["q_proj", "model.layers.3.mlp.down_proj"])}
    assert names == {f"model.layers.{layer}.self_attn.q_proj" for layer in range(32)} | {"model.layers.3.mlp.down_proj"}
    assert [module.name for module in llama.targets(["lm_head"])] == ["lm_head"]
    with pytest.raises(InputRefused, match=r"found 'query', .+ of llama-7b; need some of down_proj"):
        llama.targets(["query"])


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        ((r".*\.mlp\.(up|down)_proj",), ()),
        ((r"model\.layers\.1\..*_proj",), ()),
        (("all-linear",), (1,)),
        (("q_proj", "down_proj"), (0,)),
        ((r".*\.[qk]_proj",), (1,)),
        (("mlp.up_proj", "lm_head"), ()),
    ],
    ids=str,
)
def test_planned_targets_are_those_that_get_lora(names: tuple[str, ...], layers: tuple[int, ...]) -> None:
    """Counted from a config, and made by peft on the model itself."""
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorakit.core.config import LoraSection
    from lorakit.core.model import add_lora

    config = {**config_of("smollm2-135m"), "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 99}
    planned = {module.name for module in shape_of("two layers", config).targets(names, layers)}
    fields = {key: value for key, value in config.items() if key not in ("ids", "model_type")}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    model = add_lora(base, LoraSection(target_modules=names, layers_to_transform=layers), 0, "m")
    prefix = "base_model.model."
    made = {name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert planned == made


def test_layers_that_arent_there_get_no_lora() -> None:
    llama = shape("llama-7b")
    assert {module.layer for module in llama.targets(["all-linear"], [0, 31])} == {0, 31}
    with pytest.raises(InputRefused, match="layers_to_transform: found 32, need layers of llama-7b: 0 to 31"):
        llama.targets(["all-linear"], [0, 32])
    with pytest.raises(InputRefused, match="found 'lm_head', which matches no linear layer"):
        llama.targets(["lm_head"], [3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None, "vocab_size": 0}, "found a config without vocab_size, hidden_size"),
        ({"num_hidden_layers": 10**9}, "found num_hidden_layers = 1000000000, need at most 10,000"),
        ({"num_attention_heads": "32"}, "found a config without num_attention_heads"),
        ({"model_type": "gpt2"}, "found the model type 'gpt2'"),
        ({"model_type": None}, "found the model type None"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "found a mixture of 8 experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "found a mixture of 128 experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "found a mixture of 256 experts"),
    ],
)
def test_a_config_that_cant_be_counted_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputRefused, match=f"m: {words}"):
        shape_of("m", {**config_of("llama-7b"), **change})


def test_shape_files_hold_nothing_that_isnt_asked_for() -> None:
    """Every field is one of the model's own config class, and no id stands for two shapes."""
    from transformers import AutoConfig

    ids = [hub_id for config in built_in().values() for hub_id in config["ids"]]
    assert len(ids) == len(set(ids))
    for config in built_in().values():
        known = AutoConfig.for_model(config["model_type"]).to_dict()
        assert set(config) - {"ids"} <= set(known)
        assert config["model_type"] in shapes.FAMILIES


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"vocab_size": 320, "num_key_value_heads": 2, "intermediate_size": 96}),
        ("gemma3_text", {"vocab_size": 320, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16}),
        ("gpt2", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("gpt_neox", {"vocab_size": 320, "intermediate_size": 96}),
        ("olmo2", {"vocab_size": 320, "num_key_value_heads": 2, "intermediate_size": 96}),
    ],
)
def test_other_models_are_laid_out_by_transformers(model_type: str, fields: dict[str, Any]) -> None:
    from lorakit.core.model import meta_shape

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **fields}
    config = {"model_type": model_type, **sizes}
    found, model = meta_shape("m", config), on_meta(config)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.num_layers, found.hidden_size, found.vocab_size, found.known) == (2, 64, 320, False)
    owners = {key.rpartition(".")[0] for key in [*dict(model.named_parameters()), *dict(model.named_buffers())]}
    assert owners - {module.name for module in found.modules} == set()
    if model_type == "llama":
        ours = shape_of("m", config)
        assert set(found.modules) == set(ours.modules) - set(ours.layer_modules(None)) | set(found.layer_modules(None))


@pytest.mark.parametrize("model_type", ["no_such_model", "bert", "None", "clip"])
def test_what_transformers_cant_lay_out_as_a_language_model_is_refused(model_type: str) -> None:
    from lorakit.core.model import meta_shape

    with pytest.raises(InputRefused, match=f"m: found the model type '{model_type}', which transformers can't lay out"):
        meta_shape("m", {"model_type": model_type, "num_hidden_layers": 1, "hidden_size": 64})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma2"}, "logits that are scaled or soft-capped"),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits that are scaled or soft-capped"),
        ({"model_type": "mixtral"}, "a mixture of 8 experts"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "images beside text"),
        ({"model_type": "olmo2", "hidden_size": "64"}, "can't lay out"),
        ({"model_type": "olmo2", "num_hidden_layers": 10**9}, "need at most 10,000"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "need at most 10,000"),
        ({"model_type": "olmo2", "num_attention_heads": 0}, "can't lay out"),
        ({"model_type": "olmo2", "num_hidden_layers": 0}, "can't lay out"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_what_isnt_counted_is_refused_also_where_the_class_decides(config: dict[str, Any], words: str) -> None:
    from lorakit.core.model import meta_shape

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    with pytest.raises(InputRefused, match=words):
        meta_shape("m", {**sizes, **config})


@pytest.mark.parametrize(
    "change",
    [
        *({"num_key_value_heads": "4"}, {"num_key_value_heads": -4}, {"num_key_value_heads": 3}),
        *({"head_dim": [64]}, {"head_dim": -64}, {"vocab_size": 10**400}),
        {"quantization_config": {"quant_method": "gptq"}},
    ],
    ids=str,
)
def test_odd_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputRefused):
        shape_of("m", {**config_of("llama-7b"), **change})


def test_a_tied_head_gets_no_lora() -> None:
    """As train refuses it: its weight is the embedding's."""
    with pytest.raises(InputRefused, match="whose weight is the embedding's too"):
        shape_of("m", config_of("llama-3.2-1b")).targets(("lm_head",))
    assert shape_of("m", config_of("llama-7b")).targets(("lm_head",))


def test_a_tie_that_is_text_is_none() -> None:
    assert not shape_of("m", {**config_of("llama-7b"), "tie_word_embeddings": "false"}).tied


@pytest.mark.parametrize(
    ("typed", "meant"), [("lama-65b", "llama-65b"), ("Llama65b", "llama-65b"), ("mistral-7b", "mistral-7b-v0.3")]
)
def test_a_name_that_nearly_is_one_is_asked_for(typed: str, meant: str) -> None:
    with pytest.raises(HubFailed) as caught:
        config_of(typed)
    assert caught.value.hint == f"did you mean {meant}?"


def test_a_name_that_is_near_to_none_has_the_hubs_hint() -> None:
    with pytest.raises(HubFailed) as caught:
        config_of("something/else-entirely")
    assert "did you mean" not in caught.value.hint
