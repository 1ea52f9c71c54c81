"""The base and its LoRA: what is trained and how it begins, what quantization keeps, what a layer holds."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.core.config import LoraKindSection, LoraSection
from lorakit.core.errors import InputRefused
from lorakit.core.model import (
    add_lora,
    autocast,
    checkpoint_activations,
    compile_layers,
    grow,
    load_base,
    make_ready,
    trained_names,
    trained_parameters,
)
from lorakit.core.weights import open_weights
from tests.conftest import make_llama
from tests.live import LiveBytes

Wrap = Callable[..., PeftModel]
INNER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


def base_of(folder: Path, dtype: torch.dtype = torch.float32, quantize: str = "none", **given: Any) -> Any:
    return load_base(open_weights(folder), dtype, CPU, quantize, **given)


@pytest.fixture
def wrap(tiny_llama: Path) -> Wrap:
    """The tiny base with LoRA: wrap(rank=4, use_dora=True, …)."""

    def make(
        folder: Path = tiny_llama, dtype: torch.dtype = torch.float32, quantize: str = "none", **given: Any
    ) -> Any:
        kind = LoraKindSection(
            **{name: given.pop(name) for name in list(given) if name in LoraKindSection.model_fields}
        )
        new_tokens = given.pop("new_tokens", ())
        return add_lora(base_of(folder, dtype, quantize), LoraSection(**given), 0, "tiny", kind, new_tokens)

    return make


def adapted(model: PeftModel) -> set[str]:
    """Layer and name of each module that got LoRA: 0.q_proj; of one outside of the layers its name."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parts = name.split(".")
            found.add(".".join([*(part for part in parts if part.isdigit()), parts[-1]]))
    return found


def lora_layer(model: PeftModel, ending: str) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(ending))


# Which modules, and how


@pytest.mark.parametrize(
    ("given", "layers", "names"),
    [
        ({}, (0, 1), INNER),
        ({"target_modules": ("q_proj", "down_proj")}, (0, 1), ("q_proj", "down_proj")),
        ({"target_modules": "self_attn.v_proj"}, (0, 1), ("v_proj",)),
        ({"target_modules": r".*\.mlp\.(up|down)_proj"}, (0, 1), ("up_proj", "down_proj")),
        ({"target_modules": r"model\.layers\.1\..*_proj"}, (1,), INNER),
        ({"layers_to_transform": (1,)}, (1,), INNER),
        ({"layers_to_transform": (0,), "target_modules": ("q_proj", "up_proj")}, (0,), ("q_proj", "up_proj")),
        ({"layers_to_transform": (1,), "target_modules": r".*\.[qk]_proj"}, (1,), ("q_proj", "k_proj")),
    ],
    ids=str,
)
def test_lora_is_on_the_modules_that_were_named(
    given: dict[str, Any], layers: tuple[int, ...], names: tuple[str, ...], wrap: Wrap
) -> None:
    assert adapted(wrap(**given)) == {f"{layer}.{name}" for layer in layers for name in names}


@pytest.mark.parametrize("given", [{"target_modules": ("q_proj", "lm_head")}, {"target_modules": r"lm_head|.*q_proj"}])
def test_the_head_can_be_named_where_its_weight_is_its_own(given: dict[str, Any], wrap: Wrap, tied_llama: Path) -> None:
    assert adapted(wrap(**given)) == {"0.q_proj", "1.q_proj", "lm_head"}
    with pytest.raises(InputRefused, match="whose weight is the embedding's too"):
        wrap(tied_llama, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"target_modules": "qproj"},
            "found 'qproj', which matches no linear layer; need some of down_proj, gate_proj",
        ),
        ({"target_modules": ("q_proj", "norm")}, "found 'norm', which matches no linear layer"),
        ({"target_modules": r".*\.query"}, "which matches no linear layer; need some of"),
        ({"target_modules": r"q_pro."}, "which matches no linear layer"),  # a pattern is for whole names
        ({"layers_to_transform": (1,), "target_modules": r".*\.0\..*q_proj"}, "which matches no linear layer"),
        ({"layers_to_transform": (1,), "target_modules": ("q_proj", "lm_head")}, "'lm_head', which matches no linear"),
        ({"layers_to_transform": (0, 2)}, "layers_to_transform: found 2, need layers 0 to 1"),
        ({"modules_to_save": ("head",)}, "modules_to_save: found 'head', which is no module; need some of .*lm_head"),
        ({"modules_to_save": ("act_fn",)}, "'act_fn', which has no parameters to train; need some of (?!act_fn).*norm"),
        ({"modules_to_save": ("norm", "rotary_emb")}, "found 'rotary_emb', which has no parameters"),
        ({"modules_to_save": ("layers",)}, "'layers', which holds the layers that LoRA is for; need some of down_proj"),
        ({"modules_to_save": ("model",)}, "found 'model', which holds the layers"),
        ({"modules_to_save": ("self_attn", "mlp")}, "found self_attn, mlp, which hold all that LoRA would be on"),
        ({"modules_to_save": ("self_attn",), "target_modules": "q_proj"}, "which hold all that LoRA would be on"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(given: dict[str, Any], words: str, wrap: Wrap) -> None:
    with pytest.raises(InputRefused, match=words):
        wrap(**given)


def test_lora_is_never_on_stacks_of_experts() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    attention = {f"{layer}.{side}_proj" for layer in (0, 1) for side in "qkvo"}
    for family, more in (("mixtral", {}), ("qwen3_moe", {"num_experts": 4, "num_key_value_heads": 2})):
        config = AutoConfig.for_model(family, vocab_size=96, **sizes, **more)
        model = add_lora(AutoModelForCausalLM.from_config(config), LoraSection(), 0, "tiny")
        assert adapted(model) == attention
        assert not model.peft_config["default"].target_parameters
    dense = {"num_experts": 4, "num_key_value_heads": 2, "mlp_only_layers": [0]}  # with layers named as experts were
    for names in (("gate_proj",), ("gate_proj", "up_proj"), ("all-linear",)):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", vocab_size=96, **sizes, **dense))
        with pytest.raises(InputRefused, match="found names that PEFT takes for experts"):
            add_lora(base, LoraSection(target_modules=names), 0, "tiny")


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 24 / 6), (True, 24 / math.sqrt(6))])
def test_rank_alpha_and_dropout_reach_the_layers(use_rslora: bool, scale: float, wrap: Wrap) -> None:
    model = wrap(rank=6, lora_alpha=24.0, lora_dropout=0.25, use_rslora=use_rslora)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (6, 24, 0.25, use_rslora)
    assert (config.task_type, config.bias, config.base_model_name_or_path) == ("CAUSAL_LM", "none", "tiny")
    layer = lora_layer(model, "layers.1.mlp.up_proj")
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((6, 64), (96, 6))
    assert layer.lora_dropout["default"].p == 0.25
    hidden_1H = torch.randn(1, 64)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        model.eval()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = hidden_1H @ layer.base_layer.weight.T + scale * hidden_1H @ a.T @ b.T
        torch.testing.assert_close(layer(hidden_1H), expected)


def test_a_fraction_of_alpha_stays_one(wrap: Wrap) -> None:
    assert wrap(lora_alpha=7.5).peft_config["default"].lora_alpha == 7.5
    assert isinstance(wrap(lora_alpha=8.0).peft_config["default"].lora_alpha, int)  # as peft's own files have it


def test_dora_learns_magnitudes_beside_directions(wrap: Wrap) -> None:
    """Liu et al. 2024: they begin as the lengths of the base's columns, so that the first step sees the base."""
    model = wrap(use_dora=True, target_modules="q_proj")
    assert model.peft_config["default"].use_dora
    found = {name: tensor for name, tensor in trained_parameters(model).items() if "magnitude" in name}
    assert len(found) == 2
    for name, magnitude in found.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        weight = model.get_base_model().model.layers[layer].self_attn.q_proj.base_layer.weight
        torch.testing.assert_close(magnitude.detach(), weight.norm(dim=1))


def test_nothing_is_trained_but_the_adapter_and_all_of_it_in_fp32(wrap: Wrap) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap(dtype=dtype, modules_to_save=("lm_head",))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all("lora_" in name or "modules_to_save" in name for name in trained)
        assert {parameter.dtype for parameter in trained_parameters(model).values()} == {torch.float32}
        frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
        assert frozen == {dtype}
        assert len(trained) == len(trained_parameters(model)) == 2 * 2 * 7 + 1


def test_a_begins_as_pefts_own_does_and_b_at_zero(wrap: Wrap) -> None:
    """The same law, uniform in ±1/√in, from a seed of each tensor's own."""
    tensors = {name: parameter.detach() for name, parameter in trained_parameters(wrap(rank=64)).items()}
    for name, tensor in tensors.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.95 * bound < float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    drawn = [tensor.flatten()[:32] for name, tensor in tensors.items() if "lora_A" in name]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


# Modules that are trained whole, and new tokens


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save_are_trained_whole_and_stay_tied(
    names: tuple[str, ...], tied: bool, wrap: Wrap, tied_llama: Path, tiny_llama: Path
) -> None:
    model = wrap(tied_llama if tied else tiny_llama, modules_to_save=names, target_modules="q_proj")
    model.train()
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    whole = {name: tensor for name, tensor in trained_parameters(model).items() if "lora_" not in name}
    assert len(whole) == (1 if tied else len(names))
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in whole.values():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    in_use = {
        name: module.modules_to_save["default"].weight if hasattr(module, "modules_to_save") else module.weight
        for name, module in (("embed_tokens", embedding), ("lm_head", head))
    }
    assert (in_use["embed_tokens"].data_ptr() == in_use["lm_head"].data_ptr()) is tied
    for name in names:
        assert any(in_use[name].data_ptr() == parameter.data_ptr() for parameter in whole.values())
    both = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    named = {name for name in trained_names(model) if "lora_" not in name}
    assert named == (both if tied else {name for name in both if name.split(".")[-2] in names})


def test_a_whole_embedding_gives_the_bases_number_type(wrap: Wrap) -> None:
    model = wrap(dtype=torch.bfloat16, modules_to_save=("embed_tokens",))
    make_ready(model, torch.bfloat16, checkpointing=False)
    hidden = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].dtype))
    with autocast(CPU, torch.bfloat16):
        model(input_ids=torch.arange(8)[None])
    assert hidden == [torch.bfloat16]


@pytest.mark.parametrize("tied", [False, True])
def test_of_new_tokens_their_own_rows_are_learned(tied: bool, wrap: Wrap, tied_llama: Path, tiny_llama: Path) -> None:
    model = wrap(tied_llama if tied else tiny_llama, new_tokens=(300, 301), target_modules="q_proj")
    rows = {name: tensor for name, tensor in trained_parameters(model).items() if "lora_" not in name}
    assert {tuple(tensor.shape) for tensor in rows.values()} == {(2, 64)}
    assert len(rows) == (1 if tied else 2)
    ids = torch.tensor([[5, 300, 7, 301]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in rows.values())


@pytest.mark.parametrize(
    ("tied", "given", "left"),
    [
        (False, {"target_modules": ("q_proj", "lm_head")}, ["embed_tokens"]),  # LoRA learns all rows of the head
        (False, {"modules_to_save": ("lm_head",)}, ["embed_tokens"]),
        (False, {"modules_to_save": ("lm_head", "embed_tokens")}, []),
        (True, {"modules_to_save": ("norm",)}, ["embed_tokens"]),
        (True, {"modules_to_save": ("lm_head",)}, []),
        (True, {"modules_to_save": ("embed_tokens",)}, []),
    ],
    ids=str,
)
def test_new_tokens_are_learned_by_what_trains_their_rows_anyway(
    tied: bool, given: dict[str, Any], left: list[str], wrap: Wrap, tied_llama: Path, tiny_llama: Path
) -> None:
    """Each of embedding and head by its rows, whole, or by LoRA; what is given for the tokens changes after a step."""
    model = wrap(tied_llama if tied else tiny_llama, new_tokens=(300,), **given)
    rows = {name for name, _ in model.named_parameters() if "trainable_tokens_delta" in name}
    assert {part for name in rows for part in name.split(".") if part in ("embed_tokens", "lm_head")} == {*left}
    ids, base = torch.tensor([[300, 300, 300]]), model.get_base_model()

    def ends() -> list[Any]:
        with torch.no_grad():
            hidden = torch.ones(1, 64)
            return [
                base.get_input_embeddings()(ids[0, :1]).clone(),
                base.get_output_embeddings()(hidden)[0, 300].clone(),
            ]

    before = ends()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves no A of LoRA
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, ends(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_room_for_new_tokens_is_the_mean_of_the_old(tied: bool, tied_llama: Path, tiny_llama: Path) -> None:
    base = base_of(tied_llama if tied else tiny_llama)
    before = [module.weight.clone() for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    grow(base, 323)
    after = [module.weight for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    assert (after[0].data_ptr() == after[1].data_ptr()) is tied
    for old, new in zip(before, after, strict=True):
        assert new.shape == (323, 64)
        assert torch.equal(new[:320], old)
        torch.testing.assert_close(new[320:], old.mean(0).expand(3, -1))
        assert not new.requires_grad
    assert base.config.vocab_size == 323
    grow(base, 320)
    assert base.get_input_embeddings().weight.shape[0] == 323


# A quantized base


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_double_quantization_is_bitsandbytes_own(quantize: str, double_quantization: bool, tiny_llama: Path) -> None:
    base = base_of(tiny_llama, torch.float32, quantize, double_quantization=double_quantization)
    state = base.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == quantize
    assert state.nested is double_quantization
    scales = 64 * 96 // 64
    assert (state.absmax.dtype, state.absmax.numel()) == (
        torch.uint8 if double_quantization else torch.float32,
        scales,
    )
    assert state.dtype == torch.float32  # what it computes in


def test_the_threshold_of_int8_reaches_its_layers(tiny_llama: Path) -> None:
    for threshold in (0.0, 3.5):
        base = base_of(tiny_llama, torch.float32, "int8", int8_threshold=threshold)
        layer = base.model.layers[0].mlp.up_proj
        assert type(layer).__name__ == "Linear8bitLt"
        assert layer.state.threshold == threshold
        assert layer.weight.dtype == torch.int8
    assert type(base.lm_head) is torch.nn.Linear


def test_the_threshold_changes_what_large_inputs_give(tiny_llama: Path) -> None:
    """Columns that exceed it are multiplied unquantized: nearer to the exact product."""
    exact = base_of(tiny_llama).model.layers[0].mlp.up_proj
    torch.manual_seed(0)
    inputs = torch.randn(32, 64)
    inputs[:, 3] *= 40
    errors = {}
    for threshold in (0.0, 6.0):
        layer = base_of(tiny_llama, torch.float32, "int8", int8_threshold=threshold).model.layers[0].mlp.up_proj
        with torch.no_grad():
            errors[threshold] = float((layer(inputs.to(torch.float16)).float() - exact(inputs)).norm())
    assert errors[6.0] < 0.5 * errors[0.0]


# What a training step needs


@pytest.mark.parametrize(("quantize", "reentrant"), [("none", False), ("int8", True), ("nf4", False)])
def test_the_kind_of_checkpointing_is_the_one_that_frees(quantize: str, reentrant: bool, wrap: Wrap) -> None:
    model = wrap(quantize=quantize)
    make_ready(model, torch.float32, checkpointing=True)
    for layer in model.get_base_model().model.layers:
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": reentrant}
    plain = wrap(quantize=quantize)
    make_ready(plain, torch.float32, checkpointing=False)
    assert not any(layer.gradient_checkpointing for layer in plain.get_base_model().model.layers)
    assert plain.training


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_checkpointing_leaves_each_layers_input_alone(quantize: str, wrap: Wrap) -> None:
    """Counted from outside: what is alive after a forward pass grows by one hidden state a layer, with LLM.int8 too."""
    model = wrap(quantize=quantize)
    base = model.get_base_model()
    checkpoint_activations(model)
    model.train()
    ids, all_layers = torch.zeros(2, 64, dtype=torch.int64), base.model.layers
    alive = []
    for layers in (1, 2):
        base.model.layers = all_layers[:layers]
        with LiveBytes() as counted:
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
            alive.append(counted.live)
        del hidden
    assert alive[1] - alive[0] == ids.numel() * base.config.hidden_size * 4


def test_compiling_is_of_each_decoder_layer(wrap: Wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = wrap(), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    compile_layers(model)
    assert compiled == list(model.get_base_model().model.layers)
