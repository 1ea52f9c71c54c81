"""Which implementation of attention a model gets: what was measured here, kept, and applied.

lorakit patch-attention --apply   writes the fastest right one for a model's shape to attention.json in the cache
train --attention auto            takes it while machine and versions are the same, else proves one again
--apply-to, --revert              write it into a model folder's config.json, and take it out again
apply(model)                      for code of anyone's
"""

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakit.core import artifacts, disk
from lorakit.core.config import PatchAttentionConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import EnvironmentUnusable, InputRefused
from lorakit.core.events import Notice, Report
from lorakit.core.hub import config_folder
from lorakit.core.implementations import (
    IMPLEMENTATIONS,
    STOCK,
    Shape,
    lacking,
    refuse_leaking_mask,
    register,
    shape_of,
)
from lorakit.core.model import load_config, pick_device, pick_dtype
from lorakit.core.proving import Proof, Row, prove

CHOICES = "attention.json"
BACKUP = "config.json.before-patch-attention"
_KEY = "attn_implementation"
_QUICK_TOKENS = 256


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
    HubFailed, DiskFailed.
    """
    asked, applying = config.attention, config.applying
    device = pick_device()
    dtype = pick_dtype(config.attention.dtype, device)
    on_gpu = device.type == "cuda"
    folder = config_folder(asked.model or str(applying.apply_to))
    size = asked.block_size or (2048 if on_gpu else 256)
    proof = prove(load_config(folder), dtype, device, size, asked.batch_size, report)
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


def resolve(name: str, config: Any, dtype: torch.dtype, device: torch.device, report: Report) -> str:
    """The implementation for training a model (of its transformers config) on packed blocks; `name` may be auto.

    auto is what was measured on this machine with these versions, else the first of IMPLEMENTATIONS that a small proof
    finds right. Raises InputRefused where the model or device can't have the one that is named, EnvironmentUnusable
    where none is right.
    """
    register()
    shape = shape_of(config)
    if name != "auto":
        if name not in IMPLEMENTATIONS:
            need = f"auto or one of {', '.join(IMPLEMENTATIONS)}"
            raise InputRefused(f"attention: found {name!r}, need {need}", "correct the name")
        if (reason := lacking(name, shape, dtype, device)) is not None:
            raise InputRefused(f"attention {name}: found that {reason}, need another", "choose --attention auto")
        return name
    if (chosen := read_choice(shape, dtype, device)) is not None:
        return chosen
    wrong: list[Row] = []
    for candidate in IMPLEMENTATIONS:
        if lacking(candidate, shape, dtype, device) is not None:
            continue
        proof = prove(
            *(config, dtype, device, _QUICK_TOKENS, 1, _nothing), names=(candidate,), only=("packed",), measured=False
        )
        if proof.implementation is not None:
            return candidate
        wrong += proof.rows
        for row in proof.rows:
            report(Notice(f"attention {candidate} isn't used: {row.reason}"))
    raise none_is_right(wrong)


def require_right(proof: Proof) -> None:
    """Raises EnvironmentUnusable naming every row that isn't right."""
    wrong = [f"{row.backend}, {row.case}: {row.reason}" for row in proof.rows if not row.ok]
    if wrong:
        raise EnvironmentUnusable(
            "attention: found " + "; ".join(wrong) + "; need every implementation right in every case",
            "train with one that is right (--attention), or reinstall torch and transformers",
        )


def none_is_right(rows: Sequence[Row]) -> EnvironmentUnusable:
    """The error where no implementation passed."""
    reasons = "; ".join(f"{row.backend}, {row.case}: {row.reason}" for row in rows if not row.ok)
    return EnvironmentUnusable(
        f"attention: found none that is right for packed blocks ({reasons or 'none could run'}), need one",
        "reinstall torch and transformers; `lorakit patch-attention MODEL` shows every case",
    )


def _nothing(event: object) -> None: ...


def apply(model: Any, implementation: str = "auto", report: Report = _nothing) -> str:
    """Give a loaded transformers model an implementation, the one that `resolve` finds; returns its name.

    From then on the model refuses an attention mask beside packed positions, with which transformers lets documents
    see each other without a word. Raises what `resolve` raises.
    """
    parameter = next(model.parameters())
    name = resolve(implementation, model.config, parameter.dtype, parameter.device, report)
    model.set_attn_implementation(name)
    if refuse_leaking_mask not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(refuse_leaking_mask, with_kwargs=True)
    return name


# What was measured here


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: the device and the versions of what runs on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def read_choice(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """The implementation that was chosen for such attention on this machine with these versions, or None."""
    content = _choices()
    if content["machine"] != machine(device):
        return None
    name = content["choices"].get(_key(shape, dtype), {}).get("implementation")
    return str(name) if name in IMPLEMENTATIONS and lacking(name, shape, dtype, device) is None else None


def write_choice(proof: Proof, dtype: torch.dtype, device: torch.device, implementation: str) -> Path:
    """Keep a choice with the measurements that it rests on; returns the file. Raises DiskFailed."""
    content, here = _choices(), machine(device)
    choice = {
        "implementation": implementation,
        "evidence": [dataclasses.asdict(row) for row in proof.rows if row.backend == implementation],
    }
    kept = content["choices"] if content["machine"] == here else {}
    path = cache_folder() / CHOICES
    disk.make_folder(path.parent)
    written = {"machine": here, "choices": {**kept, _key(proof.shape, dtype): choice}}
    disk.write_file(path, (json.dumps(written, indent=1) + "\n").encode())
    return path


def _choices() -> dict[str, Any]:
    try:
        content = json.loads((cache_folder() / CHOICES).read_bytes())
        if isinstance(content["machine"], dict) and all(isinstance(one, dict) for one in content["choices"].values()):
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a cache: what can't be read is measured again
    return {"machine": None, "choices": {}}


def _key(shape: Shape, dtype: torch.dtype) -> str:
    return f"{shape}, {str(dtype).removeprefix('torch.')}"


# A model folder's config.json


def stock_choice(proof: Proof) -> str:
    """The fastest right implementation that transformers knows without lorakit. Raises EnvironmentUnusable."""
    right = {row.backend for row in proof.rows} - {row.backend for row in proof.rows if not row.ok}
    packed = [row for row in proof.rows if row.case == "packed" and row.backend in right.intersection(STOCK)]
    if not packed:
        raise none_is_right(proof.rows)
    return min(packed, key=lambda row: row.seconds).backend


def apply_to(folder: Path, implementation: str) -> Patched:
    """Write an implementation into a model folder's config.json, which stock transformers then uses; what it was is
    kept beside it. Doing it twice changes nothing more.

    Raises InputRefused where the folder is no model or only lorakit knows the implementation, DiskFailed.
    """
    if implementation not in STOCK:
        raise InputRefused(
            f"--apply-to: found {implementation}, which transformers knows through lorakit only; "
            f"need one of {', '.join(STOCK)}",
            "leave out --implementation, or use `lorakit train --attention varlen`, which changes no model",
        )
    path = folder / "config.json"
    before = _read_config(path)
    content = json.loads(before)
    if content.get(_KEY) == implementation:
        return Patched(path, implementation, changed=False)
    backup = folder / BACKUP
    if not backup.exists():
        disk.write_file(backup, before)
    _put(folder, path, (json.dumps({**content, _KEY: implementation}, indent=2) + "\n").encode())
    return Patched(path, implementation, changed=True)


def revert(folder: Path) -> Patched:
    """Put back the config.json that was there before `apply_to`, byte for byte. Raises InputRefused, DiskFailed."""
    path, backup = folder / "config.json", folder / BACKUP
    _read_config(path)
    if not backup.is_file():
        raise InputRefused(
            f"{folder}: found no {BACKUP}, need what --apply-to keeps", "nothing was applied here, or it was reverted"
        )
    before = backup.read_bytes()
    _put(folder, path, before)
    backup.unlink()
    disk.fsync_folder(folder)
    return Patched(path, json.loads(before).get(_KEY), changed=True)


def _put(folder: Path, path: Path, content: bytes) -> None:
    if artifacts.is_artifact(folder):
        artifacts.amend(folder, path.name, content)
    else:
        disk.write_file(path, content)


def _read_config(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        if isinstance(json.loads(content), dict):
            return content
        found = "no JSON object"
    except FileNotFoundError:
        found = "no such file"
    except ValueError as error:
        found = str(error)
    raise InputRefused(f"{path}: found {found}, need a model's config", "give a local model folder")
