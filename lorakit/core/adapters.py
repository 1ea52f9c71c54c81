"""An adapter folder: its settings, its tensors, and what each of them does to the base. No torch.

What a tensor does is said by its name, as PEFT writes it:

    MODULE.lora_A.weight, .lora_B.weight               a LoRA pair: W += scale · B·A
    MODULE.lora_embedding_A, .lora_embedding_B         the same for an embedding, whose weight is the other way round
    MODULE.lora_magnitude_vector                       DoRA: the length of each output's row of weights
    MODULE.lora_B.bias                                 the bias += scale · this
    MODULE.token_adapter.trainable_tokens_delta        new rows of an embedding
    MODULE.weight, .bias, also behind base_layer       the whole tensor (modules_to_save, a resized vocabulary)
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.core import artifacts
from lorakit.core.artifacts import Artifact
from lorakit.core.errors import InputRefused, Mismatch
from lorakit.core.events import Notice, Report
from lorakit.core.hub import model_folder
from lorakit.core.untrusted import TakesTooLong, bounded, read_json_object
from lorakit.core.weights import (
    HEAD,
    TensorPlace,
    Weights,
    has_a_row_a_token,
    read_header,
    refuse_gguf,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_UNKNOWN: Mapping[str, str] = {
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA, which depends on the prompt",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow, a router over adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "layers of Megatron",
}
"""Kinds of LoRA whose adapters do other things to the base than the tensors' names say."""
_CHANGE_THE_BASE = re.compile(r"pissa.*|olora|corda|loftq|mica|lora_ga")
_TRANSPOSED = ("gpt2", "openai-gpt")
"""Model types whose linear layers (transformers' Conv1D) keep the weight as [in, out]."""

_LORA = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|(B\.bias)|embedding_(A|B)|(magnitude_vector)(?:\.weight)?)")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_COPY = re.compile(r"(.+)\.(?:modules_to_save|original_module)\.(\w+)")
_WHOLE = re.compile(r"(.+?)(?:\.token_adapter)?(?:\.base_layer)?\.(\w+)")
_MAX_RANK = 2**20
_MATCHING_SECONDS = 5.0  # of CPU time, for all patterns of an adapter and all modules of its base


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk; `artifact` is None for one that has no manifest (made by peft itself)."""

    folder: Path
    config: Mapping[str, Any]
    artifact: Artifact | None

    @cached_property
    def tensors(self) -> Mapping[str, TensorPlace]:
        """What its safetensors header says. Raises ArtifactDamaged."""
        return read_header(self.folder / WEIGHTS)

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.config.get("rank_pattern"), module, self.config["r"]))

    def scale(self, module: str) -> float:
        """What B·A is multiplied by: alpha / r (Hu et al. 2021), or alpha / √r for rsLoRA (Kalajdzievski 2023)."""
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def is_calibrated(self) -> bool:
        """Whether its base was rounded by what went through it, so that its numbers in training can't be made again."""
        return self.artifact is not None and self.artifact.facts.get("calibrated") is True

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def vocabulary(self) -> int | None:
        """The rows of its own embedding, where it brings a whole one."""
        whole = {_whole_name(name): place for name, place in self.tensors.items() if not _is_part(name)}
        found = [place.shape[0] for name, place in whole.items() if place.shape and has_a_row_a_token(name)]
        return max(found, default=None)


@dataclass(frozen=True)
class LoraPair:
    """W += scale · B·A for one base tensor: A is [rank, in], B is [out, rank]; W is [out, in], or `transposed`.

    With a `magnitude` [out] (DoRA, Liu et al. 2024) each output's weights are then scaled to that length.
    """

    target: str
    name_a: str
    name_b: str
    scale: float
    transposed: bool
    magnitude: str | None


@dataclass(frozen=True)
class Replacement:
    """The whole tensor `name` instead of the base's; `shared` where a tied head becomes that tensor too."""

    target: str
    name: str
    shared: bool


@dataclass(frozen=True)
class TokenRows:
    """New rows of an embedding: row `rows[i]` becomes row i of the tensor `name`."""

    target: str
    name: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class BiasShift:
    """A bias += scale · the tensor `name`."""

    target: str
    name: str
    scale: float


Change = LoraPair | Replacement | TokenRows | BiasShift


def open_adapter(folder: Path, report: Report) -> Adapter:
    """The adapter in an adapter or run folder.

    Raises InputRefused (none, unfinished, or of a kind that can't be used exactly), ArtifactDamaged.
    """
    _require_adapter(folder)
    artifact = artifacts.open_artifact(folder, "adapter") if artifacts.is_artifact(folder) else None
    if artifact is not None and not (
        {"base", "blocks"} <= set(artifact.parents) and {CONFIG, WEIGHTS} <= set(artifact.manifest["files"])
    ):
        raise InputRefused(
            f"{folder}: found an adapter that doesn't say what it comes from or what it holds, need one of lorakit's",
            "don't use this folder: someone made its manifest by hand",
        )
    if artifact is None:
        report(Notice(f"{folder}: unverified: an adapter without lorakit's manifest"))
    config = read_json_object(folder / CONFIG, "")
    _refuse_unusable(folder, config)
    if not (folder / WEIGHTS).is_file():
        raise InputRefused(
            f"{folder}: found no {WEIGHTS}, need the adapter as safetensors (pickle files are never opened)",
            "save the adapter again with a current peft: model.save_pretrained(DIR)",
        )
    return Adapter(folder, config, artifact)


def require_adapter_or_model(name: str) -> None:
    """What folders say without being read: for before what takes seconds to import. Raises InputRefused (neither an
    adapter nor a model, or an unfinished run), ArtifactDamaged, HubFailed."""
    folder = model_folder(name)
    if not (folder / "config.json").is_file():
        _require_adapter(folder)


def _require_adapter(folder: Path) -> None:
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    if artifacts.is_artifact(folder):
        artifacts.require_kind(folder, "adapter")
    elif not (folder / CONFIG).is_file():
        if checkpoints or (folder / "metrics.jsonl").exists():
            if artifacts.is_held(folder):
                raise InputRefused(
                    f"{folder}: found a run that is being trained, need a finished one", "wait until it is done"
                )
            steps = f"stopped after step {int(checkpoints[-1].name[5:])}" if checkpoints else "without a checkpoint yet"
            raise InputRefused(
                f"{folder}: found an unfinished run, {steps}; need a finished one",
                "run the same `lorakit train` command again: it goes on",
            )
        raise InputRefused(f"{folder}: found no {CONFIG}, need an adapter", "`lorakit train` makes adapters")


def _refuse_unusable(folder: Path, config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type")).upper() != "LORA":
        raise InputRefused(f"{folder}: found an adapter of type {config.get('peft_type')!r}, need LORA", "use a LoRA")
    unknown = [f"{key} = {config[key]!r} ({what})" for key, what in _UNKNOWN.items() if config.get(key)]
    if unknown:
        raise InputRefused(f"{folder}: found {', '.join(unknown)}; need LoRA or DoRA", "use peft for it")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and _CHANGE_THE_BASE.fullmatch(init.lower()):
        raise InputRefused(
            f"{folder}: found init_lora_weights = {init!r}, which changes the base itself; need plain LoRA",
            "convert it with peft: model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL)",
        )
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise InputRefused(
            f"{folder}: found a rank_pattern or alpha_pattern that is no mapping, need one", "correct it"
        )
    ranks = [config.get("r"), *patterns[0].values()]
    alphas = [config.get("lora_alpha"), *patterns[1].values()]
    for rank in ranks:
        if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
            raise InputRefused(
                f"{folder}: found r = {rank!r}, need a whole number ≥ 1", "use an adapter that has ranks"
            )
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
            raise InputRefused(
                f"{folder}: found lora_alpha = {alpha!r}, need a number above 0", "use an adapter that has a scale"
            )
    targets = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    whole = {pattern: pattern for pattern in targets if isinstance(pattern, str)}
    for pattern, used in {**whole, **{pattern: _at_end(pattern) for each in patterns for pattern in each}}.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                re.compile(pattern)
                re.compile(used)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputRefused(
                f"{folder}: found the pattern {pattern!r} ({error}), need a regular expression",
                f"correct it in {CONFIG}",
            ) from None


def base_folder(adapter: Adapter, base_name: str | None) -> Path:
    """The folder of an adapter's base: the one given, else the one that the adapter names. Raises InputRefused."""
    name = base_name or adapter.base_name
    if not name:
        raise InputRefused(f"{adapter.folder}: found no base named in the adapter, need one", "give it with --base")
    if name.endswith(".gguf"):
        refuse_gguf(Path(name))
    try:
        return model_folder(name)
    except InputRefused as error:
        raise InputRefused(error.message, "give the base with --base") from None


def match(adapter: Adapter, base: Weights) -> list[Change]:
    """What an adapter does to its base, every tensor of it used exactly once.

    Raises Mismatch where the adapter was trained on another base, or doesn't fit this one; every problem is listed.
    """
    if adapter.artifact is not None and adapter.artifact.parents["base"] != base.fingerprint:
        raise Mismatch(
            f"{base.folder}: found the base {base.fingerprint[:12]}…, "
            f"need the one that {adapter.folder} was trained on: {adapter.artifact.parents['base'][:12]}…",
            f"give that base with --base (the adapter names {adapter.base_name or 'none'})",
        )
    found: list[Change | str] = []
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, TensorPlace] = {}
    """The base's tensors that the adapter brings whole: what else it does, it does to these."""
    for name, place in adapter.tensors.items():
        if part := _LORA.fullmatch(name):
            kind = f"embedding {part[4]}" if part[4] else str(part[2] or part[3] or part[5])
            modules.setdefault(part[1].removeprefix(_PREFIX), {})[kind] = name
        elif (copy := _COPY.fullmatch(name)) and f"{copy[1]}.{copy[2]}" in adapter.tensors:
            continue  # what peft saves beside a module that was trained whole and resized: the same, and the base's
        elif not _ROWS.fullmatch(name):
            found.append(_replacement(adapter, base, name, whole))
            whole.setdefault(_whole_name(name), place)
    if base.is_tied and base.embedding in whole:
        whole.setdefault(HEAD, whole[base.embedding])
    try:
        with bounded(_MATCHING_SECONDS):
            for module, names in sorted(modules.items()):
                found += _lora(adapter, base, module, names, whole)
            _match_targets(adapter, base)
    except TakesTooLong:
        raise InputRefused(
            f"{adapter.folder}: found a pattern that takes over {_MATCHING_SECONDS:.0f} s to match, need a simple one",
            f"write names instead of regular expressions in {CONFIG}",
        ) from None
    for name in adapter.tensors:
        if rows := _ROWS.fullmatch(name):
            found.append(_rows(adapter, base, rows[1].removeprefix(_PREFIX), name, whole))
    problems = [problem for problem in found if isinstance(problem, str)]
    if problems or not found:
        listed = "\n  ".join(problems[:10] or ["no LoRA tensors at all"])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise Mismatch(
            f"{adapter.folder}: found an adapter that doesn't fit {base.folder}:\n  {listed}{more}",
            f"give the base that it was trained on with --base (it names {adapter.base_name or 'none'})",
        )
    return [change for change in found if not isinstance(change, str)]


def unlearned(changes: Sequence[Change], base: Weights, tokens: Sequence[int]) -> list[int]:
    """The tokens for which nothing is learned when an adapter that does these changes is trained further: their rows
    aren't among its own, and it has neither LoRA on embedding and head nor trains them whole."""
    ends = [{base.embedding, HEAD}] if base.is_tied else [{base.embedding}, {HEAD}]
    own = {row for change in changes if isinstance(change, TokenRows) for row in change.rows}
    of_all = {
        change.target
        for change in changes
        if isinstance(change, LoraPair) or (isinstance(change, Replacement) and not change.shared)
    }
    return [token for token in tokens if token not in own and not all(end & of_all for end in ends)]


def _replacement(adapter: Adapter, base: Weights, name: str, whole: Mapping[str, TensorPlace]) -> Change | str:
    """A tensor that the adapter brings whole, or what is wrong with it."""
    target, shape = _whole_name(name), adapter.tensors[name].shape
    there = base.place(target)
    if there is None:
        return f"{name}: the base has no tensor {target}"
    if shape != there.shape and not (has_a_row_a_token(target) and shape[1:] == there.shape[1:]):
        return f"{name}: {list(shape)}, need {list(there.shape)}"
    if target in whole:
        return f"{name}: a second tensor for {target}"
    # what peft saves of a tied module that isn't trained whole is the base's own, and not what the other one became
    shared = not any(_is_saved_module(adapter, each) for each in (target, base.embedding, HEAD))
    return Replacement(target, name, shared)


def _lora(
    adapter: Adapter, base: Weights, module: str, names: Mapping[str, str], whole: Mapping[str, TensorPlace]
) -> Iterator[Change | str]:
    """What the LoRA tensors of one module do, or what is wrong with them."""
    target, rank, scale = f"{module}.weight", adapter.rank(module), adapter.scale(module)
    place = whole.get(target) or base.place(target)
    embedding = "embedding A" in names or "embedding B" in names
    sides = ("embedding A", "embedding B") if embedding else ("A", "B")
    allowed = {*sides, "magnitude_vector"} if embedding else {*sides, "magnitude_vector", "B.bias"}
    if not set(sides) <= set(names) or not set(names) <= allowed:
        yield from (f"{name}: not one of a pair lora_A, lora_B" for name in names.values())
        return
    if ("magnitude_vector" in names) != bool(adapter.config.get("use_dora")):
        yield f"{module}: lora_magnitude_vector {'without' if 'magnitude_vector' in names else 'missing with'} use_dora"
        return
    if place is None:
        yield f"{names[sides[0]]}: the base has no tensor {target}"
        return
    if len(place.shape) != 2:
        yield f"{module}: the base's tensor is {list(place.shape)}, need a matrix"
        return
    transposed = embedding or (base.config.get("model_type") in _TRANSPOSED and target != HEAD)
    columns, outputs = place.shape if transposed else place.shape[::-1]
    a, b = (adapter.tensors[names[side]].shape for side in sides)
    if (a, b) != ((rank, columns), (outputs, rank)):
        yield f"{module}: A and B are {list(a)} and {list(b)}, need {[rank, columns]} and {[outputs, rank]}"
        return
    magnitude = names.get("magnitude_vector")
    if magnitude is not None and adapter.tensors[magnitude].shape != (outputs,):
        yield f"{magnitude}: {list(adapter.tensors[magnitude].shape)}, need {[outputs]}"
        return
    yield LoraPair(target, names[sides[0]], names[sides[1]], scale, transposed, magnitude)
    if "B.bias" in names:
        bias = whole.get(f"{module}.bias") or base.place(f"{module}.bias")
        if bias is None or bias.shape != adapter.tensors[names["B.bias"]].shape:
            yield f"{names['B.bias']}: the base has no such bias to add it to"
        else:
            yield BiasShift(f"{module}.bias", names["B.bias"], scale)


def _match_targets(adapter: Adapter, base: Weights) -> None:
    """Match what PEFT is going to match, as it does: here it can be stopped."""
    patterns = [adapter.config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    for pattern in [pattern for pattern in patterns if isinstance(pattern, str)]:
        for name in base.tensors:
            re.fullmatch(pattern, name.rpartition(".")[0])


def _rows(adapter: Adapter, base: Weights, module: str, name: str, whole: Mapping[str, TensorPlace]) -> TokenRows | str:
    """The rows that an adapter's trained tokens replace, or what is wrong with them."""
    target, found = f"{module}.weight", adapter.tensors[name].shape
    place = whole.get(target) or base.place(target)
    chosen = adapter.config.get("trainable_token_indices")
    if isinstance(chosen, Mapping):
        fitting = [rows for key, rows in chosen.items() if module == key or module.endswith(f".{key}")]
        chosen = fitting[0] if len(fitting) == 1 else None
        if chosen is None and target == HEAD and base.is_tied and len(adapter.config["trainable_token_indices"]) == 1:
            chosen = next(iter(adapter.config["trainable_token_indices"].values()))
    if place is None or len(place.shape) != 2:
        return f"{name}: the base has no tensor {target}"
    if not isinstance(chosen, Sequence) or not all(type(row) is int and 0 <= row < place.rows for row in chosen):
        return f"{name}: trainable_token_indices are {chosen!r}, need rows below {place.rows}"
    if found != (len(chosen), place.shape[1]) or len(set(chosen)) != len(chosen):
        return f"{name}: {list(found)}, need {[len(chosen), place.shape[1]]}, each row once"
    return TokenRows(target, name, tuple(chosen))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name or its end, as PEFT chooses it."""
    for pattern, value in (patterns or {}).items():
        if re.match(_at_end(pattern), module):
            return value
    return default


def _at_end(pattern: str) -> str:
    """A pattern for a module's name or its end, as PEFT writes it."""
    return rf"(.*\.)?({pattern})$"


def _is_part(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_LORA, _ROWS, _COPY))


def _whole_name(name: str) -> str:
    """The base tensor that a whole tensor of an adapter stands for."""
    found = _WHOLE.fullmatch(name.removeprefix(_PREFIX))
    return f"{found[1]}.{found[2]}" if found else name


def _is_saved_module(adapter: Adapter, target: str) -> bool:
    """Whether PEFT gave the model a copy of this module of its own, for training it whole."""
    module = target.rpartition(".")[0]
    return any(module == name or module.endswith(f".{name}") for name in adapter.config.get("modules_to_save") or ())
