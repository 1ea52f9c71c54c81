"""One implementation of attention called in one case, as a model's layer calls it: its results, time and memory.

Queries, keys and values of the model's own shape are drawn; mask, cache and call are transformers' own, as a forward
pass makes them.

Shapes by suffix: B rows, T queries, S keys, H query heads, K key heads, D width of a head.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lorakit.core.attention.cases import Case, attention_in_float64, seen_from
from lorakit.core.attention.implementations import BY_LENGTHS, Shape, attention_module, documents_in
from lorakit.core.profiling import Profile, median_seconds, profiled, refused_kernels


@dataclass(frozen=True)
class Reference:
    """Inputs in the number type that is judged, and what float64 makes of them."""

    q_BHTD: Tensor
    k_BKSD: Tensor
    v_BKSD: Tensor
    gradient_BTHD: Tensor
    real_BT: Tensor
    """Queries that are text; what padding gets is nobody's business."""
    positions_BT: Tensor
    results: Sequence[Tensor]
    """Output [B, T, H, D], then the gradients of q, k and v where the case trains."""


@dataclass
class Measured:
    results: Sequence[Tensor]
    seconds: float = 0.0
    peak_bytes: int | None = None
    profile: Profile = field(default_factory=lambda: Profile("", fell_to_math=False, host_syncs=None))
    refused: Mapping[str, str] = field(default_factory=dict)


class Bench:
    """The model's attention layer and what it is called with."""

    def __init__(
        self, config: Any, shape: Shape, dtype: torch.dtype, device: torch.device, batch_size: int, measured: bool
    ) -> None:
        self.config, self.shape, self.dtype, self.device = config, shape, dtype, device
        self.batch_size, self.measured = batch_size, measured
        self.module = attention_module(config)
        self.module.train()
        self.scaling = float(self.module.scaling)  # type: ignore[arg-type]

    def reference(self, case: Case) -> Reference:
        """Drawn inputs, the same on every machine, and float64's results."""
        shape, rows = self.shape, self.batch_size
        draw = torch.Generator().manual_seed(0)
        sizes = [
            (rows, shape.num_heads, case.queries, shape.head_dim),
            (rows, shape.num_key_heads, case.keys, shape.head_dim),
            (rows, shape.num_key_heads, case.keys, shape.head_dim),
            (rows, case.queries, shape.num_heads, shape.head_dim),
        ]
        q, k, v, gradient = (torch.randn(size, generator=draw).to(self.device, self.dtype) for size in sizes)
        seen_BTS, real_BT, positions_BT = (tensor.to(self.device) for tensor in seen_from(case, rows))
        gradient = gradient * real_BT[:, :, None, None]
        results = attention_in_float64(q, k, v, seen_BTS, self.scaling, gradient if case.trains else None)
        return Reference(q, k, v, gradient, real_BT, positions_BT, results)

    def call(self, name: str, case: Case, reference: Reference) -> Callable[[Sequence[Tensor]], Tensor]:
        """Attention as a layer calls it, on q, k and v; the mask is made here, as once in a forward pass."""
        config = copy.deepcopy(self.config)
        config._attn_implementation = name
        self.module.config = config
        positions_BT = reference.positions_BT
        padding = reference.real_BT.long() if case.padding else None
        cache = None
        if case.cached:
            cache = DynamicCache()
            cache.update(reference.k_BKSD[:, :, : case.cached], reference.v_BKSD[:, :, : case.cached], 0)
        embeds = torch.empty(self.batch_size, case.queries, 1, device=self.device, dtype=self.dtype)
        make_mask = create_causal_mask
        if case.window is not None:
            config.sliding_window = case.window
            make_mask = create_sliding_window_causal_mask
        mask = make_mask(config, embeds, padding, cache, positions_BT)
        more: dict[str, Any] = {"position_ids": positions_BT, "sliding_window": case.window}
        if name in BY_LENGTHS and (packed := documents_in(positions_BT, *positions_BT.shape)) is not None:
            ends, longest = packed
            more |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        eager = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        function = AttentionInterface()[name] if name != "eager" else eager
        if function is None:
            raise NotImplementedError("its class has no eager attention")

        def attend(states: Sequence[Tensor]) -> Tensor:
            out: Tensor = function(self.module, *states, mask, dropout=0.0, scaling=self.scaling, **more)[0]
            return out

        if case.checkpointed:
            return lambda states: checkpoint(attend, states, use_reentrant=False)
        return attend

    def measure(self, name: str, case: Case, reference: Reference) -> Measured:
        on_gpu = self.device.type == "cuda"
        before_bytes = 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before_bytes = torch.cuda.memory_allocated()
        attend = self.call(name, case, reference)
        once = partial(_once, attend, case, reference)
        found = Measured(once())
        if on_gpu:
            found.peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
        if self.measured:
            found.seconds = median_seconds(once, on_gpu)
            found.profile = profiled(once, on_gpu)
            found.refused = refused_kernels(once) if on_gpu else {}
        return found

    def leak(self, name: str, case: Case, reference: Reference) -> float:
        """How much the other documents' output changes where the first document of every row is another one."""
        attend = self.call(name, case, reference)
        states = [reference.q_BHTD, reference.k_BKSD, reference.v_BKSD]
        changed = [tensor.clone() for tensor in states]
        others_BT = torch.ones(self.batch_size, case.queries, dtype=torch.bool, device=self.device)
        for row in range(self.batch_size):
            first = case.documents[row % len(case.documents)]
            others_BT[row, :first] = False
            for tensor in changed:
                tensor[row, :, :first] += 1.0
        with torch.no_grad():
            difference = (attend(states) - attend(changed)).abs()
        return float(difference[others_BT].max())

    def heads_that_follow(self, name: str, case: Case, reference: Reference) -> list[int]:
        """The query heads whose output changes with the first key head."""
        attend = self.call(name, case, reference)
        value = reference.v_BKSD.clone()
        value[:, 0] += 1.0
        with torch.no_grad():
            before = attend([reference.q_BHTD, reference.k_BKSD, reference.v_BKSD])
            after = attend([reference.q_BHTD, reference.k_BKSD, value])
        return (before != after).any(dim=-1).any(dim=0).any(dim=0).nonzero().flatten().tolist()

    def forget(self) -> None:
        """Give a case's memory back."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _once(attend: Callable[[Sequence[Tensor]], Tensor], case: Case, reference: Reference) -> list[Tensor]:
    """Output, and gradients where the case trains."""
    states = [reference.q_BHTD, reference.k_BKSD, reference.v_BKSD]
    if not case.trains:
        with torch.no_grad():
            return [attend(states)]
    states = [tensor.detach().requires_grad_() for tensor in states]
    output = attend(states)
    return [output.detach(), *torch.autograd.grad(output, states, reference.gradient_BTHD)]
