"""What core functions tell their caller while they work (a command shows it, a test collects it), and ask of it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Work done so far. `total` is None where it isn't known; `note` is a short figure to show beside it."""

    task: str
    done: int
    total: int | None
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Notice:
    """One line that the user should read."""

    text: str


Report = Callable[[Progress | Notice], None]

ShouldStop = Callable[[], str | None]
"""Asked at safe points: "terminate" or "interrupt" once such a signal has come, else None."""
