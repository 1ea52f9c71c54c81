"""Blocks: every document whole and once, trained where a token-by-token reference says, the same bytes each time."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.numpy import load_file, save

from lorakit.core import artifacts, blocks
from lorakit.core.blocks import Blocks, Codec, Prepared, pack, prepare
from lorakit.core.config import PrepareConfig
from lorakit.core.errors import ArtifactDamaged, DiskFailed, InputRefused, Mismatch
from lorakit.core.events import Notice, Progress
from tests.conftest import CHATML, ROWS, make_tokenizer

PAD, BOS, EOS = b"<pad>", b"<|im_start|>", b"<|im_end|>"

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)

Labels = tuple[tuple[bytes, ...], tuple[bool, ...]]
"""The tokens of a document, as the bytes that they stand for, and which of them are trained."""


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("plain"), chat_template=None)


@pytest.fixture
def bos_tokenizer(tmp_path: Path) -> Any:
    """One that puts its begin token before a text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(tmp_path / "bos", chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def gpt2_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, encoder.py)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = gpt2_bytes()
COMPILED = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHATML)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    folder: Path, rows: Iterable[dict[str, Any]], tokenizer: Any, **options: object
) -> tuple[Prepared, list[Labels]]:
    """What `prepare` made of rows, and the documents that lie in its blocks, padding left out and checked."""
    dataset = write_rows(folder / "rows.jsonl", rows)
    config = PrepareConfig.resolve((None, {"dataset": dataset, "tokenizer": "any", **options}))
    made = prepare(config, tokenizer, lambda event: None)
    return made, documents_of(Blocks(made.path), tokenizer)


def documents_of(opened: Blocks, tokenizer: Any) -> list[Labels]:
    found = []
    for index in range(len(opened)):
        tokens, trained, document = opened.arrays(index)
        assert len(tokens) == len(trained) == len(document) == opened.size
        numbers = list(dict.fromkeys(document.tolist()))
        assert numbers == list(range(len(numbers))), "documents of a block are numbered in order, each in one piece"
        for number in numbers:
            here = document == number
            if not trained[here].any():  # padding: a document without anything to learn
                assert number == numbers[-1]
                assert set(tokens[here].tolist()) == {tokenizer.pad_token_id}
            else:
                found.append((as_bytes(tokenizer, tokens[here]), tuple(map(bool, trained[here]))))
    return found


def as_bytes(tokenizer: Any, ids: Iterable[int]) -> tuple[bytes, ...]:
    names = tokenizer.convert_ids_to_tokens([int(index) for index in ids])
    return tuple(name.encode() if name in tokenizer.all_special_tokens else unmasked(name) for name in names)


def unmasked(name: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    return bytes(BYTES[sign] for sign in name)


# A reference that knows nothing of ids and offsets: bytes, counted


def chat(messages: Sequence[dict[str, str]], open_turn: bool) -> str:
    return COMPILED.render(messages=messages, add_generation_prompt=open_turn)


def reference(text: str, turns: Sequence[tuple[int, int]]) -> Labels:
    """Token by token: trained where one of its bytes lies in a turn's bytes [start, end); the first one never."""
    tokens, trained, at = tokens_of(text), [], 0
    for token in tokens:
        trained.append(bool(trained) and any(a <= at + i < b for a, b in turns for i in range(len(token))))
        at += len(token)
    return tuple(tokens), tuple(trained)


def tokens_of(text: str) -> list[bytes]:
    """Special tokens where they stand, else a token a byte."""
    tokens, raw = [], text.encode()
    while raw:
        tokens.append(next((name for name in (PAD, BOS, EOS) if raw.startswith(name)), raw[:1]))
        raw = raw[len(tokens[-1]) :]
    return tokens


def reference_chat(messages: Sequence[dict[str, str]]) -> Labels:
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(chat(messages[:index], True).encode())
            turns.append((start, start + len((message["content"] + "<|im_end|>").encode())))
    return reference(chat(messages, False), turns)


def reference_plain(prompt: str, completion: str) -> Labels:
    start, end = len(prompt.encode()), len((prompt + completion + "<|im_end|>").encode())
    return reference(prompt + completion + "<|im_end|>", [(start, end)])


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), max_size=30)
answers = texts.filter(bool)
pairs = st.fixed_dictionaries({"prompt": texts, "completion": answers})
others = st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": texts})
own = st.fixed_dictionaries({"role": st.just("assistant"), "content": answers})
conversations = st.tuples(others, st.lists(others | own, max_size=5), own).map(
    lambda parts: [parts[0], *parts[1], parts[2]]
)


@PROPERTY
@given(rows=st.lists(pairs, min_size=1, max_size=12), slack=st.integers(0, 40), shared=st.booleans())
def test_trained_tokens_are_the_completions_and_their_end(
    rows: list[dict[str, str]],
    slack: int,
    shared: bool,
    plain_tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    longest = max(len((row["prompt"] + row["completion"]).encode()) + 1 for row in rows)
    made, documents = prepared(
        tmp_path_factory.getbasetemp(),
        rows,
        plain_tokenizer,
        block_size=max(8, longest + slack),
        pack="best-fit" if shared else "none",
    )
    trained = Counter(
        b"".join(token for token, label in zip(tokens, labels, strict=True) if label) for tokens, labels in documents
    )
    # nothing comes before the first token of a document, so it can't be predicted
    assert trained == Counter((row["completion"] + "<|im_end|>").encode()[not row["prompt"] :] for row in rows)
    assert Counter(documents) == Counter(reference_plain(row["prompt"], row["completion"]) for row in rows)
    assert made.rows == len(rows) == len(documents)
    assert (made.dropped, made.truncated) == (0, 0)
    assert made.tokens == sum(len(tokens) for tokens, _ in documents)
    assert made.trained_tokens == sum(sum(labels) for _, labels in documents)
    assert made.fill == pytest.approx(made.tokens / (made.blocks * max(8, longest + slack)))


@PROPERTY
@given(rows=st.lists(conversations, min_size=1, max_size=8), slack=st.integers(0, 99))
def test_chat_labels_are_those_of_a_slow_reference(
    rows: list[list[dict[str, str]]], slack: int, chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = [reference_chat(messages) for messages in rows]
    size = max(len(tokens) for tokens, _ in expected) + slack
    made, documents = prepared(
        tmp_path_factory.getbasetemp(), [{"messages": row} for row in rows], chat_tokenizer, block_size=size
    )
    assert Counter(documents) == Counter(expected)
    assert made.rows == len(documents)


@PROPERTY
@given(rows=st.lists(answers, min_size=1, max_size=8), size=st.integers(8, 40), long=st.sampled_from(["split", "drop"]))
def test_a_long_document_is_split_or_dropped_and_counted(
    rows: list[str], size: int, long: str, plain_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = [[*tokens_of(text), EOS] for text in rows]
    kept = [tokens for tokens in whole if long == "split" or len(tokens) <= size]
    pieces = [tuple(tokens[at : at + size]) for tokens in kept for at in range(0, len(tokens), size)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # a lone token has nothing that could predict it
    if not pieces:
        return
    made, documents = prepared(
        tmp_path_factory.getbasetemp(), [{"text": row} for row in rows], plain_tokenizer, block_size=size, long=long
    )
    assert Counter(tokens for tokens, _ in documents) == Counter(pieces)
    assert all(labels == (False, *[True] * (len(tokens) - 1)) for tokens, labels in documents)
    assert made.dropped == len(whole) - len(kept)
    assert made.truncated == 0


# Documents, by example


def test_truncating_keeps_the_beginning_and_is_counted(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "abcdefghijklm"}, {"text": "xyz"}]
    made, documents = prepared(tmp_path, rows, plain_tokenizer, block_size=8, long="truncate")
    assert sorted(b"".join(tokens) for tokens, _ in documents) == [b"abcdefgh", b"xyz<|im_end|>"]
    assert (made.rows, made.truncated, made.dropped) == (2, 1, 0)


def test_a_row_whose_answer_is_cut_away_is_dropped_and_counted(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a long question ", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    made, documents = prepared(tmp_path, rows, plain_tokenizer, block_size=8, long="truncate")
    assert [b"".join(tokens) for tokens, _ in documents] == [b"cd<|im_end|>"]
    assert (made.rows, made.dropped, made.truncated) == (2, 1, 1)


def test_splitting_loses_no_token_that_can_be_trained(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "0123456789", "completion": "abcdefghij"}]
    made, documents = prepared(tmp_path, rows, plain_tokenizer, block_size=8, long="split")
    assert [b"".join(tokens) for tokens, _ in documents] == [b"89abcdef", b"ghij<|im_end|>"]
    assert [sum(labels) for _, labels in documents] == [6, 4]
    assert (made.rows, made.dropped, made.truncated) == (1, 0, 0)


def test_all_trains_the_prompt_too(plain_tokenizer: Any, chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}]
    for tokenizer, text in ((plain_tokenizer, b"abcd<|im_end|>"), (chat_tokenizer, None)):
        _, [(tokens, labels)] = prepared(tmp_path, rows, tokenizer, block_size=64, train_on="all")
        assert labels == (False, *[True] * (len(tokens) - 1))
        assert text is None or b"".join(tokens) == text


def test_the_end_of_turn_is_trained_and_the_line_break_after_it_isnt(chat_tokenizer: Any, tmp_path: Path) -> None:
    _, [(tokens, labels)] = prepared(tmp_path, [{"prompt": "Hi", "completion": "Ho"}], chat_tokenizer, block_size=64)
    assert b"".join(tokens) == b"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert [token for token, label in zip(tokens, labels, strict=True) if label] == [b"H", b"o", EOS]


@pytest.mark.parametrize("options", [{"template": "none"}, {}], ids=["none", "auto"])
def test_plain_joining_ends_with_exactly_one_end_token(
    options: dict[str, object], plain_tokenizer: Any, chat_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer if options else plain_tokenizer
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d<|im_end|>"}]
    _, documents = prepared(tmp_path, rows, tokenizer, block_size=32, **options)
    assert sorted(b"".join(tokens) for tokens, _ in documents) == [b"ab<|im_end|>", b"cd<|im_end|>"]
    assert [labels for _, labels in documents] == [(False, True, True)] * 2


def test_a_tokenizers_begin_token_stands_once_and_is_never_trained(bos_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "ab"}, {"text": "<|im_start|>cd"}]
    _, documents = prepared(tmp_path, rows, bos_tokenizer, block_size=32)
    assert sorted(tokens for tokens, _ in documents) == sorted([(BOS, b"a", b"b", EOS), (BOS, b"c", b"d", EOS)])
    assert [labels for _, labels in documents] == [(False, True, True, True)] * 2


def test_a_begin_token_makes_the_first_letter_of_a_completion_trained(bos_tokenizer: Any, tmp_path: Path) -> None:
    _, [(tokens, labels)] = prepared(tmp_path, [{"prompt": "", "completion": "ab"}], bos_tokenizer, block_size=32)
    assert (b"".join(tokens), labels) == (b"<|im_start|>ab<|im_end|>", (False, True, True, True))


def test_a_chat_template_writes_its_own_begin_token(bos_tokenizer: Any, tmp_path: Path) -> None:
    bos_tokenizer.chat_template = CHATML
    _, [(tokens, _)] = prepared(tmp_path, [{"prompt": "a", "completion": "b"}], bos_tokenizer, block_size=64)
    assert b"".join(tokens).startswith(b"<|im_start|>user")


def test_a_template_without_end_tokens_gets_the_end_token_trained(chat_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(
        tmp_path / "bare",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    _, [(tokens, labels)] = prepared(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer, block_size=64)
    assert b"".join(tokens) == b"user: a\nassistant: b\n<|im_end|>"
    assert labels[-3:] == (True, True, True)
    assert not any(labels[:-3])


def test_a_token_that_reaches_into_the_completion_is_trained(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "ab": 3, "<end>": 4}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    rows = [{"prompt": "xa", "completion": "bx"}]
    made, _ = prepared(tmp_path, rows, tokenizer, block_size=8)
    tokens, trained, _ = Blocks(made.path).arrays(0)
    assert tokens[:4].tolist() == [0, 3, 0, 4]
    assert trained[:4].tolist() == [0, 1, 1, 1]


def test_a_tokenizer_without_tokenizer_json_is_refused() -> None:
    class Slow:
        name_or_path = "slow/model"

    with pytest.raises(InputRefused, match=r"slow/model: found a tokenizer without tokenizer\.json"):
        Codec(Slow())  # type: ignore[arg-type]


def test_template_chat_needs_a_chat_template(plain_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="need one for --template chat"):
        prepared(tmp_path, [{"text": "a"}], plain_tokenizer, template="chat")


def test_an_answer_to_nothing_is_refused_by_its_row(chat_tokenizer: Any, tmp_path: Path) -> None:
    """transformers renders no empty conversation, so there is no text that the answer could follow."""
    rows = [{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}]
    with pytest.raises(InputRefused, match=r"rows\.jsonl:1: found "):
        prepared(tmp_path, rows, chat_tokenizer, block_size=64)
    made, _ = prepared(tmp_path, rows, chat_tokenizer, block_size=64, train_on="all")
    assert made.rows == 1


def test_messages_without_a_template_name_the_row(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "a"}]}]
    with pytest.raises(InputRefused, match=r"rows\.jsonl:1: .*need a chat template"):
        prepared(tmp_path, rows, chat_tokenizer, template="none")


# Packing


def first_fit_decreasing(lengths: Sequence[int], size: int) -> int:
    """How many bins the textbook's first-fit decreasing opens."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for number, room in enumerate(rooms):
            if length <= room:
                rooms[number] -= length
                break
        else:
            rooms.append(size - length)
    return len(rooms)


def fewest(lengths: Sequence[int], size: int) -> int:
    """How many bins there must be, by trying every way."""

    def place(at: int, rooms: tuple[int, ...]) -> int:
        if at == len(lengths):
            return len(rooms)
        ways = [place(at + 1, (*rooms, size - lengths[at]))]
        for number in {room: number for number, room in enumerate(rooms) if room >= lengths[at]}.values():
            ways.append(place(at + 1, (*rooms[:number], rooms[number] - lengths[at], *rooms[number + 1 :])))
        return min(ways)

    return place(0, ())


def lengths_up_to(size: int, smallest: int = 1, most: int = 60) -> st.SearchStrategy[tuple[list[int], int]]:
    return st.tuples(st.lists(st.integers(smallest, size), max_size=most), st.just(size))


sized = st.integers(1, 200).flatmap(lengths_up_to)


@settings(PROPERTY, max_examples=300)
@given(case=sized, shared=st.booleans())
def test_every_document_is_packed_once_and_no_block_overflows(case: tuple[list[int], int], shared: bool) -> None:
    lengths, size = case
    bins = pack(lengths, size, shared=shared)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= size for members in bins)
    assert bins == pack(list(lengths), size, shared=shared)
    if not shared:
        assert [len(members) for members in bins] == [1] * len(lengths)


@settings(PROPERTY, max_examples=300)
@given(case=sized)
def test_each_document_lies_in_the_fullest_block_that_held_it(case: tuple[list[int], int]) -> None:
    """Best-fit decreasing by its definition, replayed: longest first, least room left, a new block only if need be."""
    lengths, size = case
    bins = pack(lengths, size)
    block_of = {index: number for number, members in enumerate(bins) for index in members}
    filled = [0] * len(bins)
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        opened = [number for number, content in enumerate(filled) if content]
        rooms = {number: size - filled[number] for number in opened if size - filled[number] >= lengths[index]}
        if rooms:
            assert size - filled[block_of[index]] == min(rooms.values())
        else:
            assert block_of[index] not in opened
        filled[block_of[index]] += lengths[index]


@settings(PROPERTY, max_examples=200)
@given(case=st.integers(30, 300).flatmap(lambda size: lengths_up_to(size, smallest=math.ceil(size / 5))))
def test_best_fit_never_takes_more_blocks_than_first_fit(case: tuple[list[int], int]) -> None:
    """True where no document is under a sixth of a block (Johnson et al. 1974); beyond that, see the next test."""
    assert len(pack(*case)) <= first_fit_decreasing(*case)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_takes_no_more_blocks_than_first_fit_on_documents_of_real_lengths(seed: int) -> None:
    """Log-normal lengths, as texts have."""
    drawn = np.random.default_rng(seed).lognormal(4.5, 1.0, size=300)
    lengths = np.clip(drawn, 1, 1024).astype(int).tolist()
    packed = pack(lengths, 1024)
    assert len(packed) <= first_fit_decreasing(lengths, 1024)
    assert sum(lengths) / (len(packed) * 1024) > 0.95


@settings(PROPERTY, max_examples=100)
@given(case=st.integers(2, 30).flatmap(lambda size: lengths_up_to(size, most=7)))
def test_packing_is_close_to_the_best_that_there_is(case: tuple[list[int], int]) -> None:
    """11/9 of the fewest blocks and less than one more (Dósa 2007, for both first-fit and best-fit decreasing)."""
    assert len(pack(*case)) <= 11 / 9 * fewest(*case) + 6 / 9


def test_shared_blocks_need_fewer_than_a_block_a_document(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a" * 20}] * 12
    shared, _ = prepared(tmp_path, rows, plain_tokenizer, block_size=64)
    alone, _ = prepared(tmp_path, rows, plain_tokenizer, block_size=64, pack="none")
    assert (shared.blocks, alone.blocks) == (4, 12)
    assert shared.fill == pytest.approx(63 / 64)
    assert alone.fill == pytest.approx(21 / 64)
    assert shared.tokens == alone.tokens


# What lies on disk


def test_blocks_are_plain_safetensors_with_the_documented_types(plain_tokenizer: Any, tmp_path: Path) -> None:
    made, _ = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "out")
    shard = load_file(tmp_path / "out" / "blocks-00000.safetensors")
    assert {name: (array.dtype.name, array.shape) for name, array in shard.items()} == {
        "tokens": ("uint32", (made.blocks, 64)),
        "trained": ("uint8", (made.blocks, 64)),
        "document": ("uint16", (made.blocks, 64)),
    }
    assert set(np.unique(shard["trained"])) == {0, 1}
    assert int(shard["trained"].sum()) == made.trained_tokens


def test_padding_is_never_trained_and_lies_in_a_document_of_its_own(plain_tokenizer: Any, tmp_path: Path) -> None:
    made, _ = prepared(tmp_path, [{"text": "abc"}, {"text": "defgh"}], plain_tokenizer, block_size=16)
    tokens, trained, document = Blocks(made.path).arrays(0)
    assert b"".join(as_bytes(plain_tokenizer, tokens)) == b"defgh<|im_end|>abc<|im_end|>" + PAD * 6
    assert trained[10:].tolist() == [0] * 6
    assert document.tolist() == [0] * 6 + [1] * 4 + [2] * 6


def test_positions_restart_at_each_document(plain_tokenizer: Any, tmp_path: Path) -> None:
    made, _ = prepared(tmp_path, ROWS, plain_tokenizer, block_size=128, train_on="all")
    opened = Blocks(made.path)
    batch = opened.batch(range(len(opened)))
    for row in range(len(opened)):
        tokens, trained, document = opened.arrays(row)
        assert batch.ids_BT[row].tolist() == tokens.tolist()
        position = 0
        for at in range(opened.size):
            position = position + 1 if at and document[at] == document[at - 1] else 0
            assert batch.positions_BT[row, at] == position
            assert batch.trained_BT[row, at] == bool(trained[at] and position)
    assert batch.trained_tokens == made.trained_tokens
    assert opened.largest_id() == max(int(opened.arrays(row)[0].max()) for row in range(len(opened)))


def test_the_first_token_of_a_document_is_never_trained_whoever_wrote_the_blocks(tmp_path: Path) -> None:
    config = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "any", "block_size": 8}))
    shard = {
        "tokens": np.arange(16, dtype=np.uint32).reshape(2, 8),
        "trained": np.ones((2, 8), dtype=np.uint8),
        "document": np.array([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8], dtype=np.uint16),
    }
    files = [("blocks-00000.safetensors", save(shard))]
    artifacts.commit(tmp_path / "out", "blocks", files, config=config, parents={}, facts={})
    batch = Blocks(tmp_path / "out").batch([1, 0])
    assert batch.trained_BT.astype(int).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1, 1]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.ids_BT[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_many_shards_read_like_one(plain_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, documents = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "one")
    monkeypatch.setattr(blocks, "_SHARD_BYTES", 3 * 64 * 7)
    many, same_documents = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "many")
    assert len(list(many.path.glob("*.safetensors"))) == math.ceil(one.blocks / 3) > 2
    assert same_documents == documents
    assert len(Blocks(many.path)) == one.blocks
    order = [one.blocks - 1, 0, 3, 2]
    np.testing.assert_array_equal(Blocks(many.path).batch(order).ids_BT, Blocks(one.path).batch(order).ids_BT)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_request_finds_the_same_folder(plain_tokenizer: Any, tmp_path: Path) -> None:
    first, _ = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64)
    before = tree(first.path)
    second, _ = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64)
    assert (first.cached, second.cached) == (False, True)
    assert {**vars(second), "cached": False} == vars(first)
    assert tree(first.path) == before
    assert first.path.is_relative_to(tmp_path / "cache")


def test_the_same_request_makes_the_same_bytes(plain_tokenizer: Any, tmp_path: Path) -> None:
    prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "a")
    prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "b")
    first, second = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert first["blocks-00000.safetensors"] == second["blocks-00000.safetensors"]
    assert Blocks(tmp_path / "a").artifact.fingerprint == Blocks(tmp_path / "b").artifact.fingerprint
    assert sorted(first) == sorted(second) == ["blocks-00000.safetensors", "lorakit.json", "lorakit.yaml"]


def test_how_many_rows_are_read_at_once_changes_no_byte(
    plain_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "a")
    monkeypatch.setattr(blocks, "_ROWS_AT_ONCE", 5)
    made, _ = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64, output=tmp_path / "b")
    assert made.rows == len(ROWS)
    name = "blocks-00000.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def keyed(folder: Path, opened: Any, content: bytes, name: str = "rows.jsonl", **options: object) -> str:
    """The cache folder's name for a request."""
    (folder / name).write_bytes(content)
    config = PrepareConfig.resolve((None, {"dataset": folder / name, "tokenizer": "any", "block_size": 64, **options}))
    return prepare(config, opened, lambda event: None).path.name


CONTENT = b'{"prompt": "a", "completion": "bcd"}\n' * 3


@pytest.mark.parametrize(
    "options",
    [{"block_size": 65}, {"train_on": "all"}, {"template": "none"}, {"pack": "none"}, {"long": "drop"}],
    ids=lambda options: next(iter(options)),
)
def test_another_option_is_another_request(options: dict[str, object], chat_tokenizer: Any, tmp_path: Path) -> None:
    assert keyed(tmp_path, chat_tokenizer, CONTENT, **options) != keyed(tmp_path, chat_tokenizer, CONTENT)


def test_another_byte_of_data_is_another_request(chat_tokenizer: Any, tmp_path: Path) -> None:
    assert keyed(tmp_path, chat_tokenizer, CONTENT.replace(b"d", b"e", 1)) != keyed(tmp_path, chat_tokenizer, CONTENT)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "chat_template", CHATML.replace("'<|im_end|>'", "'.<|im_end|>'")),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>"),
        lambda tokenizer: setattr(tokenizer, "pad_token", "<|im_end|>"),
        lambda tokenizer: tokenizer.add_tokens(["bcd"]),
    ],
    ids=["template", "end", "pad", "vocabulary"],
)
def test_another_tokenizer_is_another_request(change: Callable[[Any], object], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    before = keyed(tmp_path, tokenizer, CONTENT)
    change(tokenizer)
    assert keyed(tmp_path, tokenizer, CONTENT) != before


def test_where_the_same_bytes_lie_makes_no_difference(chat_tokenizer: Any, tmp_path: Path) -> None:
    again = make_tokenizer(tmp_path / "again")
    first = keyed(tmp_path, chat_tokenizer, CONTENT, tokenizer="one")
    assert keyed(tmp_path, again, CONTENT, name="other.jsonl", tokenizer="two") == first


def test_padding_or_cutting_that_a_tokenizer_was_saved_with_changes_nothing(tmp_path: Path) -> None:
    before = keyed(tmp_path, make_tokenizer(tmp_path / "tokenizer"), CONTENT)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    tokenizer.backend_tokenizer.enable_padding(length=40, pad_id=tokenizer.pad_token_id, pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert keyed(tmp_path, tokenizer, CONTENT) == before


def test_other_blocks_at_the_output_are_kept(chat_tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepared(tmp_path, ROWS, chat_tokenizer, block_size=128, output=out)
    before = tree(out)
    with pytest.raises(Mismatch, match="block_size: found 128, asked for 256"):
        prepared(tmp_path, ROWS, chat_tokenizer, block_size=256, output=out)
    with pytest.raises(Mismatch, match="dataset: found"):
        prepared(tmp_path, ROWS[1:], chat_tokenizer, block_size=128, output=out)
    assert tree(out) == before


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([], {}),
        ([{"text": "a long text"}], {"block_size": 8, "long": "drop"}),
        ([{"prompt": "a long question", "completion": "b"}], {"block_size": 8, "long": "truncate", "template": "none"}),
    ],
)
def test_nothing_to_train_on_is_refused(
    rows: list[dict[str, str]], options: dict[str, object], chat_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=f"found {len(rows)} rows with no token to train on") as caught:
        prepared(tmp_path, rows, chat_tokenizer, output=tmp_path / "out", **options)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_cant_be_read_is_a_disk_failure(
    chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(blocks.disk, "sha256", broken)
    with pytest.raises(DiskFailed, match=r"rows\.jsonl: found 'Input/output error'"):
        prepared(tmp_path, ROWS, chat_tokenizer)


def test_the_caller_is_told_how_rows_are_read_and_how_far_it_is(chat_tokenizer: Any, tmp_path: Path) -> None:
    events: list[Progress | Notice] = []
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    prepare(PrepareConfig.resolve((None, {"dataset": dataset, "tokenizer": "any"})), chat_tokenizer, events.append)
    assert events[0] == Notice("read as prompt/completion rows, rendered by the tokenizer's chat template")
    assert events[-1] == Progress("preparing", len(ROWS), None, "rows")


# Opening


def test_a_folder_of_another_kind_is_no_blocks_folder(tmp_path: Path) -> None:
    config = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "any"}))
    artifacts.commit(tmp_path / "adapter", "adapter", [("a", b"b")], config=config, parents={}, facts={})
    with pytest.raises(InputRefused, match="found adapter, need blocks") as caught:
        Blocks(tmp_path / "adapter")
    assert "lorakit prepare" in caught.value.hint


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None], ids=["folder", "file", "nothing"])
def test_what_isnt_an_artifact_is_no_blocks_folder(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputRefused, match="need a lorakit artifact") as caught:
        Blocks(tmp_path / "x")
    assert "lorakit prepare" in caught.value.hint


def test_a_flipped_bit_in_a_shard_is_found(plain_tokenizer: Any, tmp_path: Path) -> None:
    made, _ = prepared(tmp_path, ROWS, plain_tokenizer, block_size=64)
    shard = made.path / "blocks-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ArtifactDamaged, match="blocks-00000"):
        Blocks(made.path)


@pytest.mark.parametrize(
    "content",
    [
        b"no safetensors",
        save({"tokens": np.zeros((1, 8), np.uint32), "trained": np.zeros((1, 8), np.uint8)}),
        save({name: np.zeros((1, 9), np.uint8) for name in ("tokens", "trained", "document")}),
        save({name: np.zeros((1 + (name == "tokens"), 8), np.uint8) for name in ("tokens", "trained", "document")}),
    ],
    ids=["format", "names", "size", "shapes"],
)
def test_a_shard_that_isnt_blocks_is_told_before_it_is_used(content: bytes, tmp_path: Path) -> None:
    config = PrepareConfig.resolve((None, {"dataset": "rows.jsonl", "tokenizer": "any", "block_size": 8}))
    files = [("blocks-00000.safetensors", content)]
    artifacts.commit(tmp_path / "x", "blocks", files, config=config, parents={}, facts={})
    with pytest.raises(ArtifactDamaged, match="blocks-00000"):
        Blocks(tmp_path / "x")
