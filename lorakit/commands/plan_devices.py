"""`lorakit plan-devices`: a model's name + devices + settings → whether a run fits, on which devices, or what would."""

from typing import TYPE_CHECKING

from lorakit.core.errors import OutOfMemory, shown_bytes

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import PlanDevicesConfig
    from lorakit.core.placement import Load, Plan


def run(config: "PlanDevicesConfig", console: "Console") -> None:
    """Say before a run whether it fits, on which devices, and what to change where it doesn't. No weights are needed.

    Example: lorakit plan-devices llama-65b --gpus 8x24GiB --quantize int8 --block-size 600 --batch-size 2
    """
    from lorakit.core import doctor, planning

    if not (config.devices.gpus or config.devices.cpu) or config.plan.probe:  # it is this machine that is asked for
        doctor.require_ready("plan-devices", console.report)
    planned = planning.plan_devices(config, console.report)
    plan, work = planned.plan, planned.plan.work
    count, unit = (
        (plan.shape.parameters / 1e6, "M") if plan.shape.parameters < 1e9 else (plan.shape.parameters / 1e9, "B")
    )
    settings = f"{work.quantize}/{work.dtype} base, rank {work.rank}, {work.batch_size} × {work.block_size:,} tokens"
    console.say(f"{plan.shape.name}: {count:.2f} {unit} parameters, {settings}, {plan.parallel}")
    console.bars([(load.name, _parts(load), f"{load.used:>12}") for load in plan.loads])
    console.say("w weights, L LoRA with gradients and optimizer, a activations and loss, c CUDA or Python, allocator")
    if planned.compared:
        header = ("strategy", "base", "fits", "fullest device", "", "on H200s")
        console.table("compared:", header, [_row(other) for other in planned.compared])
    if planned.probed:
        took = f"{planned.probed.factor:.1%} of what is counted"
        console.say(f"Probed: the step on one layer took {took}; corrected by that.")
    fullest, offloads = max(plan.loads, key=lambda load: load.share), len(plan.computed_on)
    offloaded = f"{offloads} of {plan.shape.num_layers} layers lie in CPU memory. " if offloads else ""
    console.say(f"{offloaded}{'It fits' if plan.fits else 'It does not fit'}: {fullest.name} needs {fullest.used}.")
    for change in planned.suggestions:
        console.say(f"With {change.option} it would: {change.change}, {shown_bytes(change.plan.peak_bytes)}.")
    console.result(planned.as_json())
    if not plan.fits:
        changes = (f"add {change.option}" for change in planned.suggestions)
        hint = next(changes, "no single change is enough: combine some")
        raise OutOfMemory(f"{plan.shape.name}: found a need of {fullest.used} on {fullest.name}, need more", hint)
    console.hint(planning.next_command(config, plan))


def _parts(load: "Load") -> dict[str, float]:
    b = load.bytes
    sizes = b.weights, b.lora + b.gradients + b.optimizer, b.activations + b.loss, b.workspace + b.context + b.slack
    return {name: size / load.budget_bytes for name, size in zip(("w", "L", "a", "c"), sizes, strict=True)}


def _row(plan: "Plan") -> list[str]:
    speed = f"≈ {plan.tokens_per_second:,.0f} tokens/s" if plan.tokens_per_second else ""
    figures = [shown_bytes(plan.peak_bytes), f"{plan.share:.0%}", speed]
    return [plan.parallel, plan.work.quantize, "yes" if plan.fits else "no", *figures]
