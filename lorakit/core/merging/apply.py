"""A plan → the bytes of each shard: tensors without a change are copied, the others computed row by row. No torch.

W' = W + scale · B·A in fp32 (fp64 over an fp64 base), rounded once to the type that is stored. With DoRA each output's
weights are then scaled to their magnitude (Liu et al. 2024, equation 5).
"""

import math
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
from lorakit.core.floats import Scratch, item_bytes, narrowed
from lorakit.core.merging.plan import Plan, Target
from lorakit.core.merging.quantizing import there_and_back

_MAX_THREADS = 8  # the disk and the hash keep up with no more, and each has a few MB of its own
_AHEAD = 2  # chunks that wait for the disk, a thread


def shards(plan: Plan, report: Report) -> Iterator[tuple[str, disk.Content]]:
    """Every shard of the merged model, its bytes in pieces: computed by every core, handed over in their order."""
    with ThreadPoolExecutor(_threads()) as threads:
        for shard in plan.base.shards:
            yield shard, _shard(plan, shard, threads, report)


def _threads() -> int:
    return min(usable_cores(), _MAX_THREADS)


def _shard(plan: Plan, shard: str, threads: ThreadPoolExecutor, report: Report) -> Iterator[disk.Piece]:
    targets = plan.shard(shard)
    yield plan.header(shard)
    waiting: deque[tuple[Future[NDArray[np.uint8]], NDArray[np.uint8]] | disk.FileRange] = deque()
    free: list[NDArray[np.uint8]] = []
    scratch = Scratch()

    def ready(limit: int) -> Iterator[disk.Piece]:
        while len(waiting) > limit:
            piece = waiting.popleft()
            if isinstance(piece, disk.FileRange):
                yield piece
            else:
                yield memoryview(piece[0].result())  # type: ignore[arg-type]
                free.append(piece[1])  # it is written: the next chunk may have its place

    for done, target in enumerate(targets, 1):
        source = target.source
        if not target.computed:
            piece = disk.FileRange(source.path, source.place.start, source.place.end)
            before = waiting[-1] if waiting else None
            if isinstance(before, disk.FileRange) and (before.path, before.end) == (piece.path, piece.start):
                waiting[-1] = disk.FileRange(piece.path, before.start, piece.end)
            else:
                waiting.append(piece)
        else:
            computed = Computed(target)
            for start, stop in source.chunks():
                size = (stop - start) * math.prod(target.shape[1:]) * item_bytes(target.dtype)
                buffer = free.pop() if free else np.empty(size, np.uint8)
                if len(buffer) < size:
                    buffer = np.empty(size, np.uint8)
                waiting.append((threads.submit(computed.write, start, stop, buffer[:size], scratch), buffer))
                yield from ready(_AHEAD * _threads())
        report(Progress(f"merging {shard}", done, len(targets), "tensors"))
    yield from ready(0)


class Computed:
    """The numbers of one tensor of the merged model, by rows; what they need of the adapters is in memory."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._terms = [(*term.factors(), term) for term in target.terms]
        self._rows = [(dict(zip(rows, new.all(), strict=True))) for rows, new in target.rows]
        self._shifts = [(shift.all(), scale) for shift, scale in target.shifts]
        self._base = there_and_back(target.source, target.rounding)
        self._lengths = self._lengths_of_columns()

    def write(self, start: int, stop: int, out: NDArray[np.uint8], scratch: Scratch) -> NDArray[np.uint8]:
        """Some rows as they are stored, in `out`. Raises NonFinite."""
        with np.errstate(all="ignore"):  # what isn't a number is found by the next line
            finite = narrowed(self.rows(start, stop, scratch), self.target.dtype, out, scratch)
        if not finite:
            raise NonFinite(
                f"{self.target.name}: found NaN, or more than {self.target.dtype} holds, after merging; need numbers",
                "train the adapter again, or merge with --dtype fp32",
            )
        return out

    def rows(self, start: int, stop: int, scratch: Scratch) -> NDArray[Any]:
        """Some rows in fp32, in the scratch."""
        values = self._added(start, stop, scratch)
        for _, _, term in self._terms:
            if term.magnitude is not None:
                magnitude = term.magnitude.all()[:, 0]
                if term.transposed:
                    values *= (magnitude / self._lengths).astype(values.dtype)
                else:
                    lengths = np.sqrt(np.einsum("ij,ij->i", values, values))
                    values *= (magnitude / lengths)[:, None]
        for rows in self._rows:
            for row, new in rows.items():
                if start <= row < stop:
                    values[row - start] = new
        return values

    def _added(self, start: int, stop: int, scratch: Scratch) -> NDArray[Any]:
        """W + scale · B·A."""
        values = self._base(start, stop, scratch)
        for left, right, term in self._terms:
            change = scratch.array("change", values.size, values.dtype).reshape(values.shape)
            np.matmul(left[start:stop], right, out=change, dtype=values.dtype)
            change *= values.dtype.type(term.scale)
            values += change
        for shift, scale in self._shifts:
            values += shift[start:stop] * values.dtype.type(scale)
        return values

    def _lengths_of_columns(self) -> NDArray[Any]:
        """The lengths of the merged tensor's columns, for DoRA on a tensor that is the other way round."""
        squares, scratch = np.zeros(math.prod(self.target.shape[1:])), Scratch()
        if any(term.magnitude is not None and term.transposed for term in self.target.terms):
            for start, stop in self.target.source.chunks():
                squares += np.square(self._added(start, stop, scratch), dtype=np.float64).sum(axis=0)
        return np.sqrt(squares)
