"""Which implementation of attention a model gets: what was measured here, kept, and applied.

lorakit patch-attention --apply   writes the fastest right one for a model's shape to attention.json in the cache
train --attention auto            takes it while machine and versions are the same, else proves one again
--apply-to, --revert              write it into a model folder's config.json, and take it out again
apply(model)                      for code of anyone's
"""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakit import __version__
from lorakit.core import artifacts, disk
from lorakit.core.attention.implementations import (
    IMPLEMENTATIONS,
    STOCK,
    Shape,
    guard,
    lacking,
    lacking_package,
    register,
    set_implementation,
    shape_of,
)
from lorakit.core.attention.proving import Proof, Row, best, prove
from lorakit.core.config import PatchAttentionConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import EnvironmentUnusable, InputRefused
from lorakit.core.events import Notice, Report
from lorakit.core.hub import config_folder
from lorakit.core.model import load_config, pick_device, pick_dtype
from lorakit.core.untrusted import MAX_SETTINGS_BYTES, parse_json, read_small

CHOICES = "attention.json"
_KEY = "attn_implementation"
_QUICK_TOKENS = 256
_UNASKED = tuple(name for name in IMPLEMENTATIONS if name != "flex_attention")  # which is compiled for minutes


@dataclass(frozen=True)
class Patched:
    """What `apply_to` or `revert` did to a model folder's config.json."""

    path: Path
    implementation: str | None
    """What the config says now."""
    changed: bool


@dataclass(frozen=True)
class Checked:
    """The result of `check`."""

    proof: Proof
    device: str
    dtype: str
    on_gpu: bool
    implementation: str | None
    """The choice: what was asked for, else the fastest right one."""
    written: Path | None
    """The file that keeps it, where it was applied."""
    patched: Patched | None


def check(config: PatchAttentionConfig, report: Report) -> Checked:
    """Prove every implementation for a model's attention, and apply one where that is asked for.

    Raises InputRefused (no such model, an attention that isn't covered, an implementation that isn't right here),
    EnvironmentUnusable (its package isn't installed), HubFailed, DiskFailed.
    """
    asked, applying = config.attention, config.applying
    _require_package(applying.implementation, "--implementation")
    device = pick_device()
    dtype = pick_dtype(config.attention.dtype, device)
    on_gpu = device.type == "cuda"
    model = load_config(config_folder(asked.model or str(applying.apply_to)))
    if applying.apply_to is not None:
        _require_target(applying.apply_to, applying.implementation, model if asked.model else None)
    size = asked.block_size or (2048 if on_gpu else 256)
    proof = prove(model, dtype, device, size, asked.batch_size, report)
    chosen = proof.implementation
    if applying.implementation != "auto":
        chosen = _right(applying.implementation, proof)
    written = patched = None
    if (applying.apply or applying.apply_to) and chosen is None:
        raise none_is_right(proof.rows)
    if applying.apply and chosen is not None:
        written = write_choice(proof, dtype, device, chosen)
    if applying.apply_to is not None:
        named = applying.implementation
        patched = apply_to(applying.apply_to, stock_choice(proof) if named == "auto" else named)
    machine_name = machine(device)["device"]
    return Checked(proof, machine_name, str(dtype).removeprefix("torch."), on_gpu, chosen, written, patched)


def _require_target(folder: Path, implementation: str, model: Any) -> None:
    """Raises InputRefused where a choice can't be written into a model folder: `model` is the config of another that is
    proven, None where it is the folder's own."""
    _read_config(folder / "config.json")
    if implementation != "auto":
        _require_stock(implementation)
    if model is not None and (other := shape_of(load_config(folder))) != (shape := shape_of(model)):
        raise InputRefused(
            f"--apply-to {folder}: found {other}, need the attention of MODEL ({shape})",
            "leave out MODEL: the folder itself is proven",
        )


def _require_stock(implementation: str) -> None:
    if implementation not in STOCK:
        raise InputRefused(
            f"--apply-to: found {implementation}, which transformers knows through lorakit only; "
            f"need one of {', '.join(STOCK)}",
            "leave out --implementation, or use `lorakit train --attention varlen`, which changes no model",
        )


def _right(name: str, proof: Proof) -> str:
    """The name, where it passed. Raises InputRefused."""
    reasons = [row.reason for row in proof.rows if row.backend == name and not row.ok]
    if not any(row.backend == name and row.case == "packed" for row in proof.rows):
        reasons += [one.reason for one in proof.skipped if one.backend == name]
    if reasons:
        raise InputRefused(
            f"--implementation {name}: found that {reasons[0]}, need one that is right here",
            "leave out --implementation: the fastest right one is applied",
        )
    return name


def _require_package(name: str, option: str) -> None:
    if (missing := lacking_package(name)) is not None:
        raise EnvironmentUnusable(f"{option} {name}: found that {missing}, need it", f"install it, or {option} auto")


def resolve(name: str, config: Any, dtype: torch.dtype, device: torch.device, report: Report) -> str:
    """The implementation for training a model (of its transformers config) on packed blocks; `name` may be auto.

    auto is what was measured on this machine with these versions, else the first of IMPLEMENTATIONS that a small proof
    finds right; one that is named is proven too. A model whose attention can't be proven gets sdpa, or what is named
    of sdpa and eager, and that is said.
    Raises InputRefused where the model or device can't have the one that is named, EnvironmentUnusable where its
    package isn't installed or none is right.
    """
    register()
    if name not in ("auto", *IMPLEMENTATIONS):
        need = f"auto or one of {', '.join(IMPLEMENTATIONS)}"
        raise InputRefused(f"attention: found {name!r}, need {need}", "correct the name")
    try:
        shape = shape_of(config)
    except InputRefused as error:
        if name not in ("auto", "sdpa", "eager"):
            raise
        report(Notice(f"attention isn't proven: {error.message}"))
        return "sdpa" if name == "auto" else name
    if name == "auto" and (chosen := read_choice(shape, dtype, device)) is not None:
        return chosen
    _require_package(name, "--attention")
    if name != "auto" and (reason := lacking(name, shape, dtype, device)) is not None:
        raise InputRefused(f"attention {name}: found that {reason}, need another", "choose --attention auto")
    wrong: list[Row] = []
    for candidate in _UNASKED if name == "auto" else (name,):
        if lacking(candidate, shape, dtype, device) is not None:
            continue
        proof = prove(
            *(config, dtype, device, _QUICK_TOKENS, 1, _nothing), names=(candidate,), only=("packed",), measured=False
        )
        if proof.implementation is not None:
            return candidate
        found = [row for row in proof.rows if not row.ok]
        report(Notice(f"attention {candidate} isn't used: {'; '.join(row.reason for row in found)}"))
        wrong += found
    raise none_is_right(wrong)


def require_right(proof: Proof) -> None:
    """Raises EnvironmentUnusable naming every row that isn't right."""
    wrong = [str(row) for row in proof.rows if not row.ok]
    if wrong:
        raise EnvironmentUnusable(
            "attention: found " + "; ".join(wrong) + "; need every implementation right in every case",
            "train with one that is right (--attention), or reinstall torch and transformers",
        )


def none_is_right(rows: Sequence[Row]) -> EnvironmentUnusable:
    """The error where no implementation passed."""
    reasons = "; ".join(str(row) for row in rows if not row.ok)
    return EnvironmentUnusable(
        f"attention: found none that is right for packed blocks ({reasons or 'none could run'}), need one",
        "choose a model of the Llama family, or reinstall torch and transformers; "
        "`lorakit patch-attention MODEL` shows every case",
    )


def _nothing(event: object) -> None: ...


def apply(model: Any, implementation: str = "auto", report: Report = _nothing) -> str:
    """Give a loaded transformers model an implementation, the one that `resolve` finds; returns its name.

    From then on the model refuses an attention mask beside packed positions, with which transformers lets documents
    see each other without a word. Raises what `resolve` raises.
    """
    parameter = next(model.parameters())
    name = resolve(implementation, model.config, parameter.dtype, parameter.device, report)
    set_implementation(model, name)
    guard(model)
    return name


# What was measured here


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: the device and the versions of what runs on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"lorakit": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def read_choice(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """The implementation that was chosen for such attention on this machine with these versions, or None."""
    name = _choices_of(machine(device)).get(_key(shape, dtype), {}).get("implementation")
    return str(name) if name in IMPLEMENTATIONS and lacking(name, shape, dtype, device) is None else None


def write_choice(proof: Proof, dtype: torch.dtype, device: torch.device, implementation: str) -> Path:
    """Keep a choice with the measurements that it rests on; returns the file. Raises DiskFailed, Busy."""
    here = machine(device)
    evidence = [dataclasses.asdict(row) for row in proof.rows if row.backend == implementation]
    choice = {"implementation": implementation, "evidence": evidence}
    path = cache_folder() / CHOICES
    with artifacts.lock(path):
        # one entry a device: what was measured there with other versions is gone
        others = [one for one in _machines() if one["machine"].get("device") != here["device"]]
        own = {"machine": here, "choices": {**_choices_of(here), _key(proof.shape, dtype): choice}}
        disk.write_file(path, (json.dumps([*others, own], indent=1) + "\n").encode())
    return path


def _choices_of(here: Mapping[str, str]) -> dict[str, Any]:
    return next((dict(one["choices"]) for one in _machines() if one["machine"] == here), {})


def _machines() -> list[dict[str, Any]]:
    """What was kept, a machine each. It is a cache: what can't be read is measured again."""
    try:
        content = json.loads((cache_folder() / CHOICES).read_bytes())
        for one in content:
            if not all(isinstance(choice, dict) for choice in one["choices"].values()) or not dict(one["machine"]):
                return []
        return list(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _key(shape: Shape, dtype: torch.dtype) -> str:
    return f"{shape}, {str(dtype).removeprefix('torch.')}"


# A model folder's config.json


def stock_choice(proof: Proof) -> str:
    """The fastest right implementation of those that transformers knows without lorakit, in rows as stock code mostly
    has them (causal); eager, which takes memory by the square of the length, only where no other is right.

    Raises EnvironmentUnusable where none is.
    """
    chosen = best(proof.rows, [name for name in STOCK if name != "eager"], "causal") or best(proof.rows, ["eager"])
    if chosen is None:
        raise none_is_right(proof.rows)
    return chosen


def apply_to(folder: Path, implementation: str) -> Patched:
    """Write an implementation into a model folder's config.json, which stock transformers then uses; what it was is
    kept beside it. Doing it twice changes nothing more.

    Raises InputRefused where the folder is no model or only lorakit knows the implementation, Busy, DiskFailed.
    """
    _require_stock(implementation)
    path, backup = folder / "config.json", folder / artifacts.BACKUP
    with artifacts.lock(folder):
        before = _read_config(path)
        content = json.loads(before)
        if content.get(_KEY) == implementation:
            return Patched(path, implementation, changed=False)
        if not _is_of(backup, content):  # none yet, or one of a config that is there no more
            disk.write_file(backup, before)
        _put(path, (json.dumps({**content, _KEY: implementation}, indent=2) + "\n").encode())
    return Patched(path, implementation, changed=True)


def revert(folder: Path) -> Patched:
    """Put back the config.json that was there before `apply_to`, byte for byte.

    Raises InputRefused where there is none, or config.json was changed in something else since; Busy, DiskFailed.
    """
    path, backup = folder / "config.json", folder / artifacts.BACKUP
    with artifacts.lock(folder):
        content = json.loads(_read_config(path))
        if not backup.is_file():
            raise InputRefused(
                f"{folder}: found no {artifacts.BACKUP}, need what --apply-to keeps",
                "nothing was applied here, or it was reverted",
            )
        before = _read_config(backup)
        if not _is_of(backup, content):
            raise InputRefused(
                f"{path}: found other settings than in {artifacts.BACKUP}, need those: it was changed since --apply-to",
                f"remove {_KEY!r} from config.json by hand, and {artifacts.BACKUP}",
            )
        _put(path, before)
        backup.unlink()
        disk.fsync_folder(folder)
    return Patched(path, json.loads(before).get(_KEY), changed=True)


def _is_of(backup: Path, content: Mapping[str, Any]) -> bool:
    """Whether a backup is there and differs from `content` in the implementation alone."""
    if not backup.is_file():
        return False
    kept = json.loads(_read_config(backup))
    return {**kept, _KEY: None} == {**content, _KEY: None}


def _put(path: Path, content: bytes) -> None:
    """Replace a model folder's config.json, in its manifest too where it has one."""
    if artifacts.is_artifact(path.parent):
        artifacts.amend(path.parent, path.name, content)
    else:
        disk.write_file(path, content)


def _read_config(path: Path) -> bytes:
    try:
        content = read_small(path, MAX_SETTINGS_BYTES, "give a local model folder")
        if isinstance(parse_json(content), dict):
            return content
        found = "no JSON object"
    except ValueError as error:
        found = str(error)
    raise InputRefused(f"{path}: found {found}, need a model's config", "give a local model folder")
