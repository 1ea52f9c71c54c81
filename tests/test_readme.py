"""README's words about options, held true: defaults beside a recipe, the migration table, translated launches."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.config import CONFIGS, MergeConfig, PlanDevicesConfig, PrepareConfig, TrainConfig, option_name
from lorakit.core.planning import plan_devices
from tests.shown_errors import places
from tests.test_options import TRAIN, parsed

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def part(title: str) -> str:
    return README.split(f"\n### {title}\n", 1)[1].split("\n### ", 1)[0]


def rows(title: str) -> list[list[str]]:
    """The body of the first table of a part, cell by cell."""
    lines = [line for line in part(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def commands(title: str) -> list[list[str]]:
    """Each command line of a part's blocks, as a shell would split it."""
    blocks = "\n".join(part(title).split("\n```\n")[1::2])
    return [shlex.split(line) for line in re.sub(r"\\\n", " ", blocks).splitlines()]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ALSO_OPTIONS = {"--quiet", "--verbose", "--json", "--config"}
OPTIONS = {label: name for name, knob in TrainConfig.settings().items() for label in (knob.label, option_name(name))}
OPTIONS |= {
    option_name(f"no_{name}"): name for name, knob in TrainConfig.settings().items() if knob.field.default is True
}


def same(shown: str, value: object) -> bool:
    """Whether a cell of a table says a setting's value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(shown) == value
    return shown == ("not set" if value is None else ",".join(value) if isinstance(value, list | tuple) else value)


def test_defaults_and_recommendations_are_those_that_are_shown() -> None:
    recipe = parsed(TrainConfig, "--config", "seed-7b-24gb", "--dataset", "/d")[0].flat()
    table = rows("Why these defaults")
    assert len(table) == 12
    for label, default, recommended, why in table:
        name = OPTIONS[label.strip("`")]
        assert same(default, TrainConfig.settings()[name].field.default), name
        assert same(recommended, recipe[name]), name
        assert why
    # what the recipe says and the table doesn't is no recommendation of its own
    assert {"model", "batch_size"} == {
        line.split(":")[0]
        for line in (Path(__file__).parents[1] / "lorakit/data/recipes/seed-7b-24gb.yaml").read_text().splitlines()
        if not line.startswith("#") and option_name(line.split(":")[0]) not in {row[0].strip("`") for row in table}
    }


FLAGS = (
    *("model_name_or_path", "cache_dir", "r", "lora_alpha", "lora_dropout", "bits", "double_quant", "quant_type"),
    *("trust_remote_code", "use_auth_token", "dataset_name", "block_size", "multi_gpu", "tensor_parallel"),
    *("model_output_dir", "output_dir", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "fp16", "bf16", "logging_steps", "log_level", "learning_rate"),
    *("lr_scheduler_type", "warmup_ratio", "weight_decay", "optim", "evaluation_strategy", "save_strategy"),
    *("eval_steps", "save_steps", "save_total_limit", "load_best_model_at_end", "remove_unused_columns"),
    *("gradient_checkpointing", "max_grad_norm", "config_file", "push_to_hub"),
)
"""Every flag that the script, its launcher or its merge script was given in its documents."""

MIGRATION = {
    spans(flag)[0].removeprefix("--"): (spans(options), note)
    for flag, options, note in rows("Coming from LLaMA-8bit-LoRA")
}


def said(node: ast.expr) -> str:
    """A text of the code as README shows it: `…` for what it is filled with."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts_of_errors() -> set[tuple[str, ...]]:
    """Every error's text and its hint."""
    calls: list[Any] = [ast.parse(place.text, mode="eval").body for place in places()]
    return {tuple(" ".join(said(argument).replace("`", "").split()) for argument in call.args[:2]) for call in calls}


@pytest.mark.parametrize(("error", "hint", "why"), rows("Troubleshooting"), ids=lambda cell: cell[:40])
def test_an_error_that_is_explained_is_one_of_the_codes(error: str, hint: str, why: str) -> None:
    assert (error.replace("`", ""), hint.replace("`", "").strip()) in texts_of_errors()
    assert why


def test_the_65b_storys_plan_fits_and_its_run_is_the_planned_one(tmp_path: Path) -> None:
    planning, preparing, training, merging = commands("65B, step by step")
    asked, _ = parsed(PlanDevicesConfig, *planning[2:])
    plan = plan_devices(asked, lambda event: None).plan
    assert plan.fits
    run, _ = parsed(TrainConfig, *training[2:])
    assert run.devices.plan == asked.plan.output
    prepared, _ = parsed(PrepareConfig, *preparing[2:])
    assert [prepared.output.output] == list(run.data.blocks)
    assert prepared.packing.block_size == asked.batch.block_size
    assert prepared.data.tokenizer == run.model.model == "huggyllama/llama-65b"
    flat, planned = run.flat(), asked.flat()
    shared = set(flat) & set(planned) - {"output", "model", "parallel", "block_size"}
    assert {name: flat[name] for name in shared} == {name: planned[name] for name in shared}
    merged, _ = parsed(MergeConfig, *merging[2:])
    assert Path(merged.adapter.adapter[0]).name == run.output.output.name


def test_the_commands_that_begin_readme_parse() -> None:
    quick = [shlex.split(line, comments=True) for line in README.split("\n```\n")[1].splitlines()]
    assert [words[1] for words in quick] == ["doctor", "train", "merge", "chat"]
    for _, name, *words in quick:
        parsed(CONFIGS[name], *words)


def test_every_file_and_heading_that_readme_links_to_is_there() -> None:
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines()}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (Path(__file__).parents[1] / target).is_file(), target


def test_every_flag_of_the_script_has_its_row() -> None:
    assert tuple(MIGRATION) == FLAGS
    assert all(options or note for options, note in MIGRATION.values())


@pytest.mark.parametrize("flag", FLAGS)
def test_every_option_named_beside_a_flag_is_one(flag: str) -> None:
    options, note = MIGRATION[flag]
    for option in [*options, *(span for span in spans(note) if span.startswith("--"))]:
        label, _, value = option.partition(" ")
        if label in ALSO_OPTIONS:
            continue
        name = OPTIONS[label]
        if value:
            assert parsed(TrainConfig, *TRAIN, label, value)[0].flat()[name] == value
    for command in (span for span in spans(note) if span.startswith("lorakit ")):
        assert command.split()[1] in CONFIGS


LAUNCH: dict[str, Any] = {
    **{"num_train_epochs": 2, "model_name_or_path": "huggyllama/llama-7b", "model_output_dir": "LLaMA/LoRA/7B"},
    **{"block_size": 600, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 64, "fp16": "fp16"},
    **{"logging_steps": 1, "learning_rate": 2.0e-4, "lr_scheduler_type": "linear", "warmup_ratio": 0.06},
    **{"weight_decay": 0.1, "optim": "adamw", "eval_steps": 400, "save_steps": 400, "save_total_limit": 3},
    **{"load_best_model_at_end": True, "dataset_name": ["Dahoas/full-hh-rlhf"], "r": 64, "lora_alpha": 32},
    **{"lora_dropout": 0.05, "bits": "int8"},
}
"""What its launches set, flag by flag, with names that lorakit has for fp16, fused AdamW and 8 bits."""
LAUNCHES: list[dict[str, Any]] = [
    LAUNCH,
    {**LAUNCH, "gradient_accumulation_steps": 8, "multi_gpu": "ddp"},
    {
        **LAUNCH,
        "tensor_parallel": "split",
        "model_name_or_path": "huggyllama/llama-65b",
        "model_output_dir": "LLaMA/LoRA/65B",
    },
]


@pytest.mark.parametrize("number", range(3))
def test_a_translated_launch_reaches_the_config_flag_by_flag(number: int) -> None:
    """By way of README's own table: flag → option → setting."""
    launches = [command for command in commands("Coming from LLaMA-8bit-LoRA") if command[:2] == ["lorakit", "train"]]
    assert len(launches) == 3
    config, _ = parsed(TrainConfig, *launches[number][2:])
    flat = config.flat()
    for flag, value in LAUNCHES[number].items():
        name = OPTIONS[MIGRATION[flag][0][0].split()[0]]
        expected = str(Path(value).absolute()) if name == "output" else value
        assert flat[name] == expected, flag
    assert flat["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (config.blocks_per_step, config.data_parallel_size) == (128, 8 if number == 1 else 1)
    asked = {OPTIONS[word] for word in launches[number] if word.startswith("--")}
    translated = {OPTIONS[option.split()[0]] for flag in LAUNCHES[number] for option in MIGRATION[flag][0]}
    assert asked - translated == {"validation_dataset", "target_modules", *(["num_processes"] if number == 1 else [])}


def test_the_plan_beside_the_third_launch_is_a_plan_for_it() -> None:
    planning, *_ = (command for command in commands("Coming from LLaMA-8bit-LoRA") if command[1] == "plan-devices")
    asked, _ = parsed(PlanDevicesConfig, *planning[2:])
    launch, _ = parsed(TrainConfig, *commands("Coming from LLaMA-8bit-LoRA")[-1][2:])
    assert plan_devices(asked, lambda event: None).plan.fits
    flat, planned = launch.flat(), asked.flat()
    shared = set(flat) & set(planned) - {"output"}
    assert {name: flat[name] for name in shared} == {name: planned[name] for name in shared}


def test_the_short_form_is_the_recipe() -> None:
    [command] = [span for span in spans(part("Coming from LLaMA-8bit-LoRA").split("```")[-1]) if "--config" in span]
    config, _ = parsed(TrainConfig, *shlex.split(command)[2:])
    assert (config.lora.rank, config.data.dataset) == (64, ("Dahoas/full-hh-rlhf",))


@pytest.mark.parametrize("command", [command for command in commands("Recipes") if command[:2] == ["lorakit", "train"]])
def test_the_commands_beside_the_recipes_parse(command: list[str]) -> None:
    parsed(TrainConfig, *command[2:])


def test_the_keys_of_trains_json_are_all_listed() -> None:
    from lorakit.core.training import Trained

    [row] = [line for line in README.splitlines() if line.startswith("| train | `path ")]
    listed = row.split("`")[1].split()
    assert sorted(listed) == sorted(Trained.__dataclass_fields__)
