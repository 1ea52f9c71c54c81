"""`lorakit evaluate`: loss, perplexity and exact match, the base beside the adapter."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import EvaluateConfig
    from lorakit.core.evaluation import Measured


def run(config: "EvaluateConfig", console: "Console") -> None:
    """Measure loss and perplexity over trained tokens, and answers to rows; for an adapter, its base's beside it.

    Example: lorakit evaluate runs/mine --dataset test.jsonl --exact-match --answer-pattern "#### (.*)"
    """
    from lorakit.core.evaluation import evaluate

    found = evaluate(config, console.report)
    console.stop_progress()
    measured = {"as given": found.model, **({"its base": found.base} if found.base else {})}
    rows = [[name, *_cells(one)] for name, one in measured.items()]
    if found.loss_change is not None:
        rows.append(["change", f"{found.loss_change:+.4f}", _range(found.loss_change_interval, "+.4f")])
    of_rows = f", and {found.rows:,} rows" if found.rows else ""
    title = f"over {found.tokens:,} trained tokens of {found.blocks:,} blocks{of_rows}, with 95 % intervals"
    header = ["model", "loss", "", "perplexity", "", *(["exact match", ""] if found.rows else [])]
    console.table(title, header, [[*row, *[""] * (len(header) - len(row))] for row in rows])
    console.result(found.as_json())


def _cells(one: "Measured") -> list[str]:
    cells = [f"{one.loss:.4f}", _range(one.loss_interval, ".4f")]
    cells += [f"{one.perplexity:.3f}", _range(one.perplexity_interval, ".3f")]
    if one.exact_match is not None:
        cells += [f"{one.exact_match:.1%}", _range(one.exact_match_interval, ".1%")]
    return cells


def _range(interval: tuple[float, float] | None, form: str) -> str:
    return f"{interval[0]:{form}} … {interval[1]:{form}}" if interval else "one block has none"
