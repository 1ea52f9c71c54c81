"""Quantized bases from the cache: the same layers, bit for bit, without the weights that they were made of."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorakit.core import artifacts, disk, quantized_cache
from lorakit.core.calibration import Calibration
from lorakit.core.config import TrainConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import DiskFailed, NonFinite
from lorakit.core.events import Notice, Progress
from lorakit.core.fast.storage import FrozenLinear
from lorakit.core.model import load_base
from lorakit.core.quantized_cache import QuantizedCache
from lorakit.core.weights import Weights, open_weights
from tests.conftest import Ran, make_llama
from tests.core.test_calibration import batch_of, calibration

CPU = torch.device("cpu")
NEAREST, NOT_NESTED = ("--no-calibrate",), ("--no-double-quantization",)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("fp8", {}),
    ("int8", {"fast": True}),
    ("nf4", {}),
    ("nf4", {"double_quantization": False}),
    ("fp4", {}),
]
PLACED = {
    "device_map": dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    ),
    "computed_on": {"model.layers.1": "cpu"},
}
"""As a plan has it that leaves a layer in CPU memory."""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """With a matrix that no calibrated kind can keep: it stays exact."""
    folder = make_llama(tmp_path / "base", hidden_size=64, intermediate_size=128, attention_bias=True)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"] *= 1e-3
    weights["model.layers.1.self_attn.k_proj.weight"][:, 5] = 6e4
    weights["model.layers.1.input_layernorm.weight"][5] = 0
    for name in weights:
        if name.endswith("bias"):
            weights[name].normal_()
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class Loads:
    """Loads a base by the cache, and hears what is said."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.said, self.found = weights, "", False

    def __call__(self, kind: str, given: Calibration | None = None, dtype: Any = torch.float32, **more: Any) -> Any:
        config = TrainConfig.resolve((None, {"model": "m", "blocks": ("b",), "quantize": kind}))
        heard: list[Notice | Progress] = []
        gather = more.pop("gather", lambda value: [value])
        cache = QuantizedCache(config, self.weights.fingerprint, gather, heard.append)
        model = load_base(self.weights, dtype, CPU, kind, calibration=given, cache=cache, **more)
        self.said = "\n".join(one.text for one in heard if isinstance(one, Notice))
        self.found = cache.was_found
        return model


@pytest.fixture
def loads(llama: Path) -> Loads:
    return Loads(open_weights(llama))


def with_batch(*, compensates: bool = True) -> Calibration:
    given = calibration(compensates=compensates)
    given.batch = batch_of().fingerprint
    return given


def kept_in() -> list[Path]:
    return sorted((cache_folder() / "quantized").glob("*"))


def everything(model: Any) -> dict[str, Any]:
    """Each number that a model holds, scales and all, as bytes, and how its layers are described."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        found[name] = type(module).__name__
        for key, tensor in own.items():
            data = tensor.data
            found[f"{name}.{key}"] = (data.dtype, data.shape, data.contiguous().view(torch.uint8).numpy().tobytes())
        for state in states(module):
            tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            plain = {key: value for key, value in vars(state).items() if isinstance(value, int | str | torch.dtype)}
            found[f"{name} {len(found)}"] = ([tensor.tolist() for tensor in tensors], plain, state.shape)
        if isinstance(module, FrozenLinear):
            found[f"{name} kind"] = (module.kind, module.dtype, module.in_features, module.out_features)
        if states(module):
            weight = module.weight
            names = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")
            found[f"{name} 4 bits"] = [getattr(weight, each) for each in names] + [module.compute_dtype]
            assert module.quant_state is weight.quant_state
            assert weight.module is module or weight.module is None
            assert module.support_avx512bf16_for_cpu is False
    return found


def states(module: Any) -> list[Any]:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return [] if state is None else [state, *([state.state2] if state.nested else [])]


def without_linear_weights(weights: Weights, folder: Path, given: Calibration | None = None) -> Weights:
    """The same base as far as anyone can tell, with NaN in all that is quantized."""
    kept = given.kept if given is not None else []
    shutil.copytree(weights.folder, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("_proj.weight") and name.removesuffix(".weight") not in kept:
            tensors[name].fill_(float("nan"))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed = open_weights(folder)
    vars(changed)["fingerprint"] = weights.fingerprint
    return changed


@pytest.mark.parametrize(
    ("kind", "more", "how"),
    [
        *((kind, more, how) for kind, more in KINDS for how in ("calibrated", "nearest", "neither")),
        ("nf4", {"sharded": True}, "neither"),
        ("nf4", PLACED, "neither"),
        ("fp8", PLACED, "neither"),
    ],
    ids=str,
)
def test_layers_are_the_same_bit_for_bit_and_their_weights_unread(
    kind: str, more: dict[str, Any], how: str, loads: Loads, tmp_path: Path
) -> None:
    def given() -> Calibration | None:
        return None if how == "neither" else with_batch(compensates=how == "calibrated" and kind != "int8")

    plain, first, second = given(), given(), given()
    exact = load_base(loads.weights, torch.float32, CPU, kind, calibration=plain, **more)
    made = loads(kind, first, **more)
    assert not loads.found
    assert f"the base in {kind} is kept in {cache_folder() / 'quantized'}" in loads.said
    hollow = Loads(without_linear_weights(loads.weights, tmp_path / "hollow", first))
    found = hollow(kind, second, **more)
    assert hollow.found
    assert not hollow.said
    assert everything(found) == everything(made) == everything(exact)
    if plain is not None and second is not None:
        assert (second.errors, second.kept) == (plain.errors, plain.kept)
        assert second.told(kind, "fp32") == plain.told(kind, "fp32")
        in_16_bits = {f"model.layers.1.self_attn.{each}_proj" for each in "qkv"} if plain.compensates else set()
        assert in_16_bits == set(plain.kept)
    ids = torch.arange(40)[None]
    assert torch.equal(found(ids).logits, exact(ids).logits)
    with pytest.raises(NonFinite):
        hollow("nf4" if kind == "fp8" else "fp8", given())


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bases_in_16_bits_are_kept_too(kind: str, dtype: torch.dtype, loads: Loads) -> None:
    made = everything(loads(kind, dtype=dtype))
    assert everything(loads(kind, dtype=dtype)) == made
    assert loads.found


def test_of_16_bit_weights_in_the_file_hardly_a_page_is_read(tmp_path: Path) -> None:
    """In a process of its own: which pages of the file are in its memory, while it holds the model."""
    make_llama(tmp_path / "wide", hidden_size=512, intermediate_size=2048)
    code = (
        "import re, sys, torch; from pathlib import Path\n"
        "from lorakit.core.weights import open_weights\n"
        "from tests.core.test_quantized_cache import Loads\n"
        "loads = Loads(open_weights(Path(sys.argv[1])))\n"
        "model = loads('fp8')\n"
        "maps = re.split(r'\\n(?=[0-9a-f]+-[0-9a-f]+ )', Path('/proc/self/smaps').read_text())\n"
        "read = [re.search(r'Rss: +(\\d+)', each)[1] for each in maps if 'wide/model.safetensors' in each]\n"
        "print(loads.found, sum(map(int, read)) * 1024)"
    )
    answers = []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(tmp_path / "wide")]
        ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        answers.append(ran.stdout.split())
    (was_found, first_bytes), (found, second_bytes) = answers
    size_bytes = (tmp_path / "wide" / "model.safetensors").stat().st_size
    assert (was_found, found) == ("False", "True")
    assert int(first_bytes) > 0.9 * size_bytes
    assert int(second_bytes) < 0.2 * size_bytes


# What else there is, and what can happen to it


def test_what_is_quantized_otherwise_is_kept_apart(loads: Loads) -> None:
    """Base, kind, number type, double quantization, tokens, calibrated or not, layer kind."""
    other = with_batch()
    other.batch = "other tokens"
    requests: list[tuple[str, Calibration | None, dict[str, Any]]] = [
        ("nf4", None, {}),
        ("fp4", None, {}),
        ("nf4", None, {"dtype": torch.bfloat16}),
        ("nf4", None, {"double_quantization": False}),
        ("nf4", with_batch(), {}),
        ("nf4", with_batch(compensates=False), {}),
        ("nf4", other, {}),
        ("fp8", None, {}),
        ("int8", None, {"fast": True}),
    ]
    for number, (kind, given, more) in enumerate(requests, 1):
        loads(kind, given, **more)
        assert not loads.found
        assert len(kept_in()) == number
    vars(loads.weights)["fingerprint"] = "another base"
    loads("nf4")
    assert not loads.found
    loads("nf4")
    assert loads.found
    loads("fp8", double_quantization=False)  # which means nothing to it
    assert not loads.found


def spoil(folder: Path, how: str) -> None:
    file = folder / "model.layers.0.safetensors"
    if how == "other bytes":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "no file":
        file.unlink()
    elif how == "manifest":
        (folder / "lorakit.json").write_text("{}")
    else:  # well made, but of something else
        manifest = json.loads((folder / "lorakit.json").read_bytes())
        if how == "facts":
            manifest["facts"]["errors"] = 3
        else:
            tensors = safetensors.torch.load_file(file)
            name = "model.layers.0.mlp.up_proj.scales"
            tensors[name] = tensors[name][:-1].clone() if how == "other shape" else tensors[name].double()
            safetensors.torch.save_file(tensors, file)
            manifest["files"][file.name] = disk.described(file)
        (folder / "lorakit.json").write_bytes(artifacts._manifest_bytes(manifest))


@pytest.mark.parametrize(
    "how", ["other bytes", "cut off", "no file", "manifest", "facts", "other shape", "other number type"]
)
def test_a_damaged_one_is_made_anew_and_said(how: str, loads: Loads) -> None:
    made = everything(loads("fp8", with_batch()))
    (folder,) = kept_in()
    spoil(folder, how)
    assert everything(loads("fp8", with_batch())) == made
    assert not loads.found
    assert "the cached base in fp8 is passed over, and made anew: " in loads.said
    if "other " in how and "bytes" not in how:
        assert "found model.layers.0.mlp.up_proj.scales" in loads.said
    loads("fp8", with_batch())
    assert loads.found
    assert kept_in() == [folder]


def test_a_full_disk_loses_nothing(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    made = everything(loads("nf4"))
    shutil.rmtree(cache_folder() / "quantized")
    write_all, written = disk.write_all, 0

    def full(descriptor: int, content: bytes | memoryview) -> None:
        nonlocal written
        written += len(content)
        if written > 60_000:
            raise OSError(28, os.strerror(28))
        write_all(descriptor, content)

    monkeypatch.setattr(disk, "write_all", full)
    assert everything(loads("nf4")) == made
    assert "the base in nf4 isn't kept in the cache: " in loads.said
    assert written > 60_000
    assert not kept_in()
    assert not [path for path in (cache_folder() / "quantized").rglob("*") if path.is_file()]
    monkeypatch.setattr(disk, "write_all", write_all)
    monkeypatch.setattr(disk, "require_free_bytes", refuse)
    loads("nf4")
    assert "isn't kept in the cache: no room" in loads.said


def refuse(_target: Path, needed_bytes: int) -> None:
    assert needed_bytes > 30_000
    raise DiskFailed("no room", "")


def test_two_at_once_dont_mix(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process writes, nothing is written, and nothing waits; what is whole meanwhile stays as it is."""
    loads("nf4")
    (folder,) = kept_in()
    before = (folder / "lorakit.json").stat().st_ino
    monkeypatch.setattr(quantized_cache, "_opened", hidden)
    loads("nf4")
    assert not loads.found
    assert (folder / "lorakit.json").stat().st_ino == before
    shutil.rmtree(folder)
    with artifacts.lock(folder):
        loads("nf4")
        assert not folder.exists()
    assert not loads.said


def hidden(*_: object, **__: object) -> Any:
    from lorakit.core.errors import InputRefused

    raise InputRefused("none", "")


def test_one_that_is_removed_while_it_is_read_is_an_error_of_the_disk(
    loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads("nf4")
    opened = quantized_cache._opened

    def and_removed(folder: Path, *given: Any, **more: Any) -> Any:
        kept = opened(folder, *given, **more)
        shutil.rmtree(folder)
        return kept

    monkeypatch.setattr(quantized_cache, "_opened", and_removed)
    with pytest.raises(DiskFailed, match=r"model\.layers\.0\.safetensors"):
        loads("nf4")


def test_processes_of_a_run_take_the_same_way(loads: Loads) -> None:
    loads("nf4")
    loads("nf4", gather=lambda value: [value, False])
    assert not loads.found
    loads("nf4", gather=lambda value: [value, True])
    assert loads.found


def test_what_is_no_number_isnt_kept(loads: Loads) -> None:
    losses = iter((3.0, float("nan")))  # of the base as it is, and quantized
    loads("nf4", Calibration(lambda _: next(losses), True, "batch"))
    assert not kept_in()


# From the command line


@pytest.fixture
def train(cli: Callable[..., Ran], rows_file: Path, llama: Path, tmp_path: Path) -> Callable[..., Ran]:
    given = ("--tokenizer", llama, "--block-size", 128, "--output", tmp_path / "blocks")
    assert cli("prepare", rows_file, *given).code == 0

    def run(name: str, *options: object) -> Ran:
        where = ("--model", llama, "--blocks", tmp_path / "blocks", "--output", tmp_path / name)
        return cli("train", *where, "--max-steps", 2, "--learning-rate", 0.01, "--json", *options)

    return run


@pytest.mark.parametrize(
    "options",
    [
        ("--quantize", "fp8"),
        ("--quantize", "fp8", *NEAREST),
        ("--quantize", "int8", "--engine", "fast"),
        ("--quantize", "nf4"),
        ("--quantize", "nf4", *NEAREST),
        ("--quantize", "nf4", *NOT_NESTED, "--engine", "fast"),
        ("--quantize", "fp4", *NOT_NESTED, *NEAREST),
    ],
    ids=" ".join,
)
def test_adapters_are_the_same_with_and_without(
    options: tuple[str, ...], train: Callable[..., Ran], tmp_path: Path
) -> None:
    runs = [train("plain", *options)]
    runs += [train(name, *options, "--cache-quantized") for name in ("first", "second")]
    assert [ran.code for ran in runs] == [0, 0, 0]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "first", "second")]
    assert adapters[0] == adapters[1] == adapters[2]
    lines = [re.search(rf"base in {options[1]}, .+? loss .+", ran.err) for ran in runs]
    told = [line[0] for line in lines if line is not None]
    assert told[1] == told[0]
    assert told[2] == f"{told[0]} (from the cache)"
    calibrated = "--no-calibrate" not in options and options[1] != "int8"
    assert ("stay model.layers.1.self_attn.q_proj" in told[0]) == calibrated
    assert [ran.json["calibrated"] for ran in runs] == [calibrated] * 3
    assert train("second", *options).json["already_done"], "it decides nothing"


def test_what_isnt_kept_is_refused_by_name(train: Callable[..., Ran]) -> None:
    ran = train("run", "--cache-quantized")
    assert ran.code == 2
    assert "found --cache-quantized with --quantize none, need another --quantize beside it" in ran.err
    ran = train("run", "--cache-quantized", "--quantize", "int8")
    assert ran.code == 2
    assert "--cache-quantized: found --quantize int8 with the standard engine, need the fast one or another" in ran.err
    assert not kept_in()
