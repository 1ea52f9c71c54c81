"""What the merged model will hold: each tensor, where its numbers come from, and what is added to them. No torch.

Everything that can be wrong with a merge is found here, from headers and settings, before a byte is written.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core import adapters
from lorakit.core.adapters import Adapter, BiasShift, Change, LoraPair, Replacement, TokenRows
from lorakit.core.errors import ArtifactDamaged, InputRefused, Mismatch, NonFinite
from lorakit.core.floats import CONFIG_NAMES, FRACTION_BITS, Scratch, item_bytes, widened
from lorakit.core.untrusted import read_json_object
from lorakit.core.weights import HEAD, INDEX, SINGLE, TensorPlace, Weights, header_bytes

CHUNK_ELEMENTS = 2**19
"""Numbers that are computed at once: what memory a merge takes doesn't grow with the model."""

_MIN_ROWS = 16  # of a chunk: matrix products of fewer rows are slow


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    path: Path
    place: TensorPlace

    def rows(self, start: int, stop: int, scratch: Scratch | None = None) -> NDArray[Any]:
        """The numbers of some rows, as fp32 (fp64 of F64); a vector's as a column. In a scratch they stay until its
        thread reads others. Raises ArtifactDamaged, OSError."""
        scratch = scratch or Scratch()
        raw = scratch.array("raw", (stop - start) * self.place.row_bytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.place.start + start * self.place.row_bytes)
            if file.readinto(raw) != len(raw):  # type: ignore[arg-type]
                raise ArtifactDamaged(f"{self.path}: found it cut off, need all of it", "copy it again")
        return widened(raw, self.place.dtype, scratch).reshape(stop - start, -1)

    def all(self) -> NDArray[Any]:
        """All of its numbers: only of an adapter's own, which are small."""
        return self.rows(0, self.place.rows)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Its rows in pieces of about CHUNK_ELEMENTS numbers, as [start, stop)."""
        columns = math.prod(self.place.shape[1:])
        step = max(_MIN_ROWS if len(self.place.shape) > 1 else 1, CHUNK_ELEMENTS // max(1, columns))
        for start in range(0, self.place.rows, step):
            yield start, min(start + step, self.place.rows)


@dataclass(frozen=True)
class Term:
    """+ scale · B·A, of one adapter; `transposed` where the tensor is the other way round."""

    a: Stored
    b: Stored
    scale: float
    transposed: bool
    magnitude: Stored | None

    def factors(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """(left, right) so that left · right has the shape of the tensor; left's rows are the tensor's."""
        a, b = self.a.all(), self.b.all()
        return (a.T, b.T) if self.transposed else (b, a)


@dataclass(frozen=True)
class Rounding:
    """Quantization in training: its kind (`nf4`, `fp4`, `int8`), and the type that the base had before and after it."""

    kind: str
    dtype: str


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model, in the shard and with the type that it is written in."""

    name: str
    shard: str
    dtype: str
    source: Stored
    in_base: Stored | None
    """The same tensor of the base; None for a head that is no longer tied."""
    rounding: Rounding | None = None
    """The quantization that the base's numbers go through first, there and back."""
    terms: tuple[Term, ...] = ()
    rows: tuple[tuple[tuple[int, ...], Stored], ...] = ()
    shifts: tuple[tuple[Stored, float], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.place.shape

    @property
    def size_bytes(self) -> int:
        if self.dtype == self.source.place.dtype:
            return self.source.place.end - self.source.place.start
        return math.prod(self.shape) * item_bytes(self.dtype)

    @property
    def changed(self) -> bool:
        """Whether its numbers differ from the base's."""
        return self._has_changes or self.source != self.in_base

    @property
    def computed(self) -> bool:
        """Whether its bytes aren't simply those of its source."""
        return self._has_changes or self.dtype != self.source.place.dtype

    @property
    def _has_changes(self) -> bool:
        return bool(self.terms or self.rows or self.shifts or self.rounding)


@dataclass(frozen=True)
class Weighted:
    """An adapter, how much of it is added, and what it does to the base."""

    adapter: Adapter
    weight: float
    changes: Sequence[Change]


@dataclass(frozen=True)
class Plan:
    """A merged model before it is written."""

    base: Weights
    adapters: Sequence[Weighted]
    targets: Mapping[str, Target]
    """In the order of the shards and of their bytes."""
    config: Mapping[str, Any]
    dtype: str | None
    rounding: Rounding | None

    @property
    def changed(self) -> list[Target]:
        return [target for target in self.targets.values() if target.changed]

    @property
    def size_bytes(self) -> int:
        return sum(len(self.header(shard)) for shard in self.base.shards) + sum(
            target.size_bytes for target in self.targets.values()
        )

    def shard(self, shard: str) -> list[Target]:
        """The tensors of one shard, in its order."""
        return [target for target in self.targets.values() if target.shard == shard]

    def header(self, shard: str) -> bytes:
        """The beginning of a shard: the base's own, where that still says what comes after it."""
        targets = self.shard(shard)
        places = [(name, place) for name, place in self.base.tensors.items() if place.shard == shard]
        if [(target.name, target.dtype, target.shape) for target in targets] == [
            (name, place.dtype, place.shape) for name, place in places
        ]:
            with (self.base.folder / shard).open("rb") as file:
                return file.read(places[0][1].start)
        return header_bytes((target.name, target.dtype, target.shape) for target in targets)

    def index(self) -> bytes | None:
        """The index of the shards; None for a model in one file."""
        if self.base.shards == [SINGLE]:
            return None
        raw = (self.base.folder / INDEX).read_bytes()
        if all(self._is_laid_out_as_the_base(target) for target in self.targets.values()):
            return raw
        index = read_json_object(self.base.folder / INDEX, "")
        metadata = {"total_size": sum(target.size_bytes for target in self.targets.values())}
        weight_map = {name: target.shard for name, target in sorted(self.targets.items())}
        if "total_parameters" in (index.get("metadata") or {}):
            metadata["total_parameters"] = sum(math.prod(target.shape) for target in self.targets.values())
        return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()

    def _is_laid_out_as_the_base(self, target: Target) -> bool:
        place = self.base.tensors.get(target.name)
        return place is not None and (place.dtype, place.shape) == (target.dtype, target.shape)


def make_plan(base: Weights, weighted: Sequence[Weighted], dtype: str | None, rounding: Rounding | None) -> Plan:
    """The merged model of a base and its adapters; `dtype` (as safetensors call it) of all tensors, or each its own.

    Raises Mismatch, InputRefused (what can't be merged exactly), NonFinite (an adapter's tensor).
    """
    for each in weighted:
        _refuse_not_finite(each.adapter)
        _refuse_not_linear(each, alone=len(weighted) == 1)
    targets = {
        name: Target(name, place.shard, place.dtype, stored, stored)
        for name, place in sorted(base.tensors.items(), key=lambda item: (item[1].shard, item[1].start))
        for stored in [Stored(base.folder / place.shard, place)]
    }
    embedding = targets.get(base.embedding)
    tied = base.is_tied and embedding is not None
    if tied and embedding is not None:
        copy = targets.get(HEAD)
        targets[HEAD] = replace(embedding, name=HEAD, shard=copy.shard if copy else embedding.shard)
    for each in weighted:
        for change in each.changes:
            shares = tied and change.target in (base.embedding, HEAD) and _is_shared(change)
            for name in (base.embedding, HEAD) if shares else (change.target,):
                targets[name] = _changed(targets[name], change, each)
    for target in targets.values():
        _refuse_unfit(target)
    if rounding is not None:
        targets = {name: _rounded(base, target, rounding) for name, target in targets.items()}
    config = dict(base.config)
    if base.config.get("tie_word_embeddings") and not tied:
        _refuse_half_tied(base, targets)
        config["tie_word_embeddings"] = False  # which is how transformers loads it, with a warning
    if tied and not _same(targets[base.embedding], targets[HEAD]):
        config["tie_word_embeddings"] = False
    elif tied and HEAD not in base.tensors:
        del targets[HEAD]
    elif tied and not targets[HEAD].changed:  # a copy that the base holds beside its embedding, and nobody reads
        own = Stored(base.folder / targets[HEAD].shard, base.tensors[HEAD])
        targets[HEAD] = replace(targets[HEAD], source=own, in_base=own)
    if dtype is not None:
        targets = {
            name: replace(target, dtype=dtype) if target.dtype in FRACTION_BITS else target
            for name, target in targets.items()
        }
        config |= {key: CONFIG_NAMES[dtype] for key in ("dtype", "torch_dtype") if key in config}
    rows = {targets[name].shape[0] for name in (base.embedding, HEAD) if name in targets}
    if len(rows) > 1:
        raise Mismatch(
            f"{weighted[0].adapter.folder}: found an embedding and a head of {' and '.join(map(str, sorted(rows)))} "
            "tokens, need both the same",
            "save the adapter with both: model.save_pretrained(DIR, save_embedding_layers=True)",
        )
    if rows and rows != {base.tensors[name].rows for name in (base.embedding,) if name in base.tensors}:
        config["vocab_size"] = rows.pop()
    order = sorted(targets.values(), key=lambda target: (target.shard, _position(base, target)))
    return Plan(base, weighted, {target.name: target for target in order}, config, dtype, rounding)


def _position(base: Weights, target: Target) -> tuple[int, int]:
    """Where a tensor comes in its shard: a head of its own right after the embedding."""
    place = base.tensors.get(target.name)
    return (place.start, 0) if place is not None else (base.tensors[base.embedding].start, 1)


def _is_shared(change: Change) -> bool:
    """Whether a change of the embedding is one of the tied head too, as PEFT loads it."""
    return isinstance(change, TokenRows) or (isinstance(change, Replacement) and change.shared)


def _changed(target: Target, change: Change, each: Weighted) -> Target:
    """The target with one more change. Raises InputRefused where two adapters replace the same."""

    def stored(name: str) -> Stored:
        return Stored(each.adapter.folder / adapters.WEIGHTS, each.adapter.tensors[name])

    if isinstance(change, LoraPair):
        magnitude = stored(change.magnitude) if change.magnitude else None
        transposed = change.transposed
        a, b = stored(change.name_a), stored(change.name_b)
        term = Term(a, b, change.scale * each.weight, transposed, magnitude)
        return replace(target, terms=(*target.terms, term))
    if isinstance(change, BiasShift):
        return replace(target, shifts=(*target.shifts, (stored(change.name), change.scale * each.weight)))
    new = stored(change.name)
    if isinstance(change, TokenRows):
        if (change.rows, new) in target.rows or any(_equal_rows(change.rows, new, rows) for rows in target.rows):
            return target
        taken = {row for rows, _ in target.rows for row in rows}
        if taken & set(change.rows):
            raise _both_replace(target, each, f"row {min(taken & set(change.rows))} of it")
        return replace(target, rows=(*target.rows, (change.rows, new)))
    if _equal(new, target.source):
        return target
    if target.source != target.in_base:
        raise _both_replace(target, each, "all of it")
    if each.weight != 1:
        raise InputRefused(
            f"{each.adapter.folder}: found the weight {each.weight:g} and {target.name} trained whole, need weight 1",
            "leave the weight out",
        )
    return replace(target, source=new)


def _both_replace(target: Target, each: Weighted, what: str) -> InputRefused:
    return InputRefused(
        f"{each.adapter.folder}: found a second adapter that replaces {target.name} ({what}), need one at most",
        "merge one of them",
    )


def _equal_rows(rows: tuple[int, ...], new: Stored, known: tuple[tuple[int, ...], Stored]) -> bool:
    return rows == known[0] and _equal(new, known[1])


def _rounded(base: Weights, target: Target, rounding: Rounding) -> Target:
    """The target over the base as it was trained: linear layers went through quantization, the head did not."""
    is_linear = len(target.shape) == 2 and target.name not in (base.embedding, HEAD)
    return replace(target, rounding=rounding) if is_linear and target.source == target.in_base else target


def _refuse_not_finite(adapter: Adapter) -> None:
    for name, place in adapter.tensors.items():
        if place.dtype not in FRACTION_BITS:
            raise InputRefused(
                f"{adapter.folder}: {name}: found {place.dtype}, need floating-point numbers", "use another adapter"
            )
        stored = Stored(adapter.folder / adapters.WEIGHTS, place)
        if not all(
            np.isfinite(stored.rows(start, stop).sum()) or np.isfinite(stored.rows(start, stop)).all()
            for start, stop in stored.chunks()
        ):
            raise NonFinite(f"{adapter.folder}: {name}: found NaN or infinity, need numbers", "train the adapter again")


def _refuse_not_linear(each: Weighted, *, alone: bool) -> None:
    """What can't be added in parts: DoRA's lengths are those of base + one whole adapter."""
    if each.adapter.config.get("use_dora") and not (alone and each.weight == 1):
        raise InputRefused(
            f"{each.adapter.folder}: found DoRA with a weight or beside another adapter, need it alone and whole",
            "merge it alone and without a weight; then the next adapter into the merged model",
        )
    if each.weight != 1 and any(isinstance(change, TokenRows) for change in each.changes):
        raise InputRefused(
            f"{each.adapter.folder}: found the weight {each.weight:g} and trained tokens, need weight 1 for these",
            "leave the weight out",
        )


def _refuse_unfit(target: Target) -> None:
    for stored in (target.source, target.in_base):
        if target.changed and stored is not None and stored.place.dtype not in FRACTION_BITS:
            raise InputRefused(
                f"{stored.path}: {target.name}: found {stored.place.dtype}, need F32, BF16 or F16",
                "merge into the 16-bit base",
            )


def _refuse_half_tied(base: Weights, targets: Mapping[str, Target]) -> None:
    """A config that ties a head which has numbers of its own: what belongs to both is then anyone's guess."""
    if any(targets[name].changed for name in (base.embedding, HEAD) if name in targets):
        raise InputRefused(
            f"{base.folder}: found tie_word_embeddings beside a head of other numbers than the embedding's, "
            "need one or the other",
            "say in its config.json that tie_word_embeddings is false, which is how it is loaded",
        )


def _same(one: Target, other: Target) -> bool:
    """Whether an embedding and a head get the same numbers."""
    if len(one.terms) != len(other.terms) or len(one.rows) != len(other.rows) or not _equal(one.source, other.source):
        return False
    for mine, its in zip(one.terms, other.terms, strict=True):
        pairs = zip(mine.factors(), its.factors(), strict=True)
        if mine.scale != its.scale or mine.magnitude != its.magnitude:
            return False
        if not all(np.array_equal(left, right) for left, right in pairs):
            return False
    return all(_equal_rows(rows, new, its) for (rows, new), its in zip(one.rows, other.rows, strict=True))


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same numbers, whatever their types."""
    if one == other:
        return True
    if one.place.shape != other.place.shape or not {one.place.dtype, other.place.dtype} <= set(FRACTION_BITS):
        return False
    return all(np.array_equal(one.rows(*chunk), other.rows(*chunk)) for chunk in one.chunks())
