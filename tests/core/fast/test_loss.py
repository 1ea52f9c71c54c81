"""The loss and its gradient against autograd's in fp64."""

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.fast.loss import cross_entropy_sum, is_frozen

WORDS, HIDDEN, TOKENS = 50, 12, 11


def given(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, a head and targets, of which some are the same."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, WORDS, bias=bias, dtype=dtype).requires_grad_(False)
    return torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True), head, torch.randint(0, WORDS, (TOKENS,))


def reference(hidden: Tensor, head: nn.Linear, targets: Tensor) -> tuple[float, Tensor]:
    wide = hidden.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    loss = nn.functional.cross_entropy(wide @ head.weight.double().t() + (bias if bias is not None else 0), targets)
    (3 * TOKENS * loss).backward()
    assert wide.grad is not None
    return TOKENS * loss.item(), wide.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
def test_it_is_autograds_whatever_the_chunks(chunk_tokens: int, bias: bool) -> None:
    hidden, head, targets = given(torch.float32, bias=bias)
    loss = cross_entropy_sum(hidden, head, targets, chunk_tokens)
    (3 * loss).backward()
    wanted, gradient = reference(hidden, head, targets)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.double(), gradient, atol=1e-5 * float(gradient.abs().max()))


def test_bf16_loses_no_more_than_its_places() -> None:
    hidden, head, targets = given(torch.bfloat16, bias=False)
    loss = cross_entropy_sum(hidden, head, targets, 4)
    (3 * loss).backward()
    wanted, gradient = reference(hidden, head, targets)
    assert loss.item() == pytest.approx(wanted, rel=5e-3)
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.double(), gradient, atol=2e-2 * float(gradient.abs().max()))


def test_a_steps_scale_is_not_rounded_to_bf16() -> None:
    """One over 5,000 in bf16 is off by 0.23 %, which all gradients would be, whatever rounding takes on an average."""
    hidden, head, targets = given(torch.bfloat16, bias=False)
    (cross_entropy_sum(hidden, head, targets, 4) / 5000).backward()
    assert hidden.grad is not None
    scaled, hidden.grad = hidden.grad.double(), None
    cross_entropy_sum(hidden, head, targets, 4).backward()
    assert float((5000 * scaled).norm() / hidden.grad.double().norm()) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(broken: float) -> None:
    hidden, head, targets = given(torch.float32, bias=False)
    hidden.data[3, 2] = broken
    assert not cross_entropy_sum(hidden, head, targets, 4).isfinite()


def test_no_token_at_all_is_no_loss() -> None:
    hidden, head, targets = given(torch.float32, bias=False)
    loss = cross_entropy_sum(hidden[:0], head, targets[:0], 4)
    loss.backward()
    assert loss.item() == 0


def test_a_head_that_learns_is_not_frozen() -> None:
    head = nn.Linear(HIDDEN, WORDS, bias=False).requires_grad_(False)
    assert is_frozen(head)
    assert not is_frozen(nn.Sequential(head))  # as PEFT's wrappers are none
    assert not is_frozen(head.requires_grad_())
