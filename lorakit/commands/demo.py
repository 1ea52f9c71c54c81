"""`lorakit demo`: the whole flow on a real small model, through the same command lines that a user types."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import DemoConfig

TRAINING = ["--learning-rate", "1e-3", "--rank", "16", "--no-gradient-checkpointing", "--save-steps", "20"]
BLOCK_SIZE = 256


def run(config: "DemoConfig", console: "Console") -> None:
    """Show the whole flow on a real small model: ask, prepare, train, ask again, merge, ask again.

    Takes a few minutes on a laptop; every command line that it runs is printed, so that each step can be repeated.

    Example: lorakit demo
    """
    from importlib.resources import as_file, files

    from lorakit.core.starter import starter_folder

    started = time.monotonic()
    base, out = starter_folder(config, console.report), _short(config.demo.output)
    blocks, adapter, merged = out / "blocks", out / "adapter", out / "merged"
    questions = json.loads(files("lorakit.data").joinpath("demo_questions.json").read_text(encoding="utf-8"))
    prompts = [part for question in questions for part in ("--prompt", question["question"])]
    prompts += ["--max-new-tokens", "48"]
    ran: list[str] = []

    def lorakit(*arguments: object) -> Any:
        return _run_command([str(argument) for argument in arguments], console, ran)

    before = lorakit("chat", base, *prompts)
    with as_file(files("lorakit.data").joinpath("demo.jsonl")) as rows:
        lorakit("prepare", rows, "--tokenizer", base, "--block-size", BLOCK_SIZE, "--output", blocks)
    epochs = ["--epochs", config.demo.epochs]
    [trained] = lorakit("train", "--model", base, "--blocks", blocks, "--output", adapter, *epochs, *TRAINING)
    after = lorakit("chat", adapter, *prompts)
    lorakit("merge", adapter, "--output", merged)
    at_last = lorakit("chat", merged, *prompts)

    metrics = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    console.curve("training loss", [line["loss"] for line in metrics])
    answers = [
        {
            **question,
            "before": before[index]["answer"],
            "trained": after[index]["answer"],
            "merged": at_last[index]["answer"],
        }
        for index, question in enumerate(questions)
    ]
    seen = [answer for answer in answers if answer["seen"]]
    unseen = [answer for answer in answers if not answer["seen"]]
    console.answers("asked as it was trained", seen)
    console.answers("asked in words it never saw", unseen)
    console.say("\nEvery command line of this demo:")
    for line in ran:
        console.say(f"  {line}")
    right, right_unseen = sum(map(_is_right, seen)), sum(map(_is_right, unseen))
    console.summary(
        {
            "right answers": f"{right} of {len(seen)} in trained words, {right_unseen} of {len(unseen)} in new words",
            "loss": f"{trained['first_loss']:.3f} → {trained['last_loss']:.3f}",
            "time": f"{time.monotonic() - started:.0f} s, {trained['seconds']:.0f} of them training",
        }
    )
    if right < len(seen):
        raise LorakitError(
            f"demo: found {right} of {len(seen)} trained questions answered right, need all",
            "train longer: --epochs 10, with another --output",
        )
    seconds = time.monotonic() - started
    console.result({"path": out, "right": right, "answers": answers, "commands": ran, "seconds": seconds})
    console.hint(shlex.join(["lorakit", "chat", str(merged)]))


def _short(path: Path) -> Path:
    """A path below the current folder as one would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _is_right(answer: dict[str, Any]) -> bool:
    """Whether the answer after training and the one after merging hold what a right one must."""
    return all(str(answer["expect"]).lower() in str(answer[stage]).lower() for stage in ("trained", "merged"))


def _run_command(arguments: list[str], console: "Console", ran: list[str]) -> Any:
    """Run one lorakit command as the user would; returns its JSON. Its errors are its own, and so is its exit code."""
    import subprocess

    ran.append(shlex.join(["lorakit", *arguments]))
    console.note(f"$ {ran[-1]}")
    quiet = ["--quiet"] if console.quiet else []
    done = subprocess.run([sys.executable, "-m", "lorakit", *arguments, "--json", *quiet], stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [json.loads(line) for line in done.stdout.splitlines()]
