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

from lorakit.core import proving
from lorakit.core.cases import Case, cases_of
from lorakit.core.implementations import IMPLEMENTATIONS, shape_of
from lorakit.core.profiling import _Watched
from lorakit.core.proving import Proof, Row, prove
from lorakit.core.trials import Bench
from tests.core.seed_attention import SeedAttention

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
    return prove(config, dtype, CPU, 64, 2, lambda event: None, **more)


def wrong(proof: Proof) -> list[Row]:
    return [row for row in proof.rows if not row.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["causal", "windowed"])
def test_every_implementation_is_right_in_every_case(config: Any, dtype: torch.dtype) -> None:
    proof = proof_of(config, dtype)
    assert not wrong(proof)
    ran = {(row.backend, row.case) for row in proof.rows}
    left_out = {(one.backend, one.case) for one in proof.skipped}
    names = {case.name for case in cases_of(shape_of(config), 64)}
    assert {(name, case) for name in HERE for case in names} <= ran
    assert {(name, case) for name in IMPLEMENTATIONS for case in names} <= ran | left_out
    assert all(one.reason for one in proof.skipped)
    assert {(name, "generation, cached") for name in HERE} <= ran
    judged = [row for row in proof.rows if row.case != "packed, all-ones mask"]
    assert all(row.rms_ratio <= 2 and row.max_ratio <= 6 for row in judged)
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


def test_what_fails_to_run_is_skipped_with_its_reason() -> None:
    def failing(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no kernel for this card")

    with replaced(AttentionInterface, "sdpa", failing):
        proof = proof_of(only=("causal",))
    assert [(one.backend, one.reason) for one in proof.skipped if one.backend == "sdpa"] == [
        ("sdpa", "no kernel for this card")
    ]


def test_a_cache_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgets cached keys answers otherwise than without a cache."""

    def forgetful(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        if query.shape[2] < key.shape[2]:
            key, value, mask = key[:, :, -query.shape[2] :], value[:, :, -query.shape[2] :], None
        return sdpa_attention_forward(module, query, key, value, mask, scaling=more["scaling"])

    with replaced(AttentionInterface, "sdpa", forgetful):
        found = proving._generation(CONFIG, "sdpa", shape_of(CONFIG), CPU)
    assert isinstance(found, Row)
    assert not found.ok
    assert found.reason == "the answer with a KV cache is another than without"


def test_an_all_ones_mask_beside_packed_positions_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = only(proof_of(only=("packed, all-ones mask",)), "sdpa", "packed, all-ones mask")
    assert row.ok
    assert "transformers isolates nothing here" in row.reason
    monkeypatch.setattr(proving, "refuse_leaking_mask", lambda *given: None)
    row = only(proof_of(only=("packed, all-ones mask",)), "sdpa", "packed, all-ones mask")
    assert not row.ok


# The old recipe


def test_the_old_recipes_three_defects_beside_lorakits_rows() -> None:
    """It passes a mask (no flash on a GPU), loses the cache, and keeps hidden_size² floats a layer."""
    torch.manual_seed(0)
    seed = SeedAttention(64, 4, with_flash=True)
    hidden = torch.randn(1, 16, 64)
    mask = torch.full((16, 16), torch.finfo(torch.float32).min).triu(1)[None, None]
    with _Watched() as by_recipe:
        _, past = seed(hidden, None, mask)
    reference = Bench(CONFIG, shape_of(CONFIG), torch.float32, CPU, 1, measured=False)
    case = Case("causal", 16)
    inputs = reference.reference(case)
    with _Watched() as by_lorakit:
        reference.call("sdpa", case, inputs)([inputs.q_BHTD, inputs.k_BKSD, inputs.v_BKSD])
    [(_, recipe)], [(_, lorakit)] = by_recipe.calls, by_lorakit.calls
    assert recipe["attn_mask"] is not None
    assert "is_causal" not in recipe
    assert lorakit["attn_mask"] is None
    assert lorakit["is_causal"] is True
    assert past is None, "a second token would not see the first"
    rows = {row.case: row for row in proof_of(names=("sdpa",)).rows}
    assert rows["one token, cached"].ok
    assert rows["generation, cached"].ok
    buffers = sum(buffer.numel() * 4 for buffer in SeedAttention(4096, 32, with_flash=False).buffers())
    assert buffers == 4096 * 4096 * 4, "64 MiB a layer, whatever the length"
