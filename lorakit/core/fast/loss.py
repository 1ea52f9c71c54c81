"""The loss of a frozen head, and its gradient in the same go: logits exist once, of a chunk of tokens at a time, and
become their own gradient where they lie.

Shapes by suffix: N trained tokens, C of a chunk, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_frozen(head: Any) -> bool:
    """Whether a head is a matrix that nothing trains or wraps, so that only what comes into it needs a gradient."""
    return type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())


def cross_entropy_sum(hidden_NH: Tensor, head: nn.Linear, targets_N: Tensor, chunk_tokens: int) -> Tensor:
    """The cross-entropy of all tokens, in nats, as an fp32 scalar."""
    loss: Tensor = _CrossEntropySum.apply(hidden_NH, head.weight, head.bias, targets_N, chunk_tokens)
    return loss


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, chunk_tokens):  # type: ignore[no-untyped-def]
        loss = torch.zeros((), device=hidden_NH.device, dtype=torch.float32)
        gradient_NH = torch.empty_like(hidden_NH)
        chunks = (tensor.split(chunk_tokens) for tensor in (hidden_NH, targets_N, gradient_NH))
        for hidden_CH, targets_C, gradient_CH in zip(*chunks, strict=True):
            logits_CV = nn.functional.linear(hidden_CH.to(weight_VH.dtype), weight_VH, bias_V)
            loss += _cross_entropy(logits_CV, targets_C).sum()
            gradient_CH.copy_(logits_CV @ weight_VH)
        ctx.save_for_backward(gradient_NH)
        return loss

    @staticmethod
    def backward(ctx, of_loss):  # type: ignore[no-untyped-def]
        (gradient_NH,) = ctx.saved_tensors
        # in fp32, or one over the tokens of a step, rounded to bf16, would be off by up to 0.4 % for all of them
        scaled_NH = torch.mul(gradient_NH, of_loss[None], out=torch.empty_like(gradient_NH))
        return (scaled_NH, *[None] * 4)


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """The loss of each token [C] in fp32; the logits are replaced by its gradient: softmax, less 1 at the target."""
    if logits_CV.is_cuda:
        from lorakit.core.fast import kernels

        return kernels.cross_entropy(logits_CV, targets_C)
    log_CV, at = logits_CV.float().log_softmax(-1), targets_C[:, None]
    losses_C = -log_CV.gather(1, at).squeeze(1)
    gradient_CV = log_CV.exp_()
    gradient_CV.scatter_add_(1, at, gradient_CV.new_full((1, 1), -1).expand_as(at))
    logits_CV.copy_(gradient_CV)
    return losses_C
