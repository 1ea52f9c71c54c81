"""The command line: every command in the order of the pipeline, and one place where a failure becomes an exit code.

Only the command that is run gets its options built, and what Tab doesn't need is imported where it is used: a shell
waits for it.
"""

import atexit
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from lorakit import __version__
from lorakit.commands import chat, demo, doctor, evaluate, merge, patch_attention, plan_devices, prepare, train
from lorakit.core import environment
from lorakit.core.errors import (
    WINDOWS,
    EnvironmentUnusable,
    ExitCode,
    LorakitError,
    OutOfMemory,
    Stopped,
    UsageError,
    disk_failed,
    first_line,
    is_out_of_memory,
)
from lorakit.signals import AtOnce, Terminated
from lorakit.streams import write_everywhere

COMMANDS: Mapping[str, Callable[..., None]] = {
    "prepare": prepare.run,
    "patch-attention": patch_attention.run,
    "plan-devices": plan_devices.run,
    "train": train.run,
    "merge": merge.run,
    "chat": chat.run,
    "evaluate": evaluate.run,
    "doctor": doctor.run,
    "demo": demo.run,
}

_HELP: dict[str, Any] = {"help_option_names": ["--help", "-h"]}
_WIDE = 60
_FLOWS = """Fine-tune a model:
  lorakit prepare rows.jsonl --tokenizer MODEL
  lorakit train --model MODEL --blocks BLOCKS
  lorakit merge RUN
  lorakit chat MERGED

Ask first whether a large one fits:
  lorakit plan-devices llama-65b --gpus 8x24GiB --output plan.json
  lorakit train --model MODEL --blocks BLOCKS --plan plan.json

New here?
  lorakit demo            all of it, on a small model
  lorakit doctor          what this machine lacks
  lorakit COMMAND --help  every option, and an example
"""


def build_app(arguments: Sequence[str]) -> Any:
    """The command-line app. Commands that `arguments` don't name have a name and help only."""
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    # tables of four columns can't be read in a narrow window; without them, options have lines of their own
    wide = _completes() or _width() >= _WIDE
    app = typer.Typer(name="lorakit", rich_markup_mode="rich" if wide else None, context_settings=_HELP)
    app.callback(invoke_without_command=True, epilog=_FLOWS if wide else _as_it_is(_FLOWS))(_lorakit)
    for name, run in COMMANDS.items():
        if name == chosen:
            from lorakit.options import command

            app.command(name)(command(name, run))
        else:
            app.command(name, help=run.__doc__)(_nothing)
    built: Any = typer.main.get_command(app)
    for one in (built, *built.commands.values()):
        options = [one.get_help_option(typer.Context(one, **_HELP)), *one.params]
        for switch in (option for option in options if getattr(option, "is_flag", False)):
            switch.metavar = ""  # typer shows <bool>
        if not wide:
            one.context_class, one.short_help = _Narrow, (one.help or "").partition("\n")[0]
    return built


def _as_it_is(text: str) -> str:
    """Text whose lines click doesn't join: a paragraph that begins with this sign."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.split("\n\n"))


_Formatter: Any = typer.Context.formatter_class


class _ALineEach(_Formatter):  # type: ignore[misc]
    """Help where each option and command stands alone in its line, and what it does below it."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(width=_width() - 1)

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 2, col_spacing: int = 2) -> None:
        super().write_dl(rows, 2, 2)


class _Narrow(typer.Context):
    formatter_class = _ALineEach


def _width() -> int:
    from lorakit.console import Console

    return Console.width()


def _completes() -> bool:
    """Whether a shell asks, for completions or for the script that asks for them."""
    return any(name.startswith("_LORAKIT_COMPLETE") for name in os.environ)


def _words_to_complete() -> list[str]:
    """What is typed so far where a shell completes, as each shell hands it over; else nothing."""
    if not _completes():
        return []
    os.environ["COLUMNS"] = "10000"  # a description in two lines would be two words to a shell
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        return shlex.split(line)
    except ValueError:  # a quote that isn't closed yet
        return line.split()


def _lorakit(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print lorakit's version.")] = False,
) -> None:
    """Fine-tune Llama-family language models with LoRA: dataset → blocks → adapter → merged model."""
    if version:
        typer.echo(f"lorakit {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _nothing() -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Every failure is `error:` and `hint:`, never a traceback."""
    if arguments is None:
        code = main(sys.argv[1:])
        for number in (signal.SIGTERM, signal.SIGINT):  # the code is settled, and libraries clean up
            signal.signal(number, signal.SIG_IGN)
        if code != ExitCode.DONE and _rank() is not None:
            _leave(code)
        return code
    at_once = AtOnce()
    try:
        with at_once:
            return _run(arguments)
    except SystemExit as ended:  # what the workers of a parallel run agreed on, and have printed
        return int(ended.code or ExitCode.DONE)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return _fail(_as_ours(error, at_once.asked))


def _run(arguments: Sequence[str]) -> int:
    environment.no_kernels_from_the_hub()
    write_everywhere()
    if sys.platform == "win32":  # before what Windows lacks is imported
        raise EnvironmentUnusable(*WINDOWS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # held until now by the launcher
    app = build_app([*arguments, *_words_to_complete()])
    code = app.main(arguments, prog_name="lorakit", standalone_mode=False)
    if code == ExitCode.INTERRUPTED:  # typer's word for Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else ExitCode.DONE


def _as_ours(error: BaseException, asked: str | None) -> LorakitError:
    """What ended a command, with its exit code. Once a signal has been raised, it is the signal, whatever a library
    made of it; who meets another error in the same half second meets it again with the same command."""
    if isinstance(error, Stopped):
        return error
    if asked is not None or isinstance(error, Terminated | KeyboardInterrupt | typer.Abort):
        return Stopped.early(interrupted=asked != "terminate" and not isinstance(error, Terminated))
    if isinstance(error, LorakitError):
        return error
    if isinstance(error, TyperException):
        return _usage(error)
    if isinstance(error, OSError):
        return disk_failed(error, Path(os.fsdecode(error.filename or "an unnamed file")))
    return _no_memory(error) if is_out_of_memory(error) else _bug(error)


def _fail(error: LorakitError) -> int:
    from lorakit.console import Console

    rank = _rank()
    if rank is None or not error.shared:
        Console().error(error, "" if rank is None else f"rank {rank}: ")
    elif rank == 0:
        Console().error(error)
    return int(error.exit_code)


def _leave(code: int) -> NoReturn:
    """End a process that failed among others once libraries have cleaned up, without taking Python down: the threads
    by which it spoke to the others are still there, and one time in some sixty they abort a process that destroys
    them, whose exit code is lost."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank() -> int | None:
    """This process's number, where it is one of several."""
    try:
        worker = environment.worker()
    except LorakitError:
        return None
    return worker.rank if worker is not None and worker.world_size > 1 else None


def _usage(error: TyperException) -> UsageError:
    """Typer's own complaint about the command line, with what was probably meant as the hint."""
    import difflib

    message = getattr(error, "message", "") or error.format_message()
    near, hint = list(getattr(error, "possibilities", None) or []), "`lorakit COMMAND --help` lists what it takes"
    if unknown := re.match(r"No such command '(.+?)'\.", message):
        message = f"found the unknown command {unknown[1]!r}, need one of {', '.join(COMMANDS)}"
        near, hint = difflib.get_close_matches(unknown[1], COMMANDS), "`lorakit --help` says what each does"
    elif unknown := re.match("No such option: (-.*?)( |$)", message):
        message = f"found the unknown option {unknown[1]}, need one of this command's"
    elif extra := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        message = f"found {extra[1]} behind all arguments, need an option in front of it, or nothing"
    elif option := re.match(r"Option '(-.*?)' (does not take|requires)", message):
        without = option[2] == "requires"
        message = f"{option[1]}: found {'no value, need one' if without else 'a value, need none'}"
    return UsageError(message, f"did you mean {' or '.join(sorted(near))}?" if near else hint)


def _no_memory(error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        f"found {first_line(error)}, need more memory", "close other programs, or use a smaller model or --dtype bf16"
    )


def _bug(error: BaseException) -> LorakitError:
    """A failure that nobody foresaw: the traceback goes to a file that is named, or is shown with LORAKIT_DEBUG=1."""
    import tempfile
    import traceback

    if os.environ.get("LORAKIT_DEBUG") == "1":
        traceback.print_exception(error)
    with tempfile.NamedTemporaryFile("w", prefix="lorakit-crash-", suffix=".txt", delete=False) as file:
        file.write(f"lorakit {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n\n")
        traceback.print_exception(error, file=file)
    return LorakitError(
        f"found a bug in lorakit: {type(error).__name__}: {first_line(error)}",
        f"report it with {file.name}, which says where",
    )
