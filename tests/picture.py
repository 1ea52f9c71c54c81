"""README's picture, drawn from what the real program writes to a terminal: `python -m tests.picture`.

Needs the demo's model, which it takes as `lorakit demo` does.
"""

import os
import pty
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from lorakit.core.config import DemoConfig
from lorakit.core.starter import starter_folder

PICTURE = Path(__file__).parent / "pictures" / "lorakit.svg"
WIDTH = 100
COMMANDS = (
    "lorakit plan-devices llama-65b --gpus 8x24GiB --quantize int8 --block-size 600 --batch-size 2",
    "lorakit prepare rows.jsonl --tokenizer SmolLM2 --block-size 128 --preview 1 --output blocks",
    "lorakit train --model SmolLM2 --blocks blocks --batch-size 4 --learning-rate 1e-3 --output adapter",
    "lorakit merge adapter --output merged",
)
"""What is shown, in a folder with the rows and model of the demo. Of its figures seconds, tokens/s and memory depend on
the machine, and losses by their last digits."""


def written(command: str, folder: Path) -> str:
    """What a command leaves on a terminal: its lines as they stand at the end, with their colours."""
    leader, follower = pty.openpty()
    _, *words = shlex.split(command)
    environ = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "LORAKIT_CACHE")}
    environ |= {"TERM": "xterm-256color", "COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "lorakit", *words]
    with subprocess.Popen(run, cwd=folder, stdin=follower, stdout=follower, stderr=follower, env=environ) as running:
        os.close(follower)
        raw = b""
        while True:
            try:
                raw += os.read(leader, 65536)
            except OSError:  # what Linux says at the end of a terminal
                break
    os.close(leader)
    if running.returncode:
        raise SystemExit(raw.decode())
    return settled(raw.decode())


def settled(raw: str) -> str:
    """What stands on a terminal in the end: a live line is written over, and taken away by going up to it."""
    lines: list[str] = []
    for line in raw.replace("\r\n", "\n").split("\n"):
        if "\x1b[1A\x1b[2K" in line:
            lines.pop()
        shown = line.rpartition("\r")[2].replace("\x1b[1A", "").replace("\x1b[2K", "")
        lines.append(shown.replace("\x1b[?25h", "").replace("\x1b[?25l", ""))
    return "\n".join(lines).strip("\n")


def draw(shown: list[tuple[str, str]]) -> str:
    """Commands and what they wrote as one SVG, which fetches nothing."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        for number, (command, text) in enumerate(shown):
            console.print(Text("\n" * bool(number) + "$ ", style="green").append(command, style="bold default"))
            console.print(Text.from_ansi(text))
        fonts, style = CONSOLE_SVG_FORMAT.index("@font-face"), CONSOLE_SVG_FORMAT.index(".{unique_id}-matrix")
        return console.export_svg(
            title="lorakit", code_format=CONSOLE_SVG_FORMAT[:fonts] + CONSOLE_SVG_FORMAT[style:], unique_id="lorakit"
        )


def main() -> None:
    model = starter_folder(DemoConfig.resolve(), lambda event: None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "rows.jsonl").symlink_to(Path(__file__).parents[1] / "lorakit" / "data" / "demo.jsonl")
        (folder / "SmolLM2").symlink_to(model)
        shown = [(command, written(command, folder).replace(f"{folder}/", "")) for command in COMMANDS]
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(shown), encoding="utf-8")


if __name__ == "__main__":
    main()
