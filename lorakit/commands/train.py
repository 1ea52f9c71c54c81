"""`lorakit train`: blocks + a base model → an adapter."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import TrainConfig


def run(config: "TrainConfig", console: "Console") -> None:
    """Train a LoRA adapter on blocks over a frozen base model.

    Stopped or killed, it goes on when the same command is run again.

    Example: lorakit train --model ./model --blocks blocks --output runs/mine
    """
    from lorakit.core import artifacts, doctor, environment
    from lorakit.signals import Noted

    worker = environment.worker()
    if worker is not None:
        environment.stop_with_parent()
        console = console.of_rank(worker.rank)
    if worker is None or worker.local_rank == 0:  # once a machine
        doctor.require_ready("train", console.report)
    for folder in config.data.blocks if worker is None else ():  # before what takes seconds to import
        artifacts.require_kind(folder, "blocks")
    from lorakit.core import accelerate_config, launching  # what they import may be what isn't there
    from lorakit.core.preparing import with_blocks

    config = launching.in_world(accelerate_config.translated(config, console.report), worker)
    config = with_blocks(config, console.report)
    if worker is None and launching.starts_workers(config):
        raise SystemExit(launching.launch_command("train", config, console.options, console.report))
    blocks = config.data.blocks
    target = config.output.output or Path("runs").absolute() / f"{Path(config.model.model).name}-{blocks[0].name}"
    with Noted(worker=worker is not None) as signals:
        from lorakit.core.training import train  # libraries catch what a signal would raise while they are imported

        signals.stop_if_asked()
        trained = train(config, target, blocks, console.report, lambda: signals.asked)
    planned = f", {trained.planned_bytes / 2**30:.2f} planned for tensors" if trained.planned_bytes else ""
    best = trained.best_step
    held_out = {"held-out loss": f"{trained.eval_loss:.4f}, lowest, after step {best:,}"} if best is not None else {}
    console.summary(
        {
            "adapter": f"{trained.path}{' (already done)' if trained.already_done else ''}",
            "loss": f"{trained.first_loss:.4f} → {trained.last_loss:.4f} in {trained.steps:,} steps",
            **held_out,
            "speed": f"{trained.tokens_per_second:,.0f} tokens/s, {trained.seconds:.1f} s",
            "peak memory": f"{trained.peak_bytes / 2**30:.2f} GiB{planned}",
        }
    )
    console.result(vars(trained))
    console.hint(shlex.join(["lorakit", "merge", str(trained.path)]))
