"""A decoder layer by the fast engine beside transformers and PEFT: every family, logits and gradients of LoRA."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.core.attention import apply
from lorakit.core.fast import layers
from lorakit.core.fast.engine import make_fast
from lorakit.core.fast.layers import Linears
from lorakit.core.fast.storage import FrozenLinear
from lorakit.core.model import checkpoint_activations
from lorakit.core.quantization import Quantizing, quantized

SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def rope(kind: str, **more: Any) -> Mapping[str, Any]:
    """Another way to turn queries and keys."""
    return {"rope_parameters": {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **more}}


FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, every head its own keys": ("llama", {"num_key_value_heads": 4}),
    "llama 3.1": (
        "llama",
        rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama, linear": ("llama", rope("linear")),
    "llama, dynamic": ("llama", {**rope("dynamic"), "max_position_embeddings": 12}),
    "llama, yarn": ("llama", rope("yarn", original_max_position_embeddings=32)),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", WINDOW),
    "qwen2.5, yarn": ("qwen2", rope("yarn", original_max_position_embeddings=32)),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, window": ("qwen3", {"head_dim": 32, **WINDOW}),
    "qwen3, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "widths no tile divides": ("llama", {"hidden_size": 72, "intermediate_size": 104, "num_key_value_heads": 1}),
}


def base_of(family: str, quantize: str = "none", **more: Any) -> Any:
    """A frozen base; biases and norms aren't what they are at first, or a test couldn't see them left out."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **fields, **more}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head and quantize != "none":
            own = quantize in ("int8", "fp8")
            made = FrozenLinear(module, quantize) if own else quantized(module, Quantizing(quantize, torch.float32))
            model.set_submodule(name, made)
    model.config.use_cache = False
    return model.requires_grad_(False)


def with_lora(base: Any, **more: Any) -> Any:
    fields = {"r": 5, "lora_alpha": 15, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(base, LoraConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model.train()


LENGTHS = (20, 9, 3)


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions of two rows of three documents."""
    ids = torch.randint(0, 96, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return ids, torch.stack([positions, positions])


def seen(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of packed rows, and the gradients that some loss has."""
    apply(model.get_base_model(), "varlen")
    ids, positions = packed()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


Seen = tuple[torch.Tensor, dict[str, torch.Tensor]]


def require_equal(fast: Any, standard: Any) -> None:
    require_same(seen(fast), seen(standard))


def require_same(found: Seen, wanted: Seen, rel: float = 1e-5) -> None:
    """Logits and every gradient of LoRA, as far from each other as numbers are rounded."""
    (logits, gradients), (others, expected) = found, wanted
    assert (logits - others).norm() <= rel * others.norm()
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= rel * expected[name].norm(), name
        assert expected[name].any(), name


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_transformers_and_peft_compute_it(family: str, dtype: torch.dtype, rel: float) -> None:
    fast, standard = (with_lora(base_of(family)).to(dtype) for _ in range(2))
    make_fast(fast, "none")
    require_same(seen(fast), seen(standard), rel)


def alone(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same of each document by itself, by transformers' own attention: without blocks, positions or lorakit."""
    model.set_attn_implementation("eager")
    (ids, _), logits, at = packed(), [], 0
    for length in LENGTHS:
        logits.append(model(input_ids=ids[:, at : at + length], use_cache=False).logits)
        at += length
    whole = torch.cat(logits, 1)
    torch.nn.functional.cross_entropy(whole.flatten(0, 1), ids.flatten()).backward()
    return whole.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama, dynamic"])
def test_packed_documents_are_as_transformers_and_peft_compute_each_alone(family: str) -> None:
    """Not where angles depend on the longest document that is there, which is what `dynamic` means."""
    fast = with_lora(base_of(family))
    make_fast(fast, "none")
    require_same(seen(fast), alone(with_lora(base_of(family))), 2e-5)


@pytest.mark.parametrize(
    ("family", "like"),
    [
        *((family, "llama") for family in ("llama 3.1", "llama, linear", "llama, dynamic", "llama, yarn")),
        *((f"{family}, window", family) for family in ("mistral", "qwen2", "qwen3")),
        ("qwen2.5, yarn", "qwen2"),
    ],
)
def test_what_sets_a_family_apart_is_seen_in_what_it_computes(family: str, like: str) -> None:
    """Its weights are the other's here: else a test of it would be that of the other."""
    one, other = (with_lora(base_of(name)) for name in (family, like))
    for model in (one, other):
        make_fast(model, "none")
    assert not torch.allclose(seen(one)[0], seen(other)[0], atol=1e-3)


@pytest.mark.parametrize("quantize", ["int8", "fp8", "nf4", "fp4"])
def test_every_kind_of_base_is_as_its_own_layers_compute_it(quantize: str) -> None:
    fast = with_lora(base_of("qwen2", quantize))
    make_fast(fast, quantize)
    require_equal(fast, with_lora(base_of("qwen2", quantize)))


TARGETS: Mapping[str, Mapping[str, Any]] = {
    "some of a group": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "other ranks and scales": {"rank_pattern": {"k_proj": 17}, "alpha_pattern": {"up_proj": 3}},
    "rsLoRA": {"use_rslora": True, "r": 40},
}


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_may_be_anywhere_of_any_rank(targets: str) -> None:
    fast = with_lora(base_of("llama"), **TARGETS[targets])
    make_fast(fast, "none")
    require_equal(fast, with_lora(base_of("llama"), **TARGETS[targets]))


def test_activations_may_be_checkpointed() -> None:
    fast, standard = with_lora(base_of("llama")), with_lora(base_of("llama"))
    for model in (fast, standard):
        checkpoint_activations(model)
    make_fast(fast, "none")
    require_equal(fast, standard)


def test_documents_of_a_row_dont_see_each_other() -> None:
    model = with_lora(base_of("llama"))
    make_fast(model, "none")
    apply(model.get_base_model(), "varlen")
    ids, positions = packed()
    other = ids.clone()
    other[:, :20] = (other[:, :20] + 1) % 96
    with torch.no_grad():
        first, second = (model(input_ids=i, position_ids=positions, use_cache=False).logits for i in (ids, other))
    assert not torch.allclose(first[:, :20], second[:, :20])
    assert torch.equal(first[:, 20:], second[:, 20:])


def test_an_adapter_that_is_switched_off_is_not_there() -> None:
    model, base = with_lora(base_of("llama")), base_of("llama")
    make_fast(model, "none")
    ids, _ = packed()
    with torch.no_grad(), model.disable_adapter():
        found = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(found, base(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("quantize", ["none", "fp8", "nf4"])
def test_answers_are_those_of_the_standard_engine(quantize: str) -> None:
    """Token by token with a cache, which transformers' own code computes."""
    fast, standard = (with_lora(base_of("llama", quantize)).eval() for _ in range(2))
    make_fast(fast, quantize)
    ids, _ = packed()
    given = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(fast.generate(input_ids=ids, **given), standard.generate(input_ids=ids, **given))


def test_8_bit_products_of_a_layer_are_near_the_exact_ones() -> None:
    """As a GPU computes it, by the CPU's own arithmetic."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, size) for size in (64, 32, 32)]
    frozen = [FrozenLinear(layer, "fp8") for layer in layers]
    x = torch.randn(2, 9, 64)
    for exact, found in zip([layer(x) for layer in frozen], Linears(frozen, "fp8")(x), strict=True):
        error = (found - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.05  # x was rounded to 3 bits of fraction


def test_widths_that_8_bit_products_cant_have_are_computed_exactly() -> None:
    torch.manual_seed(0)
    frozen, x = FrozenLinear(torch.nn.Linear(24, 40), "fp8"), torch.randn(3, 24)
    assert torch.allclose(Linears([frozen], "fp8")(x)[0], frozen(x), atol=1e-6)


@pytest.mark.parametrize(("quantize", "products"), [("none", "exact"), ("fp8", "fp8"), ("int8", "int8")])
def test_all_layers_are_compiled_by_one_compilation(
    quantize: str, products: layers.Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a layer differs from the others in what torch.compile looks at, or each would take its minute; and
    answers and evaluations before and between steps leave room for the steps' own."""
    from torch._dynamo.utils import counters

    compiled = torch.compile(layers._compute, backend="aot_eager")
    monkeypatch.setattr(layers, "_compiled", lambda: compiled)
    model = with_lora(base_of("llama", quantize, num_hidden_layers=10))
    apply(model.get_base_model(), "sdpa")
    checkpoint_activations(model)
    for layer in model.get_base_model().model.layers:
        layers.speed_up(layer, products=products, compiled=True)
    torch._dynamo.reset()
    counters.clear()
    ids, _ = packed()
    model.eval()
    for length in (5, 9, 20):
        model.generate(input_ids=ids[:1, :length], max_new_tokens=3, do_sample=False, use_cache=True, pad_token_id=0)
    assert counters["stats"]["unique_graphs"] == 0  # answers are transformers' own code
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    model.train()
    for _ in range(2):
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] == 3  # without gradients, the first layer's input apart; with them
    assert not counters["graph_break"]
