"""Signals that come at the worst moments, raised or noted: every one gets through, and nothing is said but that."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lorakit.signals import Noted

RUNS = """
import os, signal, sys, time, weakref
import pydantic
from lorakit import cli
from lorakit.core.errors import InputRefused
from lorakit.signals import Noted
WHICH = signal.{which}
def come(*_):
    os.kill(os.getpid(), WHICH)
    for _ in range(1000):  # Python looks for signals between its instructions
        pass
class Model(pydantic.BaseModel):
    x: int
    _ = pydantic.field_serializer("x")(lambda self, x: come())
class Named:
    __set_name__ = come
class Deleted:
    __del__ = come
def swallowed():
    try:
        come()
    except BaseException:
        pass
def run(config, console):
{body}
run.__doc__ = "Example: x"
cli.COMMANDS["demo"] = run
sys.exit(cli.main(["demo"]))
"""


def ran(body: str, which: str = "SIGTERM") -> "subprocess.CompletedProcess[str]":
    """What a command with such a body does when the signal comes inside of it."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    program = [sys.executable, "-c", RUNS.format(which=which, body=indented)]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)


CHANGED = {
    "through pydantic": "Model(x=1).model_dump()",
    "through a class body": "class Body: name = Named()",
    "through an import": "try:\n    come()\nexcept BaseException as error:\n    raise ImportError('x') from None",
    "as a refusal": "try:\n    come()\nexcept BaseException:\n    raise InputRefused('found x', 'h') from None",
}
LOST = {
    "caught": "swallowed()",
    "in a weak reference's callback": "kept = Deleted.__new__(Named)\nweak = weakref.ref(kept, come)\ndel kept",
    "in a finalizer": "gone = Deleted()\ndel gone",
}


@pytest.mark.parametrize(("which", "code", "name"), [("SIGTERM", 75, "SIGTERM"), ("SIGINT", 130, "Ctrl-C")])
@pytest.mark.parametrize("body", CHANGED.values(), ids=CHANGED)
def test_what_a_library_makes_of_a_signal_is_the_signal(body: str, which: str, code: int, name: str) -> None:
    done = ran(body, which)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().startswith(f"error: stopped by {name} before anything was written\nhint: ")
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize("which", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("body", LOST.values(), ids=LOST)
def test_a_signal_that_is_lost_comes_again(body: str, which: str) -> None:
    began = time.monotonic()
    done = ran(f"{body}\ntime.sleep(40)", which)
    assert time.monotonic() - began < 20
    assert done.returncode == (75 if which == "SIGTERM" else 130), done.stderr
    assert done.stderr.strip().startswith("error: stopped by "), "nothing is said of where it was lost"


def test_one_that_was_lost_is_noted_at_once_by_a_run_that_saves_first() -> None:
    body = "swallowed()\nwith Noted(worker=True) as noted:\n    print(noted.asked, flush=True)\n    time.sleep(1.2)"
    done = ran(f"{body}\n    print(noted.asked, flush=True)\nprint('done')")
    assert (done.returncode, done.stdout.split()) == (0, ["terminate", "terminate", "done"]), done.stderr


def test_one_that_was_lost_goes_once_to_who_handles_it_by_then() -> None:
    body = "swallowed()\ncame = []\nsignal.signal(WHICH, lambda *_: came.append(1))\ntime.sleep(2)\nprint(came)"
    done = ran(f"{body}\nraise InputRefused('m', 'h')")
    assert (done.returncode, done.stdout) == (3, "[1]\n"), "and what comes later is an error of its own"


def test_cleaning_up_is_not_cut_off() -> None:
    done = ran("try:\n    come()\nfinally:\n    time.sleep(1.5)\n    come()\n    print('clean')")
    assert (done.returncode, done.stdout) == (75, "clean\n"), done.stderr


def test_a_bug_without_a_signal_is_a_bug() -> None:
    done = ran("raise ValueError('x')")
    assert done.returncode == 1
    assert "found a bug in lorakit: ValueError: x" in done.stderr


def test_a_ctrl_c_that_the_shell_has_turned_off_stays_so() -> None:
    body = "come()\nprint('went on')"
    program = RUNS.format(which="SIGINT", body=f"    {body}".replace("\n", "\n    "))
    program = program.replace("cli.COMMANDS", "signal.signal(signal.SIGINT, signal.SIG_IGN)\ncli.COMMANDS")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_a_first_signal_is_a_request_and_a_second_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, asked in ((signal.SIGTERM, "terminate"), (signal.SIGINT, "interrupt")):
        with Noted() as signals:
            assert signals.asked is None
            os.kill(os.getpid(), number)
            time.sleep(0)
            assert signals.asked == asked
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal arrives between two instructions
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("which", "code", "name"), [("SIGTERM", 75, "SIGTERM"), ("SIGINT", 130, "Ctrl-C")])
def test_what_a_library_makes_of_a_second_signal_is_the_signal(which: str, code: int, name: str) -> None:
    done = ran("with Noted() as noted:\n    come()\n    assert noted.asked\n    Model(x=1).model_dump()", which)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().startswith(f"error: stopped by {name}")


def test_a_worker_leaves_a_second_signal_to_its_launcher() -> None:
    with Noted(worker=True) as signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0)
        assert signals.asked == "terminate"
