"""Config models → command-line options, and back: one place, one precedence (default < --config file < option).

Every option reaches typer as text; the config checks it, so that all problems are reported at once and in one voice.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.completion import offered
from lorakit.console import Console
from lorakit.core import environment
from lorakit.core.artifacts import SETTINGS
from lorakit.core.config import (
    ChatConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    MergeConfig,
    PackingSection,
    PatchAttentionConfig,
    PlanDevicesConfig,
    PrepareConfig,
    Setting,
    StepConfig,
    TrainConfig,
    option_name,
)
from lorakit.core.errors import UsageError
from lorakit.core.untrusted import MAX_SETTINGS_BYTES, parse_yaml, read_small

RUN_PANEL = "This command"
_NO = "no_"
_RECIPES = Path(__file__).parent / "data" / "recipes"

CONFIGS: Mapping[str, type[StepConfig]] = {
    "prepare": PrepareConfig,
    "patch-attention": PatchAttentionConfig,
    "plan-devices": PlanDevicesConfig,
    "train": TrainConfig,
    "merge": MergeConfig,
    "chat": ChatConfig,
    "evaluate": EvaluateConfig,
    "doctor": DoctorConfig,
    "demo": DemoConfig,
}


def command(name: str, body: Callable[..., None]) -> Callable[..., None]:
    """What typer registers for a command: `body`'s docstring as help, an option for every setting of its config."""
    config_class = CONFIGS[name]
    settings = config_class.settings()

    def run(config_file: Path | None, json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
        if quiet and verbose:
            raise UsageError("found both --quiet and --verbose, need one of them", "leave one out")
        if verbose:
            environment.be_verbose()
        console = Console(json=json, quiet=quiet, verbose=verbose)
        typed = {name: value for name, value in given.items() if value not in (None, False, [])}
        typed |= {name: False for name in settings if typed.pop(_NO + name, False)}
        layers = [_file_layer(config_file, typed, console)] if config_file is not None else []
        try:
            body(config_class.resolve(*layers, (None, typed)), console)
        finally:
            console.close()

    parameters = [parameter for setting in settings.values() for parameter in _parameters(name, setting)]
    config_help = "Settings file (YAML), or a folder that holds one."
    config_help += f" Or a recipe: {', '.join(recipes())}." if name == "train" else ""
    config_file = typer.Option(
        "--config",
        help=config_help,
        metavar="FILE",
        rich_help_panel=RUN_PANEL,
        autocompletion=lambda: list(recipes()) if name == "train" else [],
    )
    parameters += [
        _keyword("config_file", Path | None, None, config_file),
        _flag("json", "--json", "Print one JSON object on stdout, and nothing else there.", RUN_PANEL),
        _flag("quiet", "--quiet", "No progress and no hints; errors are still printed.", RUN_PANEL),
        _flag("verbose", "--verbose", "Also what libraries log, and where a bug is.", RUN_PANEL),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = body.__doc__
    return run


def _parameters(command: str, setting: Setting) -> list[inspect.Parameter]:
    kind, extra = setting.kind, setting.extra
    if extra["positional"]:
        argument = typer.Argument(
            help=setting.help,
            metavar=setting.metavar,
            show_default=False,
            autocompletion=offered(command, setting),
        )
        return [_keyword(setting.name, list[str] | None if extra["repeated"] else str | None, None, argument)]
    if kind is bool and setting.field.default:  # shown by what turns it off; the other is for what a file turned off
        off = f"Turn off {setting.label}: {setting.help}"
        return [
            _flag(_NO + setting.name, option_name(_NO + setting.name), off, setting.title),
            _flag(setting.name, setting.label, setting.help, setting.title, hidden=True),
        ]
    if kind is bool:
        return [_flag(setting.name, setting.label, setting.help, setting.title)]
    names = [option_name(setting.name)] + ([extra["short"]] if extra["short"] else [])
    option = typer.Option(
        *names,
        help=setting.help,
        metavar=setting.metavar,
        show_default=False,
        rich_help_panel=setting.title,
        autocompletion=offered(command, setting),
    )
    return [_keyword(setting.name, list[str] | None if extra["repeated"] else str | None, None, option)]


def _flag(name: str, option: str, help: str, panel: str, *, hidden: bool = False) -> inspect.Parameter:
    shown = typer.Option(option, help=help, metavar="", show_default=False, rich_help_panel=panel, hidden=hidden)
    return _keyword(name, bool, False, shown)


def _keyword(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def recipes() -> tuple[str, ...]:
    """lorakit's own settings files for `train`, by name."""
    return tuple(sorted(file.stem for file in _RECIPES.glob("*.yaml")))


def _is_recipe(path: Path) -> bool:
    return not path.exists() and str(path) in recipes()


def _file_layer(path: Path, typed: Mapping[str, object], console: Console) -> tuple[str, Mapping[str, object]]:
    """A settings file's name and settings; what a recipe says of making blocks isn't for blocks that are there."""
    content = read_settings(path)
    unused = [name for name in content if name in PackingSection.model_fields]
    if unused and typed.get("blocks") and _is_recipe(path):
        console.note(f"{path}: {', '.join(unused)} isn't used: --blocks are packed already")
        content = {name: value for name, value in content.items() if name not in unused}
    return str(path), content


def read_settings(path: Path) -> Mapping[str, object]:
    """The flat settings in a YAML file, in the `lorakit.yaml` of a folder, or in a recipe where nothing of that name is
    there. Raises UsageError, DiskFailed."""
    file = path / SETTINGS if path.is_dir() else _RECIPES / f"{path}.yaml" if _is_recipe(path) else path
    hint = (
        f"give a file of `name: value` lines, as every lorakit output holds one ({SETTINGS}), or one of the recipes: "
    )
    hint += ", ".join(recipes())
    if not file.exists():
        raise UsageError(f"--config {path}: found no such file and no recipe, need one of them", hint)
    try:
        content = parse_yaml(read_small(file, MAX_SETTINGS_BYTES, hint))
    except ValueError as error:
        raise UsageError(f"--config {file}: found {error}, need YAML", hint) from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {file}: found {type(content).__name__}, need names with values", hint)
    return content
