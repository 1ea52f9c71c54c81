"""Text → tokens → packed blocks of one length, as safetensors shards that anyone can read without torch.

A shard holds, for N blocks of `block_size` tokens:

    tokens    uint32 [N, block_size]   token ids
    trained   uint8  [N, block_size]   1 where the prediction of this token counts in the loss
    document  uint16 [N, block_size]   which document of the block a token belongs to; padding is a document of its own

Shapes by suffix: B blocks, T tokens of a block.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lorakit.core import artifacts, disk
from lorakit.core.config import PrepareConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import ArtifactDamaged, InputRefused, disk_failed
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.records import RenderChat, Rendered, detect_format, read_rows, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARD_BYTES = 64 * 2**20
_BYTES_PER_TOKEN = 4 + 1 + 2
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Document:
    """Token ids and which of them are trained, for one document of at most a block. The first is never trained."""

    tokens: NDArray[np.uint32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`; `fill` is the share of the blocks' room that holds documents."""

    path: Path
    blocks: int
    tokens: int
    trained_tokens: int
    fill: float
    rows: int
    dropped: int
    truncated: int
    cached: bool


@dataclass(frozen=True)
class Batch:
    """Blocks for one micro-step. `trained_BT` is False at the first token of every document."""

    ids_BT: NDArray[np.int64]
    positions_BT: NDArray[np.int64]
    trained_BT: NDArray[np.bool_]

    @property
    def trained_tokens(self) -> int:
        return int(self.trained_BT.sum())


class Codec:
    """A tokenizer as this room needs it: chat template, special tokens, ids with character offsets."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputRefused(
                f"{tokenizer.name_or_path}: found a tokenizer without tokenizer.json, need a fast one",
                "choose a --tokenizer that has a tokenizer.json",
            )
        backend.no_padding()
        backend.no_truncation()
        self._tokenizer, self._backend = tokenizer, backend
        self.eos_id = tokenizer.eos_token_id
        first = list(tokenizer("a").input_ids)[:1]
        self.bos_id = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        """The begin token, where this tokenizer puts one before a text."""
        self.pad_id = next((x for x in (tokenizer.pad_token_id, self.eos_id) if x is not None), 0)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.end_tokens = sorted({*special, *([tokenizer.eos_token] if tokenizer.eos_token else [])})

    @property
    def render_chat(self) -> RenderChat | None:
        """The chat template, or None. It raises ValueError where it refuses messages."""
        if not self._tokenizer.chat_template:
            return None
        from jinja2 import TemplateError

        def render_chat(messages: Sequence[Any], open_turn: bool) -> str:
            try:
                return str(
                    self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn)
                )
            except (TemplateError, TypeError) as error:
                raise ValueError(str(error)) from None

        return render_chat

    @property
    def fingerprint(self) -> str:
        """The hash of all that decides which tokens a row becomes."""
        parts = [self._backend.to_str(), self._tokenizer.chat_template, self.bos_id, self.eos_id, self.pad_id]
        return artifacts.fingerprint(parts)

    def encode(self, rendered: Sequence[Rendered]) -> Iterator[Document]:
        """Token ids and trained tokens of texts: a token is trained where it overlaps a trained span."""
        encodings = self._backend.encode_batch([text.text for text in rendered], add_special_tokens=False)
        for text, encoding in zip(rendered, encodings, strict=True):
            ids = list(encoding.ids)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            trained = np.zeros(len(ids), dtype=bool)
            for start, end in text.spans:
                trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
            if text.needs_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
                ids, trained = [self.bos_id, *ids], np.concatenate(([False], trained))
            if text.needs_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
                ids, trained = [*ids, self.eos_id], np.concatenate((trained, [True]))
            trained[:1] = False  # nothing comes before it that could predict it
            yield Document(np.array(ids, dtype=np.uint32), trained)


def prepare(config: PrepareConfig, tokenizer: "PreTrainedTokenizerBase", report: Report) -> Prepared:
    """Make the blocks folder of a dataset, or find the one that the same request has made before.

    Raises InputRefused (a row that can't be used, nothing to train on), Mismatch (other blocks at the output),
    Busy and DiskFailed.
    """
    codec = Codec(tokenizer)
    dataset = config.data.dataset
    if not dataset.is_file():
        next(read_rows(dataset), None)  # explains what is wrong with it
    try:
        parents = {"dataset": disk.sha256(dataset), "tokenizer": codec.fingerprint}
    except OSError as error:
        raise disk_failed(error, dataset) from error
    key = artifacts.fingerprint([artifacts.FORMAT, config.identity(), parents])[:16]
    target = config.output.output or cache_folder() / "blocks" / key
    with artifacts.lock(target):
        done = artifacts.claim(target, "blocks", config, parents, overwrite=config.output.overwrite)
        if done is not None:
            return Prepared(path=target, **done.facts, cached=True)
        counts = {"rows": 0, "dropped": 0, "truncated": 0}
        documents = list(_documents(config, codec, counts, report))
        trained_tokens = sum(int(document.trained.sum()) for document in documents)
        if not trained_tokens:
            raise InputRefused(
                f"{dataset}: found {counts['rows']} rows with no token to train on, need at least one",
                "check that the file has rows, that completions aren't empty and that --block-size holds them",
            )
        size = config.packing.block_size
        bins = pack([len(document.tokens) for document in documents], size, shared=config.packing.pack == "best-fit")
        tokens = sum(len(document.tokens) for document in documents)
        facts: dict[str, Any] = {
            "blocks": len(bins),
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "fill": tokens / (len(bins) * size),
            **counts,
        }
        disk.require_free_bytes(target, len(bins) * size * _BYTES_PER_TOKEN)
        shards = _shards(documents, bins, size, codec.pad_id)
        artifacts.commit(target, "blocks", shards, config=config, parents=parents, facts=facts)
    return Prepared(path=target, **facts, cached=False)


def _documents(config: PrepareConfig, codec: Codec, counts: dict[str, int], report: Report) -> Iterator[Document]:
    packing = config.packing
    rows = read_rows(config.data.dataset)
    row_format = None
    render_chat = None if packing.template == "none" else codec.render_chat
    if packing.template == "chat" and render_chat is None:
        raise InputRefused(
            f"{config.data.tokenizer}: found a tokenizer without a chat template, need one for --template chat",
            "choose a --tokenizer that has one, or --template none",
        )
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        if row_format is None:
            row_format = detect_format(chunk[0])
            how = "the tokenizer's chat template" if render_chat and row_format != "text" else "plain joining"
            report(Notice(f"read as {row_format} rows, rendered by {how}"))
            if codec.eos_id is None:
                report(Notice("the tokenizer has no end token: where rows lack one, nothing teaches the model to stop"))
        rendered = [render(row, row_format, render_chat, codec.end_tokens, packing.train_on) for row in chunk]
        for document in codec.encode(rendered):
            yield from _fit(document, config, counts)
        counts["rows"] += len(chunk)
        report(Progress("preparing", counts["rows"], None, "rows"))


def _fit(document: Document, config: PrepareConfig, counts: dict[str, int]) -> Iterator[Document]:
    """The documents that a row gives: itself, or what --long makes of one that is longer than a block."""
    size = config.packing.block_size
    pieces = [document]
    if len(document.tokens) > size:
        if config.packing.long == "drop":
            pieces = []
        else:
            cuts = range(0, len(document.tokens), size)
            pieces = [Document(document.tokens[cut : cut + size], document.trained[cut : cut + size]) for cut in cuts]
        if config.packing.long == "truncate":
            pieces = pieces[:1]
            counts["truncated"] += 1
    useful = []
    for piece in pieces:
        trained = piece.trained.copy()
        trained[:1] = False
        if trained.any():
            useful.append(Document(piece.tokens, trained))
    counts["dropped"] += not useful
    yield from useful


def pack(lengths: Sequence[int], size: int, *, shared: bool = True) -> list[list[int]]:
    """Indices of documents for each block: best-fit decreasing, or one document a block.

    Every document goes into the fullest block that still holds it, longest first (D. S. Johnson, "Near-optimal bin
    packing algorithms", 1973); blocks of equal room are taken last made first, so that the result is determined.
    """
    if not shared:
        return [[index] for index in range(len(lengths))]
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of bins_by_room, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(bins), size
            bins.append([])
        else:
            room = rooms[place]
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room]
                rooms.pop(place)
        bins[chosen].append(index)
        left = room - length
        if left:
            if left not in bins_by_room:
                bins_by_room[left] = []
                bisect.insort(rooms, left)
            bins_by_room[left].append(chosen)
    return bins


def _shards(
    documents: Sequence[Document], bins: Sequence[Sequence[int]], size: int, pad_id: int
) -> Iterable[tuple[str, bytes]]:
    per_shard = max(1, _SHARD_BYTES // (size * _BYTES_PER_TOKEN))
    for number, first in enumerate(range(0, len(bins), per_shard)):
        chosen = bins[first : first + per_shard]
        tokens = np.full((len(chosen), size), pad_id, dtype=np.uint32)
        trained = np.zeros((len(chosen), size), dtype=np.uint8)
        document = np.zeros((len(chosen), size), dtype=np.uint16)
        for row, members in enumerate(chosen):
            at = 0
            for order, index in enumerate(members):
                end = at + len(documents[index].tokens)
                tokens[row, at:end] = documents[index].tokens
                trained[row, at:end] = documents[index].trained
                document[row, at:end] = order
                at = end
            document[row, at:] = len(members)
        yield f"blocks-{number:05d}.safetensors", save({"tokens": tokens, "trained": trained, "document": document})


class Blocks:
    """A blocks folder, read block by block."""

    def __init__(self, folder: Path) -> None:
        """Raises InputRefused where `folder` is no blocks folder, ArtifactDamaged where it isn't whole."""
        self.artifact = artifacts.open_artifact(folder, "blocks")
        self.size = int(self.artifact.config["block_size"])
        self._shards, self._firsts = [], [0]
        for name in sorted(name for name in self.artifact.manifest["files"] if name.endswith(".safetensors")):
            try:
                shard = safe_open(folder / name, framework="numpy")
                shapes = {key: shard.get_slice(key).get_shape() for key in ("tokens", "trained", "document")}
            except (SafetensorError, OSError) as error:
                raise ArtifactDamaged(
                    f"{folder / name}: found {error}, need blocks", "run `lorakit prepare` again"
                ) from None
            rows = shapes["tokens"][0]
            if set(map(tuple, shapes.values())) != {(rows, self.size)}:
                raise ArtifactDamaged(
                    f"{folder / name}: found shapes {shapes}, need [blocks, {self.size}]", "run `lorakit prepare` again"
                )
            self._shards.append({key: shard.get_slice(key) for key in shapes})
            self._firsts.append(self._firsts[-1] + rows)

    def __len__(self) -> int:
        return self._firsts[-1]

    def arrays(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.uint16]]:
        """tokens, trained and document of one block, each [block_size]."""
        number = bisect.bisect_right(self._firsts, index) - 1
        shard, row = self._shards[number], index - self._firsts[number]
        return shard["tokens"][row], shard["trained"][row], shard["document"][row]

    def largest_id(self) -> int:
        """The largest token id of all blocks."""
        return max(int(shard["tokens"][:].max()) for shard in self._shards)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The blocks of a micro-step, with positions that restart at every document."""
        blocks = [self.arrays(index) for index in indices]
        document = np.stack([block[2] for block in blocks])
        starts = np.ones_like(document, dtype=bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        ramp = np.arange(self.size)[None, :]
        positions = ramp - np.maximum.accumulate(np.where(starts, ramp, 0), axis=1)
        trained = np.stack([block[1] for block in blocks]).astype(bool) & ~starts
        return Batch(np.stack([block[0] for block in blocks]).astype(np.int64), positions, trained)
