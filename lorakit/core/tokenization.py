"""A tokenizer as blocks need it: text with trained spans → token ids and which of them are trained.

What a model's tokenizer is, only transformers knows, and importing it takes seconds. So what it said is kept in the
cache, under the content of the tokenizer's files and the versions that read them; the next time `tokenizers` is enough.
"""

import contextlib
import importlib.metadata
import itertools
import json
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core import artifacts, disk
from lorakit.core.environment import cache_folder
from lorakit.core.errors import InputRefused, LorakitError, disk_failed, first_line
from lorakit.core.records import Rendered
from lorakit.core.templates import Template
from lorakit.core.untrusted import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "config.json", "vocab.*")
_MORE_FILES = ("merges.txt", "spiece.model", "additional_chat_templates/*.jinja")
_FORMAT = 2
MAX_BYTES = 128 * 2**20
"""Of a file of a tokenizer: the largest tokenizer.json have a third of it."""
_MAX_ID = 2**24
_WORTH_A_BEGINNING = 16  # texts

_Encoded = tuple[NDArray[np.uint32], NDArray[np.bool_]]
"""Token ids and which of them are trained."""


@dataclass(frozen=True)
class Document:
    """Token ids and which of them are trained. The first is never trained: nothing comes before it to predict it."""

    tokens: NDArray[np.uint32]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class TokenizerSpec:
    """All that decides which tokens a row becomes, as JSON can hold it."""

    backend: str
    """The tokenizer of the `tokenizers` library, as its JSON."""
    chat_template: str | None
    variables: Mapping[str, Any]
    """Special tokens by name (`bos_token`, …), as chat templates use them."""
    bos_id: int | None
    """The begin token, where this tokenizer puts one before a text."""
    eos_id: int | None
    pad_id: int
    end_tokens: Sequence[str]
    """The texts of the special tokens, each of which can end a turn."""
    notes: Sequence[str]
    """What is unusual and done about."""

    @property
    def fingerprint(self) -> str:
        return artifacts.fingerprint({**asdict(self), "notes": None})


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers' own progress bars and advice kept off the terminal: lorakit shows what matters itself."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)


def load_tokenizer(folder: Path, add_tokens: Sequence[str] = ()) -> "PreTrainedTokenizerBase":
    """The tokenizer in a model folder, with new tokens where some are added.

    Raises InputRefused: no tokenizer, or one that knows such a token already.
    """
    from transformers import AddedToken, AutoTokenizer

    _refuse_unusable(folder / "tokenizer.json")
    with _of_strangers(folder):
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
    known = [token for at, token in enumerate(add_tokens) if token in vocabulary or token in add_tokens[:at]]
    if known:
        raise InputRefused(
            f"add_tokens: found {', '.join(map(repr, known))} in the tokenizer already, need new ones",
            "leave them out of --add-tokens",
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in add_tokens])
    return tokenizer


def _refuse_unusable(path: Path) -> None:
    """Raises InputRefused for a vocabulary that the library takes and makes something else of: ids that it would make
    gigabytes of, ids that mean two things."""
    if not path.exists():
        return
    hint = "download it again"
    content = read_json_object(path, hint, MAX_BYTES)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    tokens = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    for token in added if isinstance(added, list) else []:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str):
            raise InputRefused(f"{path}: found the added token {repr(token)[:60]}, need its content and id", hint)
        if not isinstance(vocabulary, dict) or text not in vocabulary:
            tokens.append((text, token.get("id")))
    meanings: dict[int, Any] = {}
    for text, number in tokens:
        if type(number) is not int or not 0 <= number < _MAX_ID:
            raise InputRefused(
                f"{path}: found {repr(text)[:60]} with the id {repr(number)[:60]}, need a number below {_MAX_ID:,}",
                hint,
            )
        if meanings.setdefault(number, text) != text:
            both = f"{repr(meanings[number])[:60]} and {repr(text)[:60]}"
            raise InputRefused(f"{path}: found the id {number} for {both}, need one token an id", hint)


@contextlib.contextmanager
def _of_strangers(place: object) -> Iterator[None]:
    """What transformers and tokenizers say of files that they can't use, as InputRefused: they raise what comes, also
    Exception itself."""
    try:
        yield
    except (LorakitError, MemoryError):
        raise
    except Exception as error:
        raise InputRefused(
            f"{place}: found no tokenizer that transformers can load ({first_line(error)}), need one",
            "give a folder that holds tokenizer.json and tokenizer_config.json",
        ) from None


def tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    """What `save_pretrained` writes for a tokenizer, name → bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def load_spec(folder: Path, add_tokens: Sequence[str] = ()) -> TokenizerSpec:
    """The tokenizer of a model folder with new tokens, from the cache where the same files were read before.

    Raises InputRefused where there is none that transformers can load, DiskFailed.
    """
    kept = cache_folder() / "tokenizers" / f"{_key(folder, add_tokens)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(kept.read_bytes())
        if artifacts.fingerprint(content["spec"]) == content["sha256"]:
            return TokenizerSpec(**content["spec"])
    spec = spec_of(load_tokenizer(folder, add_tokens))
    content = {"spec": asdict(spec), "sha256": artifacts.fingerprint(asdict(spec))}
    with contextlib.suppress(LorakitError):  # a cache that can't be written costs time, nothing else
        disk.make_folder(kept.parent)
        disk.write_file(kept, json.dumps(content).encode())
    return spec


def _key(folder: Path, add_tokens: Sequence[str]) -> str:
    """The hash of every file that transformers may read for a tokenizer, of new tokens, and of the versions that do."""
    try:
        paths = sorted(path for pattern in (*_FILES, *_MORE_FILES) for path in folder.glob(pattern) if path.is_file())
        hashes = {str(path.relative_to(folder)): disk.sha256(path) for path in paths}
    except OSError as error:
        raise disk_failed(error, folder) from error
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    return artifacts.fingerprint([_FORMAT, hashes, versions, list(add_tokens)])


def spec_of(tokenizer: "PreTrainedTokenizerBase") -> TokenizerSpec:
    """What blocks need of a tokenizer of transformers. Raises InputRefused where it has no `tokenizers` backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputRefused(
            f"{tokenizer.name_or_path}: found a tokenizer without tokenizer.json, need a fast one",
            "choose a --tokenizer that has a tokenizer.json",
        )
    with _of_strangers(tokenizer.name_or_path):
        return _spec_of(tokenizer, backend)


def _spec_of(tokenizer: "PreTrainedTokenizerBase", backend: Any) -> TokenizerSpec:
    backend.no_padding()
    backend.no_truncation()
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    notes = []
    if eos_id is None:
        notes.append("the tokenizer has no end token: where rows lack one, nothing teaches the model to stop")
    if eos_id is None and pad_id is None:
        notes.append("the tokenizer has no padding token: token 0 fills blocks, where nothing is trained or seen")
    starts_with_bos = list(tokenizer("a").input_ids)[:1] == [tokenizer.bos_token_id]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return TokenizerSpec(
        backend=backend.to_str(),
        chat_template=_text(tokenizer.get_chat_template()) if tokenizer.chat_template else None,
        variables={name: _plain(value) for name, value in tokenizer.special_tokens_map.items()},
        bos_id=tokenizer.bos_token_id if starts_with_bos else None,
        eos_id=eos_id,
        # the end token first: padding tokens that were added to a tokenizer often lie beyond the model's embedding
        pad_id=next((token for token in (eos_id, pad_id) if token is not None), 0),
        end_tokens=sorted({*special, *([tokenizer.eos_token] if tokenizer.eos_token else [])}),
        notes=notes,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a chat template that is {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    return [str(part) for part in value] if isinstance(value, list | tuple) else str(value)


class Codec:
    """A tokenizer at work."""

    def __init__(self, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer

        self.spec = spec
        self._backend = Tokenizer.from_str(spec.backend)
        self._num_bytes = _bytes_of_tokens(self._backend)
        self._nfc = self._backend.normalizer is not None
        self._splitting = [
            token.content
            for token in self._backend.get_added_tokens_decoder().values()
            if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        ]

    @cached_property
    def template(self) -> Template | None:
        """The tokenizer's own chat template. Raises TemplateRefused where it is none."""
        source = self.spec.chat_template
        return Template(source, "the tokenizer's chat template", self.spec.variables) if source else None

    def encode(self, texts: Sequence[Rendered]) -> Iterator[Document]:
        """Token ids and trained tokens of texts, begin and end token added where they are missing.

        A token is trained where it lies in a trained span. Where one would lie across the edge of a span, the text is
        tokenized in pieces: what comes before the edge has to be the same tokens when the model is asked.
        """
        bos_id, eos_id = self.spec.bos_id, self.spec.eos_id
        found = itertools.repeat(None) if self._num_bytes is None else self._by_bytes(texts, self._num_bytes)
        for text, known in zip(texts, found, strict=False):
            ids, trained = known if known is not None else self._by_offsets(text)
            if text.needs_bos and bos_id is not None and ids[:1] != bos_id:
                ids, trained = np.append(np.uint32(bos_id), ids), np.append(False, trained)
            if text.needs_eos and eos_id is not None and ids[-1:] != eos_id:
                ids, trained = np.append(ids, np.uint32(eos_id)), np.append(trained, True)
            trained[:1] = False
            yield Document(ids, trained)

    def _by_bytes(self, texts: Sequence[Rendered], num_bytes: NDArray[np.int64]) -> Iterator[_Encoded | None]:
        """Texts at once, edges found by adding up the bytes of their tokens, which no encoding has to keep track of.

        Exact where the tokens have as many bytes as the text: each then stands for the bytes it says, in order. None
        for a text of which that isn't true.
        """
        common = self._common_beginning(texts)
        begin = self._ids(texts[0].text[:common]).tolist() if common else []
        encodings = self._backend.encode_batch_fast([text.text[common:] for text in texts], add_special_tokens=False)
        tokens: list[int] = []
        starts = [0]
        for encoding in encodings:
            tokens += begin
            tokens += encoding.ids
            starts.append(len(tokens))
        ids = np.fromiter(tokens, np.uint32, len(tokens))
        at_bytes = np.concatenate(([0], np.cumsum(num_bytes[ids])))  # of each token, and the end
        first_bytes = at_bytes[starts].tolist()
        whole = [
            after - before == _num_bytes(text.text) and self._is_normal(text.text)
            for text, before, after in zip(texts, first_bytes, first_bytes[1:], strict=False)
        ]
        edges = [
            before + edge
            for text, before, known in zip(texts, first_bytes, whole, strict=False)
            for span in (text.spans if known else ())
            for edge in _edges_in_bytes(text.text, span)
        ]
        at_tokens = np.searchsorted(at_bytes, edges)
        fits = (at_bytes[at_tokens] == edges).tolist()
        trained, taken = np.zeros(len(ids), dtype=bool), 0
        for text, known, start, end in zip(texts, whole, starts, starts[1:], strict=False):
            own = slice(taken, taken := taken + (2 * len(text.spans) if known else 0))
            if not known:
                yield None
            elif not all(fits[own]):
                yield self._in_pieces(text, ids[start:end])
            else:
                spans = at_tokens[own].tolist()
                for first, after in zip(spans[::2], spans[1::2], strict=True):
                    trained[first:after] = True
                yield ids[start:end], trained[start:end]

    def _is_normal(self, text: str) -> bool:
        """Whether the tokenizer's normalization leaves a text as it is."""
        return not self._nfc or text.isascii() or unicodedata.is_normalized("NFC", text)

    def _by_offsets(self, text: Rendered) -> _Encoded:
        encoding = self._backend.encode(text.text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.uint32)
        trained = np.zeros(len(ids), dtype=bool)
        for start, end in text.spans:
            first = _token_at(encoding, start, end)
            if first is None:
                continue
            if _lies_across(encoding, start) or _lies_across(encoding, end):
                return self._in_pieces(text, ids) or (ids, self._overlapping(text, encoding))
            trained[first : _token_after(encoding, first, end, len(text.text), len(ids))] = True
        return ids, trained

    def _ids(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def _common_beginning(self, texts: Sequence[Rendered]) -> int:
        """How many characters all texts begin with that can be tokenized once for all: up to behind a special token,
        which splits a text before anything else is done. 0 where there is nothing in common, or this tokenizer looks
        at what stands before."""
        if len(texts) < _WORTH_A_BEGINNING:
            return 0
        strings = [text.text for text in texts]
        first, last = min(strings), max(strings)
        differing = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
        common = first[: next(differing, min(len(first), len(last)))]
        at = max((common.rfind(token) + len(token) for token in self._splitting if token in common), default=0)
        if not at or any(start < at for text in texts for start, _ in text.spans):
            return 0
        pieces = np.concatenate((self._ids(strings[0][:at]), self._ids(strings[0][at:])))
        return at if np.array_equal(pieces, self._ids(strings[0])) else 0

    def _in_pieces(self, text: Rendered, whole: NDArray[np.uint32]) -> _Encoded | None:
        """Ids and trained tokens of a text cut at the edges of its spans; None where that changes what it says."""
        spans = [(start, end) for start, end in text.spans if start < end]
        edges = sorted({0, len(text.text), *(edge for span in spans for edge in span)})
        pieces = list(itertools.pairwise(edges))
        encodings = self._backend.encode_batch([text.text[a:b] for a, b in pieces], add_special_tokens=False)
        ids = np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])
        if self.decode(ids) != self.decode(whole):
            return None  # a tokenizer that puts a space before every text
        starts = {start for start, _ in spans}
        inside = [[start in starts] * len(encoding.ids) for (start, _), encoding in zip(pieces, encodings, strict=True)]
        return ids, np.array([flag for flags in inside for flag in flags], dtype=bool)

    @staticmethod
    def _overlapping(text: Rendered, encoding: Any) -> NDArray[np.bool_]:
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        trained = np.zeros(len(offsets), dtype=bool)
        for start, end in text.spans:
            trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return trained

    def id_of(self, token: str) -> int | None:
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def decode(self, ids: Sequence[int] | NDArray[np.uint32]) -> str:
        """The text of tokens, special ones too."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=False))


def _bytes_of_tokens(backend: Any) -> NDArray[np.int64] | None:
    """The number of UTF-8 bytes that each token stands for, where that is a token's own (byte-level BPE: a letter of
    its vocabulary is a byte); None for other tokenizers."""
    parts = json.loads(backend.to_str())
    normalizer, model = parts["normalizer"], parts["model"]
    splitters = parts["pre_tokenizer"] or {}
    splitters = splitters.get("pretokenizers", [splitters])
    kinds = [splitter.get("type") for splitter in splitters]
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token")
    if (
        (normalizer is not None and normalizer["type"] != "NFC")
        or kinds[-1] != "ByteLevel"
        or not set(kinds) <= {"ByteLevel", "Split", "Digits"}
        or any(splitter.get("add_prefix_space") for splitter in splitters)
        or model["type"] != "BPE"
        or any(model.get(affix) for affix in affixes)
    ):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    num_bytes = np.zeros(1 + max([*vocabulary.values(), *added]), dtype=np.int64)
    num_bytes[list(vocabulary.values())] = [len(token) for token in vocabulary]
    for token, content in added.items():
        num_bytes[token] = len(content.content.encode())
    return num_bytes


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _edges_in_bytes(text: str, span: tuple[int, int]) -> tuple[int, int]:
    if span[0] == span[1]:
        return 0, 0  # nothing, which lies across no token
    return span if text.isascii() else (_num_bytes(text[: span[0]]), _num_bytes(text[: span[1]]))


def _token_at(encoding: Any, start: int, end: int) -> int | None:
    """The first token of the characters [start, end); some characters, as spaces that are dropped, have none."""
    found = encoding.char_to_token(start) if start < end else None
    while found is None and start + 1 < end:
        start += 1
        found = encoding.char_to_token(start)
    return found


def _token_after(encoding: Any, first: int, end: int, length: int, num_tokens: int) -> int:
    """The token after those of the characters up to `end`; several tokens may be one character's."""
    while end < length:
        found = encoding.char_to_token(end)
        if found is not None:
            return max(int(found), first + 1)
        end += 1
    return num_tokens


def _lies_across(encoding: Any, edge: int) -> bool:
    """Whether one token holds the characters on both sides of `edge`."""
    if edge == 0:
        return False
    before = encoding.char_to_token(edge - 1)
    return before is not None and before == encoding.char_to_token(edge)
