"""Which implementation a model gets: kept for this machine only, proven again elsewhere, written and taken back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit.core import artifacts, attention
from lorakit.core.attention import (
    CHOICES,
    apply,
    apply_to,
    read_choice,
    resolve,
    revert,
    stock_choice,
    write_choice,
)
from lorakit.core.attention.implementations import shape_of
from lorakit.core.attention.proving import Proof, Row, prove
from lorakit.core.errors import ArtifactDamaged, EnvironmentUnusable, InputRefused
from lorakit.core.events import Notice
from lorakit.core.tokenization import quiet_libraries
from lorakit.core.weights import open_weights
from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]
CPU = torch.device("cpu")
CONFIG = transformers.LlamaConfig(
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
)


@pytest.fixture(scope="module")
def proof() -> Proof:
    return prove(CONFIG, torch.float32, CPU, 32, 1, lambda event: None)


def resolved(name: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    return resolve(name, CONFIG, dtype, CPU, lambda event: None)


# Choosing


def test_auto_is_varlen_where_it_is_right() -> None:
    assert resolved() == "varlen"
    assert resolved("eager") == "eager"


def test_auto_passes_over_what_is_wrong_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention.prove

    def distrusting(*given: Any, names: Any, **more: Any) -> Any:
        found = original(*given, names=names, **more)
        wrong = [row.__class__(**{**vars(row), "ok": False, "reason": "it is wrong"}) for row in found.rows[:1]]
        return Proof(found.shape, wrong, [], None) if "varlen" in names else found

    monkeypatch.setattr(attention, "prove", distrusting)
    said: list[Any] = []
    assert resolve("auto", CONFIG, torch.float32, CPU, said.append) == "sdpa"
    assert said == [Notice("attention varlen isn't used: it is wrong")]


def test_where_none_is_right_nothing_is_trained(monkeypatch: pytest.MonkeyPatch, proof: Proof) -> None:
    monkeypatch.setattr(attention, "prove", lambda *given, **more: Proof(proof.shape, [], [], None))
    with pytest.raises(EnvironmentUnusable, match="found none that is right for packed blocks"):
        resolved()


def test_a_name_that_isnt_one_or_cant_be_had_is_refused() -> None:
    with pytest.raises(InputRefused, match="found 'flash', need auto or one of"):
        resolved("flash")
    with pytest.raises(InputRefused, match="no GPU here"):
        resolved("flex_attention")


def test_one_that_is_named_is_proven_too(monkeypatch: pytest.MonkeyPatch, proof: Proof) -> None:
    rows = [row.__class__(**{**vars(row), "ok": False, "reason": "it leaks"}) for row in proof.rows[:1]]
    monkeypatch.setattr(attention, "prove", lambda *given, **more: Proof(proof.shape, rows, [], None))
    with pytest.raises(EnvironmentUnusable, match="it leaks"):
        resolved("sdpa")


def test_a_model_whose_attention_cant_be_proven_is_trained_as_transformers_would_and_said() -> None:
    config = transformers.GPTNeoXConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
    said: list[Any] = []
    assert resolve("auto", config, torch.float32, CPU, said.append) == "sdpa"
    assert "attention isn't proven: gpt_neox: found GPTNeoXForCausalLM" in said[0].text
    assert resolve("eager", config, torch.float32, CPU, said.append) == "eager"
    with pytest.raises(InputRefused, match="GPTNeoXForCausalLM"):
        resolve("varlen", config, torch.float32, CPU, said.append)


def test_a_proof_says_nothing_on_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    """Also of special tokens that a small model has no room for."""
    config = transformers.LlamaConfig(
        **{**CONFIG.to_dict(), "vocab_size": 400, "eos_token_id": 399, "pad_token_id": 398}
    )
    capfd.readouterr()
    assert resolve("auto", config, torch.float32, CPU, lambda event: None) == "varlen"
    assert capfd.readouterr() == ("", "")


# Kept


def test_a_kept_choice_holds_for_its_shape_type_machine_and_versions(
    proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of(CONFIG)
    assert read_choice(shape, torch.float32, CPU) is None
    path = write_choice(proof, torch.float32, CPU, "eager")
    assert path.name == CHOICES
    assert read_choice(shape, torch.float32, CPU) == "eager"
    assert resolved() == "eager"
    assert read_choice(shape, torch.bfloat16, CPU) is None
    other = transformers.LlamaConfig(**{**CONFIG.to_dict(), "num_key_value_heads": 1})
    assert read_choice(shape_of(other), torch.float32, CPU) is None
    write_choice(proof, torch.bfloat16, CPU, "sdpa")
    assert read_choice(shape, torch.float32, CPU) == "eager", "a second choice leaves the first"
    [kept] = json.loads(path.read_text())
    evidence = kept["choices"]
    assert all(row["backend"] == choice["implementation"] for choice in evidence.values() for row in choice["evidence"])
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert read_choice(shape, torch.float32, CPU) is None
    assert resolved() == "varlen", "proven again"
    write_choice(proof, torch.float32, CPU, "sdpa")
    [kept] = json.loads(path.read_text())
    assert len(kept["choices"]) == 1, "what was measured with other versions is gone"


def test_machines_that_share_a_cache_keep_their_own_choices(proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    write_choice(proof, torch.float32, CPU, "eager")
    monkeypatch.setattr(attention, "_processor", lambda: "another machine")
    assert resolved() == "varlen"
    write_choice(proof, torch.float32, CPU, "sdpa")
    assert resolved() == "sdpa"
    monkeypatch.undo()


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b'[{"machine": {}, "choices": []}]', b'[{"machine": {}, "choices": {"a": 1}}]', b"{}"]
)
def test_a_damaged_file_of_choices_is_passed_over(content: bytes, tmp_path: Path, proof: Proof) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / CHOICES).write_bytes(content)
    assert resolved() == "varlen"
    write_choice(proof, torch.float32, CPU, "sdpa")
    assert resolved() == "sdpa"


def test_training_takes_the_kept_choice_and_stays_with_it(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Also when another one is kept before it goes on: a run's losses are those of one implementation."""
    common = ["train", "--model", tiny_llama, "--dataset", rows_file, "--block-size", 64, "--output", tmp_path / "run"]
    assert cli("patch-attention", tiny_llama, "--apply", "--implementation", "eager").code == 0
    first = cli(*common, "--max-steps", 2, "--json")
    assert first.json["attention"] == "eager"
    assert "attention: eager" in first.err
    whole = cli(*common[:-1], tmp_path / "other", "--max-steps", 4, "--save-steps", 2, "--json").json
    assert whole["attention"] == "eager"
    for folder in (tmp_path / "other").iterdir():  # as a killed run leaves it: checkpoints alone
        if folder.name not in ("checkpoints", "metrics.jsonl"):
            folder.unlink()
    import shutil

    shutil.rmtree(tmp_path / "other" / "checkpoints" / "step-00000004")
    cli("patch-attention", tiny_llama, "--apply", "--implementation", "sdpa")
    resumed = cli(*common[:-1], tmp_path / "other", "--max-steps", 4, "--save-steps", 2, "--json").json
    assert (resumed["attention"], resumed["resumed_from"]) == ("eager", 2)
    assert resumed["last_loss"] == whole["last_loss"]


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
def test_a_run_can_name_its_implementation(
    name: str, cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    common = ["train", "--model", tiny_llama, "--dataset", rows_file, "--block-size", 64, "--max-steps", 3]
    reference = cli(*common, "--output", tmp_path / "auto", "--json").json
    ran = cli(*common, "--output", tmp_path / name, "--attention", name, "--json").json
    assert ran["attention"] == name
    assert ran["last_loss"] == pytest.approx(reference["last_loss"], rel=1e-4)
    assert cli(*common, "--output", tmp_path / name, "--attention", "auto").code == 5


def test_a_run_that_cant_go_on_as_it_began_says_so(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    common = ["train", "--model", tiny_llama, "--dataset", rows_file, "--block-size", 64, "--max-steps", 3]
    assert cli(*common, "--output", run).code == 0
    for path in run.iterdir():
        if path.name not in ("checkpoints", "metrics.jsonl"):
            path.unlink()
    monkeypatch.setattr(attention, "lacking", lambda name, *rest: "no such kernel" if name == "varlen" else None)
    ran = cli(*common, "--output", run)
    assert ran.code == 5
    assert "no such kernel" in ran.err
    assert "begin anew with --overwrite" in ran.err


# Anyone's model


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_apply_gives_a_model_the_best_and_a_guard(model: Any) -> None:
    assert apply(model) == model.config._attn_implementation == "varlen"
    assert apply(model, "sdpa") == model.config._attn_implementation == "sdpa"
    ids, positions = torch.ones(1, 6, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(InputRefused, match="position_ids that restart"):
        model(input_ids=ids, position_ids=positions, attention_mask=torch.ones(1, 6))
    model(input_ids=ids, position_ids=positions)


@pytest.mark.parametrize("name", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_gradients_are_those_of_the_documents_alone(model: Any, name: str, checkpointed: bool) -> None:
    """Of a whole model with every parameter trained; positions alone tell where documents begin."""
    apply(model, name)
    model.train()
    if checkpointed:
        with quiet_libraries():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 250, (1, length), generator=draw) for length in (9, 1, 14)]

    def losses(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, **more).logits.double().log_softmax(-1)[..., 7].sum()

    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
    together = losses(packed, position_ids=positions)
    together.backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    alone = sum(losses(ids) for ids in documents)
    alone.backward()
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-5, atol=1e-5 * float(parameter.grad.abs().max()))


# A model folder's config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model")


def test_what_is_applied_is_what_transformers_loads_and_comes_off_byte_for_byte(folder: Path) -> None:
    path = folder / "config.json"
    before = path.read_bytes()
    fingerprint = open_weights(folder).fingerprint
    assert apply_to(folder, "eager").changed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config._attn_implementation == "eager"
    assert open_weights(folder).fingerprint == fingerprint, "it is the same base for every adapter"
    assert not apply_to(folder, "eager").changed, "twice is once"
    assert apply_to(folder, "sdpa").changed
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation == "sdpa"
    done = revert(folder)
    assert path.read_bytes() == before
    assert done.implementation is None
    assert not (folder / artifacts.BACKUP).exists()
    with pytest.raises(InputRefused, match=r"found no config\.json\.before-patch-attention"):
        revert(folder)


def test_what_only_lorakit_knows_is_written_into_no_model(folder: Path) -> None:
    with pytest.raises(InputRefused, match="found varlen, which transformers knows through lorakit only"):
        apply_to(folder, "varlen")
    assert not (folder / artifacts.BACKUP).exists()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "found no config.json"), (b"{", "need a model's config"), (b"[]", "no JSON object")]
)
def test_a_folder_without_a_config_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputRefused, match=words):
        apply_to(tmp_path, "sdpa")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("as_artifact", [False, True])
def test_killed_before_the_config_is_written_the_same_command_finishes_and_can_be_reverted(
    as_artifact: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there is kept before anything is changed."""
    from lorakit.core.config import DemoConfig

    if as_artifact:
        files = [(path.name, path.read_bytes()) for path in folder.iterdir()]
        folder = tmp_path / "whole"
        artifacts.commit(folder, "base", files, config=DemoConfig.resolve(), parents={}, facts={})
    before = (folder / "config.json").read_bytes()

    def killed(*given: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(attention, "_put", killed)
        with pytest.raises(Killed):
            apply_to(folder, "eager")
    assert (folder / artifacts.BACKUP).read_bytes() == (folder / "config.json").read_bytes() == before
    assert apply_to(folder, "eager").changed
    revert(folder)
    assert (folder / "config.json").read_bytes() == before


def test_a_config_that_was_changed_since_is_not_overwritten(folder: Path) -> None:
    apply_to(folder, "eager")
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), "rope_theta": 5.0}
    path.write_text(json.dumps(changed))
    with pytest.raises(InputRefused, match="changed since --apply-to"):
        revert(folder)
    assert json.loads(path.read_text()) == changed
    fresh = {key: value for key, value in changed.items() if key != "attn_implementation"}
    path.write_text(json.dumps(fresh))
    apply_to(folder, "sdpa")
    revert(folder)
    assert path.read_text() == json.dumps(fresh), "the backup is of the config that was there last"


def row(backend: str, case: str, seconds: float, *, ok: bool = True) -> Row:
    return Row(case, backend, "", 0.0, 1.0, 1.0, seconds, None, 1.0, None, ok, "" if ok else "wrong", {})


def test_a_stock_model_gets_the_fastest_right_one_that_isnt_eager() -> None:
    cases = ("causal", "packed", "packed, checkpointed")
    rows = [row(name, case, seconds) for name, seconds in (("eager", 1.0), ("sdpa", 2.0)) for case in cases]
    rows += [row("flex_attention", "packed", 0.1), *(row("varlen", case, 0.1) for case in cases)]
    shape = shape_of(CONFIG)
    assert stock_choice(Proof(shape, rows, [], None)) == "sdpa"
    wrong = [*rows, row("sdpa", "prefill, cached", 1.0, ok=False)]
    assert stock_choice(Proof(shape, wrong, [], None)) == "eager"
    with pytest.raises(EnvironmentUnusable):
        stock_choice(Proof(shape, [*wrong, row("eager", "left-padded", 1.0, ok=False)], [], None))


def test_an_artifact_stays_one(folder: Path, tmp_path: Path) -> None:
    from lorakit.core.config import DemoConfig

    whole = tmp_path / "whole"
    files = [(path.name, path.read_bytes()) for path in folder.iterdir()]
    artifacts.commit(whole, "base", files, config=DemoConfig.resolve(), parents={}, facts={})
    manifest = (whole / artifacts.MANIFEST).read_bytes()
    apply_to(whole, "eager")
    assert artifacts.open_artifact(whole, "base").path == whole
    assert not apply_to(whole, "eager").changed
    revert(whole)
    assert (whole / artifacts.MANIFEST).read_bytes() == manifest
    (whole / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ArtifactDamaged, match=r"config\.json: found other bytes than were written"):
        apply_to(whole, "eager")
