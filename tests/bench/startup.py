"""How long `--help` and Tab take beside a plain Typer app with as many commands and options:
`python -m tests.bench.startup`.

Both are whole processes, run in turn, so that the ratio holds on a noisy machine.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lorakit.core.config import CONFIGS

RUNS = 15
TABS = (
    *("lorakit tr", "lorakit train --quant", "lorakit train --quantize n", "lorakit merge --ver"),
    *("lorakit merge ", "lorakit train --blocks ", "lorakit plan-devices llama-3"),
)
"""What is typed where a shell asks for completions."""


def plain_app() -> str:
    """The source of a Typer app with lorakit's commands, each with as many options, that does nothing."""
    lines = ["from typing import Annotated, Optional", "import typer", "app = typer.Typer()"]
    for name, config in CONFIGS.items():
        options = [
            f"o{i}: Annotated[Optional[str], typer.Option(help={knob.help!r}, rich_help_panel={knob.title!r})] = None"
            for i, knob in enumerate(config.settings().values())
        ]
        options += [f"r{i}: Annotated[Optional[str], typer.Option(help='One of three.')] = None" for i in range(3)]
        lines += ["@app.command()", f"def {name.replace('-', '_')}({', '.join(options)}): pass"]
    return "\n".join([*lines, "app(prog_name='plain')"])


def seconds(command: list[str], environ: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environ)
    return time.perf_counter() - started


def asked_by_a_shell(line: str, program: str) -> dict[str, str]:
    """The environment in which bash asks for completions of a line."""
    words = line.replace("lorakit", program).split(" ")
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    return {**os.environ, f"_{program.upper()}_COMPLETE": "complete_bash", **asked}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "plain.py"
        script.write_text(plain_app(), encoding="utf-8")
        helps = [["--help"], *([command, "--help"] for command in CONFIGS)]
        usual = dict(os.environ)
        cases = [(" ".join(words), words, usual, usual) for words in helps]
        cases += [
            (f"{line}<Tab>", [], asked_by_a_shell(line, "lorakit"), asked_by_a_shell(line, "plain")) for line in TABS
        ]
        for name, arguments, ours_environ, plain_environ in cases:
            ours, plain = [sys.executable, "-m", "lorakit", *arguments], [sys.executable, str(script), *arguments]
            seconds(ours, ours_environ)
            seconds(plain, plain_environ)
            pairs = [(seconds(ours, ours_environ), seconds(plain, plain_environ)) for _ in range(RUNS)]
            ratio = statistics.median(a / b for a, b in pairs)
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            print(f"{name:<32} lorakit {medians[0]:.3f} s  plain {medians[1]:.3f} s  ratio {ratio:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
