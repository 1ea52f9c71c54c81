"""Rows answered by a model, and which answers equal the rows' own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorakit.core.config import ExactMatchSection
from lorakit.core.errors import InputRefused
from lorakit.core.events import Progress, Report
from lorakit.core.generation import complete, context_tokens
from lorakit.core.intervals import Interval, wilson_interval
from lorakit.core.model import Opened
from lorakit.core.preparing import Question


@dataclass(frozen=True)
class Reply:
    """What a model said to a row, what of it was compared (None where the pattern isn't in it), and whether that equals
    the row's own."""

    answer: str
    compared: str | None
    right: bool


@dataclass(frozen=True)
class Matches:
    """The replies to all rows, in their order."""

    replies: Sequence[Reply]

    @property
    def right(self) -> int:
        return sum(reply.right for reply in self.replies)

    @property
    def share(self) -> float:
        """The share of the rows that were answered right."""
        return self.right / len(self.replies)

    @property
    def interval(self) -> Interval:
        """Its 95 % confidence interval."""
        return wilson_interval(self.right, len(self.replies))


def references(questions: Sequence[Question], pattern: str | None) -> list[str]:
    """What of each row's completion an answer has to equal. Raises InputRefused where the pattern isn't in one."""
    found = [compared(question.completion, pattern) for question in questions]
    lacking = [question.place for question, reference in zip(questions, found, strict=True) if not reference]
    if lacking:
        raise InputRefused(
            f"{lacking[0]}: found a completion without --answer-pattern {pattern!r} "
            f"({len(lacking)} of {len(questions)} rows), need something to compare in each",
            "correct the pattern, or leave it out to compare whole completions; GSM8K's is '#### (.*)'",
        )
    return [reference for reference in found if reference]


def compared(text: str, pattern: str | None) -> str | None:
    """What of a text is compared: the first place that the pattern matches, its first group where it has one; without a
    pattern all of it. Spaces at the ends don't count. None where nothing matches."""
    if pattern is None:
        return text.strip()
    found = re.search(pattern, text)
    return ((found[1] if found.re.groups else found[0]) or "").strip() if found else None


def answer_all(
    opened: Opened,
    questions: Sequence[Question],
    wanted: Sequence[str],
    matching: ExactMatchSection,
    report: Report,
    task: str,
) -> Matches:
    """The likeliest answer to each row, beside what it has to equal. Rows of like length are answered together.

    Raises InputRefused where a row and its longest answer exceed the model's context.
    """
    context = context_tokens(opened)
    for question in questions:
        needed = len(question.prompt_ids) + matching.max_new_tokens
        if context is not None and needed > context:
            raise InputRefused(
                f"{question.place}: found a prompt of {len(question.prompt_ids)} tokens and answers of up to "
                f"{matching.max_new_tokens}, need at most the model's {context} together",
                "lower --max-new-tokens, or leave that row out",
            )
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt_ids), reverse=True)
    replies: dict[int, Reply] = {}
    for first in range(0, len(order), matching.rows_at_once):
        mine = order[first : first + matching.rows_at_once]
        answers = complete(opened, [questions[index].prompt_ids for index in mine], matching.max_new_tokens)
        for index, answer in zip(mine, answers, strict=True):
            found = compared(answer, matching.answer_pattern)
            replies[index] = Reply(answer, found, found == wanted[index])
        right = sum(reply.right for reply in replies.values())
        report(Progress(task, len(replies), len(order), "rows", f"{right} right"))
    return Matches([replies[index] for index in range(len(order))])
