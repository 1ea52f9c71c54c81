"""Safetensors headers read as the library reads them, and model folders refused for what they are."""

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from lorakit.core import weights
from lorakit.core.errors import ArtifactDamaged, DiskFailed, InputRefused
from lorakit.core.untrusted import read_json_object
from lorakit.core.weights import open_weights, read_header
from tests.conftest import make_llama

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16}
DTYPES |= {"I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def raw_file(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def model(folder: Path, config: Any = LLAMA, **files: bytes) -> Path:
    """A model folder with this config and these files (`_` stands for a dot)."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


ONE = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
TWO = save({"b": np.arange(4, dtype=np.float16), "c": np.zeros((0, 2), dtype=np.int8)})


def sharded(folder: Path, weight_map: Any) -> Path:
    (model(folder) / "model-1.safetensors").write_bytes(ONE)
    (folder / "model-2.safetensors").write_bytes(TWO)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}


@pytest.mark.parametrize("config", [{"num_hidden_layers": 10**9}, {"n_layer": 4}, {"text_config": {"n_layer": 4}}])
def test_more_layers_than_tensors_are_refused_before_anyone_makes_them(config: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", MAP)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 3}))
    assert len(open_weights(folder).tensors) == 3
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    with pytest.raises(InputRefused, match=r"found n\w+ = \d+ beside 3 tensors, need no more layers"):
        open_weights(folder)


# Headers

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
files = st.dictionaries(
    st.text(min_size=1, max_size=12), st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6
)


@settings(deadline=None, database=None, derandomize=True, max_examples=80)
@given(
    tensors=files.filter(lambda tensors: "__metadata__" not in tensors), metadata=st.booleans(), seed=st.integers(0, 9)
)
def test_a_header_says_what_the_library_reads(
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    metadata: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    generator = np.random.default_rng(seed)
    arrays = {
        name: generator.integers(0, 2, size=shape).astype(DTYPES[dtype]) for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.getbasetemp() / "some.safetensors"
    path.write_bytes(save(arrays, metadata={"format": "pt"} if metadata else None))
    places, raw = read_header(path), path.read_bytes()
    with safe_open(path, framework="numpy") as library:
        assert sorted(places) == sorted(library.keys())
        for name, place in places.items():
            assert place.shard == "some.safetensors"
            assert place.dtype == library.get_slice(name).get_dtype()
            assert list(place.shape) == library.get_slice(name).get_shape()
            found = np.frombuffer(raw[place.start : place.end], DTYPES[place.dtype]).reshape(place.shape)
            np.testing.assert_array_equal(found, library.get_tensor(name))


def test_bf16_and_a_real_model_are_read(tiny_llama: Path) -> None:
    found = open_weights(tiny_llama)
    with safe_open(tiny_llama / "model.safetensors", framework="pt") as library:
        assert {name: place.shape for name, place in found.tensors.items()} == {
            name: tuple(library.get_slice(name).get_shape()) for name in list(library.keys())
        }
    assert found.shards == ["model.safetensors"]
    assert found.size_bytes == (tiny_llama / "model.safetensors").stat().st_size
    assert found.config == json.loads((tiny_llama / "config.json").read_text())


def test_a_model_in_shards_holds_the_tensors_of_all(tmp_path: Path) -> None:
    import torch

    one = open_weights(make_llama(tmp_path / "one", dtype=torch.bfloat16))
    many = open_weights(make_llama(tmp_path / "many", dtype=torch.bfloat16, max_shard_size="100KB"))
    assert len(many.shards) > 1
    assert {n: (p.dtype, p.shape) for n, p in many.tensors.items()} == {
        n: (p.dtype, p.shape) for n, p in one.tensors.items()
    }
    assert {place.dtype for place in one.tensors.values()} == {"BF16"}
    for name in one.tensors:
        raw = [(m.folder / p.shard).read_bytes()[p.start : p.end] for m in (one, many) for p in [m.tensors[name]]]
        assert raw[0] == raw[1], name


def test_tensors_without_elements_may_stand_anywhere_in_the_header(tmp_path: Path) -> None:
    entries = {
        "b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
        "__metadata__": {"format": "pt"},
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(entries, b"abcd"))
    with safe_open(path, framework="numpy") as library:
        assert sorted(library.keys()) == sorted(read_header(path)) == ["a", "b"]


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": offsets}


GOOD = raw_file({"a": entry()}, b"12345678")

DAMAGED = {
    "empty": b"",
    "shorter than its length": GOOD[:5],
    "cut off in the header": GOOD[:20],
    "cut off in the data": GOOD[:-1],
    "too long": GOOD + b"\0",
    "header length zero": struct.pack("<Q", 0) + GOOD[8:],
    "header length huge": struct.pack("<Q", 2**63) + GOOD[8:],
    "header length beyond the library's limit": struct.pack("<Q", 100_000_001) + GOOD[8:],
    "header not JSON": raw_file(b"not JSON"),
    "header not UTF-8": raw_file(b'{"\xff": 1}'),
    "header not an object": raw_file([1, 2]),
    "header nested without end": raw_file(b"[" * 100_000),
    "entry not an object": raw_file({"a": 1}),
    "entry without a type": raw_file({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"12345678"),
    "unknown type": raw_file({"a": entry("F31")}, b"12345678"),
    "type not a name": raw_file({"a": entry(["F32"])}, b"12345678"),
    "shape not a list": raw_file({"a": entry(shape=2)}, b"12345678"),
    "shape of text": raw_file({"a": entry(shape=("2",))}, b"12345678"),
    "shape too large": raw_file({"a": entry(shape=(3,))}, b"12345678"),
    "shape not whole": raw_file({"a": entry(shape=(2.0,))}, b"12345678"),
    "shape negative twice": raw_file({"a": entry(shape=(-1, -2))}, b"12345678"),
    "offsets too many": raw_file({"a": entry(offsets=[0, 4, 8])}, b"12345678"),
    "offsets backwards": raw_file({"a": entry(offsets=[8, 0])}, b"12345678"),
    "offsets of text": raw_file({"a": entry(offsets=["0", "8"])}, b"12345678"),
    "gap": raw_file({"a": entry(), "b": entry(offsets=[12, 20])}, b"x" * 20),
    "overlap": raw_file({"a": entry(), "b": entry(offsets=[4, 12])}, b"x" * 12),
    "twice the same place": raw_file({"a": entry(), "b": entry()}, b"x" * 8),
    "beyond the end": raw_file({"a": entry(), "b": entry(offsets=[8, 16])}, b"x" * 8),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_found_before_it_is_used(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises((SafetensorError, OSError)):  # the library agrees
        load_file(path)
    with pytest.raises(ArtifactDamaged) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: found ")
    assert len(caught.value.message) < 300 + len(str(path))
    assert caught.value.hint


def test_a_huge_header_length_reads_nothing(tmp_path: Path) -> None:
    """The file is sparse: 200 GB by its size, nothing on the disk, and read whole it would fill the memory."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200 * 10**9))
        file.truncate(200 * 10**9)
    with pytest.raises(ArtifactDamaged, match="a header of 200000000000 bytes"):
        read_header(path)


# Model folders


def test_shards_listed_by_an_index_are_one_model(tmp_path: Path) -> None:
    found = open_weights(sharded(tmp_path / "m", MAP))
    assert {name: place.shard for name, place in found.tensors.items()} == MAP
    assert found.shards == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("stale", [False, True], ids=["shards there", "shards gone"])
def test_one_file_beside_an_index_is_what_transformers_reads(stale: bool, tmp_path: Path) -> None:
    """transformers leaves the index of a formerly sharded model beside the file that it saves."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "m", max_shard_size="60KB")
    whole = make_llama(tmp_path / "other", seed=5) / "model.safetensors"
    (folder / "model.safetensors").write_bytes(whole.read_bytes())
    if stale:
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
    found = open_weights(folder)
    assert found.shards == ["model.safetensors"]
    place = found.tensors["model.embed_tokens.weight"]
    with (folder / place.shard).open("rb") as file:
        file.seek(place.start)
        read = np.frombuffer(file.read(place.end - place.start), np.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    np.testing.assert_array_equal(read, theirs.detach().numpy().ravel())
    assert found.fingerprint == open_weights(tmp_path / "other").fingerprint


@pytest.mark.parametrize(
    "weight_map",
    [
        {**MAP, "d": "model-1.safetensors"},
        {"a": "model-1.safetensors", "b": "model-2.safetensors"},
        {**MAP, "a": "model-2.safetensors"},
        {**MAP, "b": "model-3.safetensors"},
        {},
        None,
        ["model-1.safetensors"],
    ],
    ids=["too many", "too few", "elsewhere", "missing shard", "empty", "none", "list"],
)
def test_an_index_that_disagrees_with_its_shards_is_damaged(weight_map: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactDamaged):
        open_weights(sharded(tmp_path / "m", weight_map))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "", 3, None, "x.safetensors\n", ".."],
)
def test_a_shard_outside_the_folder_is_never_opened(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path / "m", {**MAP, "x": name})
    (tmp_path / "x.safetensors").write_bytes(save({"x": np.zeros(1)}))
    opened: list[Path] = []
    monkeypatch.setattr(weights, "read_header", lambda path: opened.append(path) or {})
    with pytest.raises(InputRefused, match="found the shard name"):
        open_weights(folder)
    assert opened == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_files_are_refused_with_the_way_to_convert_them(name: str, tmp_path: Path) -> None:
    """Not a byte of them is read: this one would fail."""
    folder = model(tmp_path / "m")
    (folder / name).symlink_to("/proc/self/mem")
    with pytest.raises(InputRefused) as caught:
        open_weights(folder)
    assert f"only pickle files ({name})" in caught.value.message
    assert "save_pretrained" in caught.value.hint
    assert caught.value.exit_code == 3


def test_safetensors_beside_pickle_files_are_taken(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", model_safetensors=ONE, model_bin=b"pickle")
    assert list(open_weights(folder).tensors) == ["a"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="found no weights"):
        open_weights(model(tmp_path / "m"))


@pytest.mark.parametrize("quantized", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}, "int8", ["fp8"]])
def test_quantized_weights_are_refused(quantized: Any, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {**LLAMA, "quantization_config": quantized}, model_safetensors=ONE)
    with pytest.raises(InputRefused, match="quantized") as caught:
        open_weights(folder)
    if isinstance(quantized, dict) and "quant_method" in quantized:
        assert "gptq" in caught.value.message


@pytest.mark.parametrize(
    ("architectures", "shown"),
    [
        (["BertModel"], "BertModel"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (["T5ForConditionalGeneration"], "T5ForConditionalGeneration"),
        ([], "(none)"),
        (None, "(none)"),
        (3, "3"),
        ("BertModel", "BertModel"),
    ],
)
def test_what_isnt_a_causal_language_model_is_refused(architectures: Any, shown: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"architectures": architectures}, model_safetensors=ONE)
    with pytest.raises(InputRefused) as caught:
        open_weights(folder)
    assert f"found the architecture {shown}, need a causal language model" in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM"])
def test_causal_language_models_are_taken(name: str, tmp_path: Path) -> None:
    assert open_weights(model(tmp_path / "m", {"architectures": [name]}, model_safetensors=ONE)).config


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "need JSON"),
        (b"{'a': 1}", "need JSON"),
        (b"\xff\xfe\xfd", "need JSON"),
        (b"[" * 100_000, "need JSON"),
        (b"[1]", "found list, need a JSON object"),
        (b"null", "need a JSON object"),
    ],
)
def test_a_config_that_isnt_a_json_object_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", model_safetensors=ONE)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputRefused, match=words) as caught:
        open_weights(folder)
    assert caught.value.message.startswith(f"{folder / 'config.json'}: ")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"found no config\.json"):
        open_weights(tmp_path)


def test_a_folder_where_a_file_belongs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m" / "config.json").mkdir(parents=True)
    with pytest.raises(InputRefused, match=r"config\.json: found a folder"):
        open_weights(tmp_path / "m")
    folder = sharded(tmp_path / "n", {"a": "model-3.safetensors"})
    (folder / "model-3.safetensors").mkdir()
    with pytest.raises(ArtifactDamaged, match=r"model-3\.safetensors: found a folder"):
        open_weights(folder)


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "n", {"a": "model-3.safetensors"})
    os.mkfifo(folder / "model-3.safetensors")
    with pytest.raises(ArtifactDamaged, match=r"model-3\.safetensors: found no file, need a whole safetensors"):
        open_weights(folder)
    (folder / "model-3.safetensors").unlink()
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("model-3.safetensors")
        with pytest.raises(ArtifactDamaged, match=r"found no file, need a whole safetensors"):
            open_weights(folder)


@pytest.mark.parametrize("read", [read_header, lambda path: read_json_object(path, "")], ids=["header", "json"])
def test_a_disk_that_doesnt_read_is_a_disk_failure(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, *_: int) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(DiskFailed, match="found 'Input/output error'"):
        read(tmp_path / "x")


# Fingerprints


def test_the_same_bytes_have_the_same_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    first, second = sharded(tmp_path / "a", MAP), sharded(tmp_path / "b", MAP)
    assert open_weights(first).fingerprint == open_weights(second).fingerprint


@pytest.mark.parametrize("name", ["model-1.safetensors", "model-2.safetensors"])
def test_one_flipped_bit_is_another_fingerprint(name: str, tmp_path: Path) -> None:
    before = open_weights(sharded(tmp_path / "m", MAP)).fingerprint
    raw = bytearray((tmp_path / "m" / name).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "m" / name).write_bytes(raw)
    assert open_weights(tmp_path / "m").fingerprint != before


def test_another_config_is_another_fingerprint(tmp_path: Path) -> None:
    one = open_weights(model(tmp_path / "a", {**LLAMA, "rope_theta": 1e4}, model_safetensors=ONE))
    other = open_weights(model(tmp_path / "b", {**LLAMA, "rope_theta": 1e5}, model_safetensors=ONE))
    assert one.fingerprint != other.fingerprint


def test_a_snapshot_of_the_hubs_cache_has_the_fingerprint_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are links to blobs named by their sha256, which are not read again."""
    plain = sharded(tmp_path / "plain", MAP)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        blob = blobs / (weights.disk.sha256(file) if file.suffix == ".safetensors" else f"etag-{file.name}")
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
    expected = open_weights(plain).fingerprint

    def unread(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(weights.disk, "sha256", unread)
    assert open_weights(snapshot).fingerprint == expected


def test_a_link_to_anything_else_is_read(tmp_path: Path) -> None:
    plain = model(tmp_path / "plain", model_safetensors=ONE)
    linked = model(tmp_path / "linked")
    odd = tmp_path / "blobs" / ("A" * 64)
    odd.parent.mkdir()
    odd.write_bytes(ONE)
    (linked / "model.safetensors").symlink_to(odd)
    assert open_weights(linked).fingerprint == open_weights(plain).fingerprint
