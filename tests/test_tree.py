"""The house itself: floors, the map in README, what --help loads, and that every option gets somewhere."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit
from lorakit.core import config
from lorakit.core.config import StepConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lorakit"

FLOORS = (
    ("errors", "events"),
    ("config", "disk", "floats", "intervals", "untrusted", "fast", "fast.storage"),
    ("artifacts", "doctor.finding", "fast.kernels"),
    (
        *("templates", "weights", "hub", "environment", "elastic", "reporting"),
        *("fast.linear", "fast.loss", "doctor.trials", "quantization"),
    ),
    (
        *("records", "profiling", "shapes", "parallel", "tracking", "accelerate_config", "fast.layers", "calibration"),
        *("doctor.packages", "doctor.devices", "doctor.limits", "doctor.storage", "doctor.network", "doctor.report"),
    ),
    (
        *("readers", "tokenization", "attention.implementations", "memory", "engines", "quantized_cache"),
        *("doctor.cuda", "doctor.bitsandbytes", "doctor.processes"),
    ),
    ("sources", "packing", "blocks", "adapters", "offloading", "attention.cases", "attention.miniature", "placement"),
    ("preparing", "model", "attention.trials", "merging.plan"),
    ("attention.proving", "merging.quantizing", "merging.card", "generation", "fast.engine"),
    ("attention", "merging.apply", "merging.verifying", "doctor.attention", "exact_match"),
    (
        "evaluation",
        *("training.schedule", "training.optimizers", "training.checkpoints"),
    ),
    ("training.loop", "merging.comparing"),
    ("training", "merging", "starter", "probing", "launching", "doctor"),
    ("planning",),
)
"""The rooms of the core from the ground up; rooms on one floor don't import each other."""

WITHOUT_TORCH = (
    *("errors", "events", "config", "disk", "untrusted", "artifacts", "templates", "weights", "hub", "environment"),
    "records",
    *(
        "shapes",
        "memory",
        "engines",
        "readers",
        "tokenization",
        "sources",
        "packing",
        "blocks",
        "adapters",
        "placement",
        "preparing",
        "planning",
        "reporting",
        "tracking",
        "accelerate_config",
        "launching",
        "floats",
        "intervals",
        "doctor",
        *("doctor.finding", "doctor.packages", "doctor.devices", "doctor.limits", "doctor.storage", "doctor.network"),
    ),
    *("merging", "merging.plan", "merging.quantizing", "merging.card", "merging.apply", "merging.verifying"),
)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that a file imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) or _is_for_type_checking(node)]
    inside = {id(node) for outer in later for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name, id(node) not in inside) for name in [node.module, *names])


def _is_for_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


ROOMS = {room for floor in FLOORS for room in floor}


def file_of(room: str) -> Path:
    """A room's file; a room that holds others is its folder's `__init__.py`."""
    path = (PACKAGE / "core").joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".")[2:] for name, _ in imports(path) if name.startswith("lorakit.core.")]
    return {room if (room := ".".join(parts[:2])) in ROOMS else parts[0] for parts in names}


def test_every_room_of_the_core_has_a_floor() -> None:
    files = set((PACKAGE / "core").rglob("*.py")) - {PACKAGE / "core" / "__init__.py"}
    assert files == {file_of(room) for room in ROOMS}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_imports_of_the_core_go_down_only(room: str) -> None:
    height = next(index for index, floor in enumerate(FLOORS) if room in floor)
    below = {name for floor in FLOORS[:height] for name in floor}
    assert rooms_imported(file_of(room)) <= below


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_knows_nothing_of_the_command_line(path: Path) -> None:
    above = {"typer", "rich", "argparse", "lorakit.cli", "lorakit.console", "lorakit.options", "lorakit.commands"}
    assert not {name for name, _ in imports(path)} & above
    assert path.stem == "environment" or "os.environ" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((PACKAGE / "commands").glob("*.py")), ids=lambda path: path.stem)
def test_a_command_is_short_and_imports_no_other(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (110 if path.stem == "demo" else 60)
    assert not [name for name, _ in imports(path) if name.startswith(("lorakit.commands", "lorakit.cli"))]


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_rooms_for_checks_import_no_torch(room: str) -> None:
    at_import = [name for name, when_imported in imports(file_of(room)) if when_imported]
    assert not [name for name in at_import if name.split(".")[0] in ("torch", "transformers", "peft", "accelerate")]


COMMANDS = ("prepare", "patch-attention", "plan-devices", "train", "merge", "chat", "evaluate", "doctor", "demo")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys; from lorakit.cli import main; code = main(sys.argv[1:]); heavy = "
        "{'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'bitsandbytes', 'tokenizers', 'huggingface_hub'}"
        " & set(sys.modules); print(heavy or '', file=sys.stderr); sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.strip()) == (0, "")


def test_importing_lorakit_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import lorakit; print(sorted(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['lorakit']"


def test_the_top_level_holds_nothing_more_than_it_should() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    expected = {"lorakit", "tests", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {name for name in names if not name.startswith(".")} == expected


def test_no_room_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "helpers", "constants", "types", "misc"}
    assert not {path.stem for path in PACKAGE.rglob("*.py")} & drawers


def test_readmes_map_is_the_tree() -> None:
    """Every module and data file has its line in the map, and every line of the map exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## The map of rooms", 1)[1].split("```")[1]
    shown, folders = set(), []
    for line in block.splitlines():
        found = re.match(r"( *)([\w./-]+)(?:  .+)?$", line)
        if not found:
            continue
        depth, name = len(found[1]) // 2, found[2]
        folders = [*folders[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            assert "  " in line.strip(), f"{name} has no line of its own"
            shown.add("/".join(folders))
    there = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in shown if name.startswith("lorakit/")} == there
    assert all((ROOT / name).exists() for name in shown)


def test_the_changelogs_newest_version_is_this_one() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == lorakit.__version__


def test_ci_installs_by_readmes_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^(python3 -m venv .+) && \.venv/bin/pytest$", readme, re.MULTILINE)
    assert command is not None
    assert command[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_readme_names_every_command_and_exit_code() -> None:
    from lorakit.core.errors import ExitCode

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"lorakit {command}" in readme for command in COMMANDS)
    assert all(re.search(rf"^\| {int(code)} \|", readme, re.MULTILINE) for code in ExitCode)


STEPS = [step for step in vars(config).values() if isinstance(step, type) and issubclass(step, StepConfig)][1:]


def test_every_step_is_a_command() -> None:
    names = {re.sub(r"(?<=.)([A-Z])", r"-\1", step.__name__.removesuffix("Config")).lower() for step in STEPS}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_option_reaches_the_code(step: type[StepConfig]) -> None:
    """Each setting is read somewhere: as an attribute of its section."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
        if path.name != "options.py" and "__pycache__" not in path.parts
    ]
    properties = {"columns": "renamed"} | ({"adapter": "weighted"} if step.__name__ == "MergeConfig" else {})
    for name, setting in step.settings().items():
        attribute = properties.get(name, name)
        read = re.compile(rf"\b(?:{setting.section}|lora|kind|packing|sampling|batch|devices)\.{attribute}\b")
        assert any(read.search(source) for source in sources), (
            f"{step.__name__}.{setting.section}.{name} is read nowhere"
        )


def test_every_module_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def test_public_functions_of_the_core_say_what_they_return_or_raise() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and path.stem != "disk":
                one_line_enough = {"fingerprint", "is_artifact", "pick_device", "option_name"}
                assert ast.get_docstring(node) or node.name in one_line_enough, f"{path.name}: {node.name}"
