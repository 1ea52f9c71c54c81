"""Trackers: TensorBoard's own files read back; the others as small packages on disk that write down their calls.

What is held: each gets the run's name, settings and numbers, goes on with the run it began, and never ends one.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import EnvironmentUnusable
from lorakit.core.events import Notice
from lorakit.core.tracking import Tracker, open_tracker, require_tracker

SETTINGS = {"rank": 8, "learning_rate": 2e-4, "use_dora": False, "target_modules": ["q_proj", "v_proj"], "plan": None}
KEPT = {"rank": 8, "learning_rate": 2e-4, "use_dora": False, "target_modules": "q_proj,v_proj"}

RECORDER = """
import json, pathlib
def record(call, /, *args, **kwargs):
    with pathlib.Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps([call, list(args), kwargs], default=str) + "\\n")
    print("tracker says", call)
    if pathlib.Path(__file__).with_name(f"fail-{call}").exists():
        raise ConnectionError(f"{call}: no route to host\\nand more")
"""
FAKES = {
    "wandb": """
class Run:
    class config:
        update = staticmethod(lambda values, **more: record("settings", values))
    log = staticmethod(lambda values, step=None: record("log", values, step))
    finish = staticmethod(lambda: record("finish"))
config = Run.config
def init(**given):
    record("init", **given)
    return Run()
""",
    "mlflow": """
import types
utils = types.SimpleNamespace(
    validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
)
class ActiveRun:
    info = types.SimpleNamespace(run_id="0123abcd")
def search_experiments(filter_string):
    return []
def create_experiment(name, **more):
    return f"experiment {name}"
def start_run(**given):
    record("init", **given)
    return ActiveRun()
log_params = lambda values: record("settings", values)
log_metrics = lambda values, step=None: record("log", values, step)
end_run = lambda: record("finish")
""",
}
FAKES["trackio"] = FAKES["wandb"]
Fake = Callable[[str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Puts a package of a tracker's name where it is found first; gives the folder where its calls are recorded."""

    def make(name: str) -> Path:
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(RECORDER + FAKES[name], encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / "site")
        sys.modules.pop(name, None)
        for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
            monkeypatch.delenv(variable, raising=False)
        return package

    yield make
    for name in FAKES:
        sys.modules.pop(name, None)


def calls(package: Path) -> list[Any]:
    return [json.loads(line) for line in (package / "calls.jsonl").read_text(encoding="utf-8").splitlines()]


def opened(name: Any, folder: Path, notices: list[Notice] | None = None, after_step: int = 0) -> Tracker:
    told: list[Any] = [] if notices is None else notices
    return open_tracker(name, "mine", folder, SETTINGS, told.append, after_step=after_step)


@pytest.mark.parametrize("name", FAKES)
def test_a_run_is_begun_fed_and_closed(name: str, fake: Fake, tmp_path: Path, capsys: Any) -> None:
    package, notices = fake(name), []
    require_tracker(name)  # type: ignore[arg-type]
    tracker = opened(name, tmp_path / "tracking", notices)
    tracker.log({"step": 3, "loss": 2.5, "note": "text", "grad_norm": float("nan"), "eval_loss": None, "tokens": 7}, 3)
    tracker.log({"note": "no number"}, 4)
    tracker.finish()
    tracker.finish()
    tracker.log({"loss": 1.0}, 5)
    assert notices == []
    began, *rest = calls(package)
    assert (began[0], began[1]) == ("init", [])
    assert rest == [["settings", [KEPT], {}], ["log", [{"loss": 2.5, "tokens": 7}, 3], {}], ["finish", [], {}]]
    assert notices == []
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("tracker says")) == ("", 4)


@pytest.mark.parametrize("name", FAKES)
def test_a_run_that_goes_on_is_the_same_run(name: str, fake: Fake, tmp_path: Path) -> None:
    package = fake(name)
    for after_step in (0, 5):
        opened(name, tmp_path / "tracking", after_step=after_step).finish()
    opened(name, tmp_path / "another").finish()
    begun = [given for call, _, given in calls(package) if call == "init"]
    assert [call for call, *_ in calls(package)].count("settings") == 2  # of the first run and of the other
    if name == "mlflow":
        assert [given["run_id"] for given in begun] == [None, "0123abcd", None]
        assert {given["run_name"] for given in begun} == {"mine"}
        assert {given["experiment_id"] for given in begun} == {"experiment lorakit"}
        return
    key = "id" if name == "wandb" else "name"
    assert begun[0][key] == begun[1][key] != begun[2][key]
    assert {given["resume"] for given in begun} == {"allow"}
    assert {given["project"] for given in begun} == {"lorakit"}
    assert all(given["name"].startswith("mine") for given in begun)


def test_wandb_writes_into_the_run_folder_and_takes_nothing_of_the_terminal(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = fake("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    opened("wandb", tmp_path / "tracking")
    [_, _, given] = calls(package)[0]
    assert (given["dir"], given["settings"]) == (str(tmp_path / "tracking"), {"console": "off"})
    assert given["project"] == "ours"


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("call", ["init", "settings", "log", "finish"])
def test_a_tracker_that_fails_is_one_notice_and_is_dropped(name: str, call: str, fake: Fake, tmp_path: Path) -> None:
    package, notices = fake(name), []
    (package / f"fail-{call}").touch()
    tracker = opened(name, tmp_path / "tracking", notices)
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.finish()
    [notice] = notices
    assert notice.text == (
        f"{name} failed (ConnectionError: {call}: no route to host): the run goes on without it; metrics.jsonl has all"
    )
    assert [found for found, *_ in calls(package)].count(call) == 1
    assert calls(package)[-1][0] == call


def test_what_isnt_installed_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()  # what wandb leaves in a folder isn't wandb
    with pytest.raises(EnvironmentUnusable) as caught:
        require_tracker("wandb")
    assert caught.value.message == "--track wandb: found no package wandb, need it"
    assert caught.value.hint == "pip install wandb"
    (tmp_path / "trackio.py").touch()
    importlib.invalidate_caches()
    with pytest.raises(EnvironmentUnusable) as caught:
        require_tracker("wandb")
    assert caught.value.hint == "pip install wandb, or use --track trackio"


def test_looking_for_a_tracker_imports_nothing() -> None:
    code = (
        "import sys; from lorakit.core.tracking import require_tracker; require_tracker('tensorboard'); "
        "print(sorted({'tensorboard', 'accelerate', 'torch'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_tensorboard_shows_a_run_that_was_stopped_as_one(tmp_path: Path) -> None:
    """Read back by TensorBoard itself: steps after the one that it goes on from are purged and written again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notices: list[Notice] = []
    first = opened("tensorboard", tmp_path / "tracking", notices)
    for step in range(1, 8):
        first.log({"step": step, "loss": 10.0 + step, "eval_loss": 1.5 if step == 4 else None}, step)
    del first  # killed: it was never finished
    second = opened("tensorboard", tmp_path / "tracking", notices, after_step=5)
    for step in (6, 7, 8):
        second.log({"step": step, "loss": 20.0 + step}, step)
    second.finish()
    assert notices == []
    found = EventAccumulator(str(tmp_path / "tracking" / "mine"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 26.0), (7, 27.0), (8, 28.0)]
    assert [(event.step, event.value) for event in found.Scalars("eval_loss")] == [(4, 1.5)]
    [settings] = (tmp_path / "tracking" / "mine").glob("*/hparams.yml")
    assert "target_modules: q_proj,v_proj" in settings.read_text()
