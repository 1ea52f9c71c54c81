"""Implementations of attention: packed documents by their lengths, and which model and device can have which."""

import itertools
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.attention import implementations
from lorakit.core.attention.cases import attention_in_float64
from lorakit.core.attention.implementations import (
    IMPLEMENTATIONS,
    Shape,
    attention_module,
    documents_in,
    guard,
    keep_apart,
    lacking,
    register,
    shape_of,
    varlen_attention,
)
from lorakit.core.config import Attention
from lorakit.core.errors import InputRefused

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 50}
LLAMA = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape("LlamaAttention", 4, 2, 8, None, 0.0)


def test_every_implementation_can_be_asked_for() -> None:
    assert set(get_args(Attention)) == {"auto", *IMPLEMENTATIONS}


# varlen


def by_definition(documents: list[list[int]], window: int | None) -> torch.Tensor:
    """What each token of each row sees, pair by pair."""
    rows = []
    for lengths in documents:
        of = [number for number, length in enumerate(lengths) for _ in range(length)]
        near = window or len(of)
        rows.append([[of[i] == of[j] and j <= i and i - j < near for j in range(len(of))] for i in range(len(of))])
    return torch.tensor(rows)


@settings(deadline=None, database=None, derandomize=True, max_examples=25)
@given(
    cuts=st.lists(st.sets(st.integers(1, 15), max_size=5), min_size=1, max_size=3),
    key_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3, 40]),
    told=st.booleans(),
)
def test_each_document_gets_what_float64_gives_it_alone(
    cuts: list[set[int]], key_heads: int, window: int | None, told: bool
) -> None:
    """Output and gradients, for any documents, key heads and window, with lengths or with positions alone."""
    edges = [[0, *sorted(cut), 16] for cut in cuts]
    documents = [[b - a for a, b in itertools.pairwise(row)] for row in edges]
    positions = torch.tensor([[at for length in row for at in range(length)] for row in documents])
    module: Any = attention_module(
        transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=key_heads)
    )
    rows = len(documents)
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, heads, 16, 8, requires_grad=True) for heads in (4, key_heads, key_heads))
    gradient = torch.randn(rows, 16, 4, 8)
    more: dict[str, Any] = {"position_ids": positions}
    if told:
        lengths = torch.tensor([length for row in documents for length in row])
        ends = torch.cat((torch.zeros(1), lengths.cumsum(0))).to(torch.int32)
        more = {"cu_seq_lens_q": ends, "max_length_q": int(lengths.max())}
    out, _ = varlen_attention(module, q, k, v, None, scaling=0.3, sliding_window=window, **more)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)]
    exact = attention_in_float64(q, k, v, by_definition(documents, window), 0.3, gradient)
    for own, reference in zip(found, exact, strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=1e-4, atol=1e-5)


def test_documents_in_positions_are_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU reading them waits for it; in place changed positions are read again."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    found = documents_in(positions, 1, 5)
    assert found is not None
    assert found[0].tolist() == [0, 3, 5]
    assert found[1] == 3
    assert documents_in(positions, 1, 5) is found
    positions[0, 3] = 3
    positions[0, 4] = 4
    assert documents_in(positions, 1, 5) is None
    assert documents_in(positions, 2, 5) is None


def test_documents_are_read_anew_for_other_rows_and_where_changes_cant_be_seen() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    for rows, ends in ((1, [0, 3, 5]), (2, [0, 3, 5, 8, 10]), (1, [0, 3, 5])):
        found = documents_in(positions, rows, 5)
        assert found is not None
        assert found[0].tolist() == ends
    with torch.inference_mode():
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        assert documents_in(positions, 1, 5) is not None
        positions.copy_(torch.arange(5)[None])
        assert documents_in(positions, 1, 5) is None


def test_dropout_that_varlen_doesnt_have_is_an_error() -> None:
    states = torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"found attention_dropout 0\.1, need 0"):
        varlen_attention(
            attention_module(LLAMA), states, states, states, None, 0.1, position_ids=torch.tensor([[0, 1, 0, 1]])
        )


# Shapes


def test_a_shape_is_what_the_models_own_class_makes_of_its_config() -> None:
    assert shape_of(LLAMA) == SHAPE
    mistral = transformers.MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=1, sliding_window=7)
    assert shape_of(mistral) == Shape("MistralAttention", 4, 1, 8, 7, 0.0)
    qwen = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 9, "max_window_layers": 2}
    assert shape_of(transformers.Qwen2Config(**qwen)).sliding_window is None, "it has one, and doesn't use it"
    assert shape_of(transformers.Qwen2Config(**qwen, use_sliding_window=True)).sliding_window == 9


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.Gemma2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8), "soft-capped"),
        (
            transformers.GptOssConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
            "attention sinks",
        ),
        (
            transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1),
            "GPT2LMHeadModel, whose attention isn't made as Llama's",
        ),
        (transformers.T5Config(), "can't build a causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_another_kind_of_attention_is_refused_by_name(config: Any, words: str) -> None:
    with pytest.raises(InputRefused, match=words):
        shape_of(config)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "device", "words"),
    [
        ("varlen", Shape("A", 4, 2, 8, None, 0.1), torch.bfloat16, CPU, "attention_dropout is 0.1"),
        ("varlen", SHAPE, torch.float32, GPU, "bf16 and fp16 only"),
        ("varlen", Shape("A", 4, 2, 320, None, 0.0), torch.bfloat16, GPU, "heads are 320 wide"),
        ("flash_attention_2", SHAPE, torch.bfloat16, GPU, "the package flash-attn isn't installed"),
        ("flash_attention_3", SHAPE, torch.bfloat16, GPU, "the package flash-attn-3 isn't installed"),
        ("flex_attention", SHAPE, torch.bfloat16, CPU, "no GPU here"),
        ("flex_attention", SHAPE, torch.float32, GPU, "compiling it for fp32"),
    ],
)
def test_what_cant_be_had_says_why(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementations, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(implementations, "is_flash_attn_3_available", lambda: False)
    assert words in str(lacking(name, shape, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_stands_against_the_three_that_always_run(dtype: torch.dtype) -> None:
    assert [name for name in IMPLEMENTATIONS if lacking(name, SHAPE, dtype, CPU) is None][-2:] == ["sdpa", "eager"]
    assert lacking("varlen", SHAPE, dtype, CPU) is None


# The guard


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]])


def guarded(*given: Any, **named: Any) -> Any:
    backbone = transformers.LlamaModel(LLAMA)
    return keep_apart(backbone, given, named)


def test_a_mask_or_cache_beside_packed_positions_is_refused() -> None:
    ids, ones = torch.ones(1, 6, dtype=torch.long), torch.ones(1, 6)
    with pytest.raises(InputRefused, match="attention_mask: found one beside position_ids that restart"):
        guarded(attention_mask=ones, position_ids=PACKED)
    with pytest.raises(InputRefused):
        guarded(ids, ones, PACKED)
    padded = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(InputRefused):
        guarded(attention_mask=padded, position_ids=PACKED)
    with pytest.raises(InputRefused, match="past_key_values: found one beside"):
        guarded(position_ids=PACKED, past_key_values=transformers.DynamicCache())


def test_packed_positions_make_no_cache() -> None:
    _, named = guarded(input_ids=None, position_ids=PACKED)
    assert named["use_cache"] is False
    assert guarded(position_ids=PACKED, use_cache=False) is None, "and nothing is asked of the device"


def test_what_hides_nothing_wrong_passes() -> None:
    ones = torch.ones(1, 6)
    assert guarded(attention_mask=ones, position_ids=torch.arange(6)[None]) is None
    assert guarded(attention_mask=ones) is None
    left_padded = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert guarded(attention_mask=left_padded, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3]])) is None
    assert guarded(attention_mask={"full_attention": None}, position_ids=PACKED) is None
    assert guarded(attention_mask=ones, position_ids=torch.arange(6)) is None
    filled = transformers.DynamicCache()
    filled.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    assert guarded(attention_mask=torch.ones(1, 9), position_ids=PACKED, past_key_values=filled) is None


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_a_guarded_model_keeps_documents_apart_however_it_is_called(name: str) -> None:
    from transformers import LlamaForCausalLM

    register()
    model = LlamaForCausalLM._from_config(LLAMA, attn_implementation=name).eval()
    guard(model)
    guard(model)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = torch.tensor([[7, 8, 9, 4, 5, 6]])
    with torch.no_grad():
        one, two = (model(which, position_ids=PACKED).logits[:, 3:] for which in (ids, other))
        inner = [model.model(which, position_ids=PACKED).last_hidden_state[:, 3:] for which in (ids, other)]
    assert torch.equal(one, two)
    assert torch.equal(*inner)
    assert len(model.base_model._forward_pre_hooks) == 1
