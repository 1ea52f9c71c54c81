"""`lorakit merge`: adapters + their base → one ordinary model."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import MergeConfig


def run(config: "MergeConfig", console: "Console") -> None:
    """Add an adapter to its base, or several with weights, and verify what was written.

    Example: lorakit merge runs/mine --output merged
    """
    from lorakit.core import doctor
    from lorakit.core.environment import one_thread_for_products

    doctor.require_ready("merge", console.report)
    one_thread_for_products()
    from lorakit.core.merging import merge  # what it imports may be what isn't there

    started = time.monotonic()
    names = "+".join(Path(name).name for name, _ in config.adapter.weighted)
    target = config.output.output or Path("runs").absolute() / f"{names}-merged"
    merged = merge(config, target, console.report)
    seconds = time.monotonic() - started
    console.summary(
        {
            "merged model": f"{merged.path}{' (already done)' if merged.already_done else ''}",
            "tensors": f"{merged.merged_tensors:,} of {merged.tensors:,} changed",
            "largest difference": f"{merged.max_difference:.2g} between a written number and its exact value",
            **({} if merged.logit_difference is None else {"logits": _logits(merged.logit_difference)}),
            **{f"loss, {name}": f"{loss:.4f}" for name, loss in (merged.losses or {}).items()},
            **({"uploaded to": merged.url} if merged.url else {}),
        }
    )
    console.result({**vars(merged), "seconds": seconds})
    console.hint(shlex.join(["lorakit", "chat", str(merged.path)]))


def _logits(difference: float) -> str:
    return f"at most {difference:.2g} between merged and base + adapter"
