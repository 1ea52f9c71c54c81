"""`lorakit prepare`: a dataset → packed blocks of tokens."""

import time
from typing import TYPE_CHECKING

from lorakit.console import Console

if TYPE_CHECKING:
    from lorakit.core.config import PrepareConfig


def run(config: "PrepareConfig", console: Console) -> None:
    """Turn a dataset into packed blocks of tokens that `lorakit train` reads.

    Example: lorakit prepare rows.jsonl --tokenizer ./model --block-size 2048 --output blocks
    """
    from lorakit.core.blocks import prepare
    from lorakit.core.hub import model_folder
    from lorakit.core.model import load_tokenizer

    started = time.monotonic()
    prepared = prepare(config, load_tokenizer(model_folder(config.data.tokenizer)), console.report)
    console.summary(
        {
            "blocks": f"{prepared.path}{' (made before, with the same bytes)' if prepared.cached else ''}",
            "rows": f"{prepared.rows:,} ({prepared.dropped:,} dropped, {prepared.truncated:,} truncated)",
            "tokens": f"{prepared.tokens:,} in {prepared.blocks:,} blocks, {prepared.fill:.1%} full",
            "trained tokens": f"{prepared.trained_tokens:,}",
        }
    )
    console.result({**vars(prepared), "seconds": time.monotonic() - started})
    console.hint(f"lorakit train --model {config.data.tokenizer} --blocks {prepared.path}")
