"""The proof itself is proven: right implementations pass in every case, and each way to be wrong is found and named."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.core.attention import proving
from lorakit.core.attention.cases import Case, cases_of
from lorakit.core.attention.implementations import IMPLEMENTATIONS, shape_of
from lorakit.core.attention.proving import Proof, Row, best, prove
from lorakit.core.attention.trials import Bench
from lorakit.core.profiling import _Watched
from tests.core.attention.seed_attention import SeedAttention

CONFIG = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=3,
    vocab_size=50,
    num_attention_heads=8,
    num_key_value_heads=2,
)
WINDOWED = transformers.MistralConfig(
    **{"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50, "sliding_window": 20},
    **{"num_attention_heads": 8, "num_key_value_heads": 2},
)
CPU = torch.device("cpu")
HERE = ("varlen", "sdpa", "eager")


def proof_of(config: Any = CONFIG, dtype: torch.dtype = torch.float32, **more: Any) -> Proof:
    return prove(config, dtype, CPU, 128, 2, lambda event: None, **more)


def wrong(proof: Proof) -> list[Row]:
    return [row for row in proof.rows if not row.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["causal", "windowed"])
def test_every_implementation_is_right_in_every_case(config: Any, dtype: torch.dtype) -> None:
    proof = proof_of(config, dtype)
    assert not wrong(proof)
    ran = {(row.backend, row.case) for row in proof.rows}
    left_out = {(one.backend, one.case) for one in proof.skipped}
    names = {case.name for case in cases_of(shape_of(config), 128)}
    assert {(name, case) for name in HERE for case in names} <= ran
    assert {(name, case) for name in IMPLEMENTATIONS for case in names} <= ran | left_out
    assert all(one.reason for one in proof.skipped)
    whole = {f"whole model, {what}" for what in ("packed", "all-ones mask", "cached")}
    assert {(name, case) for name in HERE for case in whole} <= ran
    assert all(row.rms_ratio <= 2 and row.max_ratio <= 6 for row in proof.rows)
    assert proof.implementation in HERE


def test_a_proof_is_json() -> None:
    rows = [asdict(row) for row in proof_of(only=("packed",)).rows]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


# Ways to be wrong


@contextmanager
def replaced(interface: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = interface._global_mapping[name]
    interface.register(name, function)
    try:
        yield
    finally:
        interface.register(name, original)


def only(proof: Proof, name: str, case: str) -> Row:
    [row] = [row for row in proof.rows if (row.backend, row.case) == (name, case)]
    return row


def test_forced_to_math_is_a_failure_with_its_reason() -> None:
    with sdpa_kernel([SDPBackend.MATH]):
        proof = proof_of()
    row = only(proof, "sdpa", "causal")
    assert not row.ok
    assert "fell back to math: every other kernel is turned off" in row.reason
    assert proof.implementation == "eager", "the only one that is what it says"


def test_a_mask_that_leaks_is_a_failure() -> None:
    def leaking(*sizes: Any, **more: Any) -> Any:
        return sdpa_mask(*sizes, **{**more, "mask_function": transformers.masking_utils.causal_mask_function})

    with replaced(AttentionMaskInterface, "sdpa", leaking):
        proof = proof_of()
    row = only(proof, "sdpa", "packed")
    assert not row.ok
    assert "the mask leaks" in row.reason
    assert only(proof, "sdpa", "causal").ok
    assert only(proof, "varlen", "packed").ok


def test_key_heads_that_serve_the_wrong_queries_are_a_failure() -> None:
    def broken(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        module = torch.nn.Module()
        module.is_causal = True  # type: ignore[assignment]
        return sdpa_attention_forward(
            module, query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), mask, scaling=more["scaling"]
        )

    with replaced(AttentionInterface, "sdpa", broken):
        row = only(proof_of(), "sdpa", "GQA")
    assert not row.ok
    assert "query heads [0, 2, 4, 6] follow the first key head" in row.reason


def test_an_error_of_one_percent_is_a_failure() -> None:
    def imprecise(module: Any, query: Any, *states: Any, **more: Any) -> Any:
        return sdpa_attention_forward(module, query * 1.01, *states, **more)

    with replaced(AttentionInterface, "sdpa", imprecise):
        row = only(proof_of(only=("causal",)), "sdpa", "causal")
    assert not row.ok
    assert "times eager's error" in row.reason


def test_a_wrong_gradient_is_a_failure_though_the_output_is_right() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return gradient / 2

    def wrong_backward(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        return sdpa_attention_forward(module, query, key, Halved.apply(value), *rest, **more)

    with replaced(AttentionInterface, "sdpa", wrong_backward):
        assert not only(proof_of(only=("packed",)), "sdpa", "packed").ok


def test_not_a_number_is_a_failure_and_still_json() -> None:
    def broken(module: Any, query: Any, *states: Any, **more: Any) -> Any:
        return sdpa_attention_forward(module, query * torch.nan, *states, **more)

    with replaced(AttentionInterface, "sdpa", broken):
        row = only(proof_of(only=("causal",)), "sdpa", "causal")
    assert not row.ok
    assert "NaN or infinity" in row.reason
    json.dumps(asdict(row), allow_nan=False)


def test_a_reference_implementation_that_is_wrong_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is judged beside eager's error: so eager's own has to be one of rounding."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.eager_attention_forward

    def broken(module: Any, query: Any, *states: Any, **more: Any) -> Any:
        return original(module, query * 1.1, *states, **more)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", broken)
    row = only(proof_of(only=("causal",)), "eager", "causal")
    assert not row.ok
    assert "away from float64" in row.reason


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*given: Any, **more: Any) -> Any:
        raise error

    return fail


def test_what_breaks_is_a_failure_and_what_cant_be_had_is_left_out() -> None:
    with replaced(AttentionInterface, "sdpa", failing(IndexError("no kernel for this card"))):
        row = only(proof_of(only=("causal",)), "sdpa", "causal")
    assert (row.ok, row.reason) == (False, "fails: no kernel for this card")
    with replaced(AttentionInterface, "sdpa", failing(torch.OutOfMemoryError("CUDA out of memory"))):
        proof = proof_of(only=("causal",))
    assert ("sdpa", "CUDA out of memory") in [(one.backend, one.reason) for one in proof.skipped]


def test_where_eager_cant_run_rounding_alone_has_to_explain_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", failing(torch.OutOfMemoryError("out of memory")))
    assert only(proof_of(only=("causal",)), "sdpa", "causal").ok

    def wrong_scale(module: Any, query: Any, *states: Any, **more: Any) -> Any:
        return sdpa_attention_forward(module, query * 1.5, *states, **more)

    with replaced(AttentionInterface, "sdpa", wrong_scale):
        row = only(proof_of(only=("causal",)), "sdpa", "causal")
    assert not row.ok
    assert "away from float64" in row.reason


def made(backend: str, case: str, seconds: float, *, ok: bool = True) -> Row:
    return Row(case, backend, "", 0.0, 1.0, 1.0, seconds, None, 1.0, None, ok, "" if ok else "wrong", {})


def test_the_best_is_the_fastest_that_is_right_wherever_it_ran() -> None:
    rows = [made("varlen", "packed", 2.0), made("sdpa", "packed", 1.0), made("eager", "packed", 3.0)]
    assert best(rows, IMPLEMENTATIONS) == "sdpa"
    assert best([*rows, made("sdpa", "prefill, cached", 1.0, ok=False)], IMPLEMENTATIONS) == "varlen"
    checkpointed = [made(name, "packed, checkpointed", 1.0) for name in ("varlen", "eager")]
    assert best([*rows, *checkpointed], IMPLEMENTATIONS) == "varlen", "sdpa wasn't proven as training runs it"
    assert best([*rows, *checkpointed], ("eager",)) == "eager"
    assert best([made("eager", "causal", 1.0)], IMPLEMENTATIONS) is None


def test_a_checkpointed_case_computes_attention_twice_as_training_does() -> None:
    calls: list[bool] = []

    def counted(module: Any, *states: Any, **more: Any) -> Any:
        calls.append(module.training)
        return sdpa_attention_forward(module, *states, **more)

    with replaced(AttentionInterface, "sdpa", counted):
        proof_of(names=("sdpa",), only=("packed",), measured=False)
        once = len(calls)
        proof_of(names=("sdpa",), only=("packed, checkpointed",), measured=False)
    assert len(calls) - once == once + 1
    assert calls[0] is True


# A whole model


def whole(name: str, case: str, config: Any = CONFIG) -> Row:
    found = proving._whole_model(config, name, shape_of(config), CPU, packed_only=False)
    [row] = [row for row in found if row.case == f"whole model, {case}"]
    assert isinstance(row, Row)
    return row


def test_a_cache_that_is_lost_is_found() -> None:
    """Attention that forgets cached keys answers otherwise than without a cache."""

    def forgetful(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        if query.shape[2] < key.shape[2]:
            key, value, mask = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :], None
        return sdpa_attention_forward(module, query, key, value, mask, scaling=more["scaling"])

    with replaced(AttentionInterface, "sdpa", forgetful):
        row = whole("sdpa", "cached")
    assert (row.ok, row.reason) == (False, "the answer with a KV cache is another than without")


def test_an_all_ones_mask_beside_packed_positions_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = whole("sdpa", "all-ones mask")
    assert row.ok
    assert row.max_difference > 0.01
    assert "lorakit refuses it" in row.reason
    monkeypatch.setattr("lorakit.core.attention.miniature.guard", lambda model: None)
    assert not whole("sdpa", "all-ones mask").ok


def test_layers_that_hand_on_no_positions_are_found() -> None:
    """varlen would see one document: as GPTBigCode's layers do, where stock sdpa's mask keeps documents apart."""
    config = transformers.GPTBigCodeConfig(n_embd=64, n_head=4, n_layer=2, vocab_size=99)
    assert whole("sdpa", "packed", config).ok
    row = whole("varlen", "packed", config)
    assert not row.ok
    assert "documents change those after them" in row.reason


def test_what_mixes_documents_besides_attention_is_found() -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "head_dim": 16}
    config = transformers.MiniMaxConfig(**small, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    assert not any(whole(name, "packed", config).ok for name in HERE)


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
EXPERTS = [
    transformers.MixtralConfig(**SMALL, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8),
    transformers.Qwen3MoeConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_experts=16),
]


@pytest.mark.parametrize("config", EXPERTS, ids=lambda config: config.model_type)
def test_experts_that_round_by_the_number_of_tokens_are_no_leak(config: Any) -> None:
    """A little of the first token in what attention gives to all after it is one."""

    def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        output, weights = sdpa_attention_forward(module, query, key, value, mask, scaling=more["scaling"])
        return output + 1e-3 * value[:, :, 0].mean(), weights

    rows = [whole(name, "packed", config) for name in HERE]
    assert [row.reason for row in rows] == ["", "", ""]
    assert any(0 < row.max_difference < 1e-5 for row in rows)  # what an exact comparison would take for a leak
    with replaced(AttentionInterface, "sdpa", leaking):
        row = whole("sdpa", "packed", config)
    assert (row.ok, "documents change those after them" in row.reason) == (False, True)


# The old recipe


def test_the_old_recipes_three_defects_beside_lorakits_rows() -> None:
    """Measured at 256 tokens of a 32-head layer: bytes of the mask that turns flash off on a GPU, tokens in the cache
    after a step, bytes of buffers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=32, num_key_value_heads=32, vocab_size=50)
    length, hidden = 256, torch.randn(1, 256, 512)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    recipe = SeedAttention(512, 32, with_flash=True)
    with _Watched() as by_recipe:
        _, past = recipe(hidden, None, mask)
    bench = Bench(config, shape_of(config), torch.float32, CPU, 1, measured=False)
    inputs = bench.reference(Case("causal", length))
    with _Watched() as by_lorakit:
        bench.call("sdpa", Case("causal", length), inputs)([inputs.q_BHTD, inputs.k_BKSD, inputs.v_BKSD])
    cache = transformers.DynamicCache()
    cache.update(inputs.k_BKSD, inputs.v_BKSD, 0)

    def row(calls: Any, cached: int, module: torch.nn.Module) -> tuple[int, bool, int, int]:
        [(_, named)] = calls
        mask_bytes = 0 if named.get("attn_mask") is None else named["attn_mask"].nbytes
        buffers = sum(buffer.nbytes for buffer in module.buffers())
        return mask_bytes, bool(named.get("is_causal")), cached, buffers

    without_flash = SeedAttention(512, 32, with_flash=False)
    rows = {
        "recipe": row(by_recipe.calls, 0 if past is None else past[0].shape[2], without_flash),
        "lorakit": row(by_lorakit.calls, cache.get_seq_length(), bench.module),
    }
    assert rows == {"recipe": (length**2 * 4, False, 0, 512**2 * 4), "lorakit": (0, True, length, 0)}
