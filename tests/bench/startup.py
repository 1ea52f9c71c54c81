"""How long `--help` takes beside a plain Typer app with as many commands and options: `python -m tests.bench.startup`.

Both are whole processes, run in turn, so that the ratio holds on a noisy machine.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lorakit.options import CONFIGS

RUNS = 15


def plain_app() -> str:
    """The source of a Typer app with lorakit's commands, each with as many options, that does nothing."""
    lines = ["from typing import Annotated, Optional", "import typer", "app = typer.Typer()"]
    for name, config in CONFIGS.items():
        options = [
            f"o{i}: Annotated[Optional[str], typer.Option(help={knob.help!r}, rich_help_panel={knob.title!r})] = None"
            for i, knob in enumerate(config.settings().values())
        ]
        options += [f"r{i}: Annotated[Optional[str], typer.Option(help='One of three.')] = None" for i in range(3)]
        lines += ["@app.command()", f"def {name}({', '.join(options)}): pass"]
    return "\n".join([*lines, "app()"])


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "plain.py"
        script.write_text(plain_app(), encoding="utf-8")
        for arguments in (["--help"], *([command, "--help"] for command in CONFIGS)):
            ours, plain = [sys.executable, "-m", "lorakit", *arguments], [sys.executable, str(script), *arguments]
            for command in (ours, plain):
                seconds(command)
            pairs = [(seconds(ours), seconds(plain)) for _ in range(RUNS)]
            ratio = statistics.median(a / b for a, b in pairs)
            medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
            print(f"{' '.join(arguments):<16} lorakit {medians[0]:.3f} s  plain {medians[1]:.3f} s  ratio {ratio:.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
