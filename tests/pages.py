"""What is made of the configs' own words: a page for each command, and the options that the command line reads.

`python -m tests.pages` writes them anew.
"""

import json
from itertools import groupby
from pathlib import Path

from lorakit.cli import COMMANDS
from lorakit.core.config import CONFIGS, Setting, option_name
from lorakit.options import Option

_PACKAGE = Path(__file__).parents[1] / "lorakit"
PAGES, OPTIONS = _PACKAGE / "docs", _PACKAGE / "data" / "options.json"


def page(name: str) -> str:
    """What `lorakit COMMAND --help` says, as Markdown."""
    paragraphs = [" ".join(part.split()) for part in (COMMANDS[name].__doc__ or "").strip().split("\n\n")]
    *text, example = paragraphs
    settings = list(CONFIGS[name].settings().values())
    arguments = [
        f"{knob.metavar}…" if knob.extra["repeated"] else knob.metavar for knob in settings if _is_argument(knob)
    ]
    lines = [f"# lorakit {name}", "", *"\n\n".join(text).splitlines(), ""]
    lines += ["```", " ".join(["lorakit", name, *arguments, "[OPTIONS]"]), example.removeprefix("Example: "), "```"]
    for title, knobs in groupby(sorted(settings, key=lambda knob: _first_of(knob.title, settings)), lambda k: k.title):
        lines += ["", f"## {title}", "", "| option | what it does |", "|---|---|"]
        lines += [f"| {_label(knob)} | {_help(knob)} |" for knob in knobs]
    lines += ["", "`--config FILE`, `--json`, `--quiet`, `--verbose` and `--help` are options of every command."]
    return "\n".join(lines) + "\n"


def _is_argument(knob: Setting) -> bool:
    return bool(knob.extra["positional"])


def _first_of(title: str, settings: list[Setting]) -> int:
    return [knob.title for knob in settings].index(title)


def _label(knob: Setting) -> str:
    if _is_argument(knob):
        return f"`{knob.metavar}`"
    if knob.kind is bool:
        return f"`{option_name('no_' + knob.name if knob.field.default else knob.name)}`"
    short = f", `{knob.extra['short']}`" if knob.extra["short"] else ""
    return f"`{option_name(knob.name)} {knob.metavar}`".replace("|", "\\|") + short


def _help(knob: Setting) -> str:
    off = "Turn off: " if knob.kind is bool and knob.field.default else ""
    return off + knob.help.replace("|", "\\|")


def options() -> str:
    """Every option of every command, as JSON."""
    table = {name: [_option(knob)._asdict() for knob in config.settings().values()] for name, config in CONFIGS.items()}
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _option(knob: Setting) -> Option:
    is_switch = knob.kind is bool
    return Option(
        name=knob.name,
        label=knob.label,
        off=option_name(f"no_{knob.name}") if is_switch and knob.field.default else None,
        short=knob.extra["short"],
        title=knob.title,
        help=knob.help,
        metavar=None if is_switch else knob.metavar,
        argument=_is_argument(knob),
        repeated=knob.extra["repeated"],
        words=list(knob.words),
    )


def main() -> None:
    OPTIONS.write_text(options(), encoding="utf-8")
    PAGES.mkdir(exist_ok=True)
    for name in COMMANDS:
        (PAGES / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
