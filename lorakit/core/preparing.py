"""A dataset → blocks: rows are read in order, rendered and tokenized by workers, packed and written as they come.

    sources (raw rows) → records (text, trained spans) → tokenization (token ids) → packing → blocks (shards)

Results are taken in the order of the rows, so the bytes are the same for any number of workers. What is in memory at
once is a few chunks for each worker, a group of documents to pack, and a shard.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from multiprocessing import active_children, connection, forkserver, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core import artifacts, disk, untrusted
from lorakit.core.blocks import BYTES_PER_TOKEN, TEMPLATE, TRAINING, VALIDATION, ShardMaker
from lorakit.core.config import (
    DatasetSection,
    OutputSection,
    PackingSection,
    PrepareConfig,
    PreviewSection,
    RowsSection,
    SplitSection,
    TrainConfig,
    TrainDataSection,
)
from lorakit.core.environment import cache_folder, one_thread_for_tokenizers, usable_cores
from lorakit.core.errors import InputRefused, OutOfMemory, UsageError
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.hub import model_folder
from lorakit.core.packing import Packer, cut
from lorakit.core.readers import Chunk
from lorakit.core.records import COLUMNS, Renderer, detect_format, parse_row
from lorakit.core.sources import Dataset, open_dataset
from lorakit.core.templates import Template, TemplateRefused, builtin_source
from lorakit.core.tokenization import Codec, Document, TokenizerSpec, load_spec

REJECTED = "rejected.jsonl"

_RENDERING = 2
"""Counted up where the same rows become other documents than before, so that earlier blocks aren't taken for theirs."""

_WORTH_A_WORKER_BYTES = 2 * 2**20
_CHUNKS_AHEAD = 3  # for each worker
_LONGEST_REJECTED = 2**20


@dataclass
class Figures:
    """What is counted on the way; figures of parts add up."""

    rows: int = 0
    validation_rows: int = 0
    rejected: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    split: int = 0
    """Rows longer than a block that became several documents."""
    truncated: int = 0
    answers_truncated: int = 0
    """Rows of which tokens that are trained were cut off."""
    pieces_dropped: int = 0
    """Pieces of split rows that hold nothing to train on."""
    ends_trained: int = 0
    """Rows whose last trained token, of what was left of them, is one that ends a turn or text."""
    double_bos: int = 0
    dropped_by_reason: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the power of two that their length doesn't exceed."""
    longest_tokens: int = 0
    longest_row: str = ""

    def add(self, other: "Figures") -> None:
        if other.longest_tokens > self.longest_tokens:
            self.longest_row = other.longest_row
        self.longest_tokens = max(self.longest_tokens, other.longest_tokens)
        for name in (one.name for one in fields(self) if not one.name.startswith("longest")):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Run:
    """Tokens of a previewed row that are all trained, or all not."""

    text: str
    trained: bool
    ids: Sequence[int]


@dataclass(frozen=True)
class Previewed:
    """One row as it is trained."""

    place: str
    runs: Sequence[Run]


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`; `fill` is the share of the blocks' room that holds documents."""

    path: Path
    blocks: int
    validation_blocks: int
    fill: float
    format: str
    template: str
    figures: Mapping[str, Any]
    preview: Sequence[Previewed]
    cached: bool


@dataclass(frozen=True)
class _Work:
    """All that a worker needs to make documents of rows."""

    spec: TokenizerSpec
    format: str
    template: tuple[str, str] | None
    """Source and name; None for plain joining."""
    config: PrepareConfig


@dataclass(frozen=True)
class _Tokenized:
    """The documents of a chunk, end to end; arrays so that little is copied between processes."""

    tokens: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    figures: Figures
    rejected: Sequence[Mapping[str, Any]]
    done_bytes: int

    def documents(self) -> Iterator[tuple[Document, bool]]:
        """Each document, and whether it is held out for validation."""
        ends = np.cumsum(self.lengths).tolist()
        for start, end, held_out in zip([0, *ends], ends, self.held_out.tolist(), strict=False):
            yield Document(self.tokens[start:end], self.trained[start:end]), held_out


def prepare(config: PrepareConfig, report: Report) -> Prepared:
    """Make the blocks folder of a dataset, or find the one that the same request has made before.

    Raises InputRefused (a row that can't be used, nothing to train on), Mismatch (other blocks at the output, data that
    changed while it was read), HubFailed, Busy and DiskFailed. Without an output, a second run of the same request
    waits for the first.
    """
    spec = load_spec(model_folder(config.data.tokenizer), config.tokens.add_tokens)
    dataset, validation = _datasets(config, report)
    if _workers(config, dataset) > 1:
        _start_server()
    sources = [source for source in (dataset, validation) if source is not None]
    stamps = {path: stamp for source in sources for path, stamp in source.stamps().items()}
    parents = {"dataset": dataset.fingerprint(), "tokenizer": spec.fingerprint}
    parents["template"] = artifacts.fingerprint([_RENDERING, *_given_template(config.packing.template)])
    if validation is not None:
        parents["validation dataset"] = validation.fingerprint()
    key = artifacts.fingerprint([artifacts.FORMAT, config.identity(), parents])[:16]
    target = config.output.output or cache_folder() / "blocks" / key
    work = _work(config, spec, dataset, report)
    preview = list(_preview(work, dataset, config.preview.preview))
    with artifacts.lock(target, None if config.output.output else _say_once(report)):
        done = artifacts.claim(target, "blocks", config, parents, overwrite=config.output.overwrite)
        if done is not None:
            found = done.facts_as(Prepared, path=target, preview=[], cached=True)
            artifacts.as_dataclass(Figures, found.figures, target / disk.MANIFEST)  # or refused
            return replace(found, preview=preview)
        facts: dict[str, Any] = {}
        kept = cache_folder() / "rejected" / f"{key}.jsonl"
        files = _files(work, dataset, validation, target, kept, facts, report)

        def check(_stage: Path) -> None:
            disk.require_unchanged(stamps)  # or what was read needn't be what was hashed

        artifacts.commit(target, "blocks", files, config=config, parents=parents, facts=facts, check=check)
    return Prepared(path=target, preview=preview, cached=False, **facts)


def with_blocks(config: TrainConfig, report: Report) -> TrainConfig:
    """Train's settings with blocks: those of its dataset, made or found again, where it names one; raises as `prepare`.
    What made the blocks is in their own settings and no longer in train's, as if they had been given."""
    if not config.data.dataset:
        return config
    request = PrepareConfig(
        data=DatasetSection(dataset=config.data.dataset, tokenizer=config.model.model),
        tokens=config.tokens,
        rows=config.rows,
        held_out=SplitSection(seed=config.batch.seed),
        packing=config.packing,
        output=OutputSection(),
        preview=PreviewSection(),
    )
    made = {"data": TrainDataSection(blocks=(prepare(request, report).path,))}
    return config.model_copy(update={**made, "rows": RowsSection(), "packing": PackingSection()})


def _datasets(config: PrepareConfig, report: Report) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those of --validation-dataset: another split where that is the same dataset."""
    rows, names = config.rows, config.data.dataset
    dataset = open_dataset(names, split=rows.split, subset=rows.subset, revision=rows.revision, report=report)
    if not rows.validation_dataset:
        return dataset, None
    same = set(rows.validation_dataset) <= set(names)
    validation = open_dataset(
        rows.validation_dataset,
        subset=rows.subset if same else None,
        revision=rows.revision if same else None,
        default_splits=("validation", "test", "train"),
        report=report,
    )
    trained_on = {stamp[:2] for stamp in dataset.stamps().values() if stamp is not None}
    for path, stamp in validation.stamps().items():
        if stamp is not None and stamp[:2] in trained_on:
            raise UsageError(
                f"--validation-dataset: found a file that is also trained on ({path}), need others",
                "name other files, or hold rows out with --validation-split",
            )
    return dataset, validation


def _say_once(report: Report) -> Any:
    said: set[str] = set()

    def on_wait(reason: str) -> None:
        if not said:
            report(Notice(f"waiting for another run of the same request: {reason}"))
        said.add(reason)

    return on_wait


# What rows become


def _given_template(name: str) -> tuple[str, str]:
    """The source and name of a template that was asked for; the source is "" for auto, chat and none."""
    if name in ("auto", "chat", "none"):
        return "", name
    if not Path(name).is_absolute():
        return builtin_source(name), name
    try:
        return Path(name).read_text(encoding="utf-8"), Path(name).name
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--template {name}: found {error}, need a Jinja file in UTF-8", "check the file") from None


def _work(config: PrepareConfig, spec: TokenizerSpec, dataset: Dataset, report: Report) -> _Work:
    """Decide by the first row what rows are and how they become text, and say so."""
    row_format: str = config.rows.format
    unknown = [name for name in config.rows.renamed if name not in COLUMNS]
    if unknown and not _of_rows(config, spec):
        raise UsageError(
            f"--columns {unknown[0]}={config.rows.renamed[unknown[0]]}: found the name {unknown[0]}, need one of "
            f"{', '.join(COLUMNS)}",
            "NAME is what a format calls the column; a --template FILE.jinja of rows takes any",
        )
    chunks = dataset.chunks()
    all_bad = False
    if row_format == "auto":
        for place, raw in (found for chunk in chunks for found in _raw_rows(chunk)):
            try:
                row = parse_row(raw, place)
            except InputRefused:
                if config.rows.on_bad_row == "skip":
                    all_bad = True
                    continue
                raise
            all_bad = False
            columns = {**dict.fromkeys(config.rows.renamed), **row.columns}
            row_format = detect_format(columns, place) if not _of_rows(config, spec) else "columns"
            break
        else:
            if not all_bad:
                raise InputRefused(f"{' '.join(dataset.names)}: found no rows, need at least one", "check the files")
            row_format = "text"  # or any other: they are rejected with their reasons when they are read again
    template = _chosen_template(config, spec, row_format)
    how = f", rendered by {'plain joining' if template is None else template[1]}"
    if row_format == "text" or (template is None and row_format in ("messages", "sharegpt")):
        how = ""  # the second can't be, which each row says
    if not all_bad:
        report(Notice(f"read as {row_format} rows{how}"))
    for note in spec.notes:
        report(Notice(note))
    return _Work(spec, row_format, template, config)


def _of_rows(config: PrepareConfig, spec: TokenizerSpec) -> bool:
    source, name = _given_template(config.packing.template)
    return bool(source) and _compiled(source, name, spec).of_rows


def _compiled(source: str, name: str, spec: TokenizerSpec) -> Template:
    try:
        return Template(source, name, spec.variables)
    except TemplateRefused as error:
        raise InputRefused(f"{name}: found {error}, need a Jinja template", "correct it, or choose another") from None


def _chosen_template(config: PrepareConfig, spec: TokenizerSpec, row_format: str) -> tuple[str, str] | None:
    source, name = _given_template(config.packing.template)
    if source:
        _compiled(source, name, spec)
        return source, name
    if name == "chat" and not spec.chat_template:
        raise InputRefused(
            f"{config.data.tokenizer}: found a tokenizer without a chat template, need one for --template chat",
            "choose a --tokenizer that has one, or another --template",
        )
    if name == "none" or row_format == "text":
        return None
    if spec.chat_template:
        return spec.chat_template, "the tokenizer's chat template"
    return (builtin_source("alpaca"), "alpaca") if row_format == "alpaca" else None


class _Maker:
    """Rows → documents, in a worker or in this process."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        self.codec = Codec(work.spec)
        template = _compiled(*work.template, work.spec) if work.template else None
        config = work.config
        self.renderer = Renderer(
            work.format, config.rows.renamed, template, work.spec.end_tokens, config.packing.train_on
        )
        self.end_ids = {self.codec.id_of(token) for token in work.spec.end_tokens}

    def tokenized(self, chunk: Chunk, first_row: int, validation: bool) -> _Tokenized:
        """The documents of a chunk whose first row is the `first_row`-th of the dataset; all held out where
        `validation`. Raises InputRefused at a row that can't be used, unless those are skipped."""
        config, figures = self.work.config, Figures()
        rejected, rendered, kept = [], [], []
        for ordinal, (place, raw) in enumerate(_raw_rows(chunk), first_row):
            figures.rows += 1
            try:
                rendered.append(self.renderer.render(parse_row(raw, place)))
            except InputRefused as error:
                if config.rows.on_bad_row == "stop":
                    raise
                rejected.append({"place": place, "reason": error.message, "row": _as_json(raw)})
                continue
            share = config.rows.validation_split
            held_out = validation or (share > 0 and _drawn(config.held_out.seed, ordinal) < share)
            kept.append((place, held_out))
        figures.rejected = len(rejected)
        documents: list[Document] = []
        held: list[bool] = []
        for (place, held_out), document in zip(kept, self.codec.encode(rendered), strict=True):
            fitting = self._fit(document, place, figures)
            figures.validation_rows += held_out and bool(fitting)
            documents += fitting
            held += [held_out] * len(fitting)
        lengths = [len(document.tokens) for document in documents]
        figures.documents, figures.tokens = len(documents), sum(lengths)
        figures.lengths = Counter(1 << max(length - 1, 0).bit_length() for length in lengths)
        none = Document(np.zeros(0, np.uint32), np.zeros(0, bool))
        trained = np.concatenate([document.trained for document in (none, *documents)])
        figures.trained_tokens = int(trained.sum())
        return _Tokenized(
            np.concatenate([document.tokens for document in (none, *documents)]),
            trained,
            np.array(lengths, dtype=np.int64),
            np.array(held, dtype=bool),
            figures,
            rejected,
            chunk.done_bytes,
        )

    def _fit(self, document: Document, place: str, figures: Figures) -> list[Document]:
        """The documents that a row gives: itself, or what --long makes of one that is longer than a block."""
        packing, tokens = self.work.config.packing, document.tokens
        if len(tokens) > figures.longest_tokens:
            figures.longest_tokens, figures.longest_row = len(tokens), place
        bos_id = self.work.spec.bos_id
        figures.double_bos += bos_id is not None and len(tokens) > 1 and int(tokens[0]) == int(tokens[1]) == bos_id
        pieces = [document]
        if len(tokens) > packing.block_size and packing.pack != "concat":
            if packing.long == "drop":
                figures.dropped_by_reason["longer than a block"] += 1
                return []
            pieces = cut(document, packing.block_size)
            if packing.long == "truncate":
                figures.truncated += 1
                figures.answers_truncated += bool(document.trained[packing.block_size :].any())
                pieces = pieces[:1]
            else:
                figures.split += 1
        useful = [piece for piece in pieces if piece.trained.any()]
        if not useful:
            figures.dropped_by_reason["nothing to train on"] += 1
            return []
        figures.pieces_dropped += len(pieces) - len(useful)
        last_trained = useful[-1].tokens[np.flatnonzero(useful[-1].trained)[-1]]
        figures.ends_trained += int(last_trained) in self.end_ids
        return useful


def _raw_rows(chunk: Chunk) -> Iterator[tuple[str, bytes | Mapping[str, Any]]]:
    """The rows of a chunk with their places, without blank lines."""
    for index, raw in enumerate(chunk.raws):
        if not isinstance(raw, bytes) or raw.strip():
            yield chunk.place(index), raw


def _drawn(seed: int, ordinal: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the row's place in the dataset."""
    digest = hashlib.blake2b(f"{seed}/{ordinal}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _as_json(raw: bytes | Mapping[str, Any]) -> object:
    """A rejected row as it was, or as much of it as is of use."""
    if isinstance(raw, bytes):
        return raw[:_LONGEST_REJECTED].decode(errors="replace").rstrip("\r\n")
    return json.loads(json.dumps(raw, default=str, ensure_ascii=False))


# Reading ahead, in order


def _workers(config: PrepareConfig, dataset: Dataset) -> int:
    return config.rows.num_workers or min(usable_cores(), 1 + dataset.size_bytes // _WORTH_A_WORKER_BYTES)


def _start_server() -> None:
    """A fresh process that forks the workers: this one may have threads (torch's), which don't survive a fork. It
    imports what they need while this process still looks at files."""
    get_context("forkserver").set_forkserver_preload([__name__])
    forkserver.ensure_running()


def _tokenized(work: _Work, dataset: Dataset, validation: bool) -> Iterator[_Tokenized]:
    workers = _workers(work.config, dataset)
    jobs = _jobs(dataset, None if validation else work.config.rows.max_rows, validation)
    if workers == 1:
        maker = _Maker(work)
        yield from (maker.tokenized(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("forkserver"), _start_worker, (work,)) as pool:
        pending: deque[Any] = deque()
        children: list[BaseProcess] = []
        try:
            for job in jobs:
                pending.append(pool.submit(_work_on, *job))
                children = children or active_children()
                if len(pending) > _CHUNKS_AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            pool.shutdown()
            if any(child.exitcode == -signal.SIGPROF for child in children):
                raise InputRefused(
                    f"{' '.join(dataset.names)}: found a row that the template renders without end (over "
                    f"{untrusted.HARD} times the CPU time of a text), need one that it can render",
                    "choose another --template, or look at what it does",
                ) from None
            raise OutOfMemory(
                "found a worker process that was killed, need all of them (memory may have run out)",
                "lower --num-workers",
            ) from None
        except BaseException:  # Ctrl-C, which a worker inside of one instruction doesn't hear of
            for child in children:
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _jobs(dataset: Dataset, max_rows: int | None, validation: bool) -> Iterator[tuple[Chunk, int, bool]]:
    first = 0
    for chunk in dataset.chunks():
        rows = sum(1 for raw in chunk.raws if not isinstance(raw, bytes) or raw.strip())
        if max_rows is not None and first + rows >= max_rows:
            yield _first_rows(chunk, max_rows - first), first, validation
            return
        yield chunk, first, validation
        first += rows


def _first_rows(chunk: Chunk, count: int) -> Chunk:
    raws = []
    for raw in chunk.raws:
        if count == 0:
            break
        count -= not isinstance(raw, bytes) or bool(raw.strip())
        raws.append(raw)
    return Chunk(chunk.name, chunk.first, raws, chunk.in_lines, chunk.done_bytes)


_maker: _Maker | None = None


def _start_worker(work: _Work) -> None:
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    one_thread_for_tokenizers()
    gc.freeze()
    gc.set_threshold(100_000)  # what rows become has no cycles worth looking for as often as every 700 objects
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = _Maker(work)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        signal.raise_signal(signal.SIGTERM)


def _work_on(chunk: Chunk, first_row: int, validation: bool) -> _Tokenized:
    assert _maker is not None
    return _maker.tokenized(chunk, first_row, validation)


# Writing


class _Part:
    """Documents of one part on their way into its files."""

    def __init__(self, name: str, config: PrepareConfig, pad_id: int) -> None:
        size = config.packing.block_size
        self._packer, self.shards = Packer(size, config.packing.pack), ShardMaker(name, size, pad_id)

    def add(self, document: Document) -> Iterator[tuple[str, bytes]]:
        for block in self._packer.add(document):
            yield from self.shards.add(block)

    def rest(self) -> Iterator[tuple[str, bytes]]:
        for block in self._packer.rest():
            yield from self.shards.add(block)
        yield from self.shards.rest()


def _files(
    work: _Work,
    dataset: Dataset,
    validation: Dataset | None,
    target: Path,
    kept: Path,
    facts: dict[str, Any],
    report: Report,
) -> Iterator[tuple[str, disk.Content]]:
    """The files of a blocks folder as they are made; `facts` is filled at the end. Raises InputRefused; where all rows
    are rejected, there is no folder that could hold them, and they are written to `kept`."""
    config, figures, started = work.config, Figures(), time.monotonic()
    parts = [_Part(name, config, work.spec.pad_id) for name in (TRAINING, VALIDATION)]
    room_checked, first_reason = False, ""
    total_mib = (dataset.size_bytes + (validation.size_bytes if validation else 0)) / 2**20
    with tempfile.TemporaryFile() as rejected, contextlib.ExitStack() as stack:
        before_bytes = 0
        for source, held_out in ((dataset, False), (validation, True)):
            if source is None:
                continue
            results = _tokenized(work, source, held_out)
            stack.callback(results.close)  # type: ignore[attr-defined]
            for result in results:
                figures.add(result.figures)
                first_reason = first_reason or (str(result.rejected[0]["reason"]) if result.rejected else "")
                rejected.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in result.rejected)
                for document, is_held_out in result.documents():
                    for file in parts[is_held_out].add(document):
                        if not room_checked:
                            _require_room(target, figures.tokens, result.done_bytes, source.size_bytes)
                            room_checked = True
                        yield file
                done_mib = (before_bytes + result.done_bytes) / 2**20
                rate = figures.tokens / (time.monotonic() - started)
                note = f"{figures.rows:,} rows, {rate:,.0f} tokens/s"
                report(Progress("preparing", round(done_mib), max(round(total_mib), 1), "MiB", note))
            before_bytes += source.size_bytes
        for part in parts:
            yield from part.rest()
        if figures.rejected:
            rejected.seek(0)
            pieces = iter(lambda: rejected.read(2**20), b"")
            if figures.rejected == figures.rows:
                disk.make_folder(kept.parent)
                disk.write_file(kept, pieces)
                rows = f"{' '.join(dataset.names)}: found {_counted(figures.rows, 'row')}"
                raise InputRefused(
                    f"{rows}, all rejected, need one to train on; the first: {first_reason}",
                    f"all of them stand in {kept}, each with its reason",
                )
            yield REJECTED, pieces
    training, held = (part.shards.num_blocks for part in parts)
    share = config.rows.validation_split
    if share and held and not training and validation is None:
        raise InputRefused(
            f"{' '.join(dataset.names)}: found {_counted(figures.rows, 'row')}, all that can be used held out by "
            f"--validation-split {share:g}, need one to train on",
            "lower --validation-split, or give more rows",
        )
    _refuse_nothing(dataset, figures, training)
    if share and not held:
        report(Notice(f"--validation-split {share:g} held out none of {_counted(figures.rows, 'row')}"))
    yield from _template_file(work)
    room_tokens = (training + held) * config.packing.block_size
    facts |= {
        "blocks": training,
        "validation_blocks": held,
        "fill": figures.tokens / room_tokens,
        "format": work.format,
        "template": "plain joining" if work.template is None else work.template[1],
        "figures": {
            **vars(figures),
            "dropped_by_reason": dict(figures.dropped_by_reason),
            "lengths": {str(length): figures.lengths[length] for length in sorted(figures.lengths)},
        },
    }


def _require_room(target: Path, tokens: int, done_bytes: int, size_bytes: int) -> None:
    """Raises DiskFailed early where what is to come won't fit beside `target`, by what came of the first part."""
    disk.require_free_bytes(target, round(tokens * size_bytes / max(done_bytes, 1) * BYTES_PER_TOKEN))


def _refuse_nothing(dataset: Dataset, figures: Figures, blocks: int) -> None:
    if figures.trained_tokens and blocks:
        return
    reasons = figures.dropped_by_reason | Counter({"rejected": figures.rejected})
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    rows = f"{' '.join(dataset.names)}: found {_counted(figures.rows, 'row')}"
    raise InputRefused(
        f"{rows} with no token to train on ({why}), need at least one",
        "check that the files have rows, that completions aren't empty and that --block-size holds them",
    )


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _template_file(work: _Work) -> Iterator[tuple[str, bytes]]:
    """What makes chat ask as rows were rendered, where that isn't the tokenizer's own template."""
    if work.format == "text" or (work.template and work.template[0] == work.spec.chat_template):
        return
    begin = "{{ bos_token }}" if work.spec.bos_id is not None else ""
    source = begin + _PLAIN if work.template is None else work.template[0]
    if not _compiled(source, "template", work.spec).of_rows:
        yield TEMPLATE, source.encode()


_PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""Plain joining as a chat template."""


# Rows as questions


@dataclass(frozen=True)
class Question:
    """A row to be answered: the tokens before its completion, those of training, and the completion itself."""

    place: str
    prompt_ids: Sequence[int]
    completion: str


def questions(config: PrepareConfig, report: Report) -> list[Question]:
    """The rows of a dataset, each up to its last completion. Raises InputRefused (no rows, one without a prompt or a
    completion, one that can't be rendered) and what opening a dataset raises."""
    spec = load_spec(model_folder(config.data.tokenizer), config.tokens.add_tokens)
    dataset, _ = _datasets(config, report)
    work = _work(config, spec, dataset, report)
    maker, found = _Maker(work), []
    for place, raw in itertools.islice(
        (row for chunk in dataset.chunks() for row in _raw_rows(chunk)), config.rows.max_rows
    ):
        rendered = maker.renderer.render(parse_row(raw, place))
        start, end = rendered.spans[-1] if work.format != "text" else (0, 0)
        if start == 0:
            raise InputRefused(
                f"{place}: found no prompt with a completion, need both",
                "name their columns: --columns prompt=COLUMN,completion=COLUMN",
            )
        document = next(maker.codec.encode([replace(rendered, spans=((start, end),))]))
        completion = rendered.text[start:end].rstrip()
        ending = next((token for token in spec.end_tokens if completion.endswith(token)), "")
        prompt_ids = document.tokens[: int(document.trained.argmax())].tolist()
        found.append(Question(place, prompt_ids, completion.removesuffix(ending).strip()))
    return found


# Preview


def _preview(work: _Work, dataset: Dataset, count: int) -> Iterator[Previewed]:
    """The first rows as they are trained; bad ones are passed over here."""
    if not count:
        return
    maker = _Maker(work)
    for chunk in dataset.chunks():
        for place, raw in _raw_rows(chunk):
            try:
                rendered = maker.renderer.render(parse_row(raw, place))
            except InputRefused:
                continue
            document = next(maker.codec.encode([rendered]))
            yield Previewed(place, list(_runs(maker.codec, document)))
            count -= 1
            if not count:
                return


def _runs(codec: Codec, document: Document) -> Iterator[Run]:
    edges = [0, *(np.flatnonzero(np.diff(document.trained)) + 1).tolist(), len(document.tokens)]
    for start, end in itertools.pairwise(edges):
        ids = document.tokens[start:end].tolist()
        yield Run(codec.decode(ids), bool(document.trained[start]), ids)
