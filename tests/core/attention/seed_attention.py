"""What an old recipe told people to paste into transformers' Llama: attention by scaled_dot_product_attention with the
mask that it was given, no word of causality, and no cache handed back. Its semantics, in lorakit's own words."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class SeedAttention(nn.Module):
    """Attention [B, T, hidden] → the same; `with_flash` is whether torch has scaled_dot_product_attention."""

    def __init__(self, hidden_size: int, num_heads: int, *, with_flash: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.with_flash = with_flash
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        if not with_flash:
            self.register_buffer("bias", torch.tril(torch.ones(hidden_size, hidden_size)))

    def forward(self, hidden: Tensor, past: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        rows, length, width = hidden.shape
        q, k, v = (
            part.view(rows, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in self.qkv(hidden).split(width, dim=-1)
        )
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(rows, length, width), past  # what was handed in, not (k, v)
