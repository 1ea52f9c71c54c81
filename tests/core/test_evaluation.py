"""The loss: which tokens count, that packed documents never see each other, and what evaluate reports."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.core.attention import apply
from lorakit.core.blocks import Batch, Blocks
from lorakit.core.evaluation import block_losses, loss_sum, measure_losses
from lorakit.core.events import Notice, Progress
from tests.conftest import Ran, make_tokenizer

Cli = Callable[..., Ran]


@pytest.fixture(scope="module", params=["eager", "sdpa", "varlen"])
def model(tiny_llama: Path, request: pytest.FixtureRequest) -> Any:
    """A model with each implementation of attention that runs on a CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    apply(model, request.param)
    return model


@pytest.fixture
def blocks_folder(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "blocks"
    assert cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", 256, "--output", folder).code == 0
    return folder


def make_batch(lengths: list[int], size: int, seed: int = 0) -> Batch:
    """Random documents of these lengths packed into one block, every second token trained."""
    random = np.random.default_rng(seed)
    positions = np.concatenate([np.arange(length) for length in [*lengths, size - sum(lengths)]])
    trained = (np.arange(size) % 2 == 0) & (positions > 0) & (np.arange(size) < sum(lengths))
    ids = random.integers(0, 256, size)
    return Batch(ids[None], positions[None].astype(np.int64), trained[None])


def test_a_packed_blocks_loss_is_that_of_each_document_alone(model: Any, blocks_folder: Path) -> None:
    blocks = Blocks(blocks_folder)
    for index in range(len(blocks)):
        tokens, trained, document = blocks.arrays(index)
        alone = 0.0
        for number in np.unique(document):
            ids = torch.from_numpy(tokens[document == number].astype(np.int64))[None]
            logits = model(input_ids=ids).logits[0].double()
            counts = np.flatnonzero(trained[document == number])
            log_probabilities = torch.log_softmax(logits, dim=-1)
            alone -= sum(float(log_probabilities[t - 1, ids[0, t]].detach()) for t in counts)
        assert loss_sum(model, blocks.batch([index])).item() == pytest.approx(alone, rel=1e-5)


def test_blocks_together_lose_what_they_lose_one_by_one(model: Any, blocks_folder: Path) -> None:
    blocks = Blocks(blocks_folder)
    apart = sum(loss_sum(model, blocks.batch([index])).item() for index in range(len(blocks)))
    together = loss_sum(model, blocks.batch(range(len(blocks)))).item()
    assert together == pytest.approx(apart, rel=1e-5)


def test_a_batchs_loss_is_that_of_each_block_in_order(model: Any, blocks_folder: Path) -> None:
    """And a progress note shows the mean so far."""
    blocks = Blocks(blocks_folder)
    assert len(blocks) > 2
    alone = [loss_sum(model, blocks.batch([index])).item() for index in range(len(blocks))]
    with torch.no_grad():
        together = block_losses(model, blocks.batch(range(len(blocks))))
    assert together == pytest.approx(alone, rel=1e-5)
    told: list[Progress | Notice] = []
    found = measure_losses(model, blocks, 2, told.append, "evaluating")
    assert found.sums == pytest.approx(alone, rel=1e-5)
    trained = [int(blocks.arrays(index)[1].sum()) for index in range(len(blocks))]
    assert found.tokens.tolist() == trained
    so_far = sum(alone[:2]) / sum(trained[:2])
    assert isinstance(told[0], Progress)
    assert told[0].note == f"loss {so_far:.4f}"
    assert found.mean == pytest.approx(sum(alone) / sum(trained), rel=1e-5)


def test_lengths_are_counted_once_a_batch_and_given_to_those_who_take_them(
    model: Any, blocks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them varlen would read documents from positions, for which the CPU waits on a GPU."""
    from lorakit.core.attention import implementations

    def asked(*given: Any) -> None:
        raise AssertionError("documents were read from positions")

    monkeypatch.setattr(implementations, "documents_in", asked)
    assert loss_sum(model, Blocks(blocks_folder).batch([0, 1])).isfinite()


def test_evaluate_takes_the_attention_that_training_would(
    cli: Cli, tiny_llama: Path, blocks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.core import evaluation

    seen: list[str] = []
    original = evaluation.block_losses

    def watched(model: Any, *rest: Any) -> Any:
        seen.append(model.config._attn_implementation)
        return original(model, *rest)

    monkeypatch.setattr(evaluation, "block_losses", watched)
    assert cli("evaluate", tiny_llama, "--blocks", blocks_folder).code == 0
    assert set(seen) == {"varlen"}


def test_changing_one_document_leaves_the_others_logits_alone(model: Any) -> None:
    """Bit for bit: what stands in document A can't be seen from document B."""
    batch = make_batch([20, 30, 14], 64)
    other = batch.ids_BT.copy()
    other[0, 20:50] = (other[0, 20:50] + 7) % 256
    positions = torch.from_numpy(batch.positions_BT)
    with torch.no_grad():  # also of code that passes positions alone, as transformers' own collator does
        one = model(input_ids=torch.from_numpy(batch.ids_BT), position_ids=positions, use_cache=False).logits[0]
        two = model(input_ids=torch.from_numpy(other), position_ids=positions, use_cache=False).logits[0]
    assert torch.equal(one[:20], two[:20])
    assert torch.equal(one[50:], two[50:])
    assert not torch.equal(one[20:50], two[20:50])


@pytest.mark.parametrize("position", range(1, 40, 3))
def test_a_label_counts_exactly_where_it_is_trained(model: Any, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label of one position is changed, its input isn't: the loss moves if and only if the token is trained."""
    from lorakit.core import evaluation

    batch = make_batch([40, 24], 64)
    before = loss_sum(model, batch).item()
    ids = torch.from_numpy(batch.ids_BT)
    labels = ids.clone()
    labels[0, position] = (labels[0, position] + 1) % 256
    original = evaluation.cross_entropy

    def with_changed_label(logits: torch.Tensor, targets: torch.Tensor, **how: Any) -> torch.Tensor:
        assert torch.equal(targets, ids[0][batch.trained_BT[0]])
        return original(logits, labels[0][batch.trained_BT[0]], **how)

    monkeypatch.setattr(evaluation, "cross_entropy", with_changed_label)
    changed = loss_sum(model, batch).item() != before
    assert changed is bool(batch.trained_BT[0, position])


def test_prompt_and_padding_have_no_gradient_of_their_own(model: Any, blocks_folder: Path) -> None:
    """The loss pulls on exactly the positions that predict a trained token, seen where the layers end."""
    blocks = Blocks(blocks_folder)
    seen: dict[str, torch.Tensor] = {}

    def watch(_: Any, __: Any, hidden: torch.Tensor) -> None:
        hidden.retain_grad()
        seen["hidden"] = hidden

    hook = model.model.norm.register_forward_hook(watch)
    loss_sum(model, blocks.batch([0])).backward()
    hook.remove()
    pulled = seen["hidden"].grad[0].abs().sum(dim=-1) > 0  # type: ignore[union-attr]
    _, trained, _ = blocks.arrays(0)
    expected = np.append(trained[1:].astype(bool), False)
    assert np.array_equal(pulled.numpy(), expected)


def test_chunks_of_any_size_give_the_same_loss_and_gradients(model: Any) -> None:
    """And no more logits exist at once than those of a chunk."""
    batch = make_batch([40, 24], 64)
    weight, rows = model.model.layers[0].mlp.up_proj.weight, []
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
    found = []
    for chunk_tokens in (1000, 7, 1):
        rows.clear()
        model.zero_grad()
        loss = loss_sum(model, batch, chunk_tokens)
        loss.backward()
        found.append((loss.item(), weight.grad.clone()))
        assert max(rows) == min(chunk_tokens, batch.trained_tokens)
    hook.remove()
    model.zero_grad()
    for loss_of_chunks, gradient in found[1:]:
        assert loss_of_chunks == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(gradient, found[0][1])


def test_a_model_that_changes_its_logits_after_the_head_keeps_its_own_loss() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    torch.manual_seed(0)
    config = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5)
    capped = Gemma2ForCausalLM(config).eval()
    capped.lm_head.weight.data *= 20
    batch = make_batch([64], 64)
    ids = torch.from_numpy(batch.ids_BT)
    labels = torch.where(torch.from_numpy(batch.trained_BT), ids, -100)
    own = capped(input_ids=ids, labels=labels).loss.item() * batch.trained_tokens
    assert loss_sum(capped, batch).item() == pytest.approx(own, rel=1e-5)
    capped.config.final_logit_softcapping = None
    assert loss_sum(capped, batch).item() != pytest.approx(own, rel=1e-3)


def test_a_batch_without_trained_tokens_loses_nothing(model: Any) -> None:
    batch = make_batch([64], 64)
    silent = Batch(batch.ids_BT, batch.positions_BT, np.zeros_like(batch.trained_BT))
    assert loss_sum(model, silent).item() == 0.0


def test_evaluate_puts_the_base_beside_the_adapter(
    cli: Cli, tiny_llama: Path, blocks_folder: Path, tmp_path: Path
) -> None:
    base = cli("evaluate", tiny_llama, "--blocks", blocks_folder, "--json").json
    assert base["base_loss"] is None
    run = tmp_path / "run"
    cli(
        "train",
        "--model",
        tiny_llama,
        "--blocks",
        blocks_folder,
        "--output",
        run,
        "--max-steps",
        15,
        "--learning-rate",
        5e-3,
    )
    adapter = cli("evaluate", run, "--blocks", blocks_folder, "--batch-size", 3, "--json").json
    assert adapter["base_loss"] == pytest.approx(base["loss"], rel=1e-5)
    assert adapter["loss"] < 0.95 * base["loss"]
    assert adapter["perplexity"] == pytest.approx(math.exp(adapter["loss"]))
    trained = sum(int(Blocks(blocks_folder).arrays(index)[1].sum()) for index in range(len(Blocks(blocks_folder))))
    assert adapter["tokens"] == base["tokens"] == trained
    assert adapter["loss_change"] == pytest.approx(adapter["loss"] - adapter["base_loss"])
    low, high = adapter["loss_change_interval"]
    assert low < adapter["loss_change"] < high < 0
    for name in ("", "base_"):
        low, high = adapter[f"{name}loss_interval"]
        assert low < adapter[f"{name}loss"] < high
        assert adapter[f"{name}perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])
    shown = cli("evaluate", run, "--blocks", blocks_folder)
    assert f"{adapter['loss']:.4f}" in shown.out
    assert "its base" in shown.out
    assert f"{adapter['loss_change']:+.4f}" in shown.out


def test_attention_that_was_trained_whole_keeps_documents_apart_too(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    """PEFT's copy of such a module has a config of its own. As train itself and the merged model have the loss."""
    blocks, run = tmp_path / "held-out", tmp_path / "run"
    given = ("--tokenizer", tiny_llama, "--block-size", 256, "--validation-split", 0.4, "--output", blocks)
    assert cli("prepare", rows_file, *given).code == 0
    (tmp_path / "prompts.txt").write_text("What is 1 plus 2?")
    trains = ("train", "--model", tiny_llama, "--blocks", blocks, "--output", run, "--learning-rate", 5e-3)
    saves = ("--modules-to-save", "self_attn", "--max-steps", 4, "--eval-steps", 2)
    assert cli(*trains, *saves, "--sample-prompts", tmp_path / "prompts.txt").code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    assert cli("merge", run, "--output", tmp_path / "merged").code == 0
    for model in (run, tmp_path / "merged"):
        found = cli("evaluate", model, "--blocks", blocks, "--json").json["loss"]
        assert found == pytest.approx(trained, rel=1e-6)


def test_mixtral_is_trained_evaluated_and_merged_and_its_experts_are_said_to_stay_whole(
    cli: Cli, rows_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model, blocks, run = tmp_path / "model", tmp_path / "held-out", tmp_path / "run"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 320, "eos_token_id": 258, "bos_token_id": 257, "pad_token_id": 256}
    config = AutoConfig.for_model("mixtral", num_key_value_heads=2, num_local_experts=4, **sizes, **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_tokenizer(model)
    given = ("--tokenizer", model, "--block-size", 256, "--validation-split", 0.3, "--output", blocks)
    assert cli("prepare", rows_file, *given).code == 0
    trains = ("train", "--model", model, "--blocks", blocks, "--output", run, "--max-steps", 4, "--eval-steps", 4)
    ran = cli(*trains, "--quantize", "nf4", "--no-calibrate")
    assert ran.code == 0, ran.err
    assert ran.err.count("experts aren't quantized") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    found = cli("evaluate", run, "--blocks", blocks, "--quantize", "nf4", "--json")
    assert found.err.count("experts aren't quantized") == 1
    assert found.json["loss"] == pytest.approx(trained, rel=1e-5)
    assert cli("merge", run, "--output", tmp_path / "merged").code == 0
    by_merged, by_adapter = (
        cli("evaluate", one, "--blocks", blocks, "--json").json for one in (tmp_path / "merged", run)
    )
    assert by_merged["loss"] == pytest.approx(by_adapter["loss"], rel=1e-5)
    assert by_adapter["loss"] < by_adapter["base_loss"]


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_quantized_base_is_evaluated_as_it_is_loaded(
    kind: str, cli: Cli, tiny_llama: Path, blocks_folder: Path
) -> None:
    from lorakit.core.model import load_base
    from lorakit.core.weights import open_weights

    ran = cli("evaluate", tiny_llama, "--blocks", blocks_folder, "--quantize", kind, "--json")
    assert ran.code == 0, ran.err
    base = load_base(open_weights(tiny_llama), torch.float32, torch.device("cpu"), kind)
    apply(base, "varlen")
    blocks = Blocks(blocks_folder)
    with torch.no_grad():
        total = sum(loss_sum(base, blocks.batch([index])).item() for index in range(len(blocks)))
    assert ran.json["loss"] == pytest.approx(total / ran.json["tokens"], rel=1e-5)
    exact = cli("evaluate", tiny_llama, "--blocks", blocks_folder, "--json").json["loss"]
    assert ran.json["loss"] != pytest.approx(exact, rel=1e-6)


@pytest.fixture
def run_folder(cli: Cli, tiny_llama: Path, blocks_folder: Path, tmp_path: Path) -> Path:
    """An adapter that has learned something."""
    given = ("--model", tiny_llama, "--blocks", blocks_folder, "--output", tmp_path / "run")
    assert cli("train", *given, "--max-steps", 8, "--learning-rate", 5e-3).code == 0
    return tmp_path / "run"


def test_evaluate_says_which_engine_computed_the_loss(cli: Cli, tiny_llama: Path, blocks_folder: Path) -> None:
    given = ("evaluate", tiny_llama, "--blocks", blocks_folder, "--json")
    auto, fast, standard = cli(*given), cli(*given, "--engine", "fast"), cli(*given, "--engine", "standard")
    assert [ran.json["engine"] for ran in (auto, fast, standard)] == ["standard", "fast", "standard"]
    assert "engine: standard, since there is no GPU" in auto.err
    assert "engine: fast\n" in fast.err
    assert "engine" not in standard.err


@pytest.mark.parametrize("kind", ["none", "nf4", "fp8"])
def test_both_engines_measure_the_same_of_adapter_and_base(
    kind: str, cli: Cli, run_folder: Path, blocks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, where no input is rounded; that the fast one does compute is seen by what its layers are called."""
    from lorakit.core.fast import layers

    calls: list[Any] = []
    original = layers._compute
    monkeypatch.setattr(layers, "_compute", lambda *a, **k: (calls.append(a), original(*a, **k))[1])
    given = ("evaluate", run_folder, "--blocks", blocks_folder, "--quantize", kind, "--json", "--engine")
    standard = cli(*given, "standard").json
    assert not calls
    fast = cli(*given, "fast").json
    assert len(calls) == 2 * 2 * fast["blocks"]  # layers, adapter and base
    for name in ("loss", "base_loss"):
        assert fast[name] == pytest.approx(standard[name], rel=1e-5)
    assert fast["loss"] < 0.98 * fast["base_loss"]
    assert fast["loss_change"] == pytest.approx(standard["loss_change"], rel=1e-4)


def test_8_bit_integers_are_multiplied_without_rounding_inputs(cli: Cli, tiny_llama: Path, blocks_folder: Path) -> None:
    """LLM.int8 rounds them wherever nothing needs a gradient, and is off by that."""
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM

    ran = cli("evaluate", tiny_llama, "--blocks", blocks_folder, "--quantize", "int8", "--engine", "fast", "--json")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for linear in model.model.modules():
        if isinstance(linear, torch.nn.Linear):
            codes, largest, _ = functional.int8_vectorwise_quant(linear.weight.detach().half())
            linear.weight.data = functional.int8_vectorwise_dequant(codes, largest).float()
    blocks = Blocks(blocks_folder)
    apply(model, "varlen")
    with torch.no_grad():
        total = sum(loss_sum(model, blocks.batch([index])).item() for index in range(len(blocks)))
    assert ran.json["loss"] == pytest.approx(total / ran.json["tokens"], rel=1e-6)


def test_dropout_keeps_no_adapter_from_being_measured_by_the_fast_engine(
    cli: Cli, tiny_llama: Path, blocks_folder: Path, tmp_path: Path
) -> None:
    """Nothing is dropped where nothing is learned."""
    given = ("--model", tiny_llama, "--blocks", blocks_folder, "--output", tmp_path / "run", "--lora-dropout", 0.5)
    assert cli("train", *given, "--max-steps", 2, "--learning-rate", 5e-3).code == 0
    given = ("evaluate", tmp_path / "run", "--blocks", blocks_folder, "--json", "--engine")
    fast, standard = (cli(*given, engine).json["loss"] for engine in ("fast", "standard"))
    assert fast == pytest.approx(standard, rel=1e-5)


def test_the_fast_engine_is_refused_by_name_where_it_cant_be_had(
    cli: Cli, tiny_llama: Path, blocks_folder: Path, tmp_path: Path
) -> None:
    given = ("--model", tiny_llama, "--blocks", blocks_folder, "--output", tmp_path / "dora", "--use-dora")
    assert cli("train", *given, "--max-steps", 1).code == 0
    ran = cli("evaluate", tmp_path / "dora", "--blocks", blocks_folder, "--engine", "fast", "--json")
    assert (ran.code, ran.out) == (11, "")
    assert "error: --engine fast: found that LoRA is DoRA (--use-dora); need what the fast engine can do" in ran.err
    assert "hint: change that, or leave out --engine" in ran.err
    ran = cli("evaluate", tiny_llama, "--blocks", blocks_folder, "--engine", "fast", "--dtype", "fp16")
    assert ran.code == 11
    assert "found that it is --dtype fp16" in ran.err


def test_answers_are_the_same_whatever_computes_the_loss(cli: Cli, run_folder: Path, rows_file: Path) -> None:
    given = ("evaluate", run_folder, "--dataset", rows_file, "--limit", 3, "--exact-match", "--max-new-tokens", 8)
    fast, standard = (cli(*given, "--json", "--engine", engine).json for engine in ("fast", "standard"))
    assert fast["answers"] == standard["answers"]
    assert fast["loss"] == pytest.approx(standard["loss"], rel=1e-5)


def test_rows_are_measured_as_their_blocks_are(
    cli: Cli, tiny_llama: Path, rows_file: Path, blocks_folder: Path
) -> None:
    of_blocks = cli("evaluate", tiny_llama, "--blocks", blocks_folder, "--json").json
    of_rows = cli("evaluate", tiny_llama, "--dataset", rows_file, "--block-size", 256, "--json").json
    assert of_rows == of_blocks
    assert of_rows["rows"] is None


def test_an_adapter_that_cant_be_switched_off_has_no_base_beside_it(cli: Cli, rows_file: Path, tmp_path: Path) -> None:
    from tests.conftest import make_llama
    from tests.core.merging.adapted import make_adapter

    base = make_llama(tmp_path / "biased", attention_bias=True)
    adapter = make_adapter(tmp_path / "adapter", base, bias="all")
    ran = cli("evaluate", adapter, "--dataset", rows_file, "--block-size", 256, "--json")
    assert ran.code == 0, ran.err
    assert "no base beside it: the adapter replaces its model.layers.0.self_attn" in ran.err
    assert (ran.json["base_loss"], ran.json["loss_change"]) == (None, None)


def test_blocks_of_a_larger_vocabulary_are_refused(cli: Cli, blocks_folder: Path, tmp_path: Path) -> None:
    from tests.conftest import make_llama

    small = make_llama(tmp_path / "small", vocab_size=200, eos_token_id=1, bos_token_id=1, pad_token_id=1)
    ran = cli("evaluate", small, "--blocks", blocks_folder)
    assert ran.code == 3
    assert "need ids below the model's 200" in ran.err


def test_a_loss_that_is_not_a_number_is_an_error(
    cli: Cli, tiny_llama: Path, blocks_folder: Path, tmp_path: Path
) -> None:
    import safetensors.torch

    from tests.conftest import make_llama

    broken = make_llama(tmp_path / "broken")
    tensors = safetensors.torch.load((broken / "model.safetensors").read_bytes())
    tensors["model.norm.weight"][:] = math.nan
    (broken / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    ran = cli("evaluate", broken, "--blocks", blocks_folder, "--json")
    assert ran.code == 8
    assert ran.out == ""
    assert "found a loss of nan" in json.dumps(ran.err)
