"""A model and blocks or rows → loss over the trained tokens, perplexity, and exact match; the base beside an adapter.

Shapes by suffix: B blocks, T tokens of a block, N trained tokens, C those of a chunk, H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lorakit.core.attention import apply
from lorakit.core.attention.implementations import BY_LENGTHS
from lorakit.core.blocks import VALIDATION, Batch, Blocks
from lorakit.core.config import (
    DatasetSection,
    Engine,
    EvaluateConfig,
    OutputSection,
    PackingSection,
    PrepareConfig,
    PreviewSection,
    RowsSection,
    SplitSection,
    TokensSection,
)
from lorakit.core.errors import NonFinite
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.exact_match import Matches, answer_all, references
from lorakit.core.fast.engine import is_fast, make_fast
from lorakit.core.fast.loss import cross_entropy_sum, is_frozen
from lorakit.core.intervals import Interval, ratio_interval
from lorakit.core.memory import LOSS_TOKENS
from lorakit.core.model import Opened, open_model, require_positions, require_vocabulary
from lorakit.core.parallel import World
from lorakit.core.preparing import Question, prepare, questions
from lorakit.core.shapes import CHANGES_LOGITS


@dataclass(frozen=True)
class Losses:
    """Cross-entropy summed over the trained tokens of each block, in nats, and how many those are; both [blocks]."""

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats per trained token."""
        return float(self.sums.sum() / max(self.tokens.sum(), 1))

    @property
    def interval(self) -> Interval | None:
        """Its 95 % confidence interval over blocks; None of fewer than two."""
        return ratio_interval(self.sums.tolist(), self.tokens.tolist())


@dataclass(frozen=True)
class Measured:
    """Figures of one model, with their 95 % confidence intervals: loss in nats per trained token, and the share of rows
    that it answered right where that was asked for."""

    loss: float
    loss_interval: Interval | None
    perplexity: float
    perplexity_interval: Interval | None
    exact_match: float | None
    exact_match_interval: Interval | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model, and of its base where it is an adapter. `loss_change` is the model's loss less its
    base's over the same blocks, which is known better than either."""

    tokens: int
    blocks: int
    engine: Engine
    """What computed the decoder layers for the losses; answers are always the standard one's."""
    model: Measured
    base: Measured | None
    loss_change: float | None
    loss_change_interval: Interval | None
    rows: int | None
    answers: Sequence[Mapping[str, Any]] | None
    """For each row its place, the reference, the answers, what of them was compared, and whether that was right."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` shows; the base's figures are there as null where there is no base."""
        names = [field.name for field in fields(Measured)]
        of_base = {f"base_{name}": getattr(self.base, name, None) for name in names}
        rest = {name: value for name, value in vars(self).items() if name not in ("model", "base")}
        return {**vars(self.model), **of_base, **rest}


def loss_sum(model: Any, batch: Batch, chunk_tokens: int = LOSS_TOKENS) -> Tensor:
    """Cross-entropy summed over the trained tokens of a batch, in nats, as an fp32 scalar.

    Token t is predicted from t-1 of its own document: positions restart at each document and no attention mask is
    passed, which is how transformers keeps packed documents apart. Logits exist only where a token is trained, for
    `chunk_tokens` of them at a time, and are computed again in the backward pass, or with the fast engine and a frozen
    head become their gradient at once.
    """
    return torch.stack(_losses(model, batch, chunk_tokens, "sum")).sum()


def block_losses(model: Any, batch: Batch) -> NDArray[np.float64]:
    """The same for each block of a batch by itself: [B]."""
    losses_N = torch.cat(_losses(model, batch, LOSS_TOKENS, "none")).double().cpu()
    counts = batch.trained_BT[:, 1:].sum(axis=1).tolist()
    return np.array([float(losses.sum()) for losses in losses_N.split(counts)])


def _losses(model: Any, batch: Batch, chunk_tokens: int, reduction: str) -> list[Tensor]:
    """The loss of each chunk of trained tokens: its sum, or that of each token."""
    device = model.get_input_embeddings().weight.device
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    lengths: dict[str, Any] = {}
    if whole.config._attn_implementation in BY_LENGTHS:
        ends = _on(device, batch.ends)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        lengths |= {"max_length_q": batch.longest, "max_length_k": batch.longest}
    inputs = {"input_ids": _on(device, batch.ids_BT), "position_ids": _on(device, batch.positions_BT)}
    as_it_is = any(getattr(whole.config, field, None) for field in CHANGES_LOGITS)
    output = (model if as_it_is else whole.base_model)(**inputs, use_cache=False, **lengths)
    last_device = output[0].device  # where layers are split over devices, another than the first
    rows_N = _on(last_device, batch.predicting)
    targets_N = _on(last_device, batch.ids_BT.reshape(-1)[batch.predicting + 1])
    if as_it_is:
        return [cross_entropy(output.logits.flatten(0, 1)[rows_N].float(), targets_N, reduction=reduction)]
    hidden_NH = output.last_hidden_state.flatten(0, 1).index_select(0, rows_N)
    del output
    head = whole.get_output_embeddings()
    if reduction == "sum" and hidden_NH.requires_grad and is_fast(whole) and is_frozen(head):
        return [cross_entropy_sum(hidden_NH, head, targets_N, chunk_tokens)]
    return [
        checkpoint(_chunk_loss, head, hidden_CH, targets_C, reduction, use_reentrant=False)
        for hidden_CH, targets_C in zip(hidden_NH.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    ]


def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
    """An array on a device; on a GPU without waiting for what was launched before, as other copies would."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _chunk_loss(head: Any, hidden_CH: Tensor, targets_C: Tensor, reduction: str) -> Tensor:
    logits_CV = head(hidden_CH)
    return cross_entropy(logits_CV.float(), targets_C.to(logits_CV.device), reduction=reduction)


def measure_losses(
    model: Any, blocks: Blocks, batch_size: int, report: Report, task: str, world: World | None = None
) -> Losses:
    """The loss of each block; each process of a parallel run computes its share, and gets all of them."""
    size, rank = (world.size, world.rank) if world is not None else (1, 0)
    firsts = range(0, len(blocks), batch_size)
    mine: list[tuple[int, list[float], list[int]]] = []
    total, tokens = 0.0, 0
    with torch.no_grad():
        for turn in range(0, len(firsts), size):
            at = min(turn + rank, len(firsts) - 1)  # shards are fetched by all: the last is computed again, uncounted
            batch = blocks.batch(range(firsts[at], min(firsts[at] + batch_size, len(blocks))))
            sums, counts = block_losses(model, batch).tolist(), batch.trained_BT[:, 1:].sum(axis=1).tolist()
            if at == turn + rank:
                mine.append((at, sums, counts))
                total, tokens = total + sum(sums), tokens + sum(counts)
            note = f"loss {total / tokens:.4f}" if tokens else ""
            report(Progress(task, min(turn + size, len(firsts)), len(firsts), "batches", note))
    told = world.gather(mine) if world is not None else [mine]
    batches = sorted(one for some in told for one in some)
    sums_of_all = [value for _, sums, _ in batches for value in sums]
    return Losses(np.array(sums_of_all), np.array([count for _, _, counts in batches for count in counts], np.int64))


def mean_loss(
    model: Any, blocks: Blocks, batch_size: int, report: Report, task: str, world: World | None = None
) -> tuple[float, int]:
    """Mean loss over all trained tokens of `blocks`, in nats, and how many they are."""
    found = measure_losses(model, blocks, batch_size, report, task, world)
    return found.mean, int(found.tokens.sum())


def perplexity(loss: float) -> float:
    """e to the mean loss in nats, as far as a float holds it: e^700 is about its largest power."""
    return math.exp(min(loss, 700.0))


def evaluate(config: EvaluateConfig, report: Report) -> Evaluation:
    """Loss and perplexity of a model over blocks, or over rows, and how many of these it answers right; its base beside
    it where it is an adapter that can be switched off.

    The loss is computed by the engine that is asked for, answers by the standard one: the fast one knows no cache.

    Raises InputRefused (no blocks, blocks of another vocabulary, rows that can't be asked), NonFinite, and what
    `open_model` and `prepare` raise.
    """
    model = config.model
    opened = open_model(model.model, model.base, model.dtype, report, model.quantize, config.computing.engine)
    request = _request(config, opened)
    asked = questions(request, lambda event: None) if request is not None and config.matching.exact_match else []
    wanted = references(asked, config.matching.answer_pattern)
    folders = config.data.blocks if request is None else (prepare(request, report).path,)
    blocks = Blocks(folders, VALIDATION)
    if len(blocks):
        report(Notice("over the held-out blocks"))
    else:
        blocks = Blocks(folders)
    require_vocabulary(opened.model, blocks.largest_id(), blocks.path)
    require_positions(opened.model, blocks, report)
    passes: list[tuple[str, Callable[[], Any]]] = [("", nullcontext)]
    if opened.kept_on is not None:
        report(Notice(f"no base beside it: the adapter replaces its {opened.kept_on}; evaluate the base by itself"))
    elif opened.adapter is not None:
        passes.append((" the base", opened.model.disable_adapter))
    matches: list[Matches | None] = [None] * len(passes)
    if asked:  # before attention is by lengths, which knows no cache
        for index, (which, context) in enumerate(passes):
            with context():
                task = f"answering{which and ' by'}{which}"
                matches[index] = answer_all(opened, asked, wanted, config.matching, report, task)
    apply(opened.model, "auto")
    if opened.engine == "fast":
        make_fast(opened.model, model.quantize)
    losses = []
    for which, context in passes:
        with context():
            losses.append(measure_losses(opened.model, blocks, config.data.batch_size, report, f"evaluating{which}"))
        if not math.isfinite(losses[-1].mean):
            raise NonFinite(f"{model.model}: found a loss of {losses[-1].mean}, need a number", "try --dtype fp32")
    measured = [_measured(*both) for both in zip(losses, matches, strict=True)]
    change = Losses(losses[0].sums - losses[1].sums, losses[0].tokens) if len(losses) > 1 else None
    return Evaluation(
        tokens=int(losses[0].tokens.sum()),
        blocks=len(blocks),
        engine=opened.engine,
        model=measured[0],
        base=measured[1] if len(measured) > 1 else None,
        loss_change=change.mean if change is not None else None,
        loss_change_interval=change.interval if change is not None else None,
        rows=len(asked) or None,
        answers=_answers(asked, wanted, matches) if asked else None,
    )


def _request(config: EvaluateConfig, opened: Opened) -> PrepareConfig | None:
    """What makes blocks of --dataset, with the tokenizer and template that the model was trained with."""
    if not config.data.dataset:
        return None
    rows = config.rows
    return PrepareConfig(
        data=DatasetSection(dataset=config.data.dataset, tokenizer=str(opened.tokenizer_folder)),
        tokens=TokensSection(),
        rows=RowsSection(
            split=rows.split,
            subset=rows.subset,
            revision=rows.revision,
            columns=rows.columns,
            max_rows=rows.limit,
        ),
        held_out=SplitSection(),
        packing=PackingSection(block_size=rows.block_size, template=rows.template),
        output=OutputSection(),
        preview=PreviewSection(),
    )


def _measured(losses: Losses, matches: Matches | None) -> Measured:
    interval = losses.interval
    return Measured(
        loss=losses.mean,
        loss_interval=interval,
        perplexity=perplexity(losses.mean),
        perplexity_interval=interval and (perplexity(interval[0]), perplexity(interval[1])),
        exact_match=matches.share if matches is not None else None,
        exact_match_interval=matches.interval if matches is not None else None,
    )


def _answers(
    asked: Sequence[Question], wanted: Sequence[str], matches: Sequence[Matches | None]
) -> list[dict[str, Any]]:
    """Each row beside what was said to it, by the model and by its base."""
    found: list[dict[str, Any]] = [
        {"place": question.place, "reference": reference} for question, reference in zip(asked, wanted, strict=True)
    ]
    for prefix, one in zip(("", "base_"), matches, strict=False):
        for row, reply in zip(found, one.replies if one is not None else (), strict=True):
            row |= {prefix + name: value for name, value in vars(reply).items()}
    return found
