"""Config models → command-line options, and back: one place, one precedence (default < --config file < option).

What options there are is read from `data/options.json`, which is made of the configs (`python -m tests.pages`) and
which a test compares with them: importing the configs takes longer than all else that `--help` and Tab do.
Every option reaches typer as text; the config checks it, so that all problems are reported at once and in one voice.
"""

import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lorakit.completion import offered
from lorakit.core import environment
from lorakit.core.errors import UsageError

if TYPE_CHECKING:
    from lorakit.console import Console

RUN_PANEL = "This command"
_NO = "no_"
_DATA = Path(__file__).parent / "data"
_RECIPES = _DATA / "recipes"


class Option(NamedTuple):
    """A setting as the command line shows it, see `Setting` in core/config.py."""

    name: str
    """Of the setting: `block_size`."""
    label: str
    """What is typed: `--block-size`, or an argument's metavar."""
    off: str | None
    """What turns it off, of a switch that is on."""
    short: str | None
    title: str
    help: str
    metavar: str | None
    """None of a switch."""
    argument: bool
    repeated: bool
    words: list[str]
    """What Tab offers for it, where that can be listed."""


def options_of(command: str) -> list[Option]:
    """A command's options but those of every command, in the order of `--help`."""
    return [Option(**facts) for facts in json.loads((_DATA / "options.json").read_bytes())[command]]


def command(name: str, body: Callable[..., None]) -> Callable[..., None]:
    """What typer registers for a command: `body`'s docstring as help, an option for every setting of its config."""
    options = options_of(name)

    def run(config_file: Path | None, json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
        if quiet and verbose:
            raise UsageError("found both --quiet and --verbose, need one of them", "leave one out")
        if verbose:
            environment.be_verbose()
        from lorakit.console import Console
        from lorakit.core.config import CONFIGS

        console = Console(json=json, quiet=quiet, verbose=verbose)
        typed = {name: value for name, value in given.items() if value not in (None, False, [])}
        typed |= {option.name: False for option in options if typed.pop(_NO + option.name, False)}
        layers = [_file_layer(name, config_file, typed, console)] if config_file is not None else []
        try:
            body(CONFIGS[name].resolve(*layers, (None, typed)), console)
        finally:
            console.close()

    parameters = [parameter for option in options for parameter in _parameters(name, option)]
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


def _parameters(command: str, option: Option) -> list[inspect.Parameter]:
    kind = list[str] | None if option.repeated else str | None
    completing = offered(command, option.name, option.words)
    if option.argument:
        argument = typer.Argument(
            help=option.help, metavar=option.metavar, show_default=False, autocompletion=completing
        )
        return [_keyword(option.name, kind, None, argument)]
    if option.off:  # shown by what turns it off; the other is for what a file turned off
        return [
            _flag(_NO + option.name, option.off, f"Turn off {option.label}: {option.help}", option.title),
            _flag(option.name, option.label, option.help, option.title, hidden=True),
        ]
    if option.metavar is None:
        return [_flag(option.name, option.label, option.help, option.title)]
    shown = typer.Option(
        *filter(None, (option.label, option.short)),
        help=option.help,
        metavar=option.metavar,
        show_default=False,
        rich_help_panel=option.title,
        autocompletion=completing,
    )
    return [_keyword(option.name, kind, None, shown)]


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


def _file_layer(
    command: str, path: Path, typed: Mapping[str, object], console: "Console"
) -> tuple[str, Mapping[str, object]]:
    """A settings file's name and settings; what a recipe says of making blocks isn't for blocks that are there. Raises
    UsageError where they are another command's."""
    from lorakit.core.config import CONFIGS, PackingSection

    content = read_settings(path)
    for other, config in CONFIGS.items() if content.keys() - CONFIGS[command].settings() else ():
        known = config.settings()
        if content.keys() <= known.keys() and len(content) > len(known) / 2:
            raise UsageError(
                f"--config {path}: found the settings of `lorakit {other}`, need those of `lorakit {command}`",
                f"`lorakit {other} --config {shlex.quote(str(path))}` takes them",
            )
    unused = [name for name in content if name in PackingSection.model_fields]
    if unused and typed.get("blocks") and _is_recipe(path):
        console.note(f"{path}: {', '.join(unused)} isn't used: --blocks are packed already")
        content = {name: value for name, value in content.items() if name not in unused}
    return str(path), content


def read_settings(path: Path) -> Mapping[str, object]:
    """The flat settings in a YAML file, in the `lorakit.yaml` of a folder, or in a recipe where nothing of that name is
    there. Raises UsageError, DiskFailed."""
    from lorakit.core.artifacts import SETTINGS
    from lorakit.core.untrusted import MAX_SETTINGS_BYTES, parse_yaml, read_small

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
        found = "an empty file" if content is None else "a list" if isinstance(content, list) else "a value alone"
        raise UsageError(f"--config {file}: found {found}, need names with values", hint)
    return content
