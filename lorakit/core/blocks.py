"""Packed blocks of one length on disk, as safetensors shards that anyone can read without torch.

A shard holds, for N blocks of `block_size` tokens:

    tokens    uint32 [N, block_size]   token ids
    trained   uint8  [N, block_size]   1 where the prediction of this token counts in the loss
    document  uint16 [N, block_size]   which document of the block a token belongs to; padding is a document of its own

`blocks-*.safetensors` are for training, `validation-*.safetensors` are held out.
Shapes by suffix: B blocks, T tokens of a block.
"""

import bisect
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lorakit.core import artifacts
from lorakit.core.artifacts import Artifact
from lorakit.core.errors import ArtifactDamaged, InputRefused, Mismatch, UsageError
from lorakit.core.tokenization import Document
from lorakit.core.weights import read_header

TRAINING, VALIDATION = "blocks", "validation"
TEMPLATE = "template.jinja"
"""The chat template that rows were rendered by, where it isn't the tokenizer's own."""

_SHARD_BYTES = 64 * 2**20
_READ_BLOCKS = 256  # at a time, where all are looked through
BYTES_PER_TOKEN = 4 + 1 + 2
_DTYPES = {"tokens": "U32", "trained": "U8", "document": "U16"}


@dataclass(frozen=True)
class Batch:
    """Blocks for one micro-step. `trained_BT` is False at the first token of every document."""

    ids_BT: NDArray[np.int64]
    positions_BT: NDArray[np.int64]
    trained_BT: NDArray[np.bool_]

    @cached_property
    def ends(self) -> NDArray[np.int32]:
        """0, and where each document of the rows end to end has its end."""
        starts = np.flatnonzero(self.positions_BT == 0)
        return np.append(starts, self.positions_BT.size).astype(np.int32)

    @cached_property
    def predicting(self) -> NDArray[np.int64]:
        """Where in the rows end to end the prediction of a trained token is made: one before it."""
        return np.flatnonzero(np.pad(self.trained_BT[:, 1:], ((0, 0), (0, 1))))

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.ends).max())

    @property
    def trained_tokens(self) -> int:
        return int(self.trained_BT.sum())

    @property
    def fingerprint(self) -> str:
        """The hash of everything in it."""
        arrays = (self.ids_BT, self.positions_BT, self.trained_BT)
        digests = [hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for array in arrays]
        return artifacts.fingerprint([self.ids_BT.shape, digests])


class ShardMaker:
    """Takes the documents of one block after the other and gives the files of a part, name and bytes."""

    def __init__(self, part: str, size: int, pad_id: int) -> None:
        self._part, self._size, self._pad_id = part, size, pad_id
        self._per_shard = max(1, _SHARD_BYTES // (size * BYTES_PER_TOKEN))
        self._waiting: list[Sequence[Document]] = []
        self._num_shards = 0
        self.num_blocks = 0

    def add(self, block: Sequence[Document]) -> Iterator[tuple[str, bytes]]:
        self._waiting.append(block)
        self.num_blocks += 1
        if len(self._waiting) == self._per_shard:
            yield from self.rest()

    def rest(self) -> Iterator[tuple[str, bytes]]:
        """The last file, which may be a short one."""
        if self._waiting:
            name = f"{self._part}-{self._num_shards:05d}.safetensors"
            blocks, self._waiting = self._waiting, []
            self._num_shards += 1
            yield name, _shard(blocks, self._size, self._pad_id)


def _shard(blocks: Sequence[Sequence[Document]], size: int, pad_id: int) -> bytes:
    tokens = np.full((len(blocks), size), pad_id, dtype=np.uint32)
    trained = np.zeros((len(blocks), size), dtype=np.uint8)
    document = np.zeros((len(blocks), size), dtype=np.uint16)
    for row, members in enumerate(blocks):
        at = 0
        for order, member in enumerate(members):
            end = at + len(member.tokens)
            tokens[row, at:end] = member.tokens
            trained[row, at:end] = member.trained
            document[row, at:end] = order
            at = end
        document[row, at:] = len(members)
    return save({"tokens": tokens, "trained": trained, "document": document})


class Blocks:
    """One part of one or more blocks folders, read block by block, a folder after the other."""

    def __init__(self, folders: Path | Sequence[Path], part: str = TRAINING) -> None:
        """Raises InputRefused where a folder is no blocks folder, ArtifactDamaged where one isn't whole, Mismatch where
        they are of different sizes or tokenizers, UsageError where one is named twice."""
        folders = [folders] if isinstance(folders, Path) else list(folders)
        self.artifacts = [artifacts.open_artifact(folder, "blocks") for folder in folders]
        for number, artifact in enumerate(self.artifacts):
            if any(artifact.path.samefile(other.path) for other in self.artifacts[:number]):
                raise UsageError(
                    f"--blocks: found {artifact.path} twice, need each folder once",
                    "leave one out; --epochs says how often blocks are trained on",
                )
            if type(artifact.config.get("block_size")) is not int or "tokenizer" not in artifact.parents:
                raise InputRefused(
                    f"{artifact.path}: found blocks without their size or tokenizer, need those of lorakit's",
                    "don't use this folder: someone made its manifest by hand",
                )
        self.size = int(self._common("block size", lambda artifact: artifact.config["block_size"]))
        self.tokenizer = str(self._common("tokenizer", lambda artifact: artifact.parents["tokenizer"]))
        self.template = self._common("template", _template)
        self._open(part)

    def of(self, part: str) -> "Blocks":
        """Another part of the same folders, whose files aren't hashed again."""
        other = copy.copy(self)
        other._open(part)
        return other

    def _open(self, part: str) -> None:
        self._shards: list[Mapping[str, Any]] = []
        self._firsts = [0]
        for artifact in self.artifacts:
            names = [name for name in artifact.manifest["files"] if name.startswith(f"{part}-")]
            for name in sorted(names):
                self._add_shard(artifact.path / name)

    def _common(self, what: str, value_of: Callable[[Artifact], Any]) -> Any:
        values = [value_of(artifact) for artifact in self.artifacts]
        for artifact, value in zip(self.artifacts, values, strict=True):
            if value != values[0]:
                raise Mismatch(
                    f"{artifact.path}: found blocks of another {what} than those of {self.artifacts[0].path}, "
                    "need the same",
                    "prepare all parts with the same --tokenizer, --block-size and --template",
                )
        return values[0]

    def _add_shard(self, path: Path) -> None:
        hint = "run `lorakit prepare` again"
        places = read_header(path)
        rows = places["tokens"].rows if "tokens" in places else 0
        found = {key: (place.dtype, *place.shape) for key, place in places.items()}
        if found != {key: (dtype, rows, self.size) for key, dtype in _DTYPES.items()}:
            raise ArtifactDamaged(f"{path}: found {found}, need {', '.join(_DTYPES)} of [blocks, {self.size}]", hint)
        try:
            shard = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ArtifactDamaged(f"{path}: found {error}, need blocks", hint) from None
        self._shards.append({key: shard.get_slice(key) for key in places})
        self._firsts.append(self._firsts[-1] + rows)

    def __len__(self) -> int:
        return self._firsts[-1]

    @property
    def path(self) -> Path:
        """The first folder, for messages."""
        return self.artifacts[0].path

    @property
    def fingerprint(self) -> str:
        """The hash of the content of all folders."""
        one = [artifact.fingerprint for artifact in self.artifacts]
        return one[0] if len(one) == 1 else artifacts.fingerprint(one)

    def arrays(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.uint16]]:
        """tokens, trained and document of one block, each [block_size]."""
        number = bisect.bisect_right(self._firsts, index) - 1
        shard, row = self._shards[number], index - self._firsts[number]
        return shard["tokens"][row], shard["trained"][row], shard["document"][row]

    def largest_id(self) -> int:
        """The largest token id of all blocks, 0 where there are none."""
        return max(
            (int(shard["tokens"][:].max()) for shard in self._shards if shard["tokens"].get_shape()[0]), default=0
        )

    def largest_position(self, *, trained: bool) -> int:
        """The last place in a document that any token of the blocks has, counted from 0; with `trained` only of tokens
        that are predicted, so not of padding. 0 where there are none."""
        found = 0
        for first in range(0, len(self), _READ_BLOCKS):
            batch = self.batch(range(first, min(first + _READ_BLOCKS, len(self))))
            positions = batch.positions_BT[batch.trained_BT] if trained else batch.positions_BT
            found = max(found, int(positions.max(initial=0)))
        return found

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


def _template(artifact: Artifact) -> str | None:
    """The template that the rows of a blocks folder were rendered by; None for the tokenizer's own."""
    path = artifact.path / TEMPLATE
    return path.read_text(encoding="utf-8") if TEMPLATE in artifact.manifest["files"] else None
