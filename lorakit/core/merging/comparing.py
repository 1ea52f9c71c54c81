"""Whole models compared: the merged one's answers against those of base + adapter. The only room here with torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.core.events import Report
from lorakit.core.merging.plan import Plan


def compare(plan: Plan, folder: Path, blocks: Sequence[Path], report: Report) -> dict[str, Any]:
    """TODO"""
    return {}
