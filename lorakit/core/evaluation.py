"""A model and blocks → loss over the trained tokens, and perplexity.

Shapes by suffix: B blocks, T tokens of a block, N trained tokens, C those of a chunk, H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lorakit.core.attention import apply
from lorakit.core.attention.implementations import BY_LENGTHS
from lorakit.core.blocks import VALIDATION, Batch, Blocks
from lorakit.core.config import EvaluateConfig
from lorakit.core.errors import NonFinite
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.memory import LOSS_TOKENS
from lorakit.core.model import open_model, require_vocabulary
from lorakit.core.parallel import World
from lorakit.core.shapes import CHANGES_LOGITS


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per trained token; the base's where an adapter was evaluated, else None."""

    loss: float
    perplexity: float
    tokens: int
    base_loss: float | None
    base_perplexity: float | None


def loss_sum(model: Any, batch: Batch, chunk_tokens: int = LOSS_TOKENS) -> Tensor:
    """Cross-entropy summed over the trained tokens of a batch, in nats, as an fp32 scalar.

    Token t is predicted from t-1 of its own document: positions restart at each document and no attention mask is
    passed, which is how transformers keeps packed documents apart. Logits exist only where a token is trained, for
    `chunk_tokens` of them at a time, and are computed again in the backward pass.
    """
    device = model.get_input_embeddings().weight.device
    ids_BT = torch.from_numpy(batch.ids_BT).to(device)
    positions_BT = torch.from_numpy(batch.positions_BT).to(device)
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    lengths: dict[str, Any] = {}
    if whole.config._attn_implementation in BY_LENGTHS:
        ends = torch.from_numpy(batch.ends).to(device)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        lengths |= {"max_length_q": batch.longest, "max_length_k": batch.longest}
    inputs = {"input_ids": ids_BT, "position_ids": positions_BT, "use_cache": False, **lengths}
    as_it_is = any(getattr(whole.config, field, None) for field in CHANGES_LOGITS)
    output = (model if as_it_is else whole.base_model)(**inputs)
    last_device = output[0].device  # where layers are split over devices, another than the first
    predicting_BT = torch.from_numpy(batch.trained_BT[:, 1:]).to(last_device)
    targets_N = ids_BT[:, 1:].to(last_device)[predicting_BT]
    if as_it_is:
        return cross_entropy(output.logits[:, :-1][predicting_BT].float(), targets_N, reduction="sum")
    hidden_NH = output.last_hidden_state[:, :-1][predicting_BT]
    del output
    losses = [
        checkpoint(_chunk_loss, whole.get_output_embeddings(), hidden_CH, targets_C, use_reentrant=False)
        for hidden_CH, targets_C in zip(hidden_NH.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(head: Any, hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = head(hidden_CH)
    return cross_entropy(logits_CV.float(), targets_C.to(logits_CV.device), reduction="sum")


def mean_loss(
    model: Any, blocks: Blocks, batch_size: int, report: Report, task: str, world: World | None = None
) -> tuple[float, int]:
    """Mean loss over all trained tokens of `blocks`, in nats, and how many they are; each process takes its share."""
    size, rank = (world.size, world.rank) if world is not None else (1, 0)
    firsts = range(0, len(blocks), batch_size)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for turn in range(0, len(firsts), size):
            mine = min(turn + rank, len(firsts) - 1)  # shards are fetched by all: the last is computed again, uncounted
            batch = blocks.batch(range(firsts[mine], min(firsts[mine] + batch_size, len(blocks))))
            loss = loss_sum(model, batch).item()
            total += loss if mine == turn + rank else 0.0
            tokens += batch.trained_tokens if mine == turn + rank else 0
            report(Progress(task, min(turn + size, len(firsts)), len(firsts), "batches"))
    told = world.gather([total, tokens]) if world is not None else [[total, tokens]]
    counted = int(sum(one[1] for one in told))
    return sum(one[0] for one in told) / max(counted, 1), counted


def perplexity(loss: float) -> float:
    """e to the mean loss in nats, as far as a float holds it: e^700 is about its largest power."""
    return math.exp(min(loss, 700.0))


def evaluate(config: EvaluateConfig, report: Report) -> Evaluation:
    """Loss and perplexity of a model over blocks, its base beside it where it is an adapter.

    Raises InputRefused (no blocks, blocks of another vocabulary), NonFinite, and what `open_model` raises.
    """
    blocks = Blocks(config.data.blocks, VALIDATION)
    if len(blocks):
        report(Notice("over the held-out blocks"))
    else:
        blocks = Blocks(config.data.blocks)
    opened = open_model(config.model.model, config.model.base, config.model.dtype, report)
    require_vocabulary(opened.model, blocks.largest_id(), blocks.path)
    apply(opened.model, "auto")
    passes: list[tuple[str, Callable[[], Any]]] = [("evaluating", nullcontext)]
    if opened.adapter is not None:
        passes.append(("evaluating the base", opened.model.disable_adapter))
    losses, tokens = [], 0
    for task, context in passes:
        with context():
            loss, tokens = mean_loss(opened.model, blocks, config.data.batch_size, report, task)
        if not math.isfinite(loss):
            raise NonFinite(f"{config.model.model}: found a loss of {loss}, need a number", "try --dtype fp32")
        losses.append(loss)
    perplexities = [perplexity(loss) for loss in losses]
    base_loss, base_perplexity = (losses[1], perplexities[1]) if len(losses) > 1 else (None, None)
    return Evaluation(losses[0], perplexities[0], tokens, base_loss, base_perplexity)
