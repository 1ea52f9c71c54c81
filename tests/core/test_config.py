"""Settings: one list of all problems with their origins, one precedence, and a file that is accepted back."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core import artifacts
from lorakit.core.config import (
    SCHEDULE_ARGUMENTS,
    ChatConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    MergeConfig,
    PatchAttentionConfig,
    PlanDevicesConfig,
    PrepareConfig,
    StepConfig,
    TrainConfig,
    is_pattern,
    option_name,
)
from lorakit.core.errors import UsageError
from lorakit.core.untrusted import parse_yaml
from lorakit.options import read_settings

NEEDED: Mapping[type[StepConfig], dict[str, object]] = {
    PrepareConfig: {"dataset": "/d/rows.jsonl", "tokenizer": "owner/name"},
    PlanDevicesConfig: {"model": "llama-7b"},
    TrainConfig: {"model": "owner/name", "blocks": "/d/blocks"},
    PatchAttentionConfig: {"model": "owner/name"},
    MergeConfig: {"adapter": "owner/adapter"},
    ChatConfig: {"model": "owner/name", "temperature": 0.7},
    EvaluateConfig: {"model": "owner/name", "dataset": "/d/rows.jsonl", "exact_match": True},
    DemoConfig: {},
    DoctorConfig: {},
}
"""What each command can't do without."""

EVERY = {
    PrepareConfig: {"block_size": 64, "long": "drop", "pack": "none", "output": "out", "overwrite": True},
    PlanDevicesConfig: {"gpus": "2x24GiB,48GB", "batch_size": "auto", "block_size": 512, "parallel": "auto"},
    TrainConfig: {
        "rank": 3,
        "target_modules": ("q_proj", "v_proj"),
        "layers_to_transform": "0,4-6",
        "modules_to_save": "embed_tokens,lm_head",
        "add_tokens": "<a>,<b>",
        "adapter": "owner/adapter",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": "min_lr_rate=0.1",
        "batch_size": 2,
        "effective_batch_size": 6,
        "parallel": "fsdp",
        "num_processes": 3,
        "eval_steps": 5,
        "load_best_model_at_end": True,
        "push_to_hub": "owner/adapter",
        "private": True,
    },
    PatchAttentionConfig: {"block_size": 128, "apply": True, "implementation": "sdpa", "apply_to": "/d/model"},
    MergeConfig: {"base": "owner/base", "output": "/d/merged"},
    ChatConfig: {"prompt": ("a, b", "- [x]: 'c'"), "system": "Sei höflich.\n", "temperature": 0.7, "top_p": 0.9},
    EvaluateConfig: {"dtype": "bf16", "batch_size": 4},
    DemoConfig: {"model": "owner/name", "output": "demo", "epochs": 0.5},
    DoctorConfig: {"only": ("disk", "limits"), "report": True},
}
"""Something beside the defaults for each command."""

CONFIGS = list(NEEDED)
by_name = pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)


def refused(config_class: type[StepConfig], *layers: tuple[str | None, Mapping[str, object]]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        config_class.resolve(*layers)
    return caught.value


def train(*layers: tuple[str | None, Mapping[str, object]], **options: object) -> TrainConfig:
    return TrainConfig.resolve((None, NEEDED[TrainConfig]), *layers, (None, options))


def refused_train(source: str | None = None, **values: object) -> UsageError:
    return refused(TrainConfig, (None, NEEDED[TrainConfig]), (source, values))


def test_the_tables_of_this_file_hold_every_command() -> None:
    assert set(CONFIGS) == set(StepConfig.__subclasses__())


# Problems


def test_all_problems_are_told_at_once_each_with_its_origin() -> None:
    error = refused(
        TrainConfig,
        ("run.yaml", {"rank": 0, "learning_rate": "fast", "rnk": 8}),
        (None, {"model": "m", "blocks": "b", "warmup_ratio": "1", "pack": "tight"}),
    )
    assert error.message.splitlines() == [
        "run.yaml: found the unknown key 'rnk', need one of this command's settings",
        "--pack: found 'tight', need one of best-fit, concat, none",
        "run.yaml: rank: found 0, need a whole number ≥ 1 and ≤ 65536",
        "run.yaml: learning_rate: found 'fast', need a number > 0 and ≤ 1000",
        "--warmup-ratio: found '1', need a number ≥ 0 and < 1",
    ]
    assert error.hint == "did you mean 'rank'?"


@pytest.mark.parametrize(
    ("config_class", "name", "value"),
    [
        (TrainConfig, "overwrite", "perhaps"),
        (TrainConfig, "dtype", "int4"),
        (PrepareConfig, "overwrite", "perhaps"),
        (MergeConfig, "base", 3),
        (EvaluateConfig, "dtype", "int4"),
        (EvaluateConfig, "base", 3),
        (ChatConfig, "prompt", 3),
        (DemoConfig, "epochs", 0),
        (DemoConfig, "output", 3),
    ],
)
def test_a_problem_is_told_of_the_setting_that_has_it(config_class: type[StepConfig], name: str, value: object) -> None:
    """A section may be named like one of its settings."""
    error = refused(config_class, (None, NEEDED[config_class]), ("run.yaml", {name: value}))
    assert error.message.startswith(f"run.yaml: {name}: found {value!r}, need ")
    assert len(error.message.splitlines()) == 1


def test_an_option_that_wins_over_the_file_is_the_origin() -> None:
    error = refused(TrainConfig, ("run.yaml", {**NEEDED[TrainConfig], "rank": 8}), (None, {"rank": "-1"}))
    assert error.message == "--rank: found '-1', need a whole number ≥ 1 and ≤ 65536"


@pytest.mark.parametrize(
    ("config_class", "lacking"),
    [
        (PrepareConfig, ["DATASET: found nothing", "--tokenizer: found nothing"]),
        (PlanDevicesConfig, ["MODEL: found nothing"]),
        (TrainConfig, ["--model: found nothing"]),
        (MergeConfig, ["ADAPTER: found nothing"]),
        (ChatConfig, ["MODEL: found nothing"]),
        (EvaluateConfig, ["MODEL: found nothing"]),
    ],
)
def test_what_is_lacking_is_named_as_it_is_typed(config_class: type[StepConfig], lacking: list[str]) -> None:
    lines = refused(config_class, (None, {})).message.splitlines()
    assert [line.partition(", need")[0] for line in lines] == lacking


@pytest.mark.parametrize(
    ("typed", "meant"), [("rnak", "rank"), ("learning-rate", "learning_rate"), ("targets_module", "target_modules")]
)
def test_a_misspelt_key_is_answered_with_the_right_one(typed: str, meant: str) -> None:
    assert f"did you mean {meant!r}?" in refused_train("run.yaml", **{typed: 1}).hint


def test_a_key_that_is_like_nothing_is_answered_with_help() -> None:
    assert refused_train("run.yaml", zzzzzz=1).hint == "`--help` lists the settings"


def test_a_key_that_isnt_text_is_refused() -> None:
    assert "unknown key 7" in refused(TrainConfig, ("run.yaml", {7: 1})).message  # type: ignore[dict-item]


def test_another_commands_setting_is_unknown_here() -> None:
    assert "unknown key 'rank'" in refused(MergeConfig, (None, NEEDED[MergeConfig]), ("run.yaml", {"rank": 4})).message


# Values


@pytest.mark.parametrize(
    ("typed", "sizes"),
    [
        ("24GiB", [24 * 2**30]),
        ("2x24GiB, 48GB", [24 * 2**30, 24 * 2**30, 48 * 10**9]),
        ("1 x 1.5TiB", [3 * 2**39]),
        ([1000, 2000], [1000, 2000]),
        ("512MiB,1MB,3KiB,1TB", [2**29, 10**6, 3 * 2**10, 10**12]),
    ],
)
def test_sizes_of_devices_are_bytes(typed: object, sizes: list[int]) -> None:
    found = PlanDevicesConfig.resolve((None, {"model": "m", "gpus": typed}))
    assert list(found.devices.gpus) == sizes
    assert PlanDevicesConfig.resolve(("lorakit.yaml", found.flat())) == found


@pytest.mark.parametrize(
    "typed",
    [
        *("24", "0GiB", "-24GiB", "0x24GiB", "24 gigs", "8x", "24GiB,", ",", "24GiB 48GiB", [0], [-5], "0.0GiB", 24),
        *("9" * 400 + "GiB", [2**60 + 1]),
    ],
)
def test_what_isnt_a_size_with_its_unit_is_refused(typed: object) -> None:
    error = refused(PlanDevicesConfig, (None, {"model": "m", "gpus": typed}))
    said = repr(typed).replace("9" * 400, "9" * 20 + "… (400 digits)")
    assert error.message.startswith(f"--gpus: found {said}, need sizes with a unit: 8x24GiB, or 24GiB,48GiB") or (
        isinstance(typed, list) and error.message.startswith("--gpus: found ")
    )


def test_there_is_one_cpu() -> None:
    for values in ({"gpus": "24GiB", "cpu": "8GiB,8GiB"}, {"cpu": "2x8GiB"}):
        error = refused(PlanDevicesConfig, (None, {"model": "m", **values}))
        assert "found 2 sizes of --cpu, need one" in error.message


@by_name
def test_true_is_not_a_number(config_class: type[StepConfig]) -> None:
    for name, knob in config_class.settings().items():
        if knob.kind in (int, float):
            error = refused(config_class, (None, NEEDED[config_class]), ("run.yaml", {name: True}))
            assert error.message.startswith(f"run.yaml: {name}: found True, need "), name


@by_name
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "-inf", "Infinity", ".nan"])
def test_nan_and_infinity_are_no_settings(config_class: type[StepConfig], value: object) -> None:
    for name, knob in config_class.settings().items():
        if knob.kind in (int, float):
            error = refused(config_class, (None, NEEDED[config_class]), (None, {name: value}))
            assert error.message.startswith(f"{option_name(name)}: found {value!r}, need "), name


BOUNDS: list[tuple[type[StepConfig], str, list[object], list[object]]] = [
    (PrepareConfig, "block_size", [8, 65536], [7, 65537]),
    (PrepareConfig, "max_rows", [1, 10**9], [0, -1, 10**9 + 1]),
    (PrepareConfig, "validation_split", [0, 0.99], [-0.01, 1]),
    (PrepareConfig, "num_workers", [1, 1024], [0, 1025]),
    (PrepareConfig, "preview", [0, 3, 10**9], [-1, 10**9 + 1]),
    (PrepareConfig, "seed", [0, 2**63 - 1], [-1, 2**64]),
    (PlanDevicesConfig, "rank", [1, 65536], [0, -1, 65537]),
    (PlanDevicesConfig, "lora_alpha", [1e-9, 999999], [0, -1, 1e6]),
    (PlanDevicesConfig, "lora_dropout", [0, 0.99], [-0.01, 1]),
    (PlanDevicesConfig, "block_size", [8, 65536, "auto"], [7, 65537, "most"]),
    (PlanDevicesConfig, "batch_size", [1, "auto"], [0, -1, 1.5]),
    (PlanDevicesConfig, "gradient_accumulation_steps", [1, 2**20], [0, 2**20 + 1]),
    (TrainConfig, "eval_steps", [1, 10**9], [0, 10**9 + 1]),
    (TrainConfig, "save_minutes", [0.1], [0]),
    (TrainConfig, "rank", [1, 65536], [0, -1, 65537]),
    (TrainConfig, "lora_alpha", [1e-9, 999999], [0, -1, 1e6]),
    (TrainConfig, "lora_dropout", [0, 0.99], [-0.01, 1]),
    (TrainConfig, "learning_rate", [1e-12, 1000], [0, -1e-4, 1001]),
    (TrainConfig, "warmup_ratio", [0, 0.99], [-0.01, 1]),
    (TrainConfig, "weight_decay", [0, 1000], [-0.01, 1001]),
    (TrainConfig, "max_grad_norm", [1e-9], [0]),
    (TrainConfig, "batch_size", [1], [0]),
    (TrainConfig, "gradient_accumulation_steps", [1, 2**20], [0, 2**20 + 1]),
    (TrainConfig, "effective_batch_size", [1, 2**20], [0, 10**23]),
    (TrainConfig, "epochs", [0.01, 10_000], [0, 10_001, 1e308]),
    (TrainConfig, "max_steps", [1, 10**9], [0, 10**9 + 1]),
    (TrainConfig, "seed", [0, 2**63 - 1], [-1, 2**64]),
    (TrainConfig, "save_steps", [1, 10**9], [0, 10**9 + 1]),
    (TrainConfig, "keep_checkpoints", [1, 10**9], [0, 10**9 + 1]),
    (TrainConfig, "logging_steps", [1, 10**9], [0, 10**9 + 1]),
    (ChatConfig, "max_new_tokens", [1, 2**20], [0, 2**20 + 1]),
    (ChatConfig, "temperature", [0], [-0.1]),
    (PatchAttentionConfig, "block_size", [128, 2**20], [127, 2**20 + 1]),
    (PatchAttentionConfig, "batch_size", [1, 65536], [0, 65537]),
    (ChatConfig, "top_p", [0.01, 1], [0, 1.01]),
    (ChatConfig, "seed", [0, 2**63 - 1], [-1, 2**64]),
    (EvaluateConfig, "batch_size", [1, 65536], [0, 65537]),
    (EvaluateConfig, "block_size", [8, 65_536], [7, 65_537]),
    (EvaluateConfig, "limit", [1, 10**9], [0, 10**9 + 1]),
    (EvaluateConfig, "max_new_tokens", [1, 2**20], [0, 2**20 + 1]),
    (EvaluateConfig, "rows_at_once", [1, 65536], [0, 65537]),
    (ChatConfig, "top_k", [0, 50, 2**20], [-1, 2**20 + 1]),
    (DemoConfig, "epochs", [0.01, 10_000], [0, 10_001]),
]


@pytest.mark.parametrize(("config_class", "name", "inside", "outside"), BOUNDS)
def test_bounds_hold_at_their_edges(
    config_class: type[StepConfig], name: str, inside: list[object], outside: list[object]
) -> None:
    for value in inside:
        assert config_class.resolve((None, NEEDED[config_class]), (None, {name: value})).flat()[name] == value
    for value in outside:
        error = refused(config_class, (None, NEEDED[config_class]), (None, {name: value}))
        assert error.message.startswith(f"{option_name(name)}: found {value!r}, need ")


def test_every_number_has_its_bounds_tried() -> None:
    tried = {(config_class, name) for config_class, name, _, _ in BOUNDS}
    numbers = {(c, name) for c in CONFIGS for name, knob in c.settings().items() if knob.kind in (int, float)}
    shared = {"block_size", "max_rows", "validation_split", "num_workers"}  # tried where `prepare` has them
    together = {
        "early_stopping_patience",
        "int8_threshold",
        "num_processes",
        "num_machines",
    }  # tried below, with what they need beside
    lacking = {(c, name) for c, name in numbers if (c, name) not in tried}
    assert lacking <= {(TrainConfig, name) for name in shared | together}


@pytest.mark.parametrize(
    ("name", "beside", "inside", "outside"),
    [
        ("int8_threshold", {"quantize": "int8"}, [0, 6], [-0.1]),
        ("early_stopping_patience", {"eval_steps": 1}, [1, 10**9], [0, 10**9 + 1]),
        ("num_processes", {"parallel": "ddp"}, [1, 1024], [0, 1025]),
        ("num_machines", {"parallel": "ddp", "rendezvous": "host:29500"}, [2, 1024], [0, 1025]),
    ],
)
def test_bounds_hold_beside_what_a_setting_needs(
    name: str, beside: dict[str, object], inside: list[float], outside: list[float]
) -> None:
    for value in inside:
        assert train(**beside, **{name: value}).flat()[name] == value
    for value in outside:
        error = refused_train(None, **beside, **{name: value})
        assert f"{option_name(name)}: found {value!r}, need {TrainConfig.settings()[name].need}" in error.message


@pytest.mark.parametrize("value", [2.5, "2.5", "two", "", None, [2], {"a": 1}])
def test_what_isnt_a_whole_number_is_refused_where_one_is_needed(value: object) -> None:
    assert refused_train("run.yaml", rank=value).message == (
        f"run.yaml: rank: found {value!r}, need a whole number ≥ 1 and ≤ 65536"
    )


def test_a_number_too_long_to_read_is_refused() -> None:
    assert "--rank: found " in refused_train(None, rank="9" * 5000).message


@by_name
@pytest.mark.parametrize(
    "text",
    [
        *("0x" + "F" * 5000, "9" * 5000, "[" + "9" * 5000 + "]", "!!int 0x" + "F" * 5000, "1.0e+400", "9" * 400),
        *("[[]]", "{a: {}}", "[a, 1]", "{1: 2}", "~", "[~]", "!!set {a}", "!!binary aaaa", "2020-01-01"),
    ],
)
def test_whatever_a_settings_file_holds_is_a_setting_or_a_usage_error(
    config_class: type[StepConfig], text: str
) -> None:
    for name in config_class.settings():
        try:
            value = parse_yaml(f"{name}: {text}\n".encode())[name]
        except ValueError:  # where it isn't even YAML
            continue
        with contextlib.suppress(UsageError):
            config_class.resolve((None, NEEDED[config_class]), ("run.yaml", {name: value})).flat()


@pytest.mark.parametrize("value", [{"completion": True}, {"completion": None}, {1: "x"}, {"completion": ["x"]}])
def test_columns_of_a_settings_file_are_text(value: object) -> None:
    error = refused(PrepareConfig, (None, NEEDED[PrepareConfig]), ("run.yaml", {"columns": value}))
    assert error.message == (f"run.yaml: columns: found {value!r}, need NAME=COLUMN, both text, separated by commas")


@pytest.mark.parametrize("value", ["", " , ", [], (), [3], "q_proj,"])
def test_names_are_names(value: object) -> None:
    if value == "q_proj,":
        assert train(target_modules=value).lora.target_modules == ("q_proj",)
    else:
        assert refused_train(None, target_modules=value).message.startswith("--target-modules: found ")


def test_names_may_be_a_list_or_separated_by_commas() -> None:
    assert train(target_modules="q_proj, v_proj").lora.target_modules == ("q_proj", "v_proj")
    assert train(("run.yaml", {"target_modules": ["q_proj", "v_proj"]})).lora.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(("config_class", "name"), [(TrainConfig, "output"), (PrepareConfig, "output")])
@pytest.mark.parametrize("value", ["~nobody-of-that-name/x", "a\0b"])
def test_a_place_that_cant_be_one_is_a_usage_error(config_class: type[StepConfig], name: str, value: str) -> None:
    error = refused(config_class, (None, NEEDED[config_class]), ("run.yaml", {name: value}))
    assert error.message.startswith(f"run.yaml: {name}: found {value!r}, need ")


@pytest.mark.parametrize(("config_class", "name"), [(TrainConfig, "output"), (PrepareConfig, "dataset")])
def test_a_file_name_that_isnt_utf_8_is_a_usage_error(config_class: type[StepConfig], name: str) -> None:
    """A manifest is UTF-8 and couldn't hold it."""
    error = refused(config_class, (None, NEEDED[config_class]), (None, {name: "out\udcff"}))
    assert "found 'out\\udcff', need " in error.message


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x"])
def test_a_model_that_cant_be_a_folder_is_still_a_name(name: str) -> None:
    """What is wrong with it is said where it is opened."""
    assert train(model=name).model.model == name


def test_paths_are_kept_absolute_and_hub_ids_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    config = train(output="runs/mine", model="base")
    assert config.output.output == tmp_path / "runs" / "mine"
    assert config.model.model == str(tmp_path / "base")
    assert train(model="owner/name").model.model == "owner/name"


def test_a_dataset_that_is_there_and_a_pattern_are_kept_absolute(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    config = PrepareConfig.resolve((None, {"tokenizer": "t", "dataset": ["rows.jsonl", "*.csv", "owner/name"]}))
    assert config.data.dataset == (str(tmp_path / "rows.jsonl"), str(tmp_path / "*.csv"), "owner/name")


@pytest.mark.parametrize("value", ["own", "./missing.jinja", ""])
def test_a_template_is_a_name_or_a_file(value: str, tmp_path: Path) -> None:
    error = refused(PrepareConfig, (None, NEEDED[PrepareConfig]), (None, {"template": value}))
    assert error.message == (
        f"--template: found {value!r}, need one of auto, chat, none, alpaca, vicuna, llama2, chatml, or a Jinja file"
    )
    (tmp_path / "mine.jinja").touch()
    config = PrepareConfig.resolve((None, NEEDED[PrepareConfig]), (None, {"template": "mine.jinja"}))
    assert config.packing.template == str(tmp_path / "mine.jinja")


def test_columns_are_pairs(tmp_path: Path) -> None:
    given = (None, {"columns": "prompt=question, completion=final answer"})
    config = PrepareConfig.resolve((None, NEEDED[PrepareConfig]), given)
    assert config.rows.renamed == {"prompt": "question", "completion": "final answer"}
    mapping = ("run.yaml", {"columns": {"prompt": "question", "completion": "final answer"}})
    assert PrepareConfig.resolve((None, NEEDED[PrepareConfig]), mapping) == config
    for value in ("prompt", "prompt=", "=question", "prompt:question"):
        error = refused(PrepareConfig, (None, NEEDED[PrepareConfig]), (None, {"columns": value}))
        assert error.message == f"--columns: found {value!r}, need NAME=COLUMN, both text, separated by commas"


def test_the_templates_that_are_named_are_those_that_there_are() -> None:
    from lorakit.core.config import TEMPLATES
    from lorakit.core.templates import builtin_names

    assert sorted(set(TEMPLATES) - {"auto", "chat", "none"}) == list(builtin_names())


def test_the_demos_own_folder_is_absolute_too(tmp_path: Path) -> None:
    assert DemoConfig.resolve((None, {})).demo.output == tmp_path / "runs" / "demo"


# Rules between settings


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, 1),
        ({"batch_size": 4, "effective_batch_size": 12}, 12),
        ({"batch_size": 4, "gradient_accumulation_steps": 5}, 20),
        ({"batch_size": "auto", "effective_batch_size": 12}, 12),
        ({"batch_size": 2, "gradient_accumulation_steps": 3, "parallel": "ddp", "num_processes": 4}, 24),
        ({"batch_size": 2, "effective_batch_size": 24, "parallel": "fsdp", "num_processes": 4}, 24),
        ({"parallel": "ddp", "num_processes": 4, "num_machines": 2, "rendezvous": "host:1"}, 8),
        ({"parallel": "split", "gradient_accumulation_steps": 3}, 3),
    ],
    ids=str,
)
def test_a_step_takes_as_many_blocks_as_all_devices_accumulate(options: dict[str, object], blocks: int) -> None:
    assert train(**options).blocks_per_step == blocks


def test_settled_settings_are_the_same_however_a_step_is_shared() -> None:
    """One process with eight micro-steps, four with two: what the adapter is doesn't depend on it."""
    alone = train(gradient_accumulation_steps=8)
    both = train(parallel="ddp", num_processes=2, batch_size=2, gradient_accumulation_steps=2)
    found_four = train(parallel="fsdp", effective_batch_size=8).settled(num_processes=4)
    settled = [alone.settled(), both.settled(), found_four]
    assert [config.identity() for config in settled] == [settled[0].identity()] * 3
    assert [config.blocks_per_step for config in settled] == [8, 8, 8]
    assert found_four.devices.num_processes == 4
    assert found_four.settled(num_processes=4) == found_four


def test_settings_that_contradict_the_processes_that_were_found_are_a_usage_error() -> None:
    """Started by torchrun, nothing on the command line says how many they are."""
    with pytest.raises(
        UsageError, match=r"effective_batch_size: found 6, need a multiple of batch_size \(1\) × 4 proc"
    ):
        train(parallel="ddp", effective_batch_size=6).settled(num_processes=4)


@pytest.mark.parametrize("effective", [1, 3, 5, 7])
def test_an_effective_batch_that_micro_steps_cant_reach_is_refused(effective: int) -> None:
    message = refused_train(None, batch_size=4, effective_batch_size=effective).message
    assert str(effective) in message
    assert "multiple" in message
    assert "4" in message


def test_only_one_setting_says_the_accumulation() -> None:
    message = refused_train(None, effective_batch_size=4, gradient_accumulation_steps=2).message
    assert "effective" in message
    assert "accumulation" in message


def test_auto_needs_the_blocks_of_a_step() -> None:
    assert (
        "batch_size: found auto alone, need --effective-batch-size N" in refused_train(None, batch_size="auto").message
    )


CONTRADICTIONS: list[tuple[dict[str, object], list[str]]] = [
    ({"early_stopping_patience": 2}, ["--early-stopping-patience without evaluations, need --eval-steps N"]),
    ({"load_best_model_at_end": True}, ["--load-best-model-at-end without evaluations, need --eval-steps N"]),
    ({"sample_prompts": "/p.txt"}, ["--sample-prompts without evaluations, need --eval-steps N"]),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["reduce_lr_on_plateau without evaluations, need --eval-steps N"]),
    ({"lr_scheduler_kwargs": "power=2"}, ["lr_scheduler_kwargs: found power, need those of linear: none"]),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": "powr=2"}, ["need those of polynomial: lr_end, power"]),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, ["found no min_lr or min_lr_rate, which cosine_with_min_lr needs"]),
    ({"lr_scheduler_type": "warmup_stable_decay"}, ["found no num_decay_steps, which warmup_stable_decay needs"]),
    ({"num_processes": 2}, ["--num-processes or --num-machines with --parallel left out, need --parallel ddp or fsdp"]),
    ({"num_processes": 2, "parallel": "split"}, ["with --parallel split, need --parallel ddp or fsdp"]),
    ({"parallel": "fsdp", "quantize": "int8"}, ["--parallel fsdp with --quantize int8, need none, nf4 or fp4"]),
    ({"num_machines": 2, "parallel": "ddp"}, ["found one of --num-machines and --rendezvous, need both"]),
    ({"rendezvous": "host:1", "parallel": "ddp"}, ["found one of --num-machines and --rendezvous, need both"]),
    (
        {"num_machines": 2, "parallel": "ddp", "rendezvous": "host"},
        ["rendezvous: found 'host', need HOST:PORT"],
    ),
    (
        {"effective_batch_size": 6, "batch_size": 2, "parallel": "ddp", "num_processes": 2},
        ["effective_batch_size: found 6, need a multiple of batch_size (2) × 2 processes"],
    ),
    ({"private": True}, ["found --private without --push-to-hub, need both"]),
    (
        {"double_quantization": False},
        ["found --no-double-quantization with --quantize none, need --quantize nf4 or fp4 beside it"],
    ),
    (
        {"cache_quantized": True},
        ["found --cache-quantized with --quantize none, need another --quantize beside it"],
    ),
    ({"int8_threshold": 5}, ["found --int8-threshold with --quantize none, need --quantize int8 beside it"]),
    (
        {"quantize": "nf4", "int8_threshold": 5, "private": True},
        ["found --int8-threshold with --quantize nf4, need --quantize int8", "--private"],
    ),
    ({"quantize": "int8", "double_quantization": False}, ["--no-double-quantization with --quantize int8, need"]),
    (
        {"parallel": "fsdp", "quantize": "int8", "load_best_model_at_end": True, "private": True, "num_machines": 2},
        ["--load-best-model-at-end without", "--parallel fsdp with", "--num-machines and --rendezvous", "--private"],
    ),
]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=lambda value: "-".join(value))
def test_what_contradicts_is_said_with_what_to_change_and_all_at_once(
    values: dict[str, object], words: list[str]
) -> None:
    lines = refused_train(None, **values).message.splitlines()
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_contradictions_of_merge_are_said_all_at_once() -> None:
    error = refused(MergeConfig, (None, {"adapter": "a", "private": True, "blocks": "/b"}))
    assert error.message.splitlines() == [
        "found --private without --push-to-hub, need both",
        "found --blocks without --verify full, need both",
    ]


def test_a_plan_refuses_double_quantization_of_a_base_that_has_none_but_compares_all() -> None:
    values: dict[str, object] = {"model": "m", "double_quantization": False}
    assert "--no-double-quantization with --quantize none" in refused(PlanDevicesConfig, (None, values)).message
    for beside in ({"quantize": "nf4"}, {"compare": True}):
        assert not PlanDevicesConfig.resolve((None, {**values, **beside})).model.double_quantization


@pytest.mark.parametrize(
    ("values", "meant"),
    [({"quantize": "nf5"}, "nf4"), ({"optimizer": "adamW"}, "adamw"), ({"lr_scheduler_type": "cosin"}, "cosine")],
)
def test_a_choice_that_nearly_is_one_is_asked_for(values: dict[str, object], meant: str) -> None:
    assert f"did you mean {meant}?" in refused_train(None, **values).hint


def test_a_choice_that_is_near_to_none_has_the_usual_hint() -> None:
    assert "did you mean" not in refused_train(None, quantize="16").hint


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "inverse_sqrt", "constant"])
def test_arguments_of_a_schedule_are_names_and_values(schedule: str) -> None:
    known = SCHEDULE_ARGUMENTS.get(schedule, frozenset())
    for name in known:
        found = train(lr_scheduler_type=schedule, lr_scheduler_kwargs={name: 2})
        assert found.optimizer.lr_scheduler_kwargs == (f"{name}=2",)
    for value in ("power", "=2", "power=", "2=power", "po wer=2"):
        message = refused_train(None, lr_scheduler_type=schedule, lr_scheduler_kwargs=value).message
        assert message.startswith("--lr-scheduler-kwargs: found ")


@pytest.mark.parametrize(
    ("value", "layers"), [("0,4-7", [0, 4, 5, 6, 7]), ("3, 1,3", [1, 3]), ([2, 0], [0, 2]), ("", []), ("5-5", [5])]
)
def test_layers_are_numbers_and_ranges(value: object, layers: list[int]) -> None:
    assert train(layers_to_transform=value).flat()["layers_to_transform"] == layers


@pytest.mark.parametrize(
    "value",
    [
        *("a", "0,-1", "1-", "-3", "5-4", "0-999999999999", "1.5", 2, True, "10000", "0-99999999999999999999"),
        *([[]], ["a", 1], [1.5], [{}]),
    ],
)
def test_what_are_no_layers_is_refused(value: object) -> None:
    error = refused_train("run.yaml", layers_to_transform=value)
    assert error.message == f"run.yaml: layers_to_transform: found {value!r}, need numbers of layers: 0,4-7"


def test_a_regular_expression_stands_alone_and_keeps_its_commas() -> None:
    """Among names PEFT would take it for one, which matches nothing."""
    pattern = r".*\.[0-9]{1,2}\.mlp\.(up|down)_proj"
    assert train(target_modules=pattern).lora.target_modules == (pattern,)
    assert train(("run.yaml", {"target_modules": [pattern]})).lora.target_modules == (pattern,)
    for value in (["q_proj", pattern], "[q_proj", "*"):
        message = refused_train("run.yaml", target_modules=value).message
        assert message == (
            f"run.yaml: target_modules: found {value!r}, need names separated by commas, or one regular expression"
        )


def test_a_run_takes_blocks_or_a_dataset() -> None:
    assert "found 2 of --blocks and --dataset" in refused_train(None, dataset="rows.jsonl").message
    assert "found 0 of --blocks and --dataset" in refused(TrainConfig, (None, {"model": "m"})).message


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 64), ("train_on", "all"), ("template", "none"), ("pack", "none"), ("long", "drop")],
)
def test_packing_belongs_to_a_dataset_not_to_blocks(name: str, value: object, tmp_path: Path) -> None:
    message = refused_train(None, **{name: value}).message
    assert option_name(name) in message
    assert "lorakit prepare" in message
    config = TrainConfig.resolve((None, {"model": "m", "dataset": "rows.jsonl", name: value}))
    assert config.flat()[name] == value
    assert config.data.dataset == ("rows.jsonl",)


# Layers


@pytest.mark.parametrize(
    ("name", "default", "in_file", "typed", "result"),
    [
        ("rank", 16, 8, "4", 4),
        ("learning_rate", 2e-4, "1e-3", "5e-5", 5e-5),
        ("gradient_checkpointing", True, True, False, False),
        ("target_modules", ["all-linear"], ["q_proj"], "k_proj,v_proj", ["k_proj", "v_proj"]),
        ("dtype", "auto", "fp16", "bf16", "bf16"),
        ("max_steps", None, 7, "9", 9),
    ],
)
def test_an_option_wins_over_the_file_and_the_file_over_the_default(
    name: str, default: object, in_file: Any, typed: object, result: object
) -> None:
    assert train().flat()[name] == default
    from_file = train(("run.yaml", {name: in_file})).flat()[name]
    assert from_file == (float(in_file) if name == "learning_rate" else in_file)
    assert train(("run.yaml", {name: in_file}), (None, {name: typed})).flat()[name] == result


def test_a_value_of_the_file_that_an_option_replaces_does_no_harm() -> None:
    assert train(("run.yaml", {"rank": "nonsense"}), (None, {"rank": "4"})).lora.rank == 4


# The file beside an artifact


def written_and_read(config: StepConfig, folder: Path) -> StepConfig:
    (folder / "lorakit.yaml").write_bytes(artifacts.settings_text(config))
    return type(config).resolve((str(folder), read_settings(folder)))


@by_name
@pytest.mark.parametrize("values", [{}, EVERY], ids=["defaults", "all"])
def test_the_settings_file_of_an_artifact_is_accepted_back(
    config_class: type[StepConfig], values: Mapping[type[StepConfig], dict[str, object]], tmp_path: Path
) -> None:
    config = config_class.resolve((None, NEEDED[config_class]), (None, values.get(config_class, {})))
    again = written_and_read(config, tmp_path)
    assert again == config
    assert again.identity() == config.identity()


positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
share = st.floats(min_value=0, max_value=1, exclude_max=True)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=",\0"), min_size=1, max_size=20).map(
    str.strip
)


def is_name(word: str) -> bool:
    return bool(word) and not is_pattern(word)


values_of_train = st.fixed_dictionaries(
    {"model": words.filter(lambda name: name and not name.startswith("~"))},
    optional={
        "dtype": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
        "rank": st.integers(1, 65_536),
        "lora_alpha": st.floats(min_value=0, max_value=1e6, exclude_min=True, exclude_max=True),
        "lora_dropout": share,
        "target_modules": st.lists(words.filter(is_name), min_size=1, max_size=4).map(tuple)
        | st.sampled_from([(r".*\.q_proj",), (r"(a|b),{2,3}",)]),
        "layers_to_transform": st.sets(st.integers(0, 9_999), max_size=4).map(sorted).map(tuple),
        "modules_to_save": st.lists(words.filter(bool), max_size=3).map(tuple),
        "add_tokens": st.lists(words.filter(bool), max_size=3).map(tuple),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "optimizer": st.sampled_from(["adamw", "paged_lion_8bit", "sgd"]),
        "eval_steps": st.none() | st.integers(1, 10**6),
        "save_minutes": st.none() | positive,
        "deterministic": st.booleans(),
        "torch_compile": st.booleans(),
        "extend": st.booleans(),
        "learning_rate": st.floats(min_value=0, max_value=1e3, exclude_min=True),
        "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant"]),
        "warmup_ratio": share,
        "weight_decay": st.floats(min_value=0, max_value=1e3),
        "epochs": st.floats(min_value=0, max_value=1e4, exclude_min=True),
        "max_steps": st.none() | st.integers(1, 10**9),
        "gradient_checkpointing": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
        "save_steps": st.integers(1, 10**6),
        "output": st.none() | words.filter(lambda name: name and not name.startswith("~")),
        "overwrite": st.booleans(),
        "block_size": st.integers(8, 65536),
        "train_on": st.sampled_from(["completion", "all"]),
    },
)
quantizations = st.one_of(
    st.fixed_dictionaries({"quantize": st.just("none")}),
    st.fixed_dictionaries(
        {"quantize": st.just("int8")}, optional={"int8_threshold": st.floats(0, allow_infinity=False)}
    ),
    st.fixed_dictionaries(
        {"quantize": st.sampled_from(["nf4", "fp4"])}, optional={"double_quantization": st.booleans()}
    ),
)
values_of_train = st.builds(lambda values, quantization: {**values, **quantization}, values_of_train, quantizations)


@settings(deadline=None, database=None, derandomize=True, max_examples=150)
@given(values=values_of_train)
def test_any_run_can_be_repeated_from_its_folder(
    values: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = TrainConfig.resolve((None, {"dataset": "rows.jsonl", **values}))
    given_back = {name: value for name, value in config.flat().items() if name in values}
    for name in ("output", "model"):
        values.pop(name, None)
        given_back.pop(name, None)
    assert given_back == {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    assert written_and_read(config, tmp_path_factory.getbasetemp()) == config


@settings(deadline=None, database=None, derandomize=True, max_examples=50)
@given(values=values_of_train.map(lambda values: {k: v for k, v in values.items() if v is not None}))
def test_what_is_typed_means_what_stands_in_a_file(values: dict[str, Any]) -> None:
    typed = {
        name: ",".join(map(str, value))
        if isinstance(value, tuple)
        else value
        if isinstance(value, bool)
        else str(value)
        for name, value in values.items()
    }
    needed = {"dataset": "rows.jsonl"}
    assert TrainConfig.resolve((None, needed), (None, typed)) == TrainConfig.resolve((None, needed), ("f", values))


# Knobs


@by_name
def test_every_setting_says_what_it_does(config_class: type[StepConfig]) -> None:
    for name, knob in config_class.settings().items():
        assert len(str(knob.field.description)) > 10, name
        assert knob.help.startswith(str(knob.field.description)), name
        assert knob.need, name


@by_name
def test_every_setting_has_a_name_of_its_own(config_class: type[StepConfig]) -> None:
    """The flat view would lose one of two settings with the same name."""
    sections = [field.annotation for field in config_class.model_fields.values()]
    names = [name for section in sections for name in section.model_fields]  # type: ignore[union-attr]
    assert sorted(names) == sorted(config_class.settings())
    shorts = [knob.extra["short"] for knob in config_class.settings().values() if knob.extra["short"]]
    assert len(shorts) == len(set(shorts))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("rank", "(≥ 1 and ≤ 65536, default: 16)"),
        (
            "optimizer",
            "One of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, lion, lion_8bit, paged_lion, "
            "paged_lion_8bit, sgd. (default: adamw)",
        ),
        ("warmup_ratio", "(≥ 0 and < 1, default: 0.03)"),
        ("max_steps", "(≥ 1 and ≤ 1e9)"),
        ("lora_alpha", "(> 0 and < 1e6, default: 32)"),
        ("learning_rate", "(> 0 and ≤ 1000, default: 0.0002)"),
        ("gradient_checkpointing", "(default: on)"),
        ("target_modules", "(default: all-linear)"),
        ("dtype", "(default: auto)"),
        ("lora_dropout", "(≥ 0 and < 1, default: 0)"),
        ("weight_decay", "(≥ 0 and ≤ 1000, default: 0)"),
        ("validation_split", "(≥ 0 and < 1, default: 0)"),
        ("seed", "(≥ 0 and ≤ 9223372036854775807, default: 0)"),
    ],
)
def test_help_shows_the_default_as_it_is_typed(name: str, shown: str) -> None:
    assert TrainConfig.settings()[name].help.endswith(shown)


@pytest.mark.parametrize("name", ["max_steps", "overwrite", "output", "model"])
def test_help_shows_no_default_where_there_is_none(name: str) -> None:
    assert "default" not in TrainConfig.settings()[name].help


# Identity


CHANGED: Mapping[str, object] = {
    "dtype": "fp32",
    "rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.1,
    "target_modules": ("q_proj",),
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "effective_batch_size": 2,
    "epochs": 2.0,
    "max_steps": 5,
    "seed": 1,
    "quantize": "fp4",
    "double_quantization": False,
    "int8_threshold": 5.0,
    "attention": "eager",
    "layers_to_transform": (1,),
    "use_rslora": True,
    "use_dora": True,
    "modules_to_save": ("embed_tokens",),
    "add_tokens": ("<new>",),
    "adapter": "owner/adapter",
    "optimizer": "lion",
    "lr_scheduler_kwargs": ("power=2",),
    "gradient_checkpointing": False,
    "torch_compile": True,
    "deterministic": True,
    "eval_steps": 5,
    "early_stopping_patience": 3,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_decides_the_adapter_is_part_of_its_identity(name: str) -> None:
    beside: dict[str, object] = {"eval_steps": 4}
    needed: dict[str, dict[str, object]] = {
        "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial"},
        "double_quantization": {"quantize": "nf4"},
        "int8_threshold": {"quantize": "int8"},
    }
    beside |= needed.get(name, {})
    assert train(**{**beside, name: CHANGED[name]}).identity() != train(**beside).identity()


@pytest.mark.parametrize("name", ["batch_size", "gradient_accumulation_steps"])
def test_of_the_batch_its_size_over_all_decides(name: str) -> None:
    assert train(**{name: 2}).settled().identity() != train().settled().identity()
    assert train(**{name: 2}).settled().identity() == train(effective_batch_size=2).settled().identity()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other/name"),
        ("blocks", "/elsewhere"),
        ("output", "/elsewhere"),
        ("overwrite", True),
        ("save_steps", 7),
        ("keep_checkpoints", 7),
        ("logging_steps", 7),
        ("save_minutes", 7.0),
        ("parallel", "ddp"),
        ("plan", "/elsewhere"),
        ("cache_quantized", True),
        ("accelerate_config", "/elsewhere"),
        ("sample_prompts", "/elsewhere"),
        ("track", "mlflow"),
        ("push_to_hub", "owner/adapter"),
        ("extend", True),
    ],
)
def test_what_only_says_where_or_how_often_is_no_part_of_it(name: str, value: object) -> None:
    beside: dict[str, object] = {"eval_steps": 4, "quantize": "nf4"}
    changed = train(**beside, **{name: value})
    assert changed != train(**beside)
    assert changed.identity() == train(**beside).identity()
