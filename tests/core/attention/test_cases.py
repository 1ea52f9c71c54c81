"""The cases: what may be seen by the definition, and float64's answer beside torch's own."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorakit.core.attention.cases import Case, attention_in_float64, cases_of, seen_from
from lorakit.core.attention.implementations import Shape

SHAPE = Shape("A", 4, 2, 8, 5, 0.0)


def test_float64_is_torchs_own_double_precision_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, dtype=torch.double, requires_grad=True) for heads in (4, 2, 2))
    seen = torch.rand(2, 6, 6) < 0.5
    seen[:, :, 0] = True
    gradient = torch.randn(2, 6, 4, 8, dtype=torch.double)
    found = attention_in_float64(q, k, v, seen, 0.2, gradient)
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=0.2, enable_gqa=True).transpose(1, 2)
    expected = [out, *torch.autograd.grad(out, (q, k, v), gradient)]
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q = k = v = torch.ones(1, 1, 2, 4)
    seen = torch.tensor([[[False, False], [True, True]]])
    out, *gradients = attention_in_float64(q, k, v, seen, 1.0, torch.ones(1, 2, 1, 4))
    assert out[0, 0].abs().sum() == 0
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_documents_fill_a_row_whatever_its_length() -> None:
    for size in (16, 17, 31, 256, 2048):
        for case in cases_of(SHAPE, size):
            assert sum(case.documents) in (0, size)
            assert all(length > 0 for length in case.documents)


def test_every_case_hides_what_it_should() -> None:
    rows = {case.name: seen_from(case, 2) for case in cases_of(SHAPE, 16)}
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    assert torch.equal(rows["causal"][0][0], causal)
    left, real, _ = rows["left-padded"]
    assert not left[0, :, :4].any()
    assert real[0].tolist() == [False] * 4 + [True] * 12
    assert torch.equal(left[1], causal), "the second row isn't padded"
    right, real, _ = rows["right-padded"]
    assert not right[0, :, 12:].any()
    assert real[0].tolist() == [True] * 12 + [False] * 4
    packed, _, positions = rows["packed"]
    for row in range(2):
        starts = (positions[row] == 0).nonzero().flatten().tolist()
        for start in starts:
            assert not packed[row, start:, :start].any(), "no document sees one before it"
        assert len(starts) > 2
    assert not torch.equal(packed[0], packed[1]), "rows are packed differently"
    assert rows["one token, cached"][0].tolist() == [[[True] * 16]] * 2
    assert torch.equal(rows["prefill, cached"][0][0], causal[8:])
    window = rows["sliding window"][0][0]
    assert window.sum(dim=-1).tolist() == [1, 2, 3, *[4] * 13]


def test_the_window_is_one_that_bites() -> None:
    wide = Shape("A", 4, 2, 8, 4096, 0.0)
    assert [case.window for case in cases_of(wide, 64) if case.window] == [16, 16]
    assert Case("x", 4).window is None
