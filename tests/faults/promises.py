"""The rows of the table: what is promised, how it is tested, and which protections are taken away to see it fail."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tests.faults import loop, mutating, power
from tests.faults.tally import Tally


@dataclass(frozen=True)
class Promise:
    """`prove(work, short=, jobs=, without=)` counts trials; `without` names protections that it can do without."""

    claim: str
    how: str
    prove: Callable[..., Tally]
    without: Sequence[str]


PROMISES: Mapping[str, Promise] = {
    "P1": Promise(
        "killed anywhere, nothing is lost or half there, and the same command finishes with the same bytes",
        "SIGKILL, also in the middle of a write, at calls of prepare, train and merge; a third killed twice",
        partial(loop.prove, kills=True),
        tuple(loop.PROTECTIONS),
    ),
    "P4": Promise(
        "files of strangers are refused in one sentence or used rightly",
        "mutated configs, indexes, headers, rows, plans, recipes, templates; merges compared with numpy's; "
        "every open() watched",
        mutating.prove,
        ("checks of adapter_config", "checks of shard names"),
    ),
    "P5": Promise(
        "a flipped byte in an artifact is found before it is used",
        "each byte of manifests, settings, states; tensors at 2,500 places of each kind of artifact",
        mutating.prove_flips,
        ("checks of hashes",),
    ),
    "P6": Promise(
        "a disk that is full or fails ends in exit code 7, the last artifact whole, no traceback",
        "ENOSPC and EIO once, ENOSPC from there on, at calls of prepare, train and merge",
        partial(loop.prove, kills=False),
        ("write-errors",),
    ),
    "P7": Promise(
        "what was reported as made survives a power loss; the rest is whole or not there",
        "logged operations replayed, what isn't fsynced dropped in every way listed",
        power.prove,
        ("files", "folders"),
    ),
}
