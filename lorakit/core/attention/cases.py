"""The ways in which a model calls attention, and what float64 makes of each, by the definition alone.

Shapes by suffix: B rows, T queries, S keys, H query heads, K key heads, D width of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.attention.implementations import Shape


@dataclass(frozen=True)
class Case:
    """A way in which a model calls attention. The first row's `padding` tokens lie left (or right) of its text."""

    name: str
    queries: int
    documents: tuple[int, ...] = ()
    """The lengths of the documents in a row, where it is packed; each row begins with another of them."""
    padding: int = 0
    padded_left: bool = False
    cached: int = 0
    """Tokens whose keys are in the cache already."""
    window: int | None = None
    checkpointed: bool = False

    @property
    def keys(self) -> int:
        return self.cached + self.queries

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return not self.cached


def cases_of(shape: Shape, block_size: int) -> list[Case]:
    """The cases of a model, for rows of `block_size` tokens."""
    documents = _document_lengths(block_size)
    cases = [
        Case("causal", block_size),
        Case("left-padded", block_size, padding=block_size // 4, padded_left=True),
        Case("right-padded", block_size, padding=block_size // 4),
        Case("packed", block_size, documents),
        Case("packed, checkpointed", block_size, documents, checkpointed=True),
        Case("one token, cached", 1, cached=block_size - 1),
        Case("prefill, cached", block_size // 2, cached=block_size - block_size // 2),
    ]
    if shape.num_key_heads < shape.num_heads:
        cases.append(Case("GQA", block_size))
    if shape.sliding_window is not None:
        window = min(shape.sliding_window, block_size // 4)
        cases.append(Case("sliding window", block_size, window=window))
        cases.append(Case("packed, window", block_size, documents, window=window))
    return cases


def _document_lengths(block_size: int) -> tuple[int, ...]:
    """Documents of unequal length, the longest 3/8 of a block, the shortest one token."""
    lengths = [block_size * part // 16 for part in (6, 1, 4, 2)]
    rest = block_size - sum(lengths) - 1
    return (*lengths, rest, 1) if rest > 0 else (block_size - 1, 1)


def seen_from(case: Case, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each query may see, bool [B, T, S]; which queries are text, bool [B, T]; and positions [B, T]."""
    key_S = torch.arange(case.keys)
    document_BS = torch.zeros(batch_size, case.keys, dtype=torch.long)
    positions_BS = key_S.expand(batch_size, -1).clone()
    for row in range(batch_size if case.documents else 0):
        turn = row % len(case.documents)
        lengths = torch.tensor(case.documents[turn:] + case.documents[:turn])
        document_BS[row] = torch.arange(len(lengths)).repeat_interleave(lengths)
        positions_BS[row] = torch.cat([torch.arange(int(length)) for length in lengths])
    real_BS = torch.ones(batch_size, case.keys, dtype=torch.bool)
    if case.padding:
        real_BS[0] = key_S >= case.padding if case.padded_left else key_S < case.keys - case.padding
    query_T = key_S[case.cached :]
    behind_TS = query_T[:, None] - key_S[None, :]
    near_TS = (behind_TS >= 0) & (behind_TS < (case.window or case.keys + 1))
    same_BTS = document_BS[:, case.cached :, None] == document_BS[:, None, :]
    return near_TS & same_BTS & real_BS[:, None, :], real_BS[:, case.cached :], positions_BS[:, case.cached :]


def attention_in_float64(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, seen_BTS: Tensor, scaling: float, gradient_BTHD: Tensor | None
) -> list[Tensor]:
    """softmax(q·kᵀ·scaling) v over what is seen (Vaswani et al. 2017, 3.2.1), and the gradients of q, k and v for a
    gradient of the output. Key head h serves the query heads h·H/K up to the next (Ainslie et al. 2023)."""
    groups = q_BHTD.shape[1] // k_BKSD.shape[1]
    inputs = [states.detach().double().requires_grad_(gradient_BTHD is not None) for states in (q_BHTD, k_BKSD, v_BKSD)]
    q, k, v = inputs
    output = torch.zeros(q.transpose(1, 2).shape, dtype=torch.float64, device=q.device)
    for row in range(q.shape[0]):
        hidden_TS = ~seen_BTS[row]
        empty_T1 = hidden_TS.all(dim=-1, keepdim=True)
        for head in range(q.shape[1]):
            key_head = head // groups
            scores_TS = (q[row, head] @ k[row, key_head].T * scaling).masked_fill(hidden_TS & ~empty_T1, -torch.inf)
            out_TD = (scores_TS.softmax(dim=-1) * ~empty_T1) @ v[row, key_head]
            if gradient_BTHD is not None:
                out_TD.backward(gradient_BTHD[row, :, head].double())
            output[row, :, head] = out_TD.detach()
    return [output, *(states.grad for states in inputs if states.grad is not None)]
