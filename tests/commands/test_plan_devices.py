"""`lorakit plan-devices`: answers, suggestions that hold what they promise, bad input, and that it is quick."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import environment, planning
from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]
OFFLOAD = ("llama-7b", "--gpus", "8GiB", "--cpu", "64GiB")
SEED = ("plan-devices", "llama-65b", "--gpus", "8x24GiB", "--quantize", "int8", "--block-size", 600, "--batch-size", 2)


def test_the_seeds_question_is_answered(cli: Cli) -> None:
    """65B in int8 over eight cards of 24 GB, which had to be typed into the seed's get_device_map."""
    ran = cli(*SEED, "--json")
    assert ran.code == 0
    assert set(ran.json) >= {"fits", "device_map", "devices", "peak_bytes", "suggestions"}
    assert (ran.json["fits"], ran.json["suggestions"]) == (True, [])
    assert [device["name"] for device in ran.json["devices"]] == [f"cuda:{i}" for i in range(8)]
    assert all(device["peak_bytes"] == sum(device["bytes"].values()) for device in ran.json["devices"])
    assert ran.json["peak_bytes"] == max(device["peak_bytes"] for device in ran.json["devices"])
    assert set(ran.json["device_map"].values()) == set(range(8))
    shown = cli(*SEED)
    assert len([line for line in shown.out.splitlines() if line.startswith("cuda:")]) == 8
    assert re.search(r"It fits: cuda:\d needs \d+\.\d of 24\.0 GiB\.", shown.out)
    hint = "hint: lorakit train --model huggyllama/llama-65b --quantize int8 --batch-size 2 "
    hint += "--parallel split --blocks DIR"
    assert hint in shown.err


@pytest.mark.parametrize(
    ("model", "gpus", "parallel", "options"),
    [
        ("llama-7b", "20GiB", "split", {"--gradient-checkpointing", "--block-size"}),
        ("llama-7b", "2x12GiB", "split", {"--gradient-checkpointing", "--block-size"}),
        ("llama-7b", "2x24GiB", "ddp", {"--gradient-checkpointing", "--block-size"}),
        ("llama-7b", "2x14GiB", "fsdp", {"--gradient-checkpointing", "--block-size"}),
        ("llama-7b", "2x12GiB", "auto", {"--gradient-checkpointing", "--block-size"}),
        ("llama-65b", "3x48GiB", "fsdp", {"--quantize"}),
        ("llama-65b", "2x48GiB", "auto", {"--quantize"}),
        ("llama-13b", "2x24GiB", "ddp", {"--quantize", "--parallel"}),
        ("llama-13b", "24GiB", "split", {"--quantize", "--gpus", "--cpu"}),
        ("llama-30b", "2x30GiB", "auto", {"--quantize", "--gpus", "--cpu"}),
    ],
)
def test_what_does_not_fit_exits_9_with_changes_that_do(
    model: str, gpus: str, parallel: str, options: set[str], cli: Cli
) -> None:
    """Each suggestion is typed as it stands, and then it fits, in the bytes that it promised."""
    heavy = ("--batch-size", 4, "--no-gradient-checkpointing") if "--block-size" in options else ()
    command = ("plan-devices", model, *heavy, "--parallel", parallel)
    ran = cli(*command, "--gpus", gpus, "--json")
    assert ran.code == 9
    assert ran.json["fits"] is False
    assert f"error: {model}: found a need of" in ran.err
    found = [change["option"] for change in ran.json["suggestions"]]
    assert {option.split()[0] for option in found} >= options
    for change in ran.json["suggestions"]:
        again = cli(*command[:2], *_without(command[2:], change["option"]), *_with(gpus, change["option"]), "--json")
        assert (again.code, again.json["peak_bytes"]) == (0, change["peak_bytes"]), change
    options_shown = found
    shown = cli(*command, "--gpus", gpus)
    assert shown.code == 9
    assert all(f"With {option} it would" in shown.out for option in options_shown)
    assert f"hint: add {options_shown[0]}" in shown.err


def _without(command: tuple[Any, ...], option: str) -> list[Any]:
    kept = [part for part in command if not (part == "--no-gradient-checkpointing" and "checkpointing" in option)]
    for name in ("--batch-size", "--parallel"):
        if option.startswith(name):
            at = kept.index(name)
            del kept[at : at + 2]
    return kept


def _with(gpus: str, option: str) -> list[str]:
    return option.split() if option.startswith("--gpus") else ["--gpus", gpus, *option.split()]


@pytest.mark.parametrize("setting", ["batch-size", "block-size"])
def test_auto_takes_the_most_that_fits(setting: str, cli: Cli) -> None:
    command = ("plan-devices", "llama-3.1-8b", "--gpus", "24GiB", "--quantize", "nf4", "--json")
    found = cli(*command, f"--{setting}", "auto").json
    most = found["settings"][setting.replace("-", "_")]
    assert found["fits"]
    assert cli(*command, f"--{setting}", most).json["peak_bytes"] == found["peak_bytes"]
    more = most + (64 if setting == "block-size" else 1)
    assert cli(*command, f"--{setting}", more).code == 9


def test_auto_takes_the_first_way_that_fits(cli: Cli) -> None:
    def way(model: str, gpus: str, *more: str) -> str:
        return str(cli("plan-devices", model, "--gpus", gpus, "--parallel", "auto", *more, "--json").json["parallel"])

    assert way("llama-7b", "2x24GiB") == "ddp"
    assert way("llama-7b", "2x13GiB") == "fsdp"
    assert way("llama-7b", "24GiB") == "split"
    assert way("llama-30b", "2x24GiB", "--quantize", "int8") == "split"


def test_layers_lie_in_cpu_memory_where_it_is_asked_for(cli: Cli, tmp_path: Path) -> None:
    command = ("plan-devices", *OFFLOAD, "--quantize", "none")
    ran, path = cli(*command, "--output", tmp_path / "plan.json", "--json"), tmp_path / "plan.json"
    assert ran.code == 0
    assert [device["name"] for device in ran.json["devices"]] == ["cuda:0", "cpu"]
    on_cpu = [name for name, place in ran.json["device_map"].items() if place == "cpu"]
    assert on_cpu == [f"model.layers.{layer}" for layer in range(len(on_cpu))]
    assert ran.json["devices"][1]["bytes"]["weights"] == len(on_cpu) * 404_766_720  # 2 bytes of 202,383,360
    assert ran.json["peak_bytes"] == ran.json["devices"][0]["peak_bytes"]
    assert json.loads(path.read_text())["device_map"] == ran.json["device_map"]
    shown = cli(*command)
    assert f"{len(on_cpu)} of 32 layers lie in CPU memory" in shown.out
    assert [line.split()[0] for line in shown.out.splitlines()[1:3]] == ["cuda:0", "cpu"]
    compared = cli(*command, "--compare", "--json").json["compared"]
    assert [plan["fits"] for plan in compared] == [True, False, False, True]
    assert [len(plan["devices"]) for plan in compared] == [2, 1, 1, 2]  # 8 bits aren't offloaded
    auto = cli(*command, "--parallel", "auto", "--json").json
    assert (auto["device_map"], auto["parallel"]) == (ran.json["device_map"], "split")


def test_auto_takes_the_most_that_fits_with_layers_in_cpu_memory(cli: Cli) -> None:
    found = cli("plan-devices", *OFFLOAD, "--batch-size", "auto", "--json").json
    most = found["settings"]["batch_size"]
    assert found["fits"]
    assert cli("plan-devices", *OFFLOAD, "--batch-size", most, "--json").json["peak_bytes"] == found["peak_bytes"]
    assert cli("plan-devices", *OFFLOAD, "--batch-size", most + 1).code == 9


def test_compare_shows_every_way_with_every_base(cli: Cli) -> None:
    ran = cli("plan-devices", "llama-2-70b", "--gpus", "4x80GiB", "--compare", "--json")
    assert [(plan["parallel"], plan["settings"]["quantize"]) for plan in ran.json["compared"]] == [
        *[("split", base) for base in ("none", "int8", "nf4")],
        *[("ddp", base) for base in ("none", "int8", "fp8", "nf4")],
        *[("fsdp", base) for base in ("none", "nf4")],
    ]
    assert all(plan["tokens_per_second"] > 0 for plan in ran.json["compared"])
    assert "fsdp" in cli("plan-devices", "llama-2-70b", "--gpus", "4x80GiB", "--compare").out


@pytest.mark.parametrize("where", ["--gpus 24GiB", "--gpus 2x24GiB", "--cpu 64GiB"])
def test_fp8_is_compared_as_it_is_planned_where_it_can_be_had(where: str, cli: Cli) -> None:
    given = ("plan-devices", "llama-7b", *where.split())

    def row(*options: object) -> list[Any]:
        compared = cli(*given, *options, "--compare", "--json").json["compared"]
        return [plan for plan in compared if plan["settings"]["quantize"] == "fp8"]

    (found,) = row()
    asked = ("--parallel", "ddp") if "2x" in where else ()
    alone = cli(*given, "--quantize", "fp8", *asked, "--json").json
    assert found["settings"]["engine"] == "fast"
    assert {key: alone[key] for key in ("peak_bytes", "settings")} == {
        key: found[key] for key in ("peak_bytes", "settings")
    }
    assert row("--lora-dropout", 0.1) == row("--engine", "standard") == []


def test_a_plan_is_written_and_nothing_else_is_replaced(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    for _ in range(2):
        ran = cli(*SEED, "--output", path, "--json")
        written = json.loads(path.read_text())
        assert {key: ran.json[key] for key in written} == written
    path.write_text('{"mine": 1}')
    ran = cli(*SEED, "--output", path)
    assert (ran.code, path.read_text()) == (3, '{"mine": 1}')


def test_without_gpus_the_machine_is_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_gpu_bytes", lambda: [24 * 2**30, 8 * 2**30])
    ran = cli("plan-devices", "llama-3.2-1b", "--json")
    assert [device["budget_bytes"] for device in ran.json["devices"]] == [24 * 2**30, 8 * 2**30]
    monkeypatch.setattr(planning, "free_gpu_bytes", list)
    ran = cli("plan-devices", "smollm2-135m", "--json")
    assert set(ran.json["device_map"].values()) == {"cpu"}
    assert (ran.json["settings"]["dtype"], ran.json["settings"]["attention"]) == ("fp32", "documents")
    assert 2**20 < ran.json["devices"][0]["budget_bytes"] < 2**50
    assert "no GPU here" in ran.err


def test_the_driver_is_asked_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 24000\necho 8000\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    shown = {"1,0": [8000, 24000], "1": [8000], "0, 7": [24000], "": [], "GPU-1f": [24000, 8000]}
    for visible, sizes in shown.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert environment.free_gpu_bytes() == [size * 2**20 for size in sizes]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert environment.free_gpu_bytes() == [24000 * 2**20, 8000 * 2**20]
    driver.write_text("#!/bin/sh\necho no devices; exit 9\n")
    assert environment.free_gpu_bytes() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.free_gpu_bytes() == []


def test_a_folder_and_another_family_are_planned_too(cli: Cli, tmp_path: Path) -> None:
    ran = cli("plan-devices", make_llama(tmp_path / "tiny"), "--gpus", "1GiB", "--json")
    assert ran.json["fits"]
    (tmp_path / "other").mkdir()
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = {"model_type": "olmo2", **sizes, "num_attention_heads": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    ran = cli("plan-devices", tmp_path / "other", "--gpus", "2GiB", "--json")
    assert ran.code == 0
    assert "its activations as those of a Llama layer" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["llama-7b", "--gpus", "24"], 2, "--gpus: found '24', need sizes with a unit"),
        (["llama-7b", "--gpus", "0GiB"], 2, "--gpus: found '0GiB', need sizes with a unit"),
        (["llama-7b", "--gpus", "-24GiB"], 2, "--gpus: found '-24GiB', need sizes with a unit"),
        (["llama-7b", "--gpus", "24GiB", "--cpu", "8GiB,8GiB"], 2, "found 2 sizes of --cpu, need one"),
        ([*OFFLOAD, "--quantize", "int8"], 2, "--cpu beside --gpus: found --quantize int8, need none, nf4 or fp4"),
        ([*OFFLOAD, "--no-gradient-checkpointing"], 2, "--cpu beside --gpus: found no gradient checkpointing"),
        ([*OFFLOAD, "--parallel", "fsdp"], 2, "--cpu beside --gpus: found --parallel fsdp, need split"),
        (["llama-65b", "--gpus", "24GiB", "--cpu", "8GiB"], 9, "found a need of"),
        (["llama-7b", "--gpus", "2x24GiB", "--parallel", "fsdp", "--quantize", "int8"], 2, "found --quantize int8"),
        (["llama-7b", "--gpus", "24GiB", "--target-modules", "query"], 3, "matches no linear layer of llama-7b"),
        (["owner/unknown", "--gpus", "24GiB"], 12, "owner/unknown: found no such folder and no answer of the Hub"),
        (["llama-7b", "--gpus", "100MiB"], 9, "found a need of"),
        ([], 2, "MODEL: found nothing"),
    ],
)
def test_bad_input_is_an_error_with_a_hint(arguments: list[str], code: int, words: str, cli: Cli) -> None:
    ran = cli("plan-devices", *arguments)
    assert ran.code == code
    assert words in ran.err
    assert "hint: " in ran.err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "vocab_size": 320}, "found a config without hidden_size, intermediate_size"),
        ({}, "found a config without vocab_size"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "found a mixture of 8 experts (mixtral), need a dense model",
        ),
        ({"model_type": "nothing-known"}, "found the model type 'nothing-known', which transformers can't lay out"),
    ],
)
def test_a_config_that_cant_be_counted_is_refused(config: dict[str, Any], words: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = cli("plan-devices", tmp_path, "--gpus", "24GiB")
    assert ran.code == 3
    assert words in ran.err


def test_the_answer_takes_less_than_twice_the_time_of_help_and_no_torch() -> None:
    def seconds(*arguments: object) -> float:
        started = time.perf_counter()
        command = [sys.executable, "-X", "importtime", "-m", "lorakit", *map(str, arguments)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        assert not re.search(r"\| +(torch|transformers|numpy)$", ran.stderr, re.MULTILINE)
        return time.perf_counter() - started

    ratios = [seconds(*SEED) / seconds("plan-devices", "--help") for _ in range(5)]
    assert statistics.median(ratios) < 2


def test_the_hint_is_a_command_that_train_takes(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    """Typed as it is printed, with the blocks' folder in it, it trains by the plan."""
    import shlex

    plan, blocks = tmp_path / "a plan.json", tmp_path / "blocks"
    cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", 64, "--output", blocks)
    settings = ("--quantize", "nf4", "--batch-size", 2, "--rank", 4, "--no-gradient-checkpointing")
    ran = cli("plan-devices", tiny_llama, "--cpu", "4GiB", "--block-size", 64, *settings, "--output", plan)
    assert ran.code == 0
    command = shlex.split(ran.err.rpartition("hint: lorakit ")[2].replace("DIR", str(blocks)))
    trained = cli(*command, "--max-steps", 1, "--output", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["planned_bytes"] > 0


def test_a_plan_for_several_processes_says_how_to_start_them(cli: Cli) -> None:
    ran = cli("plan-devices", "llama-7b", "--gpus", "2x80GiB", "--parallel", "auto")
    assert ran.code == 0
    assert "--parallel ddp --num-processes 2 --blocks DIR" in ran.err


def test_a_bar_is_drawn_however_much_is_too_much(cli: Cli) -> None:
    ran = cli("plan-devices", "llama-65b", "--gpus", "0.001KiB")
    assert ran.code == 9
    assert max(map(len, ran.out.splitlines())) < 200


# Engines


def test_what_only_the_fast_engine_can_do_is_planned_where_it_can_be_had(cli: Cli) -> None:
    ran = cli("plan-devices", "llama-7b", "--gpus", "24GiB", "--quantize", "fp8", "--json")
    assert (ran.code, ran.json["settings"]["engine"]) == (0, "fast")
    standard = cli(
        "plan-devices", "llama-7b", "--gpus", "24GiB", "--quantize", "int8", "--engine", "standard", "--json"
    )
    fast = cli("plan-devices", "llama-7b", "--gpus", "24GiB", "--quantize", "int8", "--json")
    assert (standard.json["settings"]["engine"], fast.json["settings"]["engine"]) == ("standard", "fast")
    assert fast.json["tokens_per_second"] > 3 * standard.json["tokens_per_second"]
    ran = cli("plan-devices", "llama-7b", "--gpus", "2x24GiB", "--quantize", "fp8", "--parallel", "auto", "--json")
    assert (ran.json["parallel"], ran.json["settings"]["engine"]) == ("ddp", "fast")


def test_what_the_fast_engine_cant_do_is_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    ran = cli("plan-devices", "llama-7b", "--gpus", "24GiB", "--engine", "fast", "--lora-dropout", 0.1)
    assert ran.code == 2
    assert (
        "error: --engine fast: found that LoRA has a dropout of 0.1, not 0; need what the fast engine can do" in ran.err
    )
    assert "hint: change one of them" in ran.err
    ran = cli("plan-devices", "llama-7b", "--gpus", "24GiB", "--quantize", "fp8", "--output", tmp_path / "plan.json")
    assert "error: --quantize fp8: found that --output lays layers out over devices; need" in ran.err
    drops = make_llama(tmp_path / "drops", attention_dropout=0.1)
    ran = cli("plan-devices", drops, "--gpus", "24GiB", "--engine", "fast")
    assert "error: --engine fast: found that the model has attention_dropout 0.1; need" in ran.err
    ran = cli("plan-devices", "llama-7b", "--gpus", "2x24GiB", "--quantize", "fp8")
    assert ran.code == 2
    assert "--quantize fp8: found split over 2 devices, need one GPU, or copies of the model" in ran.err
    assert "hint: --parallel ddp, or --gpus with one GPU" in ran.err
    ran = cli("plan-devices", "llama-7b", "--gpus", "2x24GiB", "--quantize", "fp8", "--parallel", "fsdp")
    assert "error: --parallel fsdp: found --quantize fp8, need none, nf4 or fp4" in ran.err


def test_attention_that_keeps_scores_is_counted_with_either_engine(cli: Cli) -> None:
    """What attention itself keeps doesn't depend on who computes the rest."""
    given = ("plan-devices", "llama-7b", "--gpus", "80GiB", "--block-size", 4096, "--json", "--attention")
    taken = {
        (kind, engine): cli(*given, kind, "--engine", engine).json["peak_bytes"]
        for kind in ("varlen", "eager")
        for engine in ("fast", "standard")
    }
    more = [taken["eager", engine] - taken["varlen", engine] for engine in ("fast", "standard")]
    assert more[0] == pytest.approx(more[1], rel=0.1)
    assert more[0] > 2**30


@pytest.mark.parametrize("steps", [1, 4])
def test_settings_in_json_have_types(cli: Cli, steps: int) -> None:
    found = cli("plan-devices", "smollm2-135m", "--gpus", "8GiB", "--gradient-accumulation-steps", steps, "--json")
    assert found.json["settings"]["accumulates_gradients"] is (steps > 1)
    assert "gradient_accumulation_steps" not in found.json["settings"]


def test_offloading_hints_at_the_file_without_which_train_does_not_offload(cli: Cli) -> None:
    """Only --plan makes train offload: the next command has it, written already or not."""
    hint = cli("plan-devices", *OFFLOAD).err
    assert "add --output plan.json" in hint
    assert "--blocks DIR --plan plan.json" in hint
    written = cli("plan-devices", *OFFLOAD, "--output", "mine.json").err.splitlines()[-1]
    assert written.startswith("hint: lorakit train ")
    assert written.endswith(f"--plan {Path('mine.json').absolute()}")
    without = cli("plan-devices", "llama-7b", "--gpus", "24GiB", "--cpu", "64GiB").err
    assert "plan.json" not in without, "nothing is offloaded where all of it fits"


def test_the_longest_block_is_the_models_context(cli: Cli) -> None:
    """Llama 2 was made for 4,096 tokens; of an 80 GB card more would fit."""
    found = cli("plan-devices", "llama-2-7b", "--gpus", "80GiB", "--block-size", "auto", "--json").json
    assert found["settings"]["block_size"] == 4096
    small = cli("plan-devices", "llama-2-7b", "--gpus", "15GiB", "--block-size", "auto", "--json").json
    assert small["settings"]["block_size"] < 4096


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (("--gpus", "1x2GiB"), "--gpus 1x15GiB"),
        (("--gpus", "2x3GiB"), "--gpus 2x9GiB"),
        (("--cpu", "2GiB"), "--cpu 28GiB"),
    ],
)
def test_the_least_memory_that_does_is_named(cli: Cli, given: tuple[str, str], option: str) -> None:
    """Whatever else is lacking: with a GiB less it doesn't fit."""
    ran = cli("plan-devices", "llama-7b", *given)
    assert ran.code == 9
    assert f"With {option} it would" in ran.out
    name, size = option.split()
    assert cli("plan-devices", "llama-7b", name, size).code == 0
    less = re.sub(r"\d+GiB", lambda found: f"{int(found[0][:-3]) - 1}GiB", size)
    assert cli("plan-devices", "llama-7b", name, less).code == 9


def test_only_another_plan_is_replaced_and_that_is_said(cli: Cli, tmp_path: Path) -> None:
    given = ("--gpus", "24GiB", "--output", tmp_path / "plan.json")
    assert "replaced" not in cli("plan-devices", "llama-7b", *given).err
    assert "replaced" not in cli("plan-devices", "llama-7b", *given).err, "the same plan again"
    assert f"{tmp_path / 'plan.json'}: replaced the plan for llama-7b" in cli("plan-devices", "llama-2-7b", *given).err
    (tmp_path / "plan.json").write_text("{}")
    ran = cli("plan-devices", "llama-7b", *given)
    assert ran.code == 3
    assert "found something else than a plan of lorakit's" in ran.err
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_small_models_have_small_units(cli: Cli, tiny_llama: Path) -> None:
    ran = cli("plan-devices", tiny_llama, "--cpu", "700MiB", "--block-size", 64)
    assert re.search(r": 0\.\d\d M parameters", ran.out)
    assert re.search(r"cpu needs \d+\.\d\d MiB of 700\.00 MiB", ran.out)
