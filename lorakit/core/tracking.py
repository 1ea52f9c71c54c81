"""Metrics to TensorBoard, Weights & Biases, MLflow or Trackio, through accelerate's classes for them.

A tracker is a guest of the run: what it needs is looked for before any model is loaded, and once it fails, the run goes
on without it. `metrics.jsonl` has every figure, whatever a tracker does.
"""

import contextlib
import importlib.util
import math
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from lorakit.core import disk
from lorakit.core.config import Tracker as TrackerName
from lorakit.core.environment import tracking_project
from lorakit.core.errors import EnvironmentUnusable, first_line
from lorakit.core.events import Notice, Report


def require_tracker(name: TrackerName) -> None:
    """Raises EnvironmentUnusable where a tracker isn't installed; nothing is imported."""
    if not _is_installed(name):
        others = [other for other in get_args(TrackerName) if _is_installed(other)]
        instead = f", or use --track {' or '.join(others)}" if others else ""
        raise EnvironmentUnusable(f"--track {name}: found no package {name}, need it", f"pip install {name}{instead}")


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # wandb leaves folders of its own name: they aren't it


class Tracker:
    """One run in a tracker. What it says goes to stderr: stdout is the result's."""

    def __init__(self, name: str, start: Callable[[], Any], report: Report) -> None:
        self._name, self._report = name, report
        self._running: Any = None
        self._guarded(lambda: setattr(self, "_running", start()))

    def log(self, values: Mapping[str, object], step: int) -> None:
        """Send the numbers among `values`; what is missing or infinite isn't one."""
        numbers = {name: value for name, value in values.items() if name != "step" and _is_number(value)}
        if self._running is not None and numbers:
            self._guarded(lambda: self._running.log(numbers, step=step))

    def finish(self) -> None:
        """Send what is left and close the run."""
        if self._running is not None:
            self._guarded(self._running.finish)
            self._running = None

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                call()
        except Exception as error:
            self._running = None
            reason = f"{type(error).__name__}: {first_line(error)}"
            self._report(Notice(f"{self._name} failed ({reason}): the run goes on without it; metrics.jsonl has all"))


def open_tracker(
    name: TrackerName,
    run_name: str,
    folder: Path,
    settings: Mapping[str, object],
    report: Report,
    *,
    after_step: int = 0,
) -> Tracker:
    """Begin a run in a tracker, or go on with the one that `folder` knows of, which has gone on to `after_step`.

    TensorBoard's and Weights & Biases' files lie in `folder`; MLflow and Trackio keep theirs where they always do. One
    process alone calls this, after the group of all processes is there. Never raises: a tracker that can't begin is one
    Notice.
    """
    return Tracker(name, lambda: _started(name, run_name, folder, settings, after_step), report)


def _started(name: TrackerName, run_name: str, folder: Path, settings: Mapping[str, object], after_step: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's logger, which its trackers use, fails without; a group that is there stays as it is
    disk.make_folder(folder)
    kept = folder / f"{name}.id"
    known = kept.read_text(encoding="utf-8") if kept.exists() else None
    run_id = known or uuid.uuid4().hex
    project, make = tracking_project(name), LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # what came after the step will be written again
        tracker = make(run_name, logging_dir=folder, purge_step=after_step + 1 if after_step else None)
    elif name == "wandb":  # nothing of the terminal is uploaded
        alone = {"console": "off"}
        tracker = make(project, name=run_name, id=run_id, resume="allow", dir=str(folder), settings=alone)
    elif name == "mlflow":
        tracker = make(project, run_name=run_name, run_id=known)
    else:  # which knows runs by their names
        tracker = make(project, name=f"{run_name}-{run_id[:8]}", resume="allow")
    tracker.main_process_only = False  # only the main process comes here
    tracker.start()
    if known is None:
        tracker.store_init_configuration(_plain(settings))
        disk.write_file(kept, (tracker.tracker.info.run_id if name == "mlflow" else run_id).encode())
    return tracker


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(settings: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """Settings as every tracker can keep them: what isn't set is left out."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {
        name: value if isinstance(value, bool | int | float | str) else ",".join(map(str, value))  # type: ignore[call-overload]
        for name, value in given.items()
    }
