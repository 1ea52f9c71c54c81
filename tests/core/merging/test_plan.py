"""What a merge refuses, and that it does so before anything is written; what it takes that others wouldn't."""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import logits, make_adapter

Cli = Callable[..., Ran]
LORA = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("bases") / "sharded", max_shard_size="60KB")


@pytest.fixture
def base(sharded: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    import shutil

    return Path(shutil.copytree(sharded, tmp_path / "base"))


def refused(cli: Cli, tmp_path: Path, code: int, words: str, *arguments: object) -> None:
    """Asserts one error with these words and a hint, and that nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    ran = cli("merge", *arguments, "--output", tmp_path / "merged")
    assert (ran.code, ran.err.count("error: "), ran.err.count("hint: ")) == (code, 1, 1), ran.err
    assert words in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def changed(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(adapter / LORA)
    change(tensors)
    save_file(tensors, adapter / LORA, metadata={"format": "pt"})
    return adapter


def configured(folder: Path, name: str = "adapter_config.json", **values: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_missing_shard(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    lost = sorted(base.glob("model-*.safetensors"))[1]
    lost.unlink()
    refused(cli, tmp_path, 4, f"{lost}: found no such file", adapter)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["a pipe", "without end"])
def test_a_file_beside_the_weights_that_is_none(kind: str, name: str, cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    (base / name).unlink()
    if kind == "a pipe":
        os.mkfifo(base / name)
    else:
        with (base / name).open("wb") as file:
            file.truncate(20 * 2**30)
    refused(cli, tmp_path, 3, f"{base / name}: found {'no file' if kind == 'a pipe' else 'over'}", adapter)


def test_an_index_that_points_outside(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    refused(cli, tmp_path, 3, "found the shard name '../outside.safetensors'", adapter)


@pytest.mark.parametrize("damage", ["truncated", "overlapping", "header cut off"])
def test_a_damaged_shard(damage: str, cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    path = max(base.glob("model-*.safetensors"), key=lambda path: len(load_file(path)))
    raw = path.read_bytes()
    if damage == "overlapping":
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
        encoded = json.dumps(header).encode()
        raw = struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :]
    path.write_bytes(raw[:-100] if damage == "truncated" else raw[:60] if damage == "header cut off" else raw)
    refused(cli, tmp_path, 4, f"{path}: found", adapter)


def test_keys_that_match_nothing_are_listed(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "q_proj" in name]:
            tensors[name.replace("q_proj", "query")] = tensors.pop(name)
        tensors["base_model.model.something.else"] = torch.zeros(2)

    ran = cli("merge", changed(adapter, rename), "--output", tmp_path / "merged")
    assert ran.code == 5
    for layer in (0, 1):
        assert f"the base has no tensor model.layers.{layer}.self_attn.query.weight" in ran.err
    assert "base_model.model.something.else: the base has no tensor something.else" in ran.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_none(value: float, dtype: torch.dtype, cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        next(tensor for name, tensor in tensors.items() if "1.mlp.up_proj.lora_A" in name)[1, 2] = value

    refused(cli, tmp_path, 8, "layers.1.mlp.up_proj.lora_A.weight: found NaN or infinity", changed(adapter, spoil))


def test_a_sum_that_the_type_cant_hold(cli: Cli, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", dtype=torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base)

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor *= 1e4

    refused(cli, tmp_path, 8, "more than F16 holds", changed(adapter, grow))
    assert cli("merge", adapter, "--output", tmp_path / "merged", "--dtype", "bf16").code == 0


def test_a_gguf_base(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    for given in (tmp_path / "gguf", tmp_path / "gguf" / "model-q4_k_m.gguf"):
        refused(cli, tmp_path, 3, "found GGUF (model-q4_k_m.gguf)", adapter, "--base", given)
    ran = cli("merge", adapter, "--base", tmp_path / "gguf", "--output", tmp_path / "merged")
    assert "gguf_file=FILE).save_pretrained(NEW)" in ran.err


def test_a_base_in_pickle_files(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").symlink_to("/proc/self/mem")  # which would fail if a byte of it were read
    refused(cli, tmp_path, 3, "found only pickle files (pytorch_model.bin)", adapter)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("owner/llama-3-8b-bnb-4bit", "by its name owner/llama-3-8b:"),
        ("owner/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "by its name owner/Llama-3.2-1B-Instruct:"),
        ("owner/Model-7B-GPTQ-Int4", "by its name owner/Model-7B:"),
        ("owner/mine", "give the unquantized model:"),
    ],
)
def test_a_quantized_base_is_refused_and_the_right_one_named(
    name: str, right: str, cli: Cli, base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    configured(base, "config.json", quantization_config={"quant_method": "bitsandbytes"}, _name_or_path=name)
    refused(cli, tmp_path, 3, right, adapter)


def test_an_adapter_in_a_pickle_file(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / LORA).unlink()
    (adapter / "adapter_model.bin").symlink_to("/proc/self/mem")
    refused(cli, tmp_path, 3, "pickle files are never opened", adapter)


def test_dora_by_its_tensors_but_not_by_its_settings(cli: Cli, base: Path, tmp_path: Path) -> None:
    """peft would merge it as plain LoRA."""
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True)
    refused(cli, tmp_path, 5, "lora_magnitude_vector without use_dora", configured(adapter, use_dora=False))


def test_rank_zero(cli: Cli, base: Path, tmp_path: Path) -> None:
    refused(cli, tmp_path, 3, "found r = 0", configured(make_adapter(tmp_path / "adapter", base), r=0))


def test_an_output_inside_any_input(cli: Cli, base: Path, tmp_path: Path) -> None:
    one, two = make_adapter(tmp_path / "one", base), make_adapter(tmp_path / "two", base, seed=2)
    before = sorted(tmp_path.rglob("*"))
    for place in (base, base / "deep" / "er", one, two / "x"):
        ran = cli("merge", one, f"{two}:0.5", "--output", place)
        assert ran.code == 2
        assert "need one outside" in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_dora_isnt_merged_in_parts(cli: Cli, base: Path, tmp_path: Path) -> None:
    """The lengths that it sets are those of base + one whole adapter."""
    dora = make_adapter(tmp_path / "dora", base, use_dora=True)
    plain = make_adapter(tmp_path / "plain", base)
    refused(cli, tmp_path, 3, "found DoRA with a weight or beside another", f"{dora}:0.5")
    refused(cli, tmp_path, 3, "found DoRA with a weight or beside another", plain, dora)


def test_whole_tensors_are_replaced_by_one_adapter_without_a_weight(cli: Cli, base: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    one, two = (make_adapter(tmp_path / f"{seed}", base, seed=seed, **config) for seed in (1, 2))
    plain = make_adapter(tmp_path / "plain", base)
    refused(cli, tmp_path, 3, "a second adapter that replaces lm_head.weight", one, two)
    refused(cli, tmp_path, 3, "lm_head.weight trained whole, need weight 1", f"{one}:0.5")
    assert cli("merge", one, f"{plain}:0.5", "--output", tmp_path / "merged").code == 0


def test_a_token_is_trained_by_one_adapter_without_a_weight(cli: Cli, base: Path, tmp_path: Path) -> None:
    one, two, three = (
        make_adapter(tmp_path / f"{seed}", base, seed=seed, target_modules=["q_proj"], trainable_token_indices=rows)
        for seed, rows in ((1, [4, 5]), (2, [5, 6]), (3, [7]))
    )
    refused(cli, tmp_path, 3, "(row 5 of it)", one, two)
    refused(cli, tmp_path, 3, "trained tokens, need weight 1", f"{one}:0.5")
    assert cli("merge", one, three, "--output", tmp_path / "merged").code == 0


def test_an_embedding_without_its_head(cli: Cli, base: Path, tmp_path: Path) -> None:
    """Saved with a longer vocabulary, and one of the two lost."""
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], resized=331)
    lost = changed(adapter, lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    refused(cli, tmp_path, 5, "an embedding and a head of 320 and 331 tokens", lost)


def test_a_token_beyond_the_vocabulary(cli: Cli, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    for rows in ([1, 320], [1], [1, 1], [True, 2], "12", {"lm_head": [1, 2]}):
        refused(cli, tmp_path, 5, "trainable_token", configured(adapter, trainable_token_indices=rows))


@pytest.mark.parametrize("name", ["A:nan", "A:inf", "A:0"])
def test_a_weight_that_is_none(name: str, cli: Cli, tmp_path: Path) -> None:
    ran = cli("merge", name, "--output", tmp_path / "merged")
    assert ran.code == 2
    assert "ADAPTER" in ran.err


def test_options_that_need_others(cli: Cli, tmp_path: Path) -> None:
    for options, words in ((["--private"], "--push-to-hub"), (["--blocks", tmp_path], "--verify full")):
        ran = cli("merge", "A", *options)
        assert ran.code == 2
        assert words in ran.err


def test_a_full_disk_is_an_error_with_the_bytes_needed(
    cli: Cli, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    adapter = make_adapter(tmp_path / "adapter", base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": size})())
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 7
    needed = int(ran.err.split(" bytes)")[0].rsplit("(", 1)[1].replace(",", ""))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": needed})())
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    written = sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert size < written <= needed < written + 2**20


def test_a_base_without_a_tokenizer_and_an_adapter_without_a_manifest_are_taken(
    cli: Cli, base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 0
    assert "unverified" in ran.err
    assert "no tokenizer beside the base or the adapter" in ran.err
    from transformers import AutoModelForCausalLM

    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))).all()


def test_the_adapters_own_tokenizer_goes_before_the_bases(cli: Cli, base: Path, tmp_path: Path) -> None:
    from tests.conftest import make_tokenizer

    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], resized=331)
    make_tokenizer(adapter, chat_template="mine {{ messages[0]['content'] }}")
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (adapter / name).read_bytes()


def test_settings_of_a_tokenizer_alone_are_no_tokenizer(cli: Cli, base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Hi").input_ids


@pytest.mark.parametrize("name", ["/home/someone/secret/base", "../secret/base", "C:\\secret\\base", "b" * 300])
def test_the_card_names_no_place_of_this_machine(name: str, cli: Cli, base: Path, tmp_path: Path) -> None:
    """The card is what --push-to-hub uploads; the folder needn't be on the machine that merges."""
    adapter = configured(make_adapter(tmp_path / "adapter", base), base_model_name_or_path=name)
    ran = cli("merge", adapter, "--base", base, "--output", tmp_path / "merged")
    assert ran.code == 0, ran.err
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "base_model" not in card
    assert "someone" not in card


def test_the_card_says_what_it_was_made_of(cli: Cli, base: Path, tmp_path: Path) -> None:
    from lorakit import __version__
    from lorakit.core.weights import open_weights

    one = make_adapter(tmp_path / "one", base)
    two = configured(make_adapter(tmp_path / "two", base, seed=2), base_model_name_or_path="owner/base")
    assert cli("merge", f"{two}:0.25", one, "--base", base, "--output", tmp_path / "merged").code == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    words = [
        "base_model: owner/base",
        open_weights(base).fingerprint,
        "two, rank 4, alpha 8, weight 0.25",
        "one, rank 4",
    ]
    assert [word for word in (*words, f"lorakit {__version__}", "14 of 21 tensors") if word not in card] == []


def test_a_merged_model_loads_in_eight_and_four_bits(cli: Cli, tmp_path: Path) -> None:
    """Where it goes next: merged first, quantized after that."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = make_llama(tmp_path / "base", intermediate_size=128)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    exact = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    without = logits(AutoModelForCausalLM.from_pretrained(base))
    for config in (
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    ):
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", quantization_config=config))
        assert float((found - exact).abs().mean()) < 0.5 * float((without - exact).abs().mean())


def test_safetensors_itself_reads_what_was_laid_out_anew(cli: Cli, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", tie_word_embeddings=True, max_shard_size="60KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    found = {
        name: path.name
        for path in (tmp_path / "merged").glob("*.safetensors")
        for name in safetensors.torch.load_file(path)
    }
    assert found == index["weight_map"]
    assert "lm_head.weight" in found
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
