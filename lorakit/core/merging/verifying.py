"""A merged model that lies on the disk, held against its inputs: rows of each changed tensor, computed another way.

Nothing of what wrote the model is used here but the plan's list of tensors: headers are read again, scales taken from
the adapters' settings again, products formed row by row in fp64, and what was written is read back from the disk.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core import adapters
from lorakit.core.adapters import Adapter, BiasShift, Change, LoraPair, Replacement, TokenRows
from lorakit.core.environment import usable_cores
from lorakit.core.errors import ArtifactDamaged
from lorakit.core.floats import FRACTION_BITS, SMALLEST, Scratch
from lorakit.core.merging.plan import Plan, Stored, Target
from lorakit.core.merging.quantizing import there_and_back
from lorakit.core.weights import HEAD, TensorPlace, read_header

_MAX_THREADS = 8
_ROWS = 4
_COLUMNS = 64  # where a number depends on its whole column


def verify_rows(plan: Plan, folder: Path) -> float:
    """The largest difference between a stored number and its exact value, over some rows of every changed tensor.

    Raises ArtifactDamaged where one differs by more than rounding it once explains.
    """
    headers = {shard: read_header(folder / shard) for shard in plan.base.shards}
    inputs = _Inputs(plan)

    def difference(target: Target) -> float:
        return _difference(target, folder / target.shard, headers[target.shard].get(target.name), inputs)

    with ThreadPoolExecutor(min(usable_cores(), _MAX_THREADS)) as threads:
        return max(threads.map(difference, plan.changed), default=0.0)


def _difference(target: Target, path: Path, place: TensorPlace | None, inputs: "_Inputs") -> float:
    if place is None or (place.dtype, place.shape) != (target.dtype, target.shape):
        raise _wrong(path, target, f"{place and (place.dtype, place.shape)}", f"{target.shape}")
    rows = _sample(target)
    found = np.stack([_read_back(Stored(path, place), row) for row in rows])
    exact, allowed, columns = inputs.exact(target, rows)
    difference = np.abs(found[:, columns] - exact)
    wrong = ~(difference <= allowed + _half_a_place(exact, target.dtype))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        shown = f"{found[:, columns][at]:.9g} in row {rows[at[0]]} ({wrong.mean():.0%} of the sample differ)"
        raise _wrong(path, target, shown, f"{exact[at]:.9g}")
    return float(difference.max(initial=0.0))


def _wrong(path: Path, target: Target, found: str, need: str) -> ArtifactDamaged:
    return ArtifactDamaged(
        f"{path}: {target.name}: found {found}, need {need}",
        "nothing was put in place; run the command again, and report it if it fails again",
    )


def _sample(target: Target) -> list[int]:
    """Some rows: the first, the last, others by its name, and some that an adapter replaces."""
    count = target.source.place.rows
    digests = [hashlib.sha256(f"{target.name}/{number}".encode()).digest() for number in range(_ROWS - 2)]
    drawn = {int.from_bytes(digest[:8], "little") % count for digest in digests}
    return sorted({0, count - 1, *drawn, *[row for rows, _ in target.rows for row in rows[:_ROWS]]})


def _read_back(written: Stored, row: int) -> NDArray[Any]:
    """A row as it lies on the disk: it was fsynced, so the kernel's copy of its pages can go first."""
    if hasattr(os, "posix_fadvise"):
        start, size = written.place.start + row * written.place.row_bytes, written.place.row_bytes
        with written.path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start - start % 4096, size + 8192, os.POSIX_FADV_DONTNEED)
    return written.rows(row, row + 1)[0].astype(np.float64)


class _Inputs:
    """The base and the adapters, their headers read again."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._headers = {
            each.adapter.folder: read_header(each.adapter.folder / adapters.WEIGHTS) for each in plan.adapters
        }

    def exact(self, target: Target, rows: list[int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Rows of the merged tensor in fp64, how far off fp32 may be, and which columns these are."""
        done = [(each.adapter, each.weight, change) for each in self.plan.adapters for change in each.changes]
        done = [found for found in done if found[2].target == target.name or self._reaches(found[2], target)]
        place = self.plan.base.place(target.name)
        source = Stored(self.plan.base.folder / place.shard, place) if place is not None else target.source
        if target.source.path.name == adapters.WEIGHTS:
            source = target.source
        by_column = any(
            isinstance(change, LoraPair) and change.magnitude and change.transposed for _, _, change in done
        )
        columns = np.arange(math.prod(source.place.shape[1:]))
        if by_column:
            columns = columns[:: max(1, len(columns) // _COLUMNS)]
        base = there_and_back(source, target.rounding)
        values = np.concatenate([base(row, row + 1, Scratch())[:, columns].astype(np.float64) for row in rows])
        size, steps = np.abs(values), 4
        for adapter, weight, change in done:
            if isinstance(change, LoraPair):
                a, b = self._of(adapter, change.name_a), self._of(adapter, change.name_b)
                scale = weight * _scale(adapter, change.target, a.place.rows)
                left, right = _factors(a, b, rows, columns, transposed=change.transposed)
                values, steps = values + scale * (left @ right), steps + a.place.rows
                size = size + abs(scale) * (np.abs(left) @ np.abs(right))
                if change.magnitude is not None:
                    lengths = self._of(adapter, change.magnitude).all()[:, 0].astype(np.float64)
                    if by_column:
                        chunks = [base(*chunk, Scratch())[:, columns] for chunk in source.chunks()]
                        whole = np.concatenate(chunks) + scale * (a.all().T.astype(np.float64) @ right)
                        factor = lengths[columns] / np.sqrt(np.square(whole).sum(axis=0))
                    else:
                        factor = (lengths[rows] / np.sqrt(np.square(values).sum(axis=1)))[:, None]
                    values, size, steps = values * factor, size * np.abs(factor), steps + 64
            elif isinstance(change, BiasShift):
                rank = self._headers[adapter.folder][change.name.replace("_B.bias", "_A.weight")].rows
                scale = weight * _scale(adapter, change.target.removesuffix("bias") + "weight", rank)
                shift = scale * self._of(adapter, change.name).all()[rows].astype(np.float64)
                values, size = values + shift, size + np.abs(shift)
        allowed = size * 2.0**-23 * steps
        for adapter, _, change in done:
            for at, row in enumerate(rows):
                if isinstance(change, TokenRows) and row in change.rows:
                    number = change.rows.index(row)
                    values[at] = self._of(adapter, change.name).rows(number, number + 1)[0]
                    allowed[at] = 0
        return values, allowed, columns

    def _reaches(self, change: Change, target: Target) -> bool:
        """Whether a change of the embedding is one of the head, or the other way round."""
        both = {self.plan.base.embedding, HEAD}
        shared = isinstance(change, TokenRows) or (isinstance(change, Replacement) and change.shared)
        return self.plan.base.is_tied and shared and {change.target, target.name} <= both

    def _of(self, adapter: Adapter, name: str) -> Stored:
        return Stored(adapter.folder / adapters.WEIGHTS, self._headers[adapter.folder][name])


def _factors(
    a: Stored, b: Stored, rows: list[int], columns: NDArray[Any], *, transposed: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What rows and columns of B·A, or of its transpose, are the product of."""
    if transposed:
        return a.all()[:, rows].T.astype(np.float64), b.all()[columns].T.astype(np.float64)
    left = np.concatenate([b.rows(row, row + 1) for row in rows]).astype(np.float64)
    return left, a.all()[:, columns].astype(np.float64)


def _scale(adapter: Adapter, target: str, rank: int) -> float:
    """alpha / r or alpha / √r, r from the matrices themselves."""
    module = target.removesuffix(".weight")
    patterns: Mapping[str, Any] = adapter.config.get("alpha_pattern") or {}
    fitting = [alpha for pattern, alpha in patterns.items() if re.search(rf"(?:^|\.)(?:{pattern})$", module)]
    alpha = float([*fitting, adapter.config["lora_alpha"]][0])
    return alpha / (rank**0.5 if adapter.config.get("use_rslora") else rank)


def _half_a_place(exact: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Half the distance between neighbouring numbers of a type, around each of these."""
    _, exponents = np.frexp(exact)
    return np.maximum(np.ldexp(1.0, exponents - 1 - FRACTION_BITS[dtype]), SMALLEST[dtype]) / 2
