"""A plan → the bytes of each shard: tensors without a change are copied, the others computed row by row. No torch.

W' = W + scale · B·A in fp32 (fp64 over an fp64 base), rounded once to the type that is stored. With DoRA each output's
weights are then scaled to their magnitude (Liu et al. 2024, equation 5).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core import disk
from lorakit.core.environment import usable_cores
from lorakit.core.errors import NonFinite
from lorakit.core.events import Progress, Report
from lorakit.core.floats import narrowed
from lorakit.core.merging.plan import Plan, Target
from lorakit.core.merging.quantizing import there_and_back

_AHEAD = 2  # chunks that wait for the disk, a core


def shards(plan: Plan, report: Report) -> Iterator[tuple[str, Iterator[disk.Piece]]]:
    """Every shard of the merged model, its bytes in pieces: computed by every core, handed over in their order."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        for shard in plan.base.shards:
            yield shard, _shard(plan, shard, threads, report)


def _shard(plan: Plan, shard: str, threads: ThreadPoolExecutor, report: Report) -> Iterator[disk.Piece]:
    targets = plan.shard(shard)
    yield plan.header(shard)
    waiting: deque[Future[NDArray[Any]] | disk.FileRange] = deque()
    done = 0

    def ready(limit: int) -> Iterator[disk.Piece]:
        while len(waiting) > limit:
            piece = waiting.popleft()
            yield piece if isinstance(piece, disk.FileRange) else memoryview(piece.result()).cast("B")  # type: ignore[arg-type]

    for done, target in enumerate(targets, 1):
        source = target.source
        if not target.computed:
            piece = disk.FileRange(source.path, source.place.start, source.place.end)
            before = waiting[-1] if waiting else None
            if isinstance(before, disk.FileRange) and (before.path, before.end) == (piece.path, piece.start):
                piece = disk.FileRange(piece.path, waiting.pop().start, piece.end)  # type: ignore[union-attr]
            waiting.append(piece)
        else:
            computed = Computed(target)
            for start, stop in source.chunks():
                waiting.append(threads.submit(computed.stored_rows, start, stop))
                yield from ready(_AHEAD * usable_cores())
        report(Progress(f"merging {shard}", done, len(targets), "tensors"))
    yield from ready(0)


class Computed:
    """The numbers of one tensor of the merged model, by rows; what they need of the adapters is in memory."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._terms = [(*term.factors(), term) for term in target.terms]
        self._rows = [(dict(zip(rows, new.all(), strict=True))) for rows, new in target.rows]
        self._shifts = [(shift.all(), scale) for shift, scale in target.shifts]
        self._round = there_and_back(target.source, target.quantize)
        self._lengths = self._lengths_of_columns()

    def stored_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some rows as they are stored. Raises NonFinite."""
        stored = narrowed(self.rows(start, stop), self.target.dtype)
        if stored is None:
            raise NonFinite(
                f"{self.target.name}: found NaN, or more than {self.target.dtype} holds, after merging; need numbers",
                "train the adapter again, or merge with --dtype fp32",
            )
        return stored

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Some rows in fp32."""
        values = self._added(start, stop)
        for _, _, term in self._terms:
            if term.magnitude is not None:
                magnitude = term.magnitude.all()[:, 0]
                if term.transposed:
                    values *= (magnitude / self._lengths).astype(values.dtype)
                else:
                    lengths = np.sqrt(np.einsum("ij,ij->i", values, values))
                    values *= (magnitude / lengths)[:, None]
        for rows in self._rows:
            for row in range(start, stop):
                if row in rows:
                    values[row - start] = rows[row]
        return values

    def _added(self, start: int, stop: int) -> NDArray[Any]:
        """W + scale · B·A."""
        values = self._round(start, stop)
        for left, right, term in self._terms:
            change = np.matmul(left[start:stop], right, dtype=values.dtype)
            change *= values.dtype.type(term.scale)
            values += change
        for shift, scale in self._shifts:
            values += shift[start:stop] * values.dtype.type(scale)
        return values

    def _lengths_of_columns(self) -> NDArray[Any]:
        """The lengths of the merged tensor's columns, for DoRA on a tensor that is the other way round."""
        if not any(term.magnitude is not None and term.transposed for term in self.target.terms):
            return np.ones(1)
        return np.sqrt(
            sum(
                np.square(self._added(start, stop), dtype=np.float64).sum(axis=0)
                for start, stop in self.target.source.chunks()
            )
        )
