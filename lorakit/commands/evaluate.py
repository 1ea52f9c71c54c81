"""`lorakit evaluate`: loss and perplexity over blocks, the base beside the adapter."""

from typing import TYPE_CHECKING

from lorakit.console import Console

if TYPE_CHECKING:
    from lorakit.core.config import EvaluateConfig


def run(config: "EvaluateConfig", console: Console) -> None:
    """Measure loss and perplexity over the trained tokens of blocks; for an adapter, its base's beside it.

    Example: lorakit evaluate runs/mine --blocks held-out
    """
    from lorakit.core.evaluation import evaluate

    found = evaluate(config, console.report)
    console.stop_progress()
    rows = [["as given", f"{found.loss:.4f}", f"{found.perplexity:.3f}"]]
    if found.base_loss is not None and found.base_perplexity is not None:
        rows.append(["its base", f"{found.base_loss:.4f}", f"{found.base_perplexity:.3f}"])
    console.table(f"over {found.tokens:,} trained tokens", ["model", "loss", "perplexity"], rows)
    console.result(vars(found))
