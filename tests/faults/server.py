"""The fork server: everything heavy is imported once, and every run is a forked child."""

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "COLUMNS": "120",
}
"""No network, and no thread but the first: only that one lives on in a forked child."""

_SECONDS_UNTIL_HUNG = 100
_SHARD_BYTES = 4096  # so that these few blocks fill several shards


def import_all() -> None:
    """Everything that the commands import, so that no child has to."""
    from lorakit.core.environment import no_kernels_from_the_hub

    no_kernels_from_the_hub()  # before bitsandbytes is imported, as the command line does
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401

    import lorakit.core.training  # noqa: F401
    from lorakit.core import blocks, reporting

    torch.set_num_threads(1)
    blocks._SHARD_BYTES = _SHARD_BYTES
    reporting._curves = lambda *_, **__: ""  # drawing takes longer than the run, and touches no disk
    with suppress(ImportError, AttributeError):  # a third of a second that every load of a model would spend
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()


def forked(body: Callable[[], int], log: Path, seconds: int = _SECONDS_UNTIL_HUNG) -> int:
    """The exit code of `body` in a child of this process; what it prints goes to `log`."""
    return ended(begun(body, log, seconds))


def begun(body: Callable[[], int], log: Path, seconds: int = _SECONDS_UNTIL_HUNG) -> int:
    """A child that runs `body`: its pid."""
    import torch

    child = os.fork()
    if child == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.alarm(seconds)
            # torch makes its pool of threads anew after a fork, where it is asked first: by two threads at once (those
            # that load a model) it goes wrong
            torch.set_num_threads(1)
            code = body()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Its exit code, negative for a signal, once it has one."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(arguments: Sequence[object]) -> int:
    """A command line of lorakit's in this process."""
    from lorakit.cli import main

    return int(main([str(argument) for argument in arguments]))


def said_by(body: Callable[[], Any], log: Path, seconds: int = _SECONDS_UNTIL_HUNG) -> Any:
    """What `body` returns in a child, as far as JSON holds it. Raises RuntimeError where it fails."""
    return said_by_each([body], log, seconds)[0]


def said_by_each(bodies: Sequence[Callable[[], Any]], log: Path, seconds: int = _SECONDS_UNTIL_HUNG) -> list[Any]:
    """`said_by` of several children at once."""
    logs = [log.with_suffix(f".{number}.log") for number in range(len(bodies))]

    def telling(body: Callable[[], Any], log: Path) -> int:
        log.with_suffix(".answer").write_text(json.dumps(body()))
        return 0

    children = [begun(partial(telling, body, log), log, seconds) for body, log in zip(bodies, logs, strict=True)]
    found = []
    for child, log in zip(children, logs, strict=True):
        code = ended(child)
        if code:
            raise RuntimeError(f"exit code {code}\n{log.read_text(errors='replace')[-4000:]}")
        found.append(json.loads(log.with_suffix(".answer").read_text()))
    return found


def spread(function: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> list[Any]:
    """`function` of every item, by so many children."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        return list(pool.map(function, items))
