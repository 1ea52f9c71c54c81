"""A model and blocks → loss over the trained tokens, and perplexity.

Shapes by suffix: B blocks, T tokens of a block, N trained tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorakit.core.attention import apply
from lorakit.core.blocks import VALIDATION, Batch, Blocks
from lorakit.core.config import EvaluateConfig
from lorakit.core.errors import NonFinite
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.implementations import BY_LENGTHS
from lorakit.core.model import open_model, require_vocabulary


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per trained token; the base's where an adapter was evaluated, else None."""

    loss: float
    perplexity: float
    tokens: int
    base_loss: float | None
    base_perplexity: float | None


def loss_sum(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy summed over the trained tokens of a batch, in nats, as an fp32 scalar.

    Token t is predicted from t-1 of its own document: positions restart at each document and no attention mask is
    passed, which is how transformers keeps packed documents apart. Logits are computed only where a token is trained.
    """
    device = model.get_input_embeddings().weight.device
    trained_BT = torch.from_numpy(batch.trained_BT).to(device)
    ids_BT = torch.from_numpy(batch.ids_BT).to(device)
    predicting_BT = trained_BT[:, 1:]
    columns = predicting_BT.any(dim=0).nonzero().squeeze(1)
    lengths: dict[str, Any] = {}
    if model.config._attn_implementation in BY_LENGTHS:
        ends = torch.from_numpy(batch.ends).to(device)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        lengths |= {"max_length_q": batch.longest, "max_length_k": batch.longest}
    output = model(
        input_ids=ids_BT,
        position_ids=torch.from_numpy(batch.positions_BT).to(device),
        use_cache=False,
        logits_to_keep=columns,
        **lengths,
    )
    chosen = predicting_BT[:, columns]
    logits_NV = output.logits[chosen].float()
    return cross_entropy(logits_NV, ids_BT[:, 1:][:, columns][chosen], reduction="sum")


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
    batches = range(0, len(blocks), config.data.batch_size)
    passes: list[tuple[str, Callable[[], Any]]] = [("evaluating", nullcontext)]
    if opened.adapter is not None:
        passes.append(("evaluating the base", opened.model.disable_adapter))
    losses, tokens = [], 0
    for task, context in passes:
        total, tokens = 0.0, 0
        with context(), torch.inference_mode():
            for done, first in enumerate(batches, 1):
                batch = blocks.batch(range(first, min(first + config.data.batch_size, len(blocks))))
                total += loss_sum(opened.model, batch).item()
                tokens += batch.trained_tokens
                report(Progress(task, done, len(batches), "batches", f"loss {total / tokens:.4f}"))
        if not math.isfinite(total):
            raise NonFinite(f"{config.model.model}: found a loss of {total}, need a number", "try --dtype fp32")
        losses.append(total / tokens)
    perplexities = [math.exp(min(loss, 700.0)) for loss in losses]  # e^700 is the largest power that a float holds
    base_loss, base_perplexity = (losses[1], perplexities[1]) if len(losses) > 1 else (None, None)
    return Evaluation(losses[0], perplexities[0], tokens, base_loss, base_perplexity)
