"""Preparing: every document whole and once, trained where a token-by-token reference says, the same bytes each time."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.numpy import load_file

from lorakit.core import artifacts, disk, preparing, readers
from lorakit.core.blocks import VALIDATION, Blocks
from lorakit.core.config import PrepareConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import DiskFailed, InputRefused, Mismatch, OutOfMemory, UsageError
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.preparing import prepare
from lorakit.core.templates import builtin_names, builtin_source
from lorakit.core.tokenization import spec_of
from tests.conftest import CHATML, ROWS, Ran, make_tokenizer, unmasked
from tests.core.test_untrusted import ONE_INSTRUCTION

BOS, EOS = b"<|im_start|>", b"<|im_end|>"
PAD = EOS  # what fills blocks

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


COMPILED = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHATML)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(
    folder: Path, rows: Iterable[dict[str, Any]], tokenizer: Any, **options: object
) -> tuple[Any, list[Labels]]:
    """What `prepare` made of rows, and the documents that lie in its blocks, padding left out and checked."""
    dataset = write_rows(folder / "rows.jsonl", rows)
    made = with_tokenizer(tokenizer, {"dataset": str(dataset), "tokenizer": "any", **options})
    return made, documents_of(Blocks(made.path), tokenizer)


def with_tokenizer(tokenizer: Any, values: dict[str, object], report: Report = lambda event: None) -> Any:
    """The result of `prepare` with a tokenizer that lies nowhere: its fields and figures side by side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "model_folder", Path)
        patch.setattr(preparing, "load_spec", lambda folder, add_tokens: spec_of(tokenizer))
        made = prepare(PrepareConfig.resolve((None, values)), report)
    dropped = sum(made.figures["dropped_by_reason"].values())
    return SimpleNamespace(**vars(made), **made.figures, dropped=dropped)


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
                assert set(tokens[here].tolist()) == {tokenizer.eos_token_id}
            else:
                found.append((as_bytes(tokenizer, tokens[here]), tuple(map(bool, trained[here]))))
    return found


def as_bytes(tokenizer: Any, ids: Iterable[int]) -> tuple[bytes, ...]:
    names = tokenizer.convert_ids_to_tokens([int(index) for index in ids])
    return tuple(name.encode() if name in tokenizer.all_special_tokens else unmasked(name) for name in names)


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


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|\0"), max_size=30)
answers = texts.filter(bool)
pairs = st.fixed_dictionaries({"prompt": texts, "completion": answers})
roles = st.lists(st.sampled_from(["user", "tool"]), min_size=1, max_size=2)
turn = st.tuples(roles.flatmap(lambda names: st.tuples(*[st.tuples(st.just(name), texts) for name in names])), answers)
conversations = st.tuples(st.none() | texts, st.lists(turn, min_size=1, max_size=3)).map(
    lambda parts: [
        {"role": role, "content": content}
        for role, content in (
            *([("system", parts[0])] if parts[0] is not None else []),
            *(said for asked, answered in parts[1] for said in (*asked, ("assistant", answered))),
        )
    ]
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


def test_template_chat_needs_a_chat_template(plain_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="need one for --template chat"):
        prepared(tmp_path, [{"text": "a"}], plain_tokenizer, template="chat")


def test_an_assistant_that_speaks_first_is_trained_too(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}]
    _, [(tokens, labels)] = prepared(tmp_path, rows, chat_tokenizer, block_size=64)
    assert [token for token, label in zip(tokens, labels, strict=True) if label] == [b"a", EOS]


def test_messages_without_a_template_name_the_row(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "a"}]}]
    with pytest.raises(InputRefused, match=r"rows\.jsonl:1: .*no chat template"):
        prepared(tmp_path, rows, chat_tokenizer, template="none")


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
    assert Blocks(tmp_path / "a").fingerprint == Blocks(tmp_path / "b").fingerprint
    assert (
        sorted(first)
        == sorted(second)
        == ["blocks-00000.safetensors", "lorakit.json", "lorakit.yaml", "template.jinja"]
    )


@pytest.mark.parametrize("workers", [2, 4])
def test_how_many_workers_there_are_and_how_much_is_read_at_once_changes_no_byte(
    workers: int, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, object] = {"block_size": 128, "validation_split": 0.3}
    one, _ = prepared(tmp_path, ROWS * 5, chat_tokenizer, output=tmp_path / "a", num_workers=1, **options)
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 7)
    many, _ = prepared(tmp_path, ROWS * 5, chat_tokenizer, output=tmp_path / "b", num_workers=workers, **options)
    assert many.figures == one.figures
    for name in ("blocks-00000.safetensors", "validation-00000.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def keyed(folder: Path, opened: Any, content: bytes, name: str = "rows.jsonl", **options: object) -> str:
    """The cache folder's name for a request."""
    (folder / name).write_bytes(content)
    values = {"dataset": str(folder / name), "tokenizer": "any", "block_size": 64, **options}
    return str(with_tokenizer(opened, values).path.name)


CONTENT = b'{"prompt": "a", "completion": "bcd"}\n' * 3


def test_a_folder_that_holds_the_output_is_prepared_again(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "d" / "deep").mkdir(parents=True)
    (tmp_path / "d" / "rows.jsonl").write_bytes(CONTENT + b"no row\n")
    values: dict[str, object] = {"dataset": "d", "tokenizer": "any", "on_bad_row": "skip"}
    for output in ("d/out", "d/deep/out"):
        for cached in (False, True):
            made = with_tokenizer(chat_tokenizer, {**values, "output": tmp_path / output})
            assert (made.rows, made.cached) == (4, cached)
    assert with_tokenizer(chat_tokenizer, {**values, "output": tmp_path / "d/out", "overwrite": True}).rows == 4


@pytest.mark.parametrize(
    "options",
    [{"block_size": 65}, {"train_on": "all"}, {"template": "none"}, {"pack": "none"}, {"long": "drop"}],
    ids=lambda options: next(iter(options)),
)
def test_another_option_is_another_request(options: dict[str, object], chat_tokenizer: Any, tmp_path: Path) -> None:
    assert keyed(tmp_path, chat_tokenizer, CONTENT, **options) != keyed(tmp_path, chat_tokenizer, CONTENT)


def test_another_way_of_rendering_is_another_request(
    chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keyed(tmp_path, chat_tokenizer, CONTENT)
    monkeypatch.setattr(preparing, "_RENDERING", 1)
    assert keyed(tmp_path, chat_tokenizer, CONTENT) != before


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


@pytest.mark.parametrize("changed", ["rows.jsonl", "held.jsonl"])
def test_data_that_changes_after_it_was_hashed_is_no_request_at_all(
    changed: str, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held.jsonl").write_bytes(CONTENT)
    options: dict[str, object] = {"validation_dataset": str(tmp_path / "held.jsonl"), "output": tmp_path / "out"}
    real = preparing._work

    def slow(*arguments: Any) -> Any:
        work = real(*arguments)
        with (tmp_path / changed).open("ab") as file:
            file.write(CONTENT)
        return work

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_work", slow)
        with pytest.raises(Mismatch, match=f"{changed}: found that it was changed while it was read"):
            keyed(tmp_path, chat_tokenizer, CONTENT, **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "held.jsonl").write_bytes(CONTENT)
    keyed(tmp_path, chat_tokenizer, CONTENT, **options)
    assert artifacts.read_manifest(tmp_path / "out")["facts"]["figures"]["rows"] == 6


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
        ([{"text": "a long text"}], {"block_size": 8, "long": "drop"}),
        ([{"prompt": "a long question", "completion": "b"}], {"block_size": 8, "long": "truncate", "template": "none"}),
    ],
)
def test_nothing_to_train_on_is_refused(
    rows: list[dict[str, str]], options: dict[str, object], chat_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=f"found {len(rows)} rows? with no token to train on") as caught:
        prepared(tmp_path, rows, chat_tokenizer, output=tmp_path / "out", **options)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_no_rows_at_all_are_refused(chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"rows\.jsonl: found no rows, need at least one"):
        prepared(tmp_path, [], chat_tokenizer)


def test_a_dataset_that_cant_be_read_is_a_disk_failure(
    chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(disk, "sha256", broken)
    with pytest.raises(DiskFailed, match=r"rows\.jsonl: found 'Input/output error'"):
        prepared(tmp_path, ROWS, chat_tokenizer)


def test_the_caller_is_told_how_rows_are_read_and_how_far_it_is(chat_tokenizer: Any, tmp_path: Path) -> None:
    events: list[Progress | Notice] = []
    dataset = write_rows(tmp_path / "rows.jsonl", ROWS)
    with_tokenizer(chat_tokenizer, {"dataset": str(dataset), "tokenizer": "any"}, events.append)
    assert events[0] == Notice("read as prompt/completion rows, rendered by the tokenizer's chat template")
    assert isinstance(events[-1], Progress)
    assert (events[-1].task, events[-1].unit) == ("preparing", "MiB")
    assert events[-1].note.startswith(f"{len(ROWS)} rows, ")


# Rows that can't be used


BAD_ROWS: list[tuple[bytes, str]] = [
    (b"not JSON", "need a JSON object"),
    (b'{"prompt": "a", "completion": "b\x00"}', "need a JSON object"),
    (b'{"prompt": "a", "completion": "b\\u0000"}', "completion: found"),
    (b'{"prompt": "a", "completion": "\xff"}', "byte 0xff that isn't UTF-8"),
    (b'{"prompt": "a", "completion": null}', "completion: found 'null', need text"),
    (b'{"prompt": 3, "completion": "b"}', "prompt: found '3', need text"),
    (b'{"prompt": "a", "completion": ""}', "completion: found"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "a key twice"),
    (b'{"prompt": ' + b"[" * 50_000, "nesting too deep"),
    (b'{"completion": "c"}', "need prompt"),
]


@pytest.mark.parametrize(("line", "words"), BAD_ROWS)
def test_a_bad_row_stops_with_its_place_or_is_kept_with_its_reason(
    line: bytes, words: str, chat_tokenizer: Any, tmp_path: Path
) -> None:
    good = b'{"prompt": "a", "completion": "b"}\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    values: dict[str, object] = {"dataset": str(path), "tokenizer": "any", "output": tmp_path / "out"}
    with pytest.raises(InputRefused) as caught:
        with_tokenizer(chat_tokenizer, values)
    assert caught.value.message.startswith(f"{path}:3: ")
    assert words in caught.value.message
    assert not (tmp_path / "out").exists()
    made = with_tokenizer(chat_tokenizer, {**values, "on_bad_row": "skip"})
    assert (made.rows, made.rejected, made.documents) == (3, 1, 2)
    [rejected] = [json.loads(one) for one in (tmp_path / "out" / "rejected.jsonl").read_bytes().splitlines()]
    assert rejected["place"] == f"{path}:3"
    assert words in rejected["reason"]
    assert rejected["row"] == line.decode(errors="replace")[: 2**20]


def test_bad_rows_before_the_first_good_one_are_skipped_too(chat_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1\n{"prompt": "a", "completion": "b"}\n')
    made = with_tokenizer(chat_tokenizer, {"dataset": str(path), "tokenizer": "any", "on_bad_row": "skip"})
    assert (made.rejected, made.documents) == (1, 1)


@pytest.mark.parametrize(
    "lines",
    [
        [b"not JSON", b"nor this"],
        [b'{"prompt": "a", "completion": ""}', b"not JSON", b'{"prompt": 1, "completion": "b"}'],
    ],
)
def test_rows_that_are_all_rejected_are_kept_with_their_reasons(
    lines: list[bytes], chat_tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    events: list[Any] = []
    values = {"dataset": str(path), "tokenizer": "any", "on_bad_row": "skip", "output": tmp_path / "out"}
    with pytest.raises(
        InputRefused, match=rf"found {len(lines)} rows, all rejected, .*; the first: .*:1: (completion: )?found"
    ) as caught:
        with_tokenizer(chat_tokenizer, values, events.append)
    kept = Path(caught.value.hint.split(" stand in ")[1].split(",")[0])
    assert kept.is_relative_to(cache_folder() / "rejected")
    rejected = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["row"] for row in rejected] == [line.decode() for line in lines]
    assert [row["place"] for row in rejected] == [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    assert not (tmp_path / "out").exists()
    assert not any("read as text" in event.text for event in events if isinstance(event, Notice))


def test_a_row_of_megabytes_is_split_and_none_of_it_lost(plain_tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "ab" * 1_500_000}])
    made = with_tokenizer(plain_tokenizer, {"dataset": str(path), "tokenizer": "any", "block_size": 65536})
    assert made.tokens == 3_000_001
    assert (made.rows, made.split, made.longest_tokens) == (1, 1, 3_000_001)
    assert made.documents == math.ceil(3_000_001 / 65536)


def test_rows_of_a_table_are_kept_as_they_are_when_they_are_rejected(chat_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\nc,\n")
    values = {"dataset": str(path), "tokenizer": "any", "on_bad_row": "skip", "output": tmp_path / "out"}
    with_tokenizer(chat_tokenizer, values)
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected["row"] == {"prompt": "c", "completion": ""}
    assert rejected["place"] == f"{path}: row 2"


# Figures


def test_the_figures_are_counted_by_hand(plain_tokenizer: Any, tmp_path: Path) -> None:
    """Lengths in bytes, one more for the end: 4, 8, 9, 13 tokens in blocks of 8."""
    rows = [{"prompt": "a", "completion": text} for text in ("bc", "b" * 6, "b" * 7, "b" * 11)]
    made, _ = prepared(tmp_path, rows, plain_tokenizer, block_size=8, long="truncate")
    assert (made.rows, made.documents, made.truncated, made.answers_truncated) == (4, 4, 2, 2)
    assert made.lengths == {"4": 1, "8": 3}
    assert (made.longest_tokens, made.longest_row) == (13, f"{tmp_path / 'rows.jsonl'}:4")
    assert made.ends_trained == 2, "the ends of the other two are cut off"
    assert made.tokens == 4 + 3 * 8
    assert made.trained_tokens == 3 + 3 * 7
    assert made.fill == pytest.approx(28 / 32)


@pytest.mark.parametrize(("long", "ends"), [("split", 2), ("truncate", 1), ("drop", 1)])
def test_ends_are_counted_in_what_is_left_of_a_row(long: str, ends: int, plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d" * 20}]
    made, documents = prepared(tmp_path, rows, plain_tokenizer, block_size=8, long=long)
    assert made.ends_trained == ends == sum(tokens[-1] == EOS and labels[-1] for tokens, labels in documents)


def test_two_begin_tokens_are_counted(bos_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "<|im_start|>a"}, {"text": "<|im_start|><|im_start|>b"}, {"text": "c"}]
    made, _ = prepared(tmp_path, rows, bos_tokenizer, block_size=32)
    assert made.double_bos == 1


def test_joined_documents_fill_every_block(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("abcde", "fgh", "i" * 30)]
    made, _ = prepared(tmp_path, rows, plain_tokenizer, block_size=16, pack="concat", output=tmp_path / "out")
    opened = Blocks(tmp_path / "out")
    assert (made.blocks, made.tokens, made.split) == (3, 6 + 4 + 31, 0)
    stream = b"".join(b"".join(as_bytes(plain_tokenizer, opened.arrays(index)[0])) for index in range(3))
    assert stream == b"abcde<|im_end|>fgh<|im_end|>" + b"i" * 30 + b"<|im_end|>" + PAD * 7
    assert [set(opened.arrays(index)[2].tolist()) for index in range(3)] == [{0}, {0}, {0, 1}]


# Held-out rows


def test_held_out_rows_are_chosen_by_seed_and_place_alone(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}?", "completion": f"{number}!"} for number in range(400)]

    def parts(**options: object) -> tuple[set[Labels], set[Labels]]:
        made, training = prepared(tmp_path, rows, chat_tokenizer, block_size=128, validation_split=0.2, **options)
        held_out = documents_of(Blocks(made.path, VALIDATION), chat_tokenizer)
        assert made.validation_rows == len(held_out)
        assert made.validation_blocks == len(Blocks(made.path, VALIDATION))
        assert len(training) + len(held_out) == len(set(training) | set(held_out)) == 400
        return set(training), set(held_out)

    training, held_out = parts()
    assert 50 < len(held_out) < 110
    assert parts(num_workers=2) == (training, held_out)
    assert parts(seed=1)[1] != held_out


def test_a_share_that_holds_out_all_or_nothing_is_told(chat_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputRefused, match=r"found 20 rows, all that can be used held out by --validation-split 0\.9999"
    ):
        prepared(tmp_path, ROWS, chat_tokenizer, max_rows=20, validation_split=0.9999)
    events: list[Any] = []
    values: dict[str, object] = {"dataset": str(tmp_path / "rows.jsonl"), "tokenizer": "any"}
    assert with_tokenizer(chat_tokenizer, {**values, "validation_split": 1e-9}, events.append).validation_rows == 0
    assert events.count(Notice(f"--validation-split 1e-09 held out none of {len(ROWS)} rows")) == 1


def test_a_validation_dataset_is_held_out_whole(chat_tokenizer: Any, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "held", "completion": "out"}] * 3)
    made, _ = prepared(tmp_path, ROWS, chat_tokenizer, block_size=128, validation_dataset=str(other), max_rows=5)
    assert (made.rows, made.validation_rows) == (8, 3)
    held_out = documents_of(Blocks(made.path, VALIDATION), chat_tokenizer)
    assert all(b"held" in b"".join(tokens) for tokens, _ in held_out)


def test_a_validation_dataset_may_be_another_split_of_the_same(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    write_rows(tmp_path / "data" / "test.jsonl", ROWS[:2])
    values: dict[str, object] = {"dataset": "data", "tokenizer": "any", "validation_dataset": "data"}
    made = with_tokenizer(chat_tokenizer, values)
    assert (made.rows, made.validation_rows) == (26, 2)
    write_rows(tmp_path / "data" / "validation.jsonl", ROWS[:3])
    assert with_tokenizer(chat_tokenizer, {**values, "split": "train"}).validation_rows == 3
    with pytest.raises(UsageError, match="found a file that is also trained on"):
        with_tokenizer(chat_tokenizer, {**values, "split": "validation"})


@pytest.mark.parametrize("held_out", ["b.jsonl", "link.jsonl", "linked.jsonl", "*.jsonl", "c.jsonl,b.jsonl"])
def test_a_file_that_is_trained_on_is_never_held_out_too(held_out: str, chat_tokenizer: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_rows(tmp_path / name, ROWS)
    (tmp_path / "link.jsonl").symlink_to("b.jsonl")
    os.link(tmp_path / "b.jsonl", tmp_path / "linked.jsonl")
    values: dict[str, object] = {"dataset": ("a.jsonl", "b.jsonl"), "tokenizer": "any"}
    with pytest.raises(UsageError, match=r"also trained on \(.*[a-z]\.jsonl\), need others"):
        with_tokenizer(chat_tokenizer, {**values, "validation_dataset": tuple(held_out.split(","))})
    assert with_tokenizer(chat_tokenizer, {**values, "validation_dataset": "c.jsonl"}).validation_rows == len(ROWS)


@pytest.mark.parametrize("count", [1, 7, 24, 100])
def test_only_the_first_rows_are_taken(count: int, chat_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"\n{json.dumps(row)}\n" for row in ROWS))
    values = {"dataset": str(path), "tokenizer": "any", "block_size": 128, "max_rows": count}
    made = with_tokenizer(chat_tokenizer, values)
    assert made.rows == min(count, len(ROWS))
    first = documents_of(Blocks(made.path), chat_tokenizer)
    assert sum(ROWS[0]["completion"].encode() in b"".join(tokens) for tokens, _ in first) == 1


# Templates


def test_alpaca_rows_get_their_own_prompt_where_there_is_no_chat_template(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    made, [(tokens, labels)] = prepared(tmp_path, rows, plain_tokenizer, block_size=512)
    assert (made.format, made.template) == ("alpaca", "alpaca")
    assert b"### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>" in b"".join(tokens)
    assert [token for token, label in zip(tokens, labels, strict=True) if label] == [b"3", EOS]


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama2", "chatml"])
def test_a_named_template_wins_over_the_tokenizers(name: str, chat_tokenizer: Any, tmp_path: Path) -> None:
    made, [(_, labels)] = prepared(tmp_path, ROWS[:1], chat_tokenizer, block_size=1024, template=name)
    assert made.template == name
    assert (made.path / "template.jinja").read_text() == builtin_source(name)
    assert any(labels)


SMOLLM2 = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""In the manner of SmolLM2's own template, which begins with a system turn of its own."""


@pytest.mark.parametrize("name", ["SmolLM2", *builtin_names()])
@pytest.mark.parametrize("system", [False, True])
def test_labels_of_every_template_are_those_of_a_slow_reference(name: str, system: bool, tmp_path: Path) -> None:
    """Token by token, from prefixes that transformers renders and tokenizes."""
    tokenizer = make_tokenizer(tmp_path / "t", SMOLLM2 if name == "SmolLM2" else builtin_source(name))
    messages = [{"role": "system", "content": "Be kind."}] * system
    for turn in range(3):
        messages += [{"role": "user", "content": f"Why {turn}? é"}, {"role": "assistant", "content": f"So {turn}: 😀!"}]

    def length(count: int, *, open_turn: bool) -> int:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=open_turn)
        return len(tokenizer(text.rstrip() if not open_turn else text, add_special_tokens=False).input_ids)

    turns = [
        (length(index, open_turn=True), length(index + 1, open_turn=False))
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    expected = tuple(any(start <= at < end for start, end in turns) for at in range(len(ids)))
    _, [(tokens, labels)] = prepared(tmp_path, [{"messages": messages}], tokenizer, block_size=1024)
    assert (tokens, labels) == (as_bytes(tokenizer, ids), expected)


def test_a_file_of_a_users_own_takes_any_columns(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Q: {{ q }} A: {% generation %}{{ a }}{{ eos_token }}{% endgeneration %}")
    rows = [{"q": "one?", "a": "1"}, {"q": "two?", "a": "2"}]
    options = {"template": str(tmp_path / "mine.jinja"), "block_size": 64}
    made, documents = prepared(tmp_path, rows, chat_tokenizer, **options)
    assert sorted(b"".join(tokens) for tokens, _ in documents) == [
        b"Q: one? A: 1<|im_end|>",
        b"Q: two? A: 2<|im_end|>",
    ]
    assert [sum(labels) for _, labels in documents] == [2, 2]
    assert not (made.path / "template.jinja").exists(), "a template of rows can't ask a question"
    (tmp_path / "mine.jinja").write_text("Q: {{ q }} B: {% generation %}{{ a }}{{ eos_token }}{% endgeneration %}")
    assert prepared(tmp_path, rows, chat_tokenizer, **options)[0].path != made.path


def test_columns_are_renamed_to_names_that_something_reads(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"q": "one?", "a": "1"}]
    with pytest.raises(UsageError, match="--columns foo=q: found the name foo, need one of messages, "):
        prepared(tmp_path, rows, chat_tokenizer, columns="foo=q,completion=a", block_size=64)
    assert prepared(tmp_path, rows, chat_tokenizer, columns="prompt=q,completion=a", block_size=64)[0].rows == 1
    (tmp_path / "mine.jinja").write_text("{{ foo }}{% generation %}{{ a }}{% endgeneration %}")
    options = {"template": str(tmp_path / "mine.jinja"), "columns": "foo=q", "block_size": 64}
    assert prepared(tmp_path, rows, chat_tokenizer, **options)[0].rows == 1


def test_messages_without_a_chat_template_arent_said_to_be_rendered(plain_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    events: list[Any] = []
    values: dict[str, object] = {"dataset": str(write_rows(tmp_path / "rows.jsonl", rows)), "tokenizer": "any"}
    with pytest.raises(InputRefused, match="found rows of messages and no chat template") as caught:
        with_tokenizer(plain_tokenizer, values, events.append)
    assert events == [Notice("read as messages rows")]
    assert "--template chatml" in caught.value.hint
    assert "--tokenizer" not in caught.value.hint, "train and evaluate have none"


def test_a_file_that_is_no_template_is_refused(chat_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% for %}")
    with pytest.raises(InputRefused, match=r"mine\.jinja: found .*, need a Jinja template"):
        prepared(tmp_path, ROWS, chat_tokenizer, template=str(tmp_path / "mine.jinja"))


# Two at once


def test_a_second_run_of_the_same_request_waits_and_uses_what_the_first_made(
    cli: Callable[..., Ran], tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lorakit", "prepare", str(rows_file), "--tokenizer", str(tiny_llama), "--json"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert sorted(result["cached"] for result in results) == [False, True, True]
    assert len({result["path"] for result in results}) == 1


def test_a_run_that_waits_says_for_whom(chat_tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    values: dict[str, object] = {"dataset": str(path), "tokenizer": "any", "block_size": 128}
    made = with_tokenizer(chat_tokenizer, values)
    events: list[Any] = []
    with artifacts.lock(made.path):
        waiting = threading.Thread(target=with_tokenizer, args=(chat_tokenizer, values, events.append))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    waiting.join(30)
    assert not waiting.is_alive()
    said = [event.text for event in events if isinstance(event, Notice) and "waiting" in event.text]
    assert len(said) == 1
    assert f"process {os.getpid()} on " in said[0]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers by /proc")
@pytest.mark.parametrize(
    ("by", "told", "found"),
    [
        (signal.SIGKILL, OutOfMemory, "a worker process that was killed"),  # as the system does when memory runs out
        (signal.SIGPROF, InputRefused, r"rows\.jsonl: found a row that the template renders without end"),
    ],
)
def test_a_worker_that_is_killed_is_told(
    by: int, told: type[Exception], found: str, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS * 50)
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 5)

    def kill_workers(event: Any) -> None:
        if isinstance(event, Progress):
            for child in active_workers():
                os.kill(child, by)

    values = {"dataset": str(path), "tokenizer": "any", "num_workers": 2, "output": tmp_path / "out"}
    with pytest.raises(told, match=found):
        with_tokenizer(chat_tokenizer, values, kill_workers)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_workers_inside_of_one_instruction(rows_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "endless.jinja").write_text(ONE_INSTRUCTION + "{{ messages }}")
    command = [sys.executable, "-m", "lorakit", "prepare", str(rows_file), "--tokenizer", str(tiny_llama)]
    command += ["--template", str(tmp_path / "endless.jinja"), "--num-workers", "2"]
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ran.stderr is not None
    while b"rendered by endless.jinja" not in ran.stderr.readline():
        assert ran.poll() is None
    time.sleep(2)
    began = time.monotonic()
    ran.send_signal(signal.SIGINT)
    ran.communicate(timeout=100)
    assert ran.returncode == 130
    assert time.monotonic() - began < 8, "a text may take 15 s"


def active_workers() -> list[int]:
    """The children of the server that forks workers, by /proc."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
