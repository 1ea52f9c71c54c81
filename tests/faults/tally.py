"""What a proof counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Trials, what was wrong with those that failed, and a figure worth a column."""

    count: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, trial: str, problems: Sequence[str] = ()) -> None:
        self.count += 1
        if problems:
            self.failures.append(f"{trial}: " + "; ".join(problems))

    def __add__(self, other: "Tally") -> "Tally":
        note = "; ".join(filter(None, (self.note, other.note)))
        return Tally(self.count + other.count, self.failures + other.failures, note)
