"""`lorakit train`: blocks + a base model → an adapter."""

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.console import Console, Signals

if TYPE_CHECKING:
    from lorakit.core.config import TrainConfig


def run(config: "TrainConfig", console: Console) -> None:
    """Train a LoRA adapter on blocks over a frozen base model.

    Stopped or killed, it goes on when the same command is run again.

    Example: lorakit train --model ./model --blocks blocks --output runs/mine
    """
    from lorakit.core.config import DatasetSection, OutputSection, PrepareConfig, PreviewSection, SplitSection
    from lorakit.core.preparing import prepare
    from lorakit.core.training import train

    blocks = config.data.blocks
    if config.data.dataset:
        request = PrepareConfig(
            data=DatasetSection(dataset=config.data.dataset, tokenizer=config.model.model),
            tokens=config.tokens,
            rows=config.rows,
            held_out=SplitSection(seed=config.batch.seed),
            packing=config.packing,
            output=OutputSection(),
            preview=PreviewSection(),
        )
        blocks = (prepare(request, console.report).path,)
    target = config.output.output or Path("runs").absolute() / f"{Path(config.model.model).name}-{blocks[0].name}"
    with Signals() as signals:
        trained = train(config, target, blocks, console.report, lambda: signals.asked)
    planned = f", {trained.planned_bytes / 2**30:.2f} planned for tensors" if trained.planned_bytes else ""
    console.summary(
        {
            "adapter": f"{trained.path}{' (already done)' if trained.already_done else ''}",
            "loss": f"{trained.first_loss:.4f} → {trained.last_loss:.4f} in {trained.steps:,} steps",
            "speed": f"{trained.tokens_per_second:,.0f} tokens/s, {trained.seconds:.1f} s",
            "peak memory": f"{trained.peak_bytes / 2**30:.2f} GiB{planned}",
        }
    )
    console.result(vars(trained))
    console.hint(f"lorakit merge {trained.path}")
