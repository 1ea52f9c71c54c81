"""Calibrated rounding: against the paper's own recursion, through what layers store, over whole models."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.core.blocks import Batch
from lorakit.core.calibration import Calibration, Grid, Spread, compensated
from lorakit.core.errors import EnvironmentUnusable, NonFinite
from lorakit.core.evaluation import loss_sum
from lorakit.core.fast.storage import FP8
from lorakit.core.model import decoder_layers, load_base
from lorakit.core.training.loop import _require_alike
from lorakit.core.weights import open_weights
from tests.conftest import Ran, make_llama

CPU = torch.device("cpu")
TABLE = torch.tensor([-1.0, -0.7, -0.4, -0.2, -0.05, 0.0, 0.1, 0.3, 0.6, 1.0])


def problem(outputs: int = 9, inputs: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and moments of inputs that hang together and are of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(200, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x *= torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]
    return weight, x.t() @ x / len(x)


def grid_of(weight: torch.Tensor, kind: str) -> Grid:
    if kind == "fp8":
        return Grid(weight.abs().amax(1)[None] / 448, None)
    return Grid(weight.view(len(weight), -1, 8).abs().amax(-1).t().contiguous(), TABLE)


def nearest(values: torch.Tensor, grid: Grid, column: int, inputs: int) -> torch.Tensor:
    """By looking at every number that there is."""
    table = TABLE if grid.table is not None else torch.arange(256, dtype=torch.uint8).view(FP8).float()
    scales = grid.scales_GN[column // (inputs // len(grid.scales_GN))].double()
    numbers = table[torch.isfinite(table)].double()[:, None] * scales
    return numbers.gather(0, (numbers - values).abs().argmin(0, keepdim=True))[0]


@pytest.mark.parametrize("kind", ["fp8", "4 bits"])
def test_it_is_the_recursion_of_the_paper(kind: str) -> None:
    """Optimal brain surgery, column by column: the inverse over the columns that are left, computed anew each time."""
    weight, moments = problem()
    grid, inputs = grid_of(weight, kind), weight.shape[1]
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    left, made = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    remaining = torch.argsort(moments.diagonal(), descending=True).tolist()
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        made[:, column] = nearest(left[:, column], grid, column, inputs)
        error = (left[:, column] - made[:, column]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    found = compensated(weight, Spread.of(moments), grid)
    assert found.double().numpy() == pytest.approx(made.numpy(), abs=1e-5)


@pytest.mark.parametrize("inputs", [24, 128, 200, 384])
def test_outputs_lose_less_than_by_the_nearest_codes_however_many_columns(inputs: int) -> None:
    weight, moments = problem(32, inputs)
    for kind in ("fp8", "4 bits"):
        grid = grid_of(weight, kind)
        plain = torch.stack([nearest(weight[:, at], grid, at, inputs) for at in range(inputs)], 1)
        found = compensated(weight, Spread.of(moments), grid)
        by_each = torch.stack([nearest(found[:, at], grid, at, inputs) for at in range(inputs)], 1)
        assert found.double().numpy() == pytest.approx(by_each.numpy(), rel=1e-6), "numbers of the grid"
        lost = [float((((weight - each) @ moments) * (weight - each)).sum()) for each in (found, plain.float())]
        assert lost[0] < 0.7 * lost[1]


def test_inputs_that_are_always_zero_are_rounded_all_the_same() -> None:
    weight, _ = problem()
    found = compensated(weight, Spread.of(torch.zeros(24, 24)), grid_of(weight, "fp8"))
    assert found.numpy() == pytest.approx(weight.numpy(), rel=0.07, abs=0.01)


# Whole models


def batch_of(blocks: int = 3, tokens: int = 48) -> Batch:
    """Blocks of two documents each."""
    ids = np.random.default_rng(0).integers(0, 256, (blocks, tokens))
    positions = np.tile(np.concatenate([np.arange(20), np.arange(tokens - 20)]), (blocks, 1))
    return Batch(ids, positions, positions > 0)


def calibration(*, compensates: bool = True) -> Calibration:
    batch = batch_of()

    def loss_of(model: Any) -> float:
        with torch.no_grad():
            return loss_sum(model, batch).item() / batch.trained_tokens

    return Calibration(loss_of, compensates)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "wide", hidden_size=64, intermediate_size=128)


def loaded(folder: Path, kind: str, given: Calibration | None, **more: Any) -> Any:
    return load_base(open_weights(folder), torch.float32, CPU, kind, calibration=given, **more)


def numbers(module: Any) -> torch.Tensor:
    """What a layer stores, by its answer to each unit vector."""
    with torch.no_grad():
        answer: torch.Tensor = module(torch.eye(module.in_features)).t()
    return answer


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("fp8", {}),
        ("int8", {"fast": True}),
        ("nf4", {}),
        ("nf4", {"double_quantization": False}),
        ("fp4", {}),
    ],
)
def test_errors_and_losses_are_those_of_the_models_themselves(kind: str, more: dict[str, Any], llama: Path) -> None:
    exact_model, given = loaded(llama, "none", None), calibration(compensates=kind != "int8")
    model = loaded(llama, kind, given, **more)
    assert given.exact_loss == pytest.approx(given.loss_of(exact_model), rel=1e-6)
    assert given.quantized_loss == pytest.approx(given.loss_of(model), rel=1e-6)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in exact_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.__setitem__(name, x[0]))
    given.loss_of(exact_model)
    assert len(given.errors) == 7 * len(decoder_layers(model))
    for name, error in given.errors.items():
        before, after = exact_model.get_submodule(name), model.get_submodule(name)
        x, weight = inputs[name].flatten(0, 1), before.weight
        lost = (x @ (weight - numbers(after)).t()).norm() / (x @ weight.t()).norm()
        assert error == pytest.approx(lost.item(), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("kind", ["fp8", "nf4", "fp4"])
def test_outputs_of_every_matrix_lose_less_than_with_the_nearest_codes(kind: str, llama: Path) -> None:
    plain, compensating = calibration(compensates=False), calibration()
    rounded, model = loaded(llama, kind, plain), loaded(llama, kind, compensating)
    assert all(compensating.errors[name] < plain.errors[name] for name in plain.errors)
    for name in plain.errors:  # the same scales
        one, other = rounded.get_submodule(name), model.get_submodule(name)
        same = (
            (one.scale, other.scale)
            if kind == "fp8"
            else (one.weight.quant_state.absmax, other.weight.quant_state.absmax)
        )
        assert torch.equal(*same)
    assert "calibrated" in compensating.told(kind, "fp32")
    assert "rounded to the nearest" in plain.told(kind, "fp32")


def test_rounded_to_the_nearest_is_as_without_measuring(llama: Path) -> None:
    measured, plain = loaded(llama, "nf4", calibration(compensates=False)), loaded(llama, "nf4", None)
    codes = {name: parameter for name, parameter in plain.named_parameters()}
    assert all(torch.equal(parameter, codes[name]) for name, parameter in measured.named_parameters())


def test_rows_that_blocks_of_64_dont_divide_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    folder = make_llama(
        tmp_path / "narrow", hidden_size=72, intermediate_size=104, num_attention_heads=3, num_key_value_heads=1
    )
    given, plain = calibration(), calibration(compensates=False)
    loaded(folder, "nf4", given), loaded(folder, "nf4", plain)
    assert given.errors == plain.errors
    assert given.recoded == 0
    assert "rounded to the nearest" in given.told("nf4", "fp32")


def spiked(folder: Path, **sizes: int) -> Path:
    """A model with numbers so large in one matrix that all others of its rows are rounded to zero; nothing reads
    them."""
    make_llama(folder, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        decoder_layers(model)[1].self_attn.k_proj.weight[:, 5] = 1e6
        decoder_layers(model)[1].input_layernorm.weight[5] = 0
    model.save_pretrained(folder)
    return folder


def test_a_matrix_that_would_lose_too_much_stays_exact_with_its_neighbours(tmp_path: Path) -> None:
    folder, given = spiked(tmp_path / "spiked", hidden_size=64, intermediate_size=128), calibration()
    found = loaded(folder, "fp8", given)
    names = {f"model.layers.1.self_attn.{each}_proj" for each in "qkv"}
    assert set(given.kept) == names
    assert not names & set(given.errors)
    layers = {name: type(module) for name, module in found.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, kind in layers.items() if kind is torch.nn.Linear} == names | {"lm_head"}
    assert f"in fp32 stay {', '.join(given.kept)}" in given.told("fp8", "fp32")


def test_where_nothing_is_compensated_even_the_worst_matrix_is_rounded(tmp_path: Path) -> None:
    folder = spiked(tmp_path / "spiked", hidden_size=64, intermediate_size=128)
    given = calibration(compensates=False)
    loaded(folder, "fp8", given)
    assert (given.kept, given.recoded) == ([], 0)
    assert given.errors["model.layers.1.self_attn.k_proj"] > 0.5


def test_what_a_layer_reads_has_to_be_numbers(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "large", hidden_size=64, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        decoder_layers(model)[0].post_attention_layernorm.weight[:] = 1e38
        decoder_layers(model)[0].mlp.up_proj.weight[:] = 1e3
    model.save_pretrained(folder)
    with pytest.raises(NonFinite, match=r"model\.layers\.0: found NaN or infinity in what its layers read") as found:
        loaded(folder, "nf4", calibration())
    assert "--dtype bf16 or fp32" in found.value.hint


# From the command line


@pytest.fixture
def train(cli: Callable[..., Ran], rows_file: Path, llama: Path, tmp_path: Path) -> Callable[..., Ran]:
    given = ("--tokenizer", llama, "--block-size", 128, "--output", tmp_path / "blocks")
    assert cli("prepare", rows_file, *given).code == 0

    def run(name: str, *options: object) -> Ran:
        where = ("--model", llama, "--blocks", tmp_path / "blocks", "--output", tmp_path / name)
        return cli("train", *where, "--max-steps", 1, "--json", *options)

    return run


def test_train_says_what_a_base_has_lost(train: Callable[..., Ran]) -> None:
    assert "base in nf4, calibrated: loss " in train("one", "--quantize", "nf4").err
    assert "base in nf4, rounded to the nearest: loss " in train("two", "--quantize", "nf4", "--no-calibrate").err
    assert "base in int8, rounded to the nearest: loss " in train("three", "--quantize", "int8").err
    assert "base in" not in train("four").err


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_vocabulary_grows_before_tokens_pass_the_base(quantize: str, cli: Callable[..., Ran], tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base", vocab_size=259)  # no longer than the tokenizer's
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say <new>", "completion": "<new> it is"}\n' * 30)
    given = ("--tokenizer", base, "--add-tokens", "<new>", "--block-size", 64, "--output", tmp_path / "blocks")
    assert cli("prepare", tmp_path / "rows.jsonl", *given).code == 0
    run = ("train", "--model", base, "--blocks", tmp_path / "blocks", "--output", tmp_path / "run")
    ran = cli(*run, "--add-tokens", "<new>", "--quantize", quantize, "--max-steps", 1)
    assert ran.code == 0, ran.err


OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
OTHERS["opt"] |= {"word_embed_proj_dim": 32, "max_position_embeddings": 128}


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("family", sorted(OTHERS))
def test_other_families_are_calibrated_too(
    family: str, quantize: str, cli: Callable[..., Ran], rows_file: Path, tmp_path: Path
) -> None:
    folder = make_llama(tmp_path / "base")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=320, **OTHERS[family]))
    (folder / "model.safetensors").unlink()
    made.save_pretrained(folder)
    given = ("--tokenizer", folder, "--block-size", 128, "--output", tmp_path / "blocks")
    assert cli("prepare", rows_file, *given).code == 0
    run = ("train", "--model", folder, "--blocks", tmp_path / "blocks", "--output", tmp_path / "run")
    ran = cli(*run, "--quantize", quantize, "--max-steps", 1)
    assert ran.code == 0, ran.err
    assert f"base in {quantize}, {'calibrated' if quantize == 'nf4' else 'rounded to the nearest'}: loss" in ran.err


def test_a_run_keeps_the_rounding_that_it_began_with(train: Callable[..., Ran], llama: Path, tmp_path: Path) -> None:
    given = ("--quantize", "nf4", "--lr-scheduler-type", "constant", "--effective-batch-size", 2, "--extend")
    assert train("run", *given).json["calibrated"]
    where = ("--model", llama, "--blocks", tmp_path / "blocks", "--output", tmp_path / "run")
    by_two = ("train", *where, *given, "--max-steps", 2, "--parallel", "fsdp", "--num-processes", 2)
    found = subprocess.run([sys.executable, "-m", "lorakit", *map(str, by_two)], capture_output=True, text=True)
    assert found.returncode == 5
    assert "found the base on several devices, need it on one: the run began with a calibrated one" in found.stderr
    assert "hint: go on without --parallel fsdp" in found.stderr
    ran = train("run", *given, "--max-steps", 2)
    assert (ran.json["calibrated"], ran.json["steps"]) == (True, 2)


def test_matrices_kept_exact_stay_so_when_a_run_goes_on(train: Callable[..., Ran], tmp_path: Path) -> None:
    """Also where no code changes, since blocks of 64 don't divide the rows."""
    sizes = {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = ("--model", spiked(tmp_path / "narrow", **sizes), "--quantize", "nf4", "--lr-scheduler-type", "constant")
    whole = train("whole", *model, "--max-steps", 2)
    assert whole.json["calibrated"], whole.err
    train("run", *model)
    ran = train("run", *model, "--max-steps", 2, "--extend")
    assert "in fp32 stay" in ran.err
    assert ran.json["last_loss"] == whole.json["last_loss"]


def test_a_run_that_begins_with_less_memory_doesnt_go_on_over_another_base(
    train: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--quantize", "nf4", "--lr-scheduler-type", "constant", "--extend")
    original = Spread.of

    def short(moments_KK: torch.Tensor) -> Spread:
        if len(moments_KK) > 64:
            raise torch.OutOfMemoryError("no memory for moments")
        return original(moments_KK)

    monkeypatch.setattr(Spread, "of", short)
    assert "rounded to the nearest, unmeasured" in train("run", *given, "--cache-quantized").err
    assert not list((tmp_path / "cache").rglob("quantized/*/lorakit.json"))  # nor is such a base kept
    assert train("run", *given, "--max-steps", 2).code == 0
    monkeypatch.undo()
    ran = train("run", *given, "--max-steps", 3)
    assert ran.code == 5
    assert "found 0 matrices that can't be calibrated, need those that couldn't be when the run began" in ran.err


def test_ranks_that_had_to_round_otherwise_dont_train_together() -> None:
    _require_alike([["a", "b"], ["a", "b"]])
    with pytest.raises(EnvironmentUnusable, match="found 2, 0 matrices that couldn't be calibrated") as found:
        _require_alike([["a", "b"], []])
    assert "--no-calibrate" in found.value.hint


def test_what_has_no_use_for_it_is_refused(train: Callable[..., Ran]) -> None:
    for kind in ("none", "int8"):
        ran = train("run", "--quantize", kind, "--no-calibrate")
        assert ran.code == 2
        assert f"found --no-calibrate with --quantize {kind}, need --quantize fp8 or nf4 or fp4 beside it" in ran.err


def test_the_numbers_of_a_calibrated_base_arent_merged_into(
    train: Callable[..., Ran], cli: Callable[..., Ran], tmp_path: Path
) -> None:
    train("run", "--quantize", "nf4")
    ran = cli("merge", tmp_path / "run", "--output", tmp_path / "merged", "--base-precision", "as-trained")
    assert ran.code == 3
    assert "trained over a calibrated base, need one whose numbers can be made again" in ran.err
    assert "train with --no-calibrate" in ran.err
    assert not (tmp_path / "merged").exists()
    ran = cli("merge", tmp_path / "run", "--output", tmp_path / "merged", "--verify", "full")
    assert ran.code == 0
    assert "it was calibrated to be near those" in ran.err
    assert "the numbers of a calibrated base aren't kept: answers are compared" in ran.err
    blocks = ("--blocks", tmp_path / "blocks")
    rounded = "the base in nf4 is rounded to the nearest; the adapter learned over a calibrated one"
    assert rounded in cli("evaluate", tmp_path / "run", *blocks, "--quantize", "nf4").err
    assert rounded not in cli("evaluate", tmp_path / "run", *blocks).err
