"""Does lorakit learn as a plain loop of transformers and peft does? Both train on the same blocks for as many steps,
and the loss over the held-out blocks is printed side by side.

    python -m tests.bench.learning --model MODEL --train train.jsonl --test test.jsonl --steps 200

The plain loop is what their documentation shows: get_peft_model, AdamW, a linear schedule with warm-up, labels of -100
where nothing is learned, one block after the other without packing tricks (documents of a block don't see each other by
their positions alone, as transformers does it). It draws its own LoRA matrices.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from lorakit.core.blocks import VALIDATION, Blocks
from lorakit.core.training.schedule import Schedule


def lorakit(*arguments: object) -> Any:
    command = [sys.executable, "-m", "lorakit", *map(str, arguments), "--quiet", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(ran.stderr)
    return json.loads(ran.stdout)


def plain(model_path: str, blocks_path: Path, asked: argparse.Namespace) -> list[tuple[int, float]]:
    """(step, held-out loss) of the plain loop."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.learning_rate, weight_decay=0.0)
    warmup = -(-3 * asked.steps // 100)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, asked.steps)
    blocks, held_out = Blocks(blocks_path), Blocks(blocks_path, VALIDATION)
    schedule = Schedule(len(blocks), asked.batch, asked.steps * asked.batch, 0)

    def loss_of(part: Blocks, index: int) -> tuple[torch.Tensor, int]:
        batch = part.batch([index])
        ids = torch.from_numpy(batch.ids_BT).to(device)
        labels = torch.where(torch.from_numpy(batch.trained_BT).to(device), ids, -100)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            positions = torch.from_numpy(batch.positions_BT).to(device)
            # with a cache transformers would let the documents of a block see each other
            output = model(input_ids=ids, position_ids=positions, use_cache=False)
        shifted = output.logits[:, :-1].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(shifted, labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
        return loss, batch.trained_tokens

    def evaluated() -> float:
        model.eval()
        with torch.no_grad():
            parts = [loss_of(held_out, index) for index in range(len(held_out))]
        model.train()
        return sum(loss.item() for loss, _ in parts) / sum(tokens for _, tokens in parts)

    found = [(0, evaluated())]
    for step in range(asked.steps):
        indices = schedule.blocks_of_step(step)
        tokens = sum(blocks.batch([index]).trained_tokens for index in indices)
        for index in indices:
            (loss_of(blocks, index)[0] / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % asked.every == 0 or step + 1 == asked.steps:
            found.append((step + 1, evaluated()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--columns", default="prompt=question,completion=answer")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        blocks, run = Path(folder) / "blocks", Path(folder) / "run"
        data = (asked.train, "--validation-dataset", asked.test, "--columns", asked.columns)
        lorakit("prepare", *data, "--tokenizer", asked.model, "--block-size", asked.block_size, "--output", blocks)
        steps = ("--max-steps", asked.steps, "--eval-steps", asked.every, "--effective-batch-size", asked.batch)
        began = time.monotonic()
        rate = ("--learning-rate", asked.learning_rate)
        lorakit("train", "--model", asked.model, "--blocks", blocks, "--output", run, *steps, *rate)
        between = time.monotonic()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ours = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        theirs = plain(asked.model, blocks, asked)
        ended = time.monotonic()
    lines = ["| step | lorakit | transformers + peft |", "|---|---|---|"]
    lines += [f"| {step} | {our:.4f} | {their:.4f} |" for (step, our), (_, their) in zip(ours, theirs, strict=True)]
    seconds = f"seconds: {between - began:.0f} and {ended - between:.0f}, start and evaluations included"
    sys.stdout.write("\n".join([*lines, seconds, ""]))


if __name__ == "__main__":
    main()
