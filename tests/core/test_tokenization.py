"""Tokenization: the right tokens are trained at every edge, and what a tokenizer is is read once and kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core import tokenization
from lorakit.core.errors import InputRefused
from lorakit.core.records import Rendered
from lorakit.core.tokenization import Codec, Document, TokenizerSpec, load_spec, spec_of
from tests.conftest import make_tokenizer, unmasked

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=150)

CORPUS = [
    "the cat sat on the mat, and the hat sat on the cat",
    "naïve 😀😀 emoji  and   spaces\n\n\nlines 漢字漢字",
] * 20


def trained_bpe(*, prefix_space: bool = False) -> Any:
    """A small byte-level BPE, merged over letters, spaces and line breaks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metaspace() -> Any:
    """In the manner of Llama 2's: a space before every text, and spaces as ▁."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [(letter, -2.0) for letter in "abcdefgh▁"] + [("▁ab", -1.0), ("bc", -1.0), ("<unk>", -9.0)]
    backend = Tokenizer(models.Unigram(letters, unk_id=len(letters) - 1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return backend


def codec(backend: Any, **changed: Any) -> Codec:
    more: dict[str, Any] = {"bos_id": None, "eos_id": None, "pad_id": 0, "end_tokens": [], "notes": [], **changed}
    return Codec(TokenizerSpec(backend=backend.to_str(), chat_template=None, variables={}, **more))


def encoded(with_codec: Codec, text: str, *spans: tuple[int, int]) -> Document:
    return next(with_codec.encode([Rendered(text, spans, needs_bos=False, needs_eos=False)]))


BPE = codec(trained_bpe())


def reference(text: str, spans: list[tuple[int, int]]) -> tuple[list[bytes], list[bool]]:
    """Bytes of the text and whether each is in a span, without any token."""
    marks = [any(start <= at < end for start, end in spans) for at in range(len(text))]
    letters = [letter.encode() for letter in text]
    return letters, marks


@PROPERTY
@given(
    pieces=st.lists(st.sampled_from(["the cat", " sat", " ", "\n", "😀", "漢字", "naïve", "x", "  and"]), max_size=12),
    edges=st.lists(st.integers(0, 60), min_size=2, max_size=4, unique=True),
)
def test_what_is_trained_decodes_to_exactly_the_spans(pieces: list[str], edges: list[int]) -> None:
    """Also where a token would lie across an edge, or one character is several tokens."""
    text = "".join(pieces)
    edges = sorted(min(edge, len(text)) for edge in edges)
    spans = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False) if 0 < a < b]
    found = encoded(BPE, text, *spans)
    assert BPE.decode(found.tokens) == text
    letters, marks = reference(text, spans)
    expected = b"".join(letter for letter, mark in zip(letters, marks, strict=True) if mark)
    assert b"".join(token_bytes(found.tokens[found.trained])) == expected


def token_bytes(ids: Any) -> list[bytes]:
    return [unmasked(BPE._backend.id_to_token(int(token))) for token in ids]


def with_added_tokens(normalizer: Any = None) -> Any:
    """Special tokens, one of which takes the spaces before it along, and a normalizer."""
    from tokenizers import AddedToken

    backend = trained_bpe()
    backend.normalizer = normalizer
    backend.add_special_tokens(["<|user|>", "<|end|>", AddedToken("<|tight|>", lstrip=True, rstrip=True)])
    backend.add_tokens([AddedToken("naïve", normalized=True)])
    return backend


def nfc() -> Any:
    from tokenizers import normalizers

    return normalizers.NFC()


@pytest.mark.parametrize("backend", [with_added_tokens(), with_added_tokens(nfc())])
@PROPERTY
@given(data=st.data())
def test_many_texts_at_once_are_what_each_is_alone_by_offsets(backend: Any, data: st.DataObject) -> None:
    """Two ways to the same tokens: bytes added up over a batch with a common beginning, and offsets, text by text."""
    as_long_in_nfc = "e\u0301e\u0301e\u0301\u0958"  # three letters lose a byte, one becomes two of three bytes
    pieces = ["the cat", " sat", " ", "😀", "漢字", "naïve", as_long_in_nfc, "<|tight|>", "<|end|>", "  ", "\n"]
    texts = []
    for _ in range(20):
        said = "".join(data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=6)))
        start = len("<|user|>") + data.draw(st.integers(0, len(said)))
        text = f"<|user|>{said}<|end|>"
        texts.append(Rendered(text, ((start, len(text)),), needs_bos=False, needs_eos=False))
    fast, slow = codec(backend), codec(backend)
    assert fast._num_bytes is not None
    slow._num_bytes = None
    for text, found in zip(texts, fast.encode(texts), strict=True):
        [alone] = slow.encode([text])
        assert found.tokens.tolist() == alone.tokens.tolist()
        assert found.trained.tolist() == alone.trained.tolist()


def test_a_space_that_offsets_leave_out_is_still_cut_from_the_answer() -> None:
    """Trimmed offsets hide that ' cat' begins before the edge; asked with 'the ', the model sees another token."""
    from tokenizers import processors

    backend = trained_bpe()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    one = codec(backend)
    found = encoded(one, "the cat", (4, 7))
    assert found.tokens[~found.trained].tolist() == encoded(one, "the ").tokens.tolist()
    assert one.decode(found.tokens[found.trained]) == "cat"


def test_what_comes_before_an_answer_is_tokenized_as_when_it_is_asked() -> None:
    """ab is one token; where b is the answer, the model has to learn it after the token a."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab={"x": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    backend.decoder = decoders.Fuse()
    one = codec(backend)
    assert encoded(one, "xabx").tokens.tolist() == [0, 3, 0]
    split = encoded(one, "xabx", (2, 4))
    assert split.tokens.tolist() == [0, 1, 2, 0]
    assert split.trained.tolist() == [False, False, True, True]
    assert encoded(one, "xabx", (1, 3)).tokens.tolist() == [0, 3, 0], "nothing lies across these edges"


def test_a_tokenizer_that_puts_a_space_before_every_text_isnt_cut() -> None:
    """Cut there, the text would get a space that nobody wrote; the token across the edge is trained instead."""
    one = codec(metaspace())
    found = encoded(one, "abcd", (2, 4))
    assert one.decode(found.tokens) == "abcd"
    names = [one._backend.id_to_token(int(token)) for token in found.tokens]
    assert "".join(names).replace("▁", "") == "abcd"
    trained = [name for name, mark in zip(names, found.trained, strict=True) if mark]
    assert "".join(trained).endswith("cd")


def test_begin_and_end_are_added_once_and_only_where_they_lack() -> None:
    one = codec(trained_bpe(), bos_id=1, eos_id=2)

    def ids(text: str, *, bos: bool, eos: bool) -> Document:
        return next(one.encode([Rendered(text, ((0, len(text)),), needs_bos=bos, needs_eos=eos)]))

    bare = ids("x", bos=False, eos=False)
    both = ids("x", bos=True, eos=True)
    assert both.tokens.tolist() == [1, *bare.tokens.tolist(), 2]
    assert both.trained.tolist() == [False, True, True]
    assert bare.trained.tolist() == [False], "nothing comes before it that could predict it"


def test_a_span_without_tokens_trains_nothing() -> None:
    assert not encoded(BPE, "the cat", (3, 3)).trained.any()
    assert encoded(BPE, "").tokens.tolist() == []


# What a tokenizer is


def test_a_begin_token_counts_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(tmp_path / "t")
    assert spec_of(tokenizer).bos_id is None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert spec_of(tokenizer).bos_id == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("taken", "pad", "words"),
    [
        ((), "<|im_end|>", []),
        (("pad_token",), "<|im_end|>", []),
        (("eos_token",), "<pad>", ["no end token"]),
        (("pad_token", "eos_token"), None, ["no end token", "no padding token: token 0"]),
    ],
)
def test_a_tokenizer_without_end_or_padding_is_used_as_it_is_and_said(
    taken: tuple[str, ...], pad: str | None, words: list[str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(tmp_path / "t")
    for name in taken:
        setattr(tokenizer, name, None)
    size = len(tokenizer)
    spec = spec_of(tokenizer)
    assert spec.pad_id == (tokenizer.convert_tokens_to_ids(pad) if pad else 0)
    assert len(spec.notes) == len(words)
    assert all(word in " ".join(spec.notes) for word in words)
    assert len(tokenizer) == size


def test_a_tokenizer_without_tokenizer_json_is_refused() -> None:
    class Slow:
        name_or_path = "slow/model"

    with pytest.raises(InputRefused, match=r"slow/model: found a tokenizer without tokenizer\.json"):
        spec_of(Slow())  # type: ignore[arg-type]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="found no tokenizer that transformers can load"):
        load_spec(tmp_path)


def without_number(tokenizer: Any) -> None:
    tokenizer["model"]["vocab"]["A"] = "32"


def far_away(tokenizer: Any) -> None:
    tokenizer["model"]["vocab"]["A"] = 2**31


def twice(tokenizer: Any) -> None:
    tokenizer["model"]["vocab"]["A"] = tokenizer["model"]["vocab"]["B"]


def taken(tokenizer: Any) -> None:
    tokenizer["added_tokens"][0]["id"] = 5


def nameless(tokenizer: Any) -> None:
    tokenizer["added_tokens"][0]["content"] = ["<pad>"]


def of_another_kind(tokenizer: Any) -> None:
    tokenizer["truncation"] = "/etc/passwd"  # of which the library says `Exception`, and nothing more special


@pytest.mark.parametrize("change", [without_number, far_away, twice, taken, nameless, of_another_kind])
def test_a_tokenizer_of_nonsense_is_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    """Ids that the library makes gigabytes of, or quietly other ids of; and what it raises Exception itself for."""
    make_tokenizer(tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputRefused):
        load_spec(tmp_path / "t")


@pytest.mark.parametrize(
    "values", [{"tokenizer_class": 7}, {"tokenizer_class": "__class__"}, {"model_max_length": "["}]
)
def test_settings_of_nonsense_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    """Where transformers raises AttributeError or TypeError."""
    make_tokenizer(tmp_path / "t")
    path = tmp_path / "t" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))
    with pytest.raises(InputRefused, match="found no tokenizer that transformers can load"):
        load_spec(tmp_path / "t")


# Kept


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that transformers was asked for."""
    asked: list[Path] = []
    original = tokenization.load_tokenizer

    def watched(folder: Path, *rest: Any) -> Any:
        asked.append(folder)
        return original(folder, *rest)

    monkeypatch.setattr(tokenization, "load_tokenizer", watched)
    return asked


def test_what_a_tokenizer_is_is_asked_once(tmp_path: Path, loads: list[Path]) -> None:
    tokenizer = make_tokenizer(tmp_path / "t")
    first = load_spec(tmp_path / "t")
    assert first == load_spec(tmp_path / "t") == spec_of(tokenizer)
    make_tokenizer(tmp_path / "the same elsewhere")
    assert load_spec(tmp_path / "the same elsewhere") == first
    assert loads == [tmp_path / "t"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_any_changed_file_is_another_tokenizer(name: str, tmp_path: Path, loads: list[Path]) -> None:
    make_tokenizer(tmp_path / "t")
    load_spec(tmp_path / "t")
    path = tmp_path / "t" / name
    path.write_text(path.read_text() + " ")
    load_spec(tmp_path / "t")
    assert len(loads) == 2


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw.replace(b"user", b"usex"), lambda raw: b"[]"])
def test_a_damaged_note_is_not_believed(damage: Any, tmp_path: Path, loads: list[Path]) -> None:
    make_tokenizer(tmp_path / "t", "{{ messages }} user")
    first = load_spec(tmp_path / "t")
    [kept] = (tmp_path / "cache" / "tokenizers").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert load_spec(tmp_path / "t") == first
    assert len(loads) == 2


def test_a_cache_that_cant_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path / "t")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file"))
    assert load_spec(tmp_path / "t").eos_id == 257


def test_a_kept_tokenizer_needs_no_transformers(tmp_path: Path) -> None:
    import subprocess
    import sys

    make_tokenizer(tmp_path / "t")
    expected = load_spec(tmp_path / "t").fingerprint
    script = (
        "import sys, pathlib; from lorakit.core.tokenization import load_spec;"
        "print(load_spec(pathlib.Path('t')).fingerprint, 'transformers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False", "False"]


def test_a_spec_is_json(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "t")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    spec = spec_of(tokenizer)
    assert json.loads(json.dumps(dict(spec.variables))) == spec.variables
    assert {"<a>", "<b>"} <= set(spec.end_tokens)
    assert np.uint32(spec.pad_id) == tokenizer.eos_token_id


# New tokens


def test_new_tokens_are_ids_of_their_own_after_the_old(tmp_path: Path, loads: list[Path]) -> None:
    tokenizer = make_tokenizer(tmp_path / "t")
    old = len(tokenizer)
    spec = load_spec(tmp_path / "t", ("<ask>", "say it"))
    codec = Codec(spec)
    assert [codec.id_of(token) for token in ("<ask>", "say it")] == [old, old + 1]
    assert codec.decode([old, old + 1]) == "<ask>say it"
    text = Rendered("a<ask>b", ((0, 7),), needs_bos=False, needs_eos=False)
    [document] = list(codec.encode([text]))
    assert document.tokens.tolist() == [codec.id_of("a"), old, codec.id_of("b")]
    assert spec.fingerprint != load_spec(tmp_path / "t").fingerprint
    assert spec.fingerprint != load_spec(tmp_path / "t", ("say it", "<ask>")).fingerprint
    assert load_spec(tmp_path / "t", ("<ask>", "say it")) == spec
    assert len(loads) == 3


@pytest.mark.parametrize(
    ("tokens", "named"), [(("<a>", "x"), "'x'"), (("<a>", "<a>"), "'<a>'"), (("<pad>",), "'<pad>'")]
)
def test_a_token_that_is_there_already_is_refused(tokens: tuple[str, ...], named: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "t")
    with pytest.raises(InputRefused, match=f"add_tokens: found {named} in the tokenizer already, need new ones"):
        load_spec(tmp_path / "t", tokens)
