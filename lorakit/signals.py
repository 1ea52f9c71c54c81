"""SIGTERM and Ctrl-C: they end a command at once, or are noted until a long run comes to a safe point."""

import signal
import sys
from types import FrameType
from typing import Any

from lorakit.core.errors import LorakitError, Stopped

_AGAIN_SECONDS = 0.5


class Terminated(BaseException):
    """SIGTERM outside of a command that saves first. No Exception: libraries catch those while they are imported."""


class AtOnce:
    """SIGTERM and Ctrl-C end what runs inside, by what their handler raises.

    That arrives wherever Python is, and not everything there lets it through: the compiler drops it, a weak reference's
    callback has it printed, pydantic and class bodies raise an error of their own in its place. So `asked` says of any
    error whether a signal came before it; and while the command goes on, the signal is raised again, or given to who
    handles it by then.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._over = False

    def __enter__(self) -> "AtOnce":
        signal.signal(signal.SIGTERM, self._hear)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is under nohup and in the background of a script
            signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True  # a second one mustn't cut the message off
        if self._asked is not None:
            self._stop_asking()

    @property
    def asked(self) -> str | None:
        """Which has come: "terminate" or "interrupt"; None where none has."""
        return None if self._asked is None else _word(self._asked)

    def hand_over(self) -> str | None:
        """`asked`, to whom it is left from now on."""
        asked = self.asked
        if asked is not None:
            self._stop_asking()
        self._asked = None
        return asked

    def _hear(self, which: int, frame: FrameType | None) -> None:
        if self._over or (which == self._asked == signal.SIGTERM and _is_under_way()):
            return
        if self._asked is None:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._not_raised
            signal.signal(signal.SIGALRM, self._again)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        self._asked = which
        raise _raised(which)

    def _again(self, number: int, frame: FrameType | None) -> None:
        which = self._asked
        if which is None or self._over or _is_under_way():
            return
        if signal.getsignal(which) != self._hear:
            self.hand_over()
        signal.raise_signal(which)

    def _stop_asking(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = self._hook

    def _not_raised(self, lost: Any) -> None:
        if not issubclass(lost.exc_type, Terminated | KeyboardInterrupt):
            self._hook(lost)


def _is_under_way() -> bool:
    """Whether what a signal raised is on its way to the top, through what cleans up."""
    seen, error = [], sys.exception()
    while error is not None and error not in seen:
        if isinstance(error, Terminated | KeyboardInterrupt):
            return True
        seen.append(error)
        error = error.__context__
    return False


class Noted:
    """SIGTERM and Ctrl-C as a flag that a long run asks for at its safe points; a second one ends it at once, except in
    a `worker`, which its launcher ends."""

    def __init__(self, *, worker: bool = False) -> None:
        self.asked: str | None = None
        self._worker = worker
        self._insisted: int | None = None

    def __enter__(self) -> "Noted":
        self._before = {which: signal.signal(which, self._ask) for which in (signal.SIGINT, signal.SIGTERM)}
        for handler in self._before.values():
            earlier = getattr(handler, "__self__", None)
            if isinstance(earlier, AtOnce):  # one that was raised and didn't get through
                self.asked = earlier.hand_over() or self.asked
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        if self._insisted is not None and isinstance(error, Exception) and not isinstance(error, LorakitError):
            raise _raised(self._insisted) from error  # which a library made that of

    def stop_if_asked(self) -> None:
        """Raises Stopped where one has come; for before there is anything to save."""
        if self.asked is not None:
            raise Stopped.early(interrupted=self.asked == "interrupt")

    def _ask(self, which: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = _word(which)
        elif not self._worker:
            self._insisted = which
            raise _raised(which)


def _raised(which: int) -> BaseException:
    return KeyboardInterrupt() if which == signal.SIGINT else Terminated()


def _word(which: int) -> str:
    return "interrupt" if which == signal.SIGINT else "terminate"
