"""A page for each command, made of its config's own words: `python -m tests.pages` writes them anew."""

from itertools import groupby
from pathlib import Path

from lorakit.cli import COMMANDS
from lorakit.core.config import Setting, option_name
from lorakit.options import CONFIGS

PAGES = Path(__file__).parents[1] / "lorakit" / "docs"


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


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    for name in COMMANDS:
        (PAGES / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
