"""Base + adapters → one ordinary model: plan, check everything, apply row by row, verify, put in place.

W' = W + scale · B·A in fp32, rounded once to the type that is stored. Tensors without a change keep their bytes.

plan.py says what each tensor of the merged model will be, apply.py makes the bytes, verifying.py reads rows back from
the disk; none of them needs torch, and none holds more than a few chunks of a tensor, however large the model is.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core import adapters, artifacts, disk
from lorakit.core.adapters import Adapter, base_folder, match, open_adapter
from lorakit.core.config import MergeConfig
from lorakit.core.errors import InputRefused, UsageError
from lorakit.core.events import Notice, Report
from lorakit.core.floats import NAMES
from lorakit.core.hub import model_folder, push_folder
from lorakit.core.merging.apply import shards
from lorakit.core.merging.card import model_card, tokenizer_files
from lorakit.core.merging.plan import Plan, Rounding, Weighted, make_plan
from lorakit.core.merging.verifying import verify_rows
from lorakit.core.untrusted import MAX_SETTINGS_BYTES, read_small
from lorakit.core.weights import INDEX, Weights, open_weights

_MANIFEST_BYTES = 2**18


@dataclass(frozen=True)
class Merged:
    """The result of `merge`. `max_difference` is the largest between a stored number and its exact value, over rows of
    every changed tensor; `logit_difference` that between logits of merged and base + adapter (None: not asked for);
    `losses` those of `--verify full` over held-out blocks, by what was measured."""

    path: Path
    tensors: int
    merged_tensors: int
    max_difference: float
    already_done: bool
    logit_difference: float | None = None
    losses: Mapping[str, float] | None = None
    url: str | None = None


def merge(config: MergeConfig, target: Path, report: Report) -> Merged:
    """Write the merged model of an adapter (or several, weighted) and its base to `target`, once it is verified.

    Raises InputRefused, Mismatch (an adapter for another base; other work at the output; an input that was changed
    meanwhile), ArtifactDamaged (also where what was written isn't what it should be), NonFinite, UsageError (output
    inside an input, an adapter twice), Busy, DiskFailed, HubFailed.
    """
    opened, base, stamps = _opened(config, report)
    for place in (base.folder, *(adapter.folder for adapter, _ in opened)):
        if target.resolve().is_relative_to(place.resolve()):
            raise UsageError(
                f"--output {target}: found a place inside {place}, need one outside", "choose another folder"
            )
    weighted = [Weighted(adapter, weight, match(adapter, base)) for adapter, weight in opened]
    plan = make_plan(base, weighted, NAMES.get(config.merging.dtype), _rounding(config, weighted, report))
    copied = _copied(plan)
    settings = _settings(weighted, copied)
    parents = {**_parents(base, weighted), **settings}
    with artifacts.lock(target):
        overwrite = config.output.overwrite
        done = artifacts.claim(target, "merged model", config, parents, overwrite=overwrite, may_lack=settings)
        facts: dict[str, Any] = vars(done.facts_as(Merged, path=target, already_done=True)) if done else {}
        full = config.merging.verify == "full"
        if done is None:
            files = _small_files(plan, copied, report)
            disk.require_free_bytes(target, plan.size_bytes + sum(map(len, files.values())) + _MANIFEST_BYTES)
            facts |= {"tensors": len(plan.targets), "merged_tensors": len(plan.changed)}

            def check(stage: Path) -> None:
                disk.require_unchanged(stamps)  # or what comes next finds a wrong model, and not why
                facts["max_difference"] = verify_rows(plan, stage)
                if full:
                    facts.update(_compared(plan, stage, config, report))
                disk.require_unchanged(stamps)

            content = itertools.chain(shards(plan, report), files.items())
            artifacts.commit(target, "merged model", content, config=config, parents=parents, facts=facts, check=check)
        elif full:
            facts |= _compared(plan, target, config, report)
        if config.hub.push_to_hub is not None:
            facts["url"] = push_folder(target, config.hub.push_to_hub, private=config.hub.private, report=report)
    return Merged(**{**facts, "path": target, "already_done": done is not None})


def _opened(
    config: MergeConfig, report: Report
) -> tuple[list[tuple[Adapter, float]], Weights, dict[Path, disk.Stamp | None]]:
    """Each adapter and its weight, their base, and the stamps that their files had before the first byte was read."""
    folders = [model_folder(name, need="an adapter") for name, _ in config.adapter.weighted]
    if twice := next((folder for folder in folders if _is_twice(folder, folders)), None):
        raise UsageError(
            f"found the adapter {twice} twice, need each once", f"give it once, with a weight: {twice}:2 counts double"
        )
    stamps = _stamps(*folders)
    weights = [weight for _, weight in config.adapter.weighted]
    opened = [(open_adapter(folder, report), weight) for folder, weight in zip(folders, weights, strict=True)]
    below = base_folder(opened[0][0], config.adapter.base)
    stamps |= _stamps(below)
    return opened, open_weights(below), stamps


def _is_twice(folder: Path, folders: Sequence[Path]) -> bool:
    """Whether several of these are the same folder, by whatever name."""
    return [each.resolve() for each in folders].count(folder.resolve()) > 1


def _stamps(*folders: Path) -> dict[Path, disk.Stamp | None]:
    """Those of all weights in some folders: settings are read only once."""
    return {path: disk.stamp(path) for folder in folders for path in sorted(folder.glob("*.safetensors"))}


def _parents(base: Weights, weighted: Sequence[Weighted]) -> dict[str, str]:
    """The fingerprint of every input; an adapter's weight stands beside its own."""
    parents = {"base": base.fingerprint}
    for number, each in enumerate(weighted, 1):
        name = "adapter" if len(weighted) == 1 else f"adapter {number}"
        weight = "" if each.weight == 1 else f" × {each.weight:g}"
        parents[name] = disk.sha256(each.adapter.folder / adapters.WEIGHTS) + weight
    return parents


def _settings(weighted: Sequence[Weighted], copied: Mapping[str, bytes]) -> dict[str, str]:
    """The fingerprint of what else decides the result: each adapter's settings, whatever its base is called, and the
    files that are copied."""
    settings = {}
    for number, each in enumerate(weighted, 1):
        name = "adapter" if len(weighted) == 1 else f"adapter {number}"
        config = {key: value for key, value in each.adapter.config.items() if key != "base_model_name_or_path"}
        settings[f"{name}'s settings"] = artifacts.fingerprint(config)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in copied.items()}
    return {**settings, "tokenizer and generation settings": artifacts.fingerprint(hashes)}


def _in_training(adapter: Adapter) -> Rounding | None:
    """How the base was quantized while an adapter was trained, as far as its manifest says.

    Where the number type isn't known, it is taken to have been bf16, as it is on every GPU that has it.
    """
    config = adapter.artifact.config if adapter.artifact is not None else {}
    facts = adapter.artifact.facts if adapter.artifact is not None else {}
    kind, dtype = str(config.get("quantize", "none")), str(facts.get("dtype", config.get("dtype", "auto")))
    return None if kind == "none" else Rounding(kind, "bf16" if dtype == "auto" else dtype)


def _rounding(config: MergeConfig, weighted: Sequence[Weighted], report: Report) -> Rounding | None:
    """What the base's numbers go through before anything is added: nothing, or what they went through in training."""
    trained = {_in_training(each.adapter) for each in weighted}
    calibrated = [each.adapter.folder for each in weighted if each.adapter.is_calibrated]
    if config.merging.base_precision == "16bit":
        for rounding in filter(None, trained):
            other = "--base-precision as-trained takes what training saw, --verify full measures both"
            report(
                Notice(
                    f"trained over a base in {rounding.kind}, merged into its original weights; "
                    + ("it was calibrated to be near those" if calibrated else other)
                )
            )
        return None
    if calibrated:
        raise InputRefused(
            f"--base-precision as-trained: found {calibrated[0]}, trained over a calibrated base, need one whose "
            "numbers can be made again",
            "leave it out: calibration keeps a base near its original weights; or train with --no-calibrate",
        )
    unknown = [each.adapter.folder for each in weighted if each.adapter.artifact is None]
    if unknown or len(trained) > 1:
        found = f"{unknown[0]} without lorakit's manifest" if unknown else "adapters trained over different bases"
        raise InputRefused(
            f"--base-precision as-trained: found {found}, need to know how the base was quantized in training",
            "leave it out: the adapter is then merged into the original weights",
        )
    return trained.pop()


def _copied(plan: Plan) -> dict[str, bytes]:
    """The files that a merged model has from its base and adapters as they are: how it generates, and a tokenizer."""
    generation = plan.base.folder / "generation_config.json"
    tokenizer = tokenizer_files([*(each.adapter.folder for each in plan.adapters), plan.base.folder])
    if not generation.exists():
        return tokenizer
    return {generation.name: read_small(generation, MAX_SETTINGS_BYTES, "restore the file, or remove it"), **tokenizer}


def _small_files(plan: Plan, copied: Mapping[str, bytes], report: Report) -> dict[str, bytes]:
    """The merged model's files beside its weights, as transformers writes them."""
    files = {"config.json": (json.dumps(dict(plan.config), indent=2) + "\n").encode()}
    index = plan.index()
    if index is not None:
        files[INDEX] = index
    if not copied.keys() - {"generation_config.json"}:
        report(Notice("no tokenizer beside the base or the adapter: the merged model has none"))
    return {**files, **copied, "README.md": model_card(plan).encode()}


def _compared(plan: Plan, folder: Path, config: MergeConfig, report: Report) -> dict[str, Any]:
    """What `--verify full` finds out. Only here models are loaded, and with them torch."""
    from lorakit.core.merging.comparing import compare

    trained = _in_training(plan.adapters[0].adapter)
    if any(each.adapter.is_calibrated for each in plan.adapters):
        report(Notice("the numbers of a calibrated base aren't kept: answers are compared, not losses as trained"))
        trained = None
    return compare(plan, folder, trained, config.merging.blocks, report)
