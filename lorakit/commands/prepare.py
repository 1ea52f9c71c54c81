"""`lorakit prepare`: a dataset → packed blocks of tokens."""

import shlex
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import PrepareConfig


def run(config: "PrepareConfig", console: "Console") -> None:
    """Turn a dataset into packed blocks of tokens that `lorakit train` reads.

    Example: lorakit prepare rows.jsonl --tokenizer ./model --block-size 2048 --output blocks
    """
    from lorakit.core.preparing import prepare

    started = time.monotonic()
    prepared = prepare(config, console.report)
    figures = prepared.figures
    for row in prepared.preview:
        console.preview(row.place, row.runs, ids=config.preview.preview_ids)
    dropped = sum(figures["dropped_by_reason"].values())
    kept = figures["rows"] - figures["rejected"] - dropped
    held_out = f", {prepared.validation_blocks:,} of them held out" if prepared.validation_blocks else ""
    all_blocks = prepared.blocks + prepared.validation_blocks
    lengths = [f"≤ {length}: {count:,}" for length, count in figures["lengths"].items()]
    reasons = [f"{count:,} {reason}" for reason, count in figures["dropped_by_reason"].items()]
    summary = {
        "blocks": f"{prepared.path}{' (made before, with the same bytes)' if prepared.cached else ''}",
        "rows": f"{figures['rows']:,} → {figures['documents']:,} documents",
        "tokens": f"{figures['tokens']:,} in {all_blocks:,} blocks{held_out}, {prepared.fill:.1%} full",
        "trained tokens": f"{figures['trained_tokens']:,}, {figures['trained_tokens'] / max(figures['tokens'], 1):.1%}",
        "lengths": ", ".join(lengths),
        "longest": f"{figures['longest_tokens']:,} tokens, {figures['longest_row']}",
        "ends trained": f"{figures['ends_trained'] / max(kept, 1):.1%} of the rows",
    }

    def rows(name: str) -> str:
        return f"{figures[name]:,} {'row' if figures[name] == 1 else 'rows'}"

    unusual = {
        "split": f"{rows('split')} longer than a block",
        "truncated": f"{rows('truncated')}, {figures['answers_truncated']:,} of them in what is trained",
        "rejected": f"{rows('rejected')}, in {prepared.path / 'rejected.jsonl'}",
        "pieces_dropped": f"{figures['pieces_dropped']:,} of the pieces of split rows with nothing to train on",
        "double_bos": f"{rows('double_bos')} with two begin tokens at the beginning",
    }
    summary |= {name.replace("_", " "): text for name, text in unusual.items() if figures[name]}
    console.summary(summary | ({"dropped": ", ".join(reasons)} if dropped else {}))
    flat = {name: value for name, value in vars(prepared).items() if name not in ("figures", "preview")}
    preview = [asdict(row) for row in prepared.preview]
    seconds = time.monotonic() - started
    console.result({**flat, **figures, "dropped": dropped, "preview": preview, "seconds": seconds})
    given = ["--model", config.data.tokenizer, "--blocks", str(prepared.path)]
    console.hint(shlex.join(["lorakit", "train", *given]))
