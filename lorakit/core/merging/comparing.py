"""Whole models compared: the merged one's answers, and losses, against those of base + adapter. Needs torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from lorakit.core.attention import apply as apply_attention
from lorakit.core.blocks import VALIDATION, Blocks
from lorakit.core.errors import ArtifactDamaged, LorakitError
from lorakit.core.evaluation import mean_loss
from lorakit.core.events import Notice, Report
from lorakit.core.floats import Scratch
from lorakit.core.merging.apply import Computed
from lorakit.core.merging.plan import Plan, Rounding, Target, make_plan
from lorakit.core.model import load_base, pick_device, pick_dtype, wrap
from lorakit.core.tokenization import load_tokenizer, quiet_libraries
from lorakit.core.weights import open_weights

_TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 5e-3, "BF16": 5e-2}
"""Largest difference of a logit, relative to the largest logit, that rounding the weights once can explain."""

_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Question: A train leaves at 9:40 and arrives at 12:15. How long is the journey?\nAnswer:",
    "Der schnelle braune Fuchs springt über den faulen Hund. 敏捷的棕色狐狸跳过了懒狗。",
)


def compare(
    plan: Plan, folder: Path, trained: Rounding | None, blocks: Sequence[Path], report: Report
) -> dict[str, Any]:
    """The largest difference between logits of the merged model in `folder` and of base + adapters, in fp32; and where
    the base was quantized in training (`trained`), the losses over held-out blocks.

    Raises ArtifactDamaged where the logits differ by more than rounding the weights once explains.
    """
    facts: dict[str, Any] = {"logit_difference": _logit_difference(plan, folder, report)}
    if trained is not None:
        facts["losses"] = _losses(plan, folder, trained, blocks, report)
    return facts


def _logit_difference(plan: Plan, folder: Path, report: Report) -> float:
    report(Notice("comparing the answers of the merged model with those of base + adapter"))
    device = pick_device()
    prompts = _prompts(plan, folder)
    merged = _logits(load_base(open_weights(folder), torch.float32, device), prompts)
    expected = _logits(_adapted(plan, torch.float32), prompts)
    pairs = list(zip(merged, expected, strict=True))
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    largest = max(float(other.abs().max()) for _, other in pairs)
    allowed = max(_TOLERANCE[target.dtype] for target in plan.targets.values() if target.dtype in _TOLERANCE)
    if not math.isfinite(difference) or difference > allowed * max(1.0, largest):
        raise ArtifactDamaged(
            f"found merged logits that differ by {difference:.3g} from base + adapter's, "
            f"need ≤ {allowed * max(1.0, largest):.3g}",
            "nothing was put in place; report this with the adapter's adapter_config.json",
        )
    return difference


def _prompts(plan: Plan, folder: Path) -> list[torch.Tensor]:
    """A few real texts as token ids; any ids where there is no tokenizer."""
    try:
        tokenizer = load_tokenizer(folder)
        return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in _PROMPTS]
    except LorakitError:
        vocabulary = int(plan.config["vocab_size"])
        return [torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))]


def _logits(model: Any, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with quiet_libraries(), torch.inference_mode():
        ids = [prompt.to(model.device) for prompt in prompts]
        return [model(input_ids=prompt, use_cache=False).logits.float() for prompt in ids]


def _adapted(plan: Plan, dtype: torch.dtype) -> PeftModel:
    """The base, rounded as the plan says, with the adapters by peft itself."""
    base = load_base(plan.base, dtype, pick_device())
    rounded = [target for target in plan.targets.values() if target.rounding is not None]
    _put(base, {target.name: Target(**{**vars(target), "terms": ()}) for target in rounded})
    return _with_adapters(base, plan)


def _with_adapters(base: PreTrainedModel, plan: Plan) -> PeftModel:
    first, *others = plan.adapters
    model = wrap(base, first.adapter)
    with quiet_libraries():
        for number, each in enumerate(others):
            model.load_adapter(str(each.adapter.folder), adapter_name=f"{number}", local_files_only=True)
        names = ["default", *map(str, range(len(others)))]
        if others:
            model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, each in zip(names, plan.adapters, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= each.weight
    return model.eval()


def _put(model: PreTrainedModel, targets: Mapping[str, Target]) -> None:
    """Give parameters of a model the numbers that a plan says."""
    parameters, scratch = dict(model.named_parameters()), Scratch()
    for name, target in targets.items():
        computed = Computed(target)
        for start, stop in target.source.chunks():
            rows = torch.from_numpy(computed.rows(start, stop, scratch).reshape(stop - start, *target.shape[1:]))
            parameters[name].data[start:stop] = rows.to(parameters[name].dtype)


def _losses(
    plan: Plan, folder: Path, trained: Rounding, blocks: Sequence[Path], report: Report
) -> dict[str, float] | None:
    """Mean losses per trained token: base + adapter as trained, and merged both ways; None without held-out blocks."""
    held_out = _held_out(plan, blocks)
    if held_out is None:
        report(Notice("no held-out blocks, so no losses: give some with --blocks"))
        return None
    device, dtype = pick_device(), pick_dtype(trained.dtype, pick_device())
    as_trained = _with_adapters(load_base(plan.base, dtype, device, trained.kind), plan)
    losses = {f"base in {trained.kind} + adapter": _loss(as_trained, held_out, report)}
    del as_trained
    other = None if plan.rounding else trained
    merged = load_base(open_weights(folder), dtype, device)
    here, there = ("as-trained", "16bit") if plan.rounding else ("16bit", "as-trained")
    losses[f"merged, {here}"] = _loss(merged, held_out, report)
    again = make_plan(plan.base, plan.adapters, plan.dtype, other)
    _put(merged, {name: target for name, target in again.targets.items() if target != plan.targets[name]})
    losses[f"merged, {there}"] = _loss(merged, held_out, report)
    return losses


def _held_out(plan: Plan, blocks: Sequence[Path]) -> Blocks | None:
    """The held-out part of these blocks, or all of them where they have none; left out, that of the training."""
    artifact = plan.adapters[0].adapter.artifact
    paths = [Path(path) for path in blocks or (artifact.config.get("blocks", []) if artifact is not None else [])]
    try:
        found = Blocks(tuple(paths), VALIDATION) if paths else None
        if found is not None and not len(found):
            found = Blocks(tuple(paths)) if blocks else None
    except LorakitError:
        if blocks:
            raise
        return None
    return found


def _loss(model: Any, blocks: Blocks, report: Report) -> float:
    apply_attention(model, "auto")
    return mean_loss(model, blocks, 1, report, "measuring the loss")[0]
