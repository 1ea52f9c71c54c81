"""An adapter folder: its settings, its tensors, and the base tensor that each pair of matrices changes. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core import artifacts
from lorakit.core.artifacts import Artifact
from lorakit.core.errors import InputRefused, Mismatch
from lorakit.core.events import Notice, Report
from lorakit.core.weights import TensorPlace, Weights, read_header, read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_DEFAULTS: Mapping[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}
"""What lorakit's adapters are, as far as it changes the numbers; an adapter that says otherwise is refused by name."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; `artifact` is None for one that has no manifest (made by peft itself)."""

    folder: Path
    config: Mapping[str, Any]
    artifact: Artifact | None

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        """What B·A is multiplied by: alpha / r (Hu et al. 2021), or alpha / √r for rsLoRA (Kalajdzievski 2023)."""
        divisor = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return float(self.config["lora_alpha"]) / divisor

    @property
    def vocabulary(self) -> int:
        """Rows that the base's embeddings need for this adapter's own tokens; 0 where it has none."""
        learned = self.config.get("trainable_token_indices") or []
        lists = learned.values() if isinstance(learned, Mapping) else [learned]
        return max((index + 1 for indices in lists for index in indices), default=0)

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")


@dataclass(frozen=True)
class LoraPair:
    """W += scale · B·A for one base tensor: A is [rank, in], B is [out, rank]."""

    target: str
    name_a: str
    name_b: str


def open_adapter(folder: Path, report: Report) -> Adapter:
    """The adapter in an adapter or run folder.

    Raises InputRefused (none, unfinished, or of a kind that can't be used exactly), ArtifactDamaged.
    """
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if not (folder / CONFIG).is_file() and not artifacts.is_artifact(folder):
        if checkpoints or (folder / "metrics.jsonl").exists():
            steps = f"stopped after step {int(checkpoints[-1].name[5:])}" if checkpoints else "without a checkpoint yet"
            raise InputRefused(
                f"{folder}: found an unfinished run, {steps}; need a finished one",
                "run the same `lorakit train` command again: it goes on",
            )
        raise InputRefused(f"{folder}: found no {CONFIG}, need an adapter", "`lorakit train` makes adapters")
    artifact = artifacts.open_artifact(folder, "adapter") if artifacts.is_artifact(folder) else None
    if artifact is None:
        report(Notice(f"{folder}: unverified: an adapter without lorakit's manifest"))
    config = read_json_object(folder / CONFIG, "")
    if str(config.get("peft_type")).upper() != "LORA":
        raise InputRefused(f"{folder}: found an adapter of type {config.get('peft_type')!r}, need LORA", "use a LoRA")
    unusual = [key for key, usual in _DEFAULTS.items() if config.get(key) not in (usual, None, False, [], {})]
    if unusual:
        listed = ", ".join(f"{key} = {config[key]!r}" for key in unusual)
        raise InputRefused(f"{folder}: found {listed}, which lorakit can't use yet; need plain LoRA", "use peft for it")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise InputRefused(f"{folder}: found r = {rank!r}, lora_alpha = {alpha!r}; need both positive", "use a LoRA")
    if not (folder / WEIGHTS).is_file():
        raise InputRefused(
            f"{folder}: found no {WEIGHTS}, need the adapter as safetensors (pickle files are never opened)",
            "save the adapter again with a current peft: model.save_pretrained(DIR)",
        )
    return Adapter(folder, config, artifact)


def match(adapter: Adapter, base: Weights) -> list[LoraPair]:
    """The pairs of an adapter and the base tensor that each changes, every tensor used exactly once.

    Raises Mismatch where the adapter was trained on another base, or doesn't fit this one.
    """
    if adapter.artifact is not None and adapter.artifact.parents["base"] != base.fingerprint:
        raise Mismatch(
            f"{base.folder}: found the base {base.fingerprint[:12]}…, "
            f"need the one that {adapter.folder} was trained on: {adapter.artifact.parents['base'][:12]}…",
            f"give that base with --base (the adapter names {adapter.base_name or 'none'})",
        )
    tensors = read_header(adapter.folder / WEIGHTS)
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        modules.setdefault(module.removeprefix(_PREFIX) if side in ("A", "B") else "", {})[side] = name
    problems, pairs = [], []
    for module, sides in sorted(modules.items()):
        target = f"{module}.weight"
        place = base.tensors.get(target)
        if set(sides) != {"A", "B"}:
            problems += [f"{name}: not one of a pair lora_A, lora_B" for name in sides.values()]
        elif place is None:
            problems.append(f"{sides['A']}: the base has no tensor {target}")
        elif (found := _shapes(tensors[sides["A"]], tensors[sides["B"]])) != _expected(place, adapter.rank):
            problems.append(f"{module}: A and B are {found}, need {_expected(place, adapter.rank)}")
        else:
            pairs.append(LoraPair(target, sides["A"], sides["B"]))
    if problems or not pairs:
        listed = "\n  ".join(problems[:10] or ["no LoRA tensors at all"])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise Mismatch(
            f"{adapter.folder}: found an adapter that doesn't fit {base.folder}:\n  {listed}{more}",
            f"give the base that it was trained on with --base (it names {adapter.base_name or 'none'})",
        )
    return pairs


def _shapes(a: TensorPlace, b: TensorPlace) -> list[tuple[int, ...]]:
    return [a.shape, b.shape]


def _expected(base: TensorPlace, rank: int) -> list[tuple[int, ...]]:
    return [(rank, base.shape[-1]), (base.shape[0], rank)]
