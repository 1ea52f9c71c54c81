"""Base + adapter → one ordinary model: plan, check everything, apply tensor by tensor, verify, put in place.

W' = W + scale · B·A in fp32, rounded once to the base's own number type. Tensors without LoRA keep their bytes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lorakit.core import adapters, artifacts, disk
from lorakit.core.adapters import Adapter, LoraPair, match, open_adapter
from lorakit.core.config import MergeConfig
from lorakit.core.errors import ArtifactDamaged, InputRefused, NonFinite, UsageError
from lorakit.core.events import Notice, Progress, Report
from lorakit.core.hub import model_folder
from lorakit.core.model import (
    base_folder,
    load_base,
    pick_device,
    wrap,
)
from lorakit.core.tokenization import load_tokenizer, quiet_libraries, tokenizer_files
from lorakit.core.weights import INDEX, SINGLE, Weights, open_weights

_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOLERANCE = {"F64": 1e-4, "F32": 1e-4, "F16": 5e-3, "BF16": 5e-2}
"""Largest difference of a logit, relative to the largest logit, that rounding the weights once can explain."""

_PROBE_TOKENS = 64
_COPIED = ("generation_config.json",)


@dataclass(frozen=True)
class Merged:
    """The result of `merge`; `max_difference` is between logits of the merged model and of base + adapter, in fp32."""

    path: Path
    tensors: int
    merged_tensors: int
    max_difference: float
    already_done: bool


def merge(config: MergeConfig, target: Path, report: Report) -> Merged:
    """Write the merged model of an adapter and its base to `target`, once it is shown to give the adapter's answers.

    Raises InputRefused, Mismatch (an adapter for another base; other work at the output), ArtifactDamaged (also where
    the merged model's answers differ), NonFinite, UsageError (output inside an input), Busy, DiskFailed, HubFailed.
    """
    adapter = open_adapter(model_folder(config.adapter.adapter), report)
    base = open_weights(base_folder(adapter, config.adapter.base))
    for place in (base.folder, adapter.folder):
        if target.resolve().is_relative_to(place.resolve()):
            raise UsageError(
                f"--output {target}: found a place inside {place}, need one outside", "choose another folder"
            )
    pairs = match(adapter, base)
    parents = {"adapter": disk.sha256(adapter.folder / adapters.WEIGHTS), "base": base.fingerprint}
    with artifacts.lock(target):
        done = artifacts.claim(target, "merged model", config, parents, overwrite=config.output.overwrite)
        if done is not None:
            return Merged(path=target, already_done=True, **done.facts)
        _refuse_unfit(base, pairs)
        disk.require_free_bytes(target, base.size_bytes)
        facts: dict[str, float] = {"tensors": len(base.tensors), "merged_tensors": len(pairs)}

        def check(stage: Path) -> None:
            facts["max_difference"] = _compare(adapter, base, stage, report)

        files = _files(adapter, base, pairs, report)
        artifacts.commit(target, "merged model", files, config=config, parents=parents, facts=facts, check=check)
    return Merged(path=target, already_done=False, **facts)  # type: ignore[arg-type]


def _refuse_unfit(base: Weights, pairs: Iterable[LoraPair]) -> None:
    for pair in pairs:
        place = base.tensors[pair.target]
        if place.dtype not in _TORCH_DTYPES:
            raise InputRefused(
                f"{base.folder / place.shard}: {pair.target}: found {place.dtype}, need F32, BF16 or F16",
                "merge into the 16-bit base",
            )


def _files(
    adapter: Adapter, base: Weights, pairs: Iterable[LoraPair], report: Report
) -> Iterator[tuple[str, disk.Content]]:
    """The merged model's files, as transformers writes them."""
    by_target = {pair.target: pair for pair in pairs}
    with safe_open(adapter.folder / adapters.WEIGHTS, framework="pt") as lora:
        for shard in base.shards:
            yield shard, _shard(adapter, base, shard, by_target, lora, report)
    if base.shards != [SINGLE]:
        yield INDEX, (base.folder / INDEX).read_bytes()
    yield "config.json", (json.dumps(dict(base.config), indent=2) + "\n").encode()
    for name in _COPIED:
        if (base.folder / name).is_file():
            yield name, (base.folder / name).read_bytes()
    for folder in (adapter.folder, base.folder):
        if (folder / "tokenizer.json").is_file():
            yield from tokenizer_files(load_tokenizer(folder)).items()
            return
    report(Notice("no tokenizer beside the base or the adapter: the merged model has none"))


def _shard(
    adapter: Adapter, base: Weights, shard: str, pairs: Mapping[str, LoraPair], lora: safe_open, report: Report
) -> Iterator[bytes]:
    """The bytes of one shard: the header as it is, then every tensor in its place, changed or not."""
    places = sorted(
        ((name, place) for name, place in base.tensors.items() if place.shard == shard), key=lambda item: item[1].start
    )
    with (base.folder / shard).open("rb") as source:
        yield source.read(places[0][1].start)
        for done, (name, place) in enumerate(places, 1):
            raw = source.read(place.end - place.start)
            if len(raw) != place.end - place.start:
                raise ArtifactDamaged(f"{base.folder / shard}: found it cut off, need all of {name}", "copy it again")
            if name in pairs:
                weight = torch.frombuffer(bytearray(raw), dtype=_TORCH_DTYPES[place.dtype]).reshape(place.shape)
                merged = add_lora_to_weight(
                    weight, lora.get_tensor(pairs[name].name_a), lora.get_tensor(pairs[name].name_b), adapter.scale
                )
                if not torch.isfinite(merged).all():
                    raise NonFinite(f"{name}: found NaN or infinity after merging, need numbers", "train it again")
                raw = merged.contiguous().view(torch.uint8).numpy().tobytes()
            yield raw
            report(Progress(f"merging {shard}", done, len(places), "tensors"))


def add_lora_to_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale · B·A, computed in fp32 (fp64 for fp64) and rounded once; W [out, in], A [rank, in], B [out, rank]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def _compare(adapter: Adapter, base: Weights, stage: Path, report: Report) -> float:
    """Largest difference between logits of the staged model and of base + adapter, both computed in fp32.

    Raises ArtifactDamaged where it is more than rounding the weights once explains: nothing is put in place then.
    """
    report(Notice("comparing the merged model with base + adapter"))
    device = pick_device()
    vocabulary = int(base.config["vocab_size"])
    ids_1T = torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for model in (
        lambda: wrap(load_base(base, torch.float32, device), adapter),
        lambda: load_base(open_weights(stage), torch.float32, device),
    ):
        with quiet_libraries(), torch.inference_mode():
            logits.append(model()(input_ids=ids_1T, use_cache=False).logits.float())
    difference = float((logits[0] - logits[1]).abs().max())
    allowed = max(_TOLERANCE.get(place.dtype, 0.0) for place in base.tensors.values()) * max(
        1.0, float(logits[0].abs().max())
    )
    if not math.isfinite(difference) or difference > allowed:
        raise ArtifactDamaged(
            f"found merged logits that differ by {difference:.3g} from base + adapter's, need ≤ {allowed:.3g}",
            "nothing was written; report this with the adapter's adapter_config.json",
        )
    return difference
