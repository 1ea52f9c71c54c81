"""The same kills for transformers' own Trainer, beside P1: does it go on by itself from what is there?"""

import shutil
import signal
from functools import partial
from pathlib import Path

from tests.faults.loop import KILL, Shim
from tests.faults.server import forked, said_by, spread


def trained(inputs: Path, folder: Path, steps: int, *, resume: bool, strike_at: int | None = None) -> int:
    """LoRA by Trainer, a checkpoint a step; struck at a call of the second save. Returns that save's calls."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(inputs / "tiny"), LoraConfig(r=4, task_type="CAUSAL_LM")
    )
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(8)]
    how = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "no", "report_to": []}
    more = {"per_device_train_batch_size": 1, "use_cpu": True, "disable_tqdm": True, "max_steps": steps}
    trainer = Trainer(model, TrainingArguments(output_dir=str(folder), **how, **more), train_dataset=rows)
    shim, save, calls = Shim(), trainer._save_checkpoint, [0]

    def saved(*arguments: object) -> None:
        if trainer.state.global_step == 2 and strike_at is not None:
            shim.arm(folder, strike_at, KILL)
        save(*arguments)
        calls[0] = shim.calls

    trainer._save_checkpoint = saved
    trainer.train(resume_from_checkpoint=resume or None)
    return calls[0]


def goes_on(inputs: Path, whole: Path, call: int) -> bool:
    """Killed at a call of its second save, with the first one whole beside it: whether the next run finishes."""
    folder = whole.with_name(f"trainer-{call}")
    shutil.copytree(whole, folder)
    log = folder.with_suffix(".log")

    def body(strike_at: int | None) -> int:
        trained(inputs, folder, 2, resume=True, strike_at=strike_at)
        return 0

    if forked(partial(body, call), log) != -signal.SIGKILL:
        raise RuntimeError(log.read_text()[-2000:])
    code = forked(partial(body, None), log)
    shutil.rmtree(folder)
    return code == 0


def compared(work: Path, jobs: int) -> str:
    """How many kills stop it, in a sentence."""
    import transformers

    inputs, whole = work / "inputs", work / "trainer"
    said_by(partial(trained, inputs, whole, 1, resume=False), work / "trainer.log")
    counted = work / "trainer-counted"
    shutil.copytree(whole, counted)
    calls = said_by(partial(trained, inputs, counted, 2, resume=True, strike_at=0), work / "trainer.log")
    went_on = spread(partial(goes_on, inputs, whole), range(1, calls + 1), jobs)
    stopped = went_on.count(False)
    return (
        f"Beside P1: transformers' Trainer {transformers.__version__}, killed at each of the {calls} calls of its "
        f"second save, doesn't go on by itself {stopped} of {calls} times, though the first checkpoint is whole."
    )
