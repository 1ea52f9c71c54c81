"""Attention: right implementations are found right, and one that is wrong by one per cent is caught and named."""

from typing import Any

import pytest
import torch

from lorakit.core.doctor.attention import attention
from lorakit.core.doctor.finding import Need


def test_attention_that_is_right_is_found_right() -> None:
    found = attention(Need())
    assert found.status == "ok", found


def test_attention_that_is_wrong_by_one_per_cent_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, wherever it is called."""
    from transformers.integrations import sdpa_attention

    from lorakit.core.attention import implementations

    real = torch.nn.functional.scaled_dot_product_attention

    def wrong(*given: Any, **named: Any) -> Any:
        return real(*given, **named) * 1.01

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    monkeypatch.setattr(implementations, "scaled_dot_product_attention", wrong)
    assert sdpa_attention.torch is torch
    found = attention(Need())
    assert (found.status, "sdpa" in found.detail) == ("fail", True), found
