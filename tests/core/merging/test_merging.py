"""Merging: the numbers, what stays as it was, that a wrong model is never put in place."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from lorakit.core import artifacts, merging
from lorakit.core.merging import apply
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import logits, make_adapter

Cli = Callable[..., Ran]


def merged_and_adapted(merged: Path, base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the merged folder by plain transformers, and of base + adapter by plain peft, both in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    two = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return logits(one), logits(two)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"r": 1, "lora_alpha": 3}, {"target_modules": ["q_proj", "down_proj", "lm_head"]}],
    ids=["plain", "rslora", "rank 1", "with the head"],
)
def test_merged_logits_are_those_of_base_plus_adapter(
    cli: Cli, tiny_llama: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama, **config)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--json")
    assert ran.code == 0, ran.err
    assert "unverified" in ran.err
    merged, adapted = merged_and_adapted(tmp_path / "merged", tiny_llama, adapter)
    assert float((merged - adapted).abs().max()) < 1e-4
    assert ran.json["max_difference"] < 1e-6
    from transformers import AutoModelForCausalLM

    assert float((merged - logits(AutoModelForCausalLM.from_pretrained(tiny_llama))).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_bases_are_rounded_once(cli: Cli, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every merged tensor equals the float64 sum rounded to the base's type; fp32 addition may move a tie by one."""
    base = make_llama(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    before, after = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged")
    )
    lora = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if key not in lora:
            assert torch.equal(tensor, before[name])
            continue
        a, b = lora[key].double().numpy(), lora[key.replace("lora_A", "lora_B")].double().numpy()
        exact = before[name].double().numpy() + 2.0 * (b @ a)
        rounded = torch.from_numpy(exact).to(dtype)
        assert float((tensor == rounded).float().mean()) > 0.999
        np.testing.assert_allclose(tensor.double().numpy(), exact, rtol=float(torch.finfo(dtype).eps), atol=1e-7)
        changed += 1
    assert changed == 14


def test_untouched_tensors_and_the_shards_keep_their_bytes(cli: Cli, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", max_shard_size="60KB")
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 2
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--json")
    assert ran.json["merged_tensors"] == 2
    assert ran.json["tensors"] == 21
    assert sorted(path.name for path in (tmp_path / "merged").glob("model-*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_bytes() == (base / index).read_bytes()
    same = [name for name in shards if (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()]
    weight_map = json.loads((base / index).read_text())["weight_map"]
    assert set(shards) - set(same) == {shard for name, shard in weight_map.items() if "v_proj" in name}
    merged, adapted = merged_and_adapted(tmp_path / "merged", base, adapter)
    assert float((merged - adapted).abs().max()) < 1e-4


def test_tied_embeddings_stay_tied(cli: Cli, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    names = set(safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors"))
    assert "lm_head.weight" not in names
    merged, adapted = merged_and_adapted(tmp_path / "merged", base, adapter)
    assert float((merged - adapted).abs().max()) < 1e-4


def test_the_merged_folder_is_a_whole_model(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    """Tokenizer, chat template and generation settings come along, and lorakit takes it as a base itself."""
    from transformers import AutoTokenizer

    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    merged = tmp_path / "merged"
    assert cli("merge", adapter, "--output", merged).code == 0
    theirs, ours = AutoTokenizer.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(merged)
    turn = [{"role": "user", "content": "Hé!"}]
    assert ours.apply_chat_template(turn, tokenize=False) == theirs.apply_chat_template(turn, tokenize=False)
    assert ours("Hé!").input_ids == theirs("Hé!").input_ids
    assert (merged / "generation_config.json").is_file()
    assert cli("chat", merged, "--prompt", "a", "--max-new-tokens", 3, "--json").code == 0


def test_the_same_merge_again_is_already_done(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    first = cli("merge", adapter, "--output", tmp_path / "merged", "--json").json
    again = cli("merge", adapter, "--output", tmp_path / "merged", "--json").json
    assert again["already_done"] is True
    assert again["max_difference"] == first["max_difference"]
    other = make_adapter(tmp_path / "other", tiny_llama, seed=2)
    refused = cli("merge", other, "--output", tmp_path / "merged")
    assert refused.code == 5
    assert "adapter: found" in refused.err
    assert cli("merge", other, "--output", tmp_path / "merged", "--overwrite").code == 0


def test_what_patch_attention_left_is_replaced_with_the_model(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    one, two = (make_adapter(tmp_path / str(seed), tiny_llama, seed=seed) for seed in (1, 2))
    merged = tmp_path / "merged"
    assert cli("merge", one, "--output", merged).code == 0
    before = set(merged.iterdir())
    assert cli("patch-attention", "--apply-to", merged, "--implementation", "sdpa").code == 0
    assert len(set(merged.iterdir()) - before) == 1
    assert cli("merge", two, "--output", merged, "--overwrite").code == 0
    assert set(merged.iterdir()) == before


@pytest.mark.parametrize("changed", ["lora_alpha", "tokenizer_config.json", "generation_config.json"])
def test_other_settings_of_the_inputs_are_other_work(changed: str, cli: Cli, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0
    path = adapter / "adapter_config.json" if changed == "lora_alpha" else base / changed
    path.write_text(json.dumps({**json.loads(path.read_text()), changed.removesuffix(".json"): 31}))
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 5
    assert ("adapter's settings: found" in ran.err) is (changed == "lora_alpha")
    assert ("tokenizer and generation settings: found" in ran.err) is (changed != "lora_alpha")


def test_a_base_of_another_name_and_a_merge_of_an_older_lorakit_are_the_same_work(
    cli: Cli, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter, merged = make_adapter(tmp_path / "adapter", tiny_llama), tmp_path / "merged"
    assert cli("merge", adapter, "--output", merged).code == 0
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "elsewhere"}))
    again = ("merge", adapter, "--base", tiny_llama, "--output", merged, "--json")
    assert cli(*again).json["already_done"] is True
    manifest = json.loads((merged / "lorakit.json").read_text())
    manifest["parents"] = {name: manifest["parents"][name] for name in ("base", "adapter")}
    (merged / "lorakit.json").write_bytes(artifacts._manifest_bytes(manifest))
    assert cli(*again).json["already_done"] is True


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("moment", ["_parents", "make_plan"])
def test_an_input_that_changes_meanwhile_gives_nothing(
    moment: str, which: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint would be that of other weights than the merged model has."""
    base = make_llama(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    path = base / "model.safetensors" if which == "base" else adapter / "adapter_model.safetensors"
    right = getattr(merging, moment)

    def then_changed(*given: Any) -> Any:
        found = right(*given)
        tensors = {name: tensor * 0 + 7 for name, tensor in safetensors.torch.load_file(path).items()}
        path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        return found

    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(merging, moment, then_changed)
        ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 5, ran.err
    assert f"{path}: found that it was changed while it was read" in ran.err
    assert sorted(tmp_path.rglob("*")) == before
    assert cli("merge", adapter, "--output", tmp_path / "merged").code == 0


def test_the_same_adapter_twice_is_refused(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    (tmp_path / "link").symlink_to(adapter)
    for again in (adapter, f"{adapter}:0.5", tmp_path / "link"):
        ran = cli("merge", adapter, again, "--output", tmp_path / "merged")
        assert ran.code == 2
        assert f"found the adapter {adapter} twice, need each once" in ran.err


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("rows.jsonl", 3, "found a file, need an adapter folder or a hub id"),
        ("./nope", 3, "found no such folder, need an adapter folder or a hub id"),
        ("nope", 12, "or give a folder that holds an adapter"),
        ("runs/a:x", 2, "found 'runs/a:x', need folders or hub ids, each once, a weight behind the last colon"),
    ],
)
def test_what_is_no_adapter_is_told_so(
    name: str, code: int, words: str, cli: Cli, rows_file: Path, tmp_path: Path
) -> None:
    ran = cli("merge", name, "--output", tmp_path / "merged")
    assert ran.code == code
    assert words in " ".join(ran.err.split())


def test_a_run_that_is_being_trained_is_told_from_one_that_stopped(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    with artifacts.lock(run):
        ran = cli("merge", run, "--output", tmp_path / "merged")
    assert ran.code == 3
    assert "found a run that is being trained, need a finished one" in ran.err
    ran = cli("merge", run, "--output", tmp_path / "merged")
    assert "found an unfinished run" in ran.err


def test_a_merge_that_gives_other_numbers_is_never_put_in_place(
    cli: Cli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    right = apply.Computed._added

    def wrong(self: apply.Computed, *where: Any) -> Any:
        return right(self, *where) * np.float32(1.001)

    monkeypatch.setattr(apply.Computed, "_added", wrong)
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 4
    assert "layers.0.mlp.down_proj.weight: found" in ran.err
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_nan_in_an_adapter_is_named_and_nothing_is_written(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    weights = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    tensors[name][0, 0] = math.nan
    weights.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 8
    assert "layers.1.mlp.up_proj" in ran.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"use_dora": True}, 5, "lora_magnitude_vector missing with use_dora"),
        ({"target_parameters": ["q_proj.weight"]}, 3, "target_parameters = ['q_proj.weight']"),
        ({"layer_replication": [[0, 2], [0, 2]]}, 3, "replicated layers"),
        ({"init_lora_weights": "pissa_niter_4"}, 3, "init_lora_weights = 'pissa_niter_4'"),
        ({"alora_invocation_tokens": [1]}, 3, "alora_invocation_tokens"),
        ({"peft_type": "IA3"}, 3, "type 'IA3'"),
        ({"r": 0}, 3, "r = 0"),
        ({"lora_alpha": "NaN"}, 3, "lora_alpha = 'NaN'"),
        ({"rank_pattern": {"q_proj": 8}}, 5, "q_proj: A and B are [4, 64] and [64, 4], need [8, 64] and [64, 8]"),
        ({"rank_pattern": {"q_proj": 0}}, 3, "r = 0"),
        ({"rank_pattern": {"(": 2}}, 3, "need a regular expression"),
        ({"alpha_pattern": {"(?i)Q_PROJ": 8}}, 3, "need a regular expression"),
        ({"alpha_pattern": {"q_proj)(.*": 8}}, 3, "need a regular expression"),
        ({"alpha_pattern": {"q_proj": -1}}, 3, "lora_alpha = -1"),
        ({"r": 8}, 5, "need [8, 64]"),
    ],
)
def test_an_adapter_that_cannot_be_merged_exactly_is_refused_by_name(
    cli: Cli, tiny_llama: Path, tmp_path: Path, change: dict[str, Any], code: int, words: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == code
    assert words in ran.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_for_another_number_of_layers_is_refused(cli: Cli, tmp_path: Path, layers: int) -> None:
    """peft drops half of such an adapter without a word; here every tensor has to find its place."""
    two, other = make_llama(tmp_path / "two"), make_llama(tmp_path / "other", num_hidden_layers=layers)
    adapter = make_adapter(tmp_path / "adapter", other)
    ran = cli("merge", adapter, "--base", two, "--output", tmp_path / "merged")
    if layers == 3:
        assert ran.code == 5
        assert "the base has no tensor model.layers.2" in ran.err
    else:  # LoRA on some layers only is an ordinary adapter
        assert ran.code == 0


def test_an_adapter_tensor_without_its_pair_is_refused(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    weights = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    weights.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 5
    assert "not one of a pair" in ran.err


def test_an_adapter_as_pickle_is_never_opened(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 3
    assert "pickle files are never opened" in ran.err


def test_output_inside_an_input_is_refused(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    for place in (adapter, adapter / "deeper" / "down", tiny_llama):
        ran = cli("merge", adapter, "--output", place)
        assert ran.code == 2
        assert "need one outside" in ran.err


def test_a_full_disk_is_known_before_anything_is_written(
    cli: Cli, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    adapter = make_adapter(tmp_path / "adapter", tiny_llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 7
    assert "found 1000 bytes free, need " in ran.err
    assert not (tmp_path / "merged").exists()
