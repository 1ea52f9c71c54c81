"""Does lorakit learn as a plain loop of transformers and peft does, on real weights, whatever the base is kept in and
whichever engine computes it?

    python -m tests.bench.learning --model MODEL --train train.jsonl --test test.jsonl [--steps 200] [WAY …]

Every way trains on the same blocks for as many steps, from the same start; the loss over the held-out blocks is written
as a table and, with `--picture`, drawn. Ways:

    plain                     a loop of transformers and peft, as their documentation shows it
    standard-KIND, fast-KIND  `lorakit train` with that engine over a base in KIND (none, fp8, int8, nf4)
    …-nearest                 with --no-calibrate

Of each adapter of lorakit's follow the held-out loss of the model merged in 16 bits (`lorakit merge`, `lorakit
evaluate`), and, for one batch and the adapter of standard-none, the cosine between LoRA's gradients over this base and
over that in 16 bits: of all layers, and the least of a layer. `--jobs` runs ways side by side, on several GPUs in turn.

The plain loop uses AdamW, a linear schedule with warm-up and labels of -100 where nothing is learned. Documents of a
block don't see each other by their positions alone, as transformers does it. It draws its own LoRA matrices.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WAYS = (
    *("plain", "standard-none", "standard-int8", "standard-nf4-nearest", "fast-none", "fast-fp8", "fast-fp8-nearest"),
    *("fast-int8", "fast-nf4", "fast-nf4-nearest"),
)
REFERENCE = "standard-none"


def plain(asked: argparse.Namespace, blocks_path: Path) -> dict[str, Any]:
    """(step, held-out loss) of the plain loop."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    from lorakit.core.blocks import VALIDATION, Blocks
    from lorakit.core.training.schedule import Schedule

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype).to(device)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.learning_rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, -(-3 * asked.steps // 100), asked.steps)
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
    return {"curve": found}


def train(asked: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """`lorakit train`, `merge` and `evaluate`: the curve, the loss of the merged model, what was said of the base."""
    run, merged = folder / way, folder / f"{way}-merged"
    options = [*way_options(way), "--max-steps", asked.steps, "--eval-steps", asked.every]
    options += ["--effective-batch-size", asked.batch, "--batch-size", asked.batch, "--no-gradient-checkpointing"]
    options += ["--learning-rate", asked.learning_rate]
    blocks = ("--blocks", folder / "blocks")
    said = lorakit("train", "--model", asked.model, *blocks, "--output", run, *options)[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lorakit("merge", run, "--output", merged)
    on_exact = lorakit("evaluate", merged, *blocks, "--dtype", "bf16" if on_gpu() else "fp32")[0]["loss"]
    curve = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    return {"curve": curve, "merged": on_exact, "said": [line for line in said.splitlines() if "base in " in line]}


def way_options(way: str) -> list[object]:
    engine, kind, *more = way.split("-")
    return ["--engine", engine, "--quantize", kind, *(["--no-calibrate"] if more else [])]


def lorakit(*arguments: object) -> tuple[Any, str]:
    """What a command answers, and says on the way."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout), ran.stderr


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gradients(asked: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """LoRA's gradients of one batch, with the reference's adapter, over this way's base; as a file."""
    import torch
    from safetensors.torch import save_file

    from lorakit.core.adapters import open_adapter
    from lorakit.core.attention import apply
    from lorakit.core.blocks import Blocks
    from lorakit.core.evaluation import loss_sum
    from lorakit.core.fast.engine import make_fast
    from lorakit.core.model import autocast, continue_lora, load_base, make_ready, trained_parameters
    from lorakit.core.training.loop import calibration_on
    from lorakit.core.weights import open_weights

    device = torch.device("cuda" if on_gpu() else "cpu")
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    engine, kind, *nearest = way.split("-")
    blocks = Blocks(folder / "blocks")
    calibrates = kind in ("fp8", "nf4") and not nearest
    calibration = calibration_on(blocks, compensates=True) if calibrates else None
    is_fast = engine == "fast"
    base = load_base(open_weights(Path(asked.model)), dtype, device, kind, fast=is_fast, calibration=calibration)
    apply(base, "varlen")
    model = continue_lora(base, open_adapter(folder / REFERENCE, lambda _: None), asked.model)
    make_ready(model, dtype, checkpointing=False)
    if is_fast:
        make_fast(model, kind)
    batch = blocks.batch(range(len(blocks) - asked.batch, len(blocks)))
    with autocast(device, dtype):
        loss = loss_sum(model, batch)
    (loss / batch.trained_tokens).backward()
    found = {name: p.grad.float().cpu() for name, p in trained_parameters(model).items() if p.grad is not None}
    save_file(found, folder / f"{way}.gradients")
    return {}


def cosines(folder: Path, way: str) -> tuple[float, float]:
    """Between the gradients of a way and of the reference: of all together, and the least of a decoder layer's."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / f"{name}.gradients") for name in (way, REFERENCE))
    layers: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for name, gradient in ours.items():
        pair = layers.setdefault(name.partition(".layers.")[2].partition(".")[0], ([], []))
        pair[0].append(gradient.flatten())
        pair[1].append(theirs[name].flatten())
    flat = [(torch.cat(one).double(), torch.cat(other).double()) for one, other in layers.values()]
    of_each = [torch.nn.functional.cosine_similarity(one, other, dim=0).item() for one, other in flat]
    whole = [torch.cat(side) for side in zip(*flat, strict=True)]
    return torch.nn.functional.cosine_similarity(whole[0], whole[1], dim=0).item(), min(of_each)


def by_itself(asked: argparse.Namespace, part: str, way: str, folder: Path, number: int) -> Any:
    """A part of a way's work in a process of its own, on the GPU whose turn it is."""
    rest = ["--model", asked.model, "--steps", asked.steps, "--batch", asked.batch, "--every", asked.every]
    rest += ["--learning-rate", asked.learning_rate, "--part", part, "--folder", folder, way]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % asked.gpus)} if asked.gpus else dict(os.environ)
    command = [sys.executable, "-m", "tests.bench.learning", *map(str, rest)]
    began = time.monotonic()
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if ran.returncode:
        say(f"{way} {part} failed: {ran.stderr[-1500:]}")
        return None
    say(f"{way} {part}: {time.monotonic() - began:.0f} s")
    return json.loads(ran.stdout.splitlines()[-1])


def picture(results: dict[str, dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for way, found in results.items():
        axes.plot(*zip(*found["curve"], strict=True), label=f"{way} {found['curve'][-1][1]:.4f}", linewidth=1.2)
    steps = min(len(found["curve"]) for found in results.values())
    after = [
        found["curve"][min(2, steps - 1)][1] for found in results.values()
    ]  # how all begin would hide how they end
    axes.set(xlabel="step", ylabel="held-out loss", ylim=(None, max(after)))
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=WAYS, metavar="WAY")
    parser.add_argument("--model", required=True)
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--columns", default="prompt=question,completion=answer")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="blocks in a step")
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to take turns on; 0: as it is")
    parser.add_argument("--picture", help="file for an SVG of the curves")
    parser.add_argument("--output", help="file for the results as JSON")
    parser.add_argument("--part", choices=["train", "gradients"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        (way,) = asked.ways
        work = gradients if asked.part == "gradients" else train
        found = plain(asked, asked.folder / "blocks") if way == "plain" else work(asked, way, asked.folder)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(asked.jobs) as pool:
        folder = Path(name)
        data = (asked.train, "--validation-dataset", asked.test, "--columns", asked.columns)
        shape = ("--tokenizer", asked.model, "--block-size", asked.block_size)
        lorakit("prepare", *data, *shape, "--output", folder / "blocks")
        ways = list(asked.ways)

        def each(part: str, of: list[str]) -> dict[str, Any]:
            found = pool.map(lambda turn: by_itself(asked, part, turn[1], folder, turn[0]), enumerate(of))
            return {way: one for way, one in zip(of, found, strict=True) if one is not None}

        results = each("train", ways)
        others = [way for way in results if way != "plain"] if REFERENCE in results else []
        compared = {way: cosines(folder, way) for way in each("gradients", others)}
    for way, one in results.items():
        one["cosine"] = compared.get(way)
    if asked.output:
        Path(asked.output).write_text(json.dumps(results), encoding="utf-8")
    if asked.picture:
        picture(results, asked.picture)
    steps = [step for step, _ in results[ways[0]]["curve"]]
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    lines = [f"| way | {' | '.join(f'step {step}' for step in shown)} | merged | cosine | least of a layer |"]
    lines += ["|---" * (len(shown) + 4) + "|"]
    for way, one in results.items():
        losses = " | ".join(f"{dict(map(tuple, one['curve']))[step]:.4f}" for step in shown)
        whole, least = (f"{value:.4f}" for value in one["cosine"]) if one["cosine"] else ("", "")
        merged = f"{one['merged']:.4f}" if "merged" in one else ""
        lines.append(f"| {way} | {losses} | {merged} | {whole} | {least} |")
    for one in results.values():
        lines += one.get("said", [])
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
