"""The rows of the table: what is promised, how it is tested, and which protections are taken away to see it fail."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tests.faults import crowding, enduring, loop, merging, mutating, power, training
from tests.faults.tally import Tally


@dataclass(frozen=True)
class Promise:
    """`prove(work, short=, jobs=, without=)` counts trials; `without` names protections that it can do without."""

    claim: str
    how: str
    prove: Callable[..., Tally]
    without: Sequence[str]
    in_short: bool = True
    """Whether the short table has it too."""


PROMISES: Mapping[str, Promise] = {
    "P1": Promise(
        "killed anywhere, nothing is lost or half there, and the same command finishes with the same bytes",
        "SIGKILL, also in the middle of a write, at every call of prepare and merge and every 4th of train; a third "
        "killed twice",
        partial(loop.prove, kills=True),
        tuple(loop.PROTECTIONS),
    ),
    "P2": Promise(
        "a run that goes on is bit for bit the run that wasn't stopped (CPU)",
        "from the checkpoint of each step: adapter, optimizer, losses; fp32, bf16 with accumulation, dropout on",
        training.prove_resume,
        ("seeds of micro-steps",),
    ),
    "P3": Promise(
        "on 1, then 2, then 1 processes: the same samples, losses within 1e-6",
        "two gloo ranks; each step's loss and samples beside one process alone",
        training.prove_world_sizes,
        ("sums of gradients",),
    ),
    "P4": Promise(
        "files of strangers are refused in one sentence or used rightly",
        "mutated configs, indexes, headers, rows, plans, recipes, tokenizers, templates, and manifests, blocks, states "
        "behind hashes that are right; merges compared with torch's, tokens with tokenizers'; Python's open() watched",
        mutating.prove,
        ("checks of adapter_config", "checks of shard names", "checks of facts", "checks of tokenizers"),
    ),
    "P5": Promise(
        "a flipped byte in an artifact is found before it is used",
        "each byte of manifests, settings, states; tensors at 2,500 places of each kind of artifact",
        mutating.prove_flips,
        ("checks of hashes",),
    ),
    "P6": Promise(
        "a disk that is full or fails ends in exit code 7, the last artifact whole, no traceback",
        "ENOSPC and EIO once, ENOSPC from there on, at every call of prepare, every 4th of merge and 16th of train",
        partial(loop.prove, kills=False),
        ("write-errors",),
    ),
    "P7": Promise(
        "what was reported as made survives a power loss; the rest is whole or not there",
        "logged operations replayed, what isn't fsynced dropped in every way listed",
        power.prove,
        ("files", "folders"),
    ),
    "P8": Promise(
        "SIGTERM: a step is finished and saved, exit code 75, the same adapter after the same command",
        "real signals at random moments, half of them to two ranks",
        training.prove_signals,
        ("the save of a stop",),
    ),
    "P9": Promise(
        "a rank that dies ends the run within 10 s, one that hangs within the timeout + 10 s, exit code 10",
        f"two gloo ranks, SIGKILL or SIGSTOP to one at random moments; timeout {training._TIMEOUT_SECONDS} s",
        training.prove_deaths,
        ("the timeout of exchanges",),
    ),
    "P10": Promise(
        "a merge changes what the adapter changes, rounded once, and nothing else",
        "6 bases (tied, biases, sharded, …) × 3 types × 6 adapters, beside fp64; other tensors byte for byte",
        merging.prove,
        ("the reading back of a wrong scale",),
    ),
    "P11": Promise(
        "gradients of micro-steps are those of the whole step, to 1e-6",
        "fp64; 1, 2, 4, 8 of 8, 7, 5 blocks at once, unequal lengths; transformers' own loss a document",
        training.prove_accumulation,
        ("one mean over the step",),
    ),
    "P12": Promise(
        "NaN and infinity never reach the disk: exit code 8",
        "in losses, gradients, activations, parameters, in one of six steps, every fifth in rank 1 of two",
        training.prove_no_nan,
        ("the checks",),
    ),
    "crowd": Promise(
        "of many processes on one output one wins, the rest wait or are told, nothing is mixed",
        "eight at once on prepare, merge, train, fifty times; locks that work, and locks that do nothing",
        crowding.prove,
        ("the file of the owner",),
    ),
    "load": Promise(
        "long work takes no more memory and open files than short work",
        "a checkpoint each ten steps, merges in a row, rows by the gigabyte as they are made (64 KB each, little used)",
        enduring.prove,
        ("the release of what is used",),
        in_short=False,
    ),
}
