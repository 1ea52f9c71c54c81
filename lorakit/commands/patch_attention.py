"""`lorakit patch-attention`: which kernel a model's attention runs, whether it is right, and the best one applied."""

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.attention.proving import Row
    from lorakit.core.config import PatchAttentionConfig

_HEADER = ("case", "implementation", "kernel", "difference", "× eager's", "ms", "MiB", "× speed", "")


def run(config: "PatchAttentionConfig", console: "Console") -> None:
    """Prove every attention implementation for a model's shape against float64, measure it, and apply the best.

    Example: lorakit patch-attention meta-llama/Llama-3.1-8B --apply
    """
    from lorakit.core.environment import patched_transformers
    from lorakit.core.hub import config_folder

    if config.applying.revert is None:  # before what takes seconds to import
        config_folder(config.attention.model or str(config.applying.apply_to))
    from lorakit.core import attention

    if warning := patched_transformers():
        console.note(warning)
    if config.applying.revert is not None:
        done = attention.revert(config.applying.revert)
        console.summary({"reverted": str(done.path), "attention": done.implementation or "transformers' own choice"})
        console.result({"path": done.path, "implementation": done.implementation})
        return
    found = attention.check(config, console.report)
    proof = found.proof
    console.stop_progress()
    console.table(f"{proof.shape}; {found.dtype} on {found.device}", _HEADER, [_cells(row) for row in proof.rows])
    for line in proof.notes():
        console.say(line)
    if not found.on_gpu:
        console.say("no GPU here: which kernels a GPU would run, their speed and memory can't be known on this machine")
    facts = {"implementation": found.implementation or "none is right"}
    facts |= {"kept in": str(found.written)} if found.written else {}
    if found.patched:
        facts["config"] = f"{found.patched.path}: {found.patched.implementation}"
    console.summary(facts)
    lists = {"rows": [asdict(row) for row in proof.rows], "skipped": [asdict(one) for one in proof.skipped]}
    rest = {name: value for name, value in vars(found).items() if name not in ("proof", "patched")}
    console.result({**rest, "attention": str(proof.shape), **lists, "patched": found.patched and found.patched.path})
    attention.require_right(proof)
    if not found.written and not found.patched:
        console.hint(shlex.join(["lorakit", "patch-attention", str(config.attention.model), "--apply"]))


def _cells(row: "Row") -> list[str]:
    memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    return [
        *(row.case, row.backend, row.kernel.partition(":")[0], f"{row.max_difference:.2g}", f"{row.rms_ratio:.2f}"),
        *(f"{row.seconds * 1000:.3f}", memory, f"{row.speed:.2f}", "ok" if row.ok else "WRONG"),
    ]
