"""Recipes: each is a settings file of `train` by name, and what it asks for fits the devices in its name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.config import PlanDevicesConfig, TrainConfig
from lorakit.core.planning import plan_devices
from lorakit.core.shapes import built_in
from lorakit.options import read_settings, recipes
from tests.conftest import Ran
from tests.test_options import parsed

Cli = Callable[..., Ran]
FOLDER = Path(__file__).parents[1] / "lorakit" / "data" / "recipes"
README = Path(__file__).parents[1] / "README.md"


def config(name: str, *more: str) -> tuple[TrainConfig, Any]:
    found, console = parsed(TrainConfig, "--config", name, *(more or ("--dataset", "/d.jsonl")))
    return found, console


def devices_of(name: str) -> str:
    """As the recipe's comment says."""
    [found] = re.findall(r"^# devices: (.+)$", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return str(found)


def asked_of_the_planner(found: TrainConfig, devices: str) -> PlanDevicesConfig:
    """plan-devices' settings for what train would run, on devices as they are written in a recipe."""
    flat, known = found.flat(), PlanDevicesConfig.settings()
    same = {name: flat[name] for name in flat if name in known and name not in ("output", "parallel", "plan")}
    micro_steps = found.blocks_per_step // int(flat["batch_size"])
    where = {"cpu": devices.removeprefix("cpu ")} if devices.startswith("cpu ") else {"gpus": devices}
    asked = {**same, **where, "parallel": flat["parallel"] or "split", "gradient_accumulation_steps": micro_steps}
    return PlanDevicesConfig.resolve((None, asked))


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_fits_the_devices_in_its_name(name: str) -> None:
    found, devices = config(name)[0], devices_of(name)
    count, size = re.search(r"-(?:(\d+)x)?(\d+)gb$", name).groups()  # type: ignore[union-attr]
    on_cpu = devices.startswith("cpu ")
    assert devices == (f"cpu {size}GiB" if on_cpu else f"{count or 1}x{size}GiB")
    assert on_cpu == ("-cpu-" in name)
    plan = plan_devices(asked_of_the_planner(found, devices), lambda event: None).plan
    assert plan.fits
    assert len(plan.loads) == int(count or 1)
    assert (plan.work.quantize, plan.work.rank) == (found.model.quantize, found.lora.rank)
    assert (plan.work.block_size, plan.work.batch_size) == (found.packing.block_size, found.batch.batch_size)
    assert plan.work.accumulates


def test_the_planner_would_find_a_recipe_that_does_not_fit() -> None:
    found, _ = config("llama-65b-8x24gb")
    assert not plan_devices(asked_of_the_planner(found, "1x24GiB"), lambda event: None).plan.fits


@pytest.mark.parametrize("name", recipes())
def test_every_line_of_a_recipe_reaches_the_config(name: str) -> None:
    found, content = config(name)[0], read_settings(Path(name))
    flat = found.flat()
    for key, value in content.items():
        expected = value.split(",") if key == "target_modules" else value  # type: ignore[attr-defined]
        assert flat[key] == expected, key
    assert found.batch.batch_size != "auto"
    sizes = re.match(r"(?:seed|qlora|llama3?|smollm2)-(\d+)(b|m)", name)
    assert sizes is not None
    short = next(short for short, one in built_in().items() if found.model.model in one["ids"])
    assert short.endswith(f"-{sizes[1]}{sizes[2]}")


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_takes_blocks_that_are_there(name: str) -> None:
    """Their size is theirs; the recipe's is for a dataset."""
    found, _ = config(name, "--blocks", "/b", "--rank", "3", "--model", "mine")
    assert (found.data.blocks, found.lora.rank, found.model.model) == ((Path("/b"),), 3, "mine")
    assert found.packing.block_size == 2048
    assert config(name, "--dataset", "/d", "--block-size", "64")[0].packing.block_size == 64


def test_what_a_recipe_says_in_vain_is_said(cli: Cli, tmp_path: Path) -> None:
    ran = cli("train", "--config", "seed-7b-24gb", "--blocks", tmp_path / "none")
    assert ran.code != 0
    assert "seed-7b-24gb: block_size isn't used: --blocks are packed already" in ran.err
    own = tmp_path / "own.yaml"
    own.write_text("model: m\nblock_size: 512\n")
    assert "found --block-size beside --blocks" in cli("train", "--config", own, "--blocks", tmp_path / "none").err


def test_a_file_of_ones_own_wins_over_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seed-7b-24gb").write_text("rank: 5\n")
    assert read_settings(Path("seed-7b-24gb")) == {"rank": 5}
    assert "rank" in read_settings(Path("qlora-7b-16gb"))


@pytest.mark.parametrize("name", ["seed-7b-24", "seed-7b-24gb.yaml", "./seed-7b", "../recipes/seed-7b-24gb"])
def test_another_name_is_refused_with_the_recipes_there_are(name: str, cli: Cli) -> None:
    ran = cli("train", "--config", name, "--blocks", "b")
    assert ran.code == 2
    assert "found no such file and no recipe" in ran.err
    assert ", ".join(recipes()) in ran.err


def test_help_and_readme_name_every_recipe(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "900")
    monkeypatch.setenv("TERMINAL_WIDTH", "900")
    assert f"Or a recipe: {', '.join(recipes())}." in " ".join(cli("train", "--help").out.split())
    assert "recipe" not in cli("merge", "--help").out
    part = README.read_text(encoding="utf-8").split("### Recipes", 1)[1].split("\n### ", 1)[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[:3] == "| `"]
    assert [row[0] for row in rows] == list(recipes())
    for name, model, devices, base, steps in rows:
        found = config(name)[0]
        assert model == found.model.model
        assert devices == devices_of(name).replace("cpu ", "CPU, ")
        assert base == (found.model.quantize if found.model.quantize != "none" else found.model.dtype)
        assert steps == f"{found.blocks_per_step} × {found.packing.block_size:,}"


def test_a_recipe_is_what_a_run_keeps(tmp_path: Path) -> None:
    """The settings that a run writes beside its adapter are the recipe's: `--config FOLDER` repeats it."""
    from lorakit.core import artifacts

    made, _ = config("qlora-13b-24gb", "--dataset", str(tmp_path / "d.jsonl"))
    (tmp_path / artifacts.SETTINGS).write_bytes(artifacts.settings_text(made))
    assert json.dumps(config(str(tmp_path), "--dataset", str(tmp_path / "d.jsonl"))[0].flat()) == json.dumps(
        made.flat()
    )
