"""`lorakit merge`: an adapter + its base → one ordinary model."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.console import Console

if TYPE_CHECKING:
    from lorakit.core.config import MergeConfig


def run(config: "MergeConfig", console: Console) -> None:
    """Add an adapter to its base and prove that the merged model gives the same answers.

    Example: lorakit merge runs/mine --output merged
    """
    from lorakit.core import doctor

    doctor.require_ready("merge", console.report)
    from lorakit.core.merging import merge  # what it imports may be what isn't there

    started = time.monotonic()
    target = config.output.output or Path("runs").absolute() / f"{Path(config.adapter.adapter).name}-merged"
    merged = merge(config, target, console.report)
    seconds = time.monotonic() - started
    console.summary(
        {
            "merged model": f"{merged.path}{' (already done)' if merged.already_done else ''}",
            "tensors": f"{merged.merged_tensors:,} of {merged.tensors:,} changed",
            "largest difference": f"{merged.max_difference:.2g} between logits of merged and base + adapter (fp32)",
        }
    )
    console.result({**vars(merged), "seconds": seconds})
    console.hint(f"lorakit chat {merged.path}")
