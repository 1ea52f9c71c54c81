"""How fast training steps are, lorakit's engines beside peft as people run it: `python -m tests.bench.train` on a GPU.

Every variant trains the same model of real shape with random weights on full blocks of random tokens, in this one
process, one after the other: tokens/s is the median of the timed steps after the warm-up, each synchronized, peak the
most that torch allocated. `--tiny` runs the same code on the CPU. Variants:

    fast-KIND, fast-KIND-ck       lorakit's fast engine over a base in KIND (none, fp8, int8, nf4); ck: checkpointing
    standard-KIND-ck              lorakit's standard engine
    peft                          transformers + peft, bf16, bf16 adapters, no checkpointing: the fastest plain way
    peft-ck, peft-nf4-ck          with checkpointing and fp32 adapters under autocast, as trainers run it
    qlora                         peft-nf4-ck after peft's prepare_model_for_kbit_training, as its examples have it:
                                  norms, embeddings and head in fp32
    liger                         peft with Liger's kernels, each layer compiled
    seed                          LLM.int8, eager attention, fp16 autocast, q, k, v and o, as the popular script had it
"""

import argparse
import gc
import json
import statistics
import sys
import time
from typing import Any

from lorakit.core.environment import let_gpu_memory_grow

let_gpu_memory_grow()  # before torch asks

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lorakit.core.attention import apply  # noqa: E402
from lorakit.core.model import autocast, checkpoint_activations, compile_layers  # noqa: E402
from lorakit.core.shapes import shape_of  # noqa: E402
from tests.bench.memory import RandomBlocks, Row, config_for, plan, random_base, training_run  # noqa: E402

VARIANTS = (
    *("fast-fp8", "peft", "fast-fp8-ck", "peft-ck", "fast-nf4", "peft-nf4-ck", "liger", "fast-none", "fast-int8"),
    *("fast-nf4-ck", "standard-none-ck", "standard-nf4-ck", "standard-int8-ck", "qlora", "seed"),
)


class FullBlocks(RandomBlocks):
    """Blocks of one document each, as long as what the others train on."""

    def batch(self, indices: list[int]) -> Any:
        batch = super().batch(indices)
        batch.positions_BT[:] = np.arange(self.size)
        batch.trained_BT[:] = batch.positions_BT > 0
        return batch


def ours(variant: str, asked: argparse.Namespace, device: torch.device) -> tuple[Any, int]:
    """A function that does one training step of lorakit's, and what it is planned to take."""
    engine, quantize = variant.split("-")[:2]
    row = Row(
        asked.model, quantize, asked.block, asked.batch, variant.endswith("-ck"), False, asked.rank, engine=engine
    )
    base = random_base(row, device)
    apply(base, "varlen")
    run = training_run(row, base, device)
    run.blocks = FullBlocks(row, base.config.vocab_size)
    return run._step, plan(row, shape_of(row.model, config_for(row)), device).allocated


def theirs(variant: str, asked: argparse.Namespace, device: torch.device) -> Any:
    """A function that does one training step as people write it with transformers and peft."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    seed, usual = variant == "seed", variant.endswith("-ck") or variant in ("qlora", "seed")
    quantize = "int8" if seed else "nf4" if variant in ("peft-nf4-ck", "qlora") else "none"
    if variant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True)
    row = Row(asked.model, quantize, asked.block, asked.batch, usual, True, asked.rank)
    base = random_base(row, device)
    base.set_attn_implementation("eager" if seed else "sdpa")
    if variant == "qlora":
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # switched on below
    targets: Any = ["q_proj", "k_proj", "v_proj", "o_proj"] if seed else "all-linear"
    lora = LoraConfig(
        r=asked.rank, lora_alpha=2 * asked.rank, lora_dropout=0.05 if seed else 0.0, target_modules=targets
    )
    lora.task_type = "CAUSAL_LM"
    model = get_peft_model(base, lora, autocast_adapter_dtype=usual)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.float32 if usual else torch.bfloat16)
    if usual:
        checkpoint_activations(model)
    model.train()
    if variant == "liger":
        compile_layers(model)
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    dtype = torch.float16 if seed else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    size = (asked.batch, asked.block)
    vocabulary = base.config.vocab_size

    def step() -> None:
        ids = torch.randint(0, vocabulary, size, device=device, generator=generator)
        with autocast(device, dtype if usual else torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(step: Any, warm: int, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step."""
    found = []
    for number in range(warm + steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number == warm and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[warm:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=VARIANTS, metavar="VARIANT")
    parser.add_argument("--model", default="llama-2-7b", help="a short name of a shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8, help="blocks in a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=500, help="start no variant after so many seconds")
    parser.add_argument("--output", help="file for a JSON line a variant")
    parser.add_argument("--profile", action="store_true", help="list what the GPU does in a step, after each variant")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    asked = parser.parse_args()
    if asked.tiny:
        asked.model, asked.block, asked.batch, asked.steps = "tiny", 64, 2, 2
    device, began = torch.device("cpu" if asked.tiny else "cuda"), time.monotonic()
    name = "cpu" if asked.tiny else torch.cuda.get_device_name()
    say(f"torch {torch.__version__}, {name}; {asked.model}, rank {asked.rank}, {asked.batch} × {asked.block} tokens")
    for variant in asked.variants:
        if time.monotonic() - began > asked.limit:
            say(f"{variant:<18} left out: no time")
            continue
        planned = None
        try:
            if variant.startswith(("fast", "standard")):
                step, planned = ours(variant, asked, device)
            else:
                step = theirs(variant, asked, device)
            seconds = timed(step, 3, 3 if variant == "seed" else asked.steps, device)
        except Exception as error:
            say(f"{variant:<18} failed: {type(error).__name__} {str(error)[:300]}")
            step = None
            clean()
            continue
        tokens = asked.batch * asked.block
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        median = statistics.median(seconds)
        plan_text = f"planned {planned / 2**30:6.2f}" if planned is not None else ""
        spread = f"{1000 * median:7.0f} ms ({1000 * min(seconds):.0f}-{1000 * max(seconds):.0f})"
        say(f"{variant:<18} {tokens / median:8,.0f} tokens/s {spread}, {peak:6.2f} GiB {plan_text}")
        if asked.profile and device.type == "cuda":
            with torch.profiler.profile() as profile:
                timed(step, 0, 1, device)
            show_kernels(profile)
        if asked.output:
            facts = {"variant": variant, "device": name, **vars(asked), "seconds": seconds, "peak_gib": peak}
            with open(asked.output, "a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "variants": None, "planned": planned}) + "\n")
        del step
        clean()
    return 0


def show_kernels(profile: torch.profiler.profile) -> None:
    """What the GPU does in a step, the longest first, and how long it does nothing."""
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    idle, until = [], spans[0][1]
    for start, end in spans:
        idle.append(max(0.0, start - until))
        until = max(until, end)
    longest = ", ".join(f"{gap / 1000:.2f}" for gap in sorted(idle)[: -len(idle) // 2 : -1][:5])
    say(f"{(until - spans[0][0]) / 1000:.1f} ms, idle {sum(idle) / 1000:.1f} of them, at most {longest} at a time")
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name, []).append(event.time_range.elapsed_us())
    for name, times in sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[:40]:
        say(f"{sum(times) / 1000:8.2f} ms  {len(times):5} × {statistics.median(times):8.1f} us  {name[:90]}")


def clean() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
