"""Everything that lorakit keeps on disk: folders that are whole or not there.

An artifact is a folder with a manifest, `lorakit.json`, that lists every file with its size and sha256 and carries the
hash of itself. `commit` is the only function that makes, replaces or completes one:

    files into a stage beside the target, each fsynced · manifest last · fsync stage · rename · fsync parent

A folder that can't be replaced by a rename (it exists already and is empty, a mount point, or a run folder with its
checkpoints) gets the staged files one by one, `lorakit.json` last. What a killed process leaves behind is swept by the
next one under the lock, so the recovery is always to run the same command again.
The system calls are disk.py's.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pydantic
import yaml

from lorakit import __version__
from lorakit.core import disk
from lorakit.core.disk import MANIFEST
from lorakit.core.errors import ArtifactDamaged, InputRefused, Mismatch, UsageError, differences, disk_failed
from lorakit.core.untrusted import MAX_SETTINGS_BYTES, parse_json, read_small

if TYPE_CHECKING:
    from lorakit.core.config import StepConfig

SETTINGS = "lorakit.yaml"
BACKUP = "config.json.before-patch-attention"
"""What `lorakit patch-attention --apply-to` leaves beside the model's own files."""
FORMAT = 1
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
"""Whose versions a manifest records: what could change an artifact's bytes."""

MADE_BY = {
    "blocks": "lorakit prepare",
    "checkpoint": "lorakit train",
    "adapter": "lorakit train",
    "merged model": "lorakit merge",
    "quantized base": "lorakit train",
    "base": "lorakit demo",
}
"""Every kind of artifact and the command that makes it."""

OtherWorkHint = Callable[[Mapping[str, object]], str]
"""What to do where work differs: of the settings and inputs that do, by name, what they are in what is there."""


def _other_work(found: Mapping[str, object]) -> str:
    return "choose another --output, or add --overwrite"


def _shown(parent: object) -> str:
    """A parent with its fingerprint shortened to eight digits."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1…", str(parent))


_MAX_MANIFEST_BYTES = 4 * MAX_SETTINGS_BYTES  # a hundred thousand files
_Made = TypeVar("_Made")
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\x00]+")
_REPLACED = "replaced.json"  # in a stage: the manifest of what it replaces in place
_NEXT_TO_LAST = "adapter_config.json"  # a folder without it is no adapter to peft, so it appears after the weights


@dataclass(frozen=True)
class Artifact:
    """A whole artifact: every file was there, with the bytes that its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved settings that made it."""
        return dict(self.manifest["config"])

    @property
    def parents(self) -> Mapping[str, str]:
        """The fingerprint of each input."""
        return dict(self.manifest["parents"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its maker found out (counts, losses, …)."""
        return dict(self.manifest["facts"])

    def facts_as(self, maker: type[_Made], **given: object) -> _Made:
        """Its facts, and what is given besides, as the dataclass that its maker returns.

        Raises InputRefused where they aren't such facts: a manifest is no signature.
        """
        return as_dataclass(maker, {**self.facts, **given}, self.path / MANIFEST)

    @property
    def fingerprint(self) -> str:
        """The hash of its content: the same bytes give the same fingerprint, whenever and wherever they were made."""
        return fingerprint(
            {name: entry["sha256"] for name, entry in self.manifest["files"].items() if name != SETTINGS}
        )


def fingerprint(content: object) -> str:
    """sha256 of `content` as canonical JSON."""
    return hashlib.sha256(_canonical(content)).hexdigest()


def as_dataclass(kind: type[_Made], content: Mapping[str, Any], path: Path) -> _Made:
    """What a file of an artifact says, as this dataclass: each field of its type, numbers finite. Raises
    InputRefused."""
    try:
        made = pydantic.TypeAdapter(kind).validate_json(json.dumps(content, default=str), strict=True)
        fault = next((name for name, value in vars(made).items() if _is_too_large(value)), None)
        reason = "a number that is too large"
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        fault, reason = ".".join(map(str, first["loc"])) or "numbers", first["msg"]
    if fault is None:
        return made
    raise InputRefused(
        f"{path}: found {fault[:60]} that lorakit doesn't write ({reason}), though its hash is right; "
        "need what lorakit wrote",
        "don't use this folder: someone made that file by hand",
    )


def _is_too_large(value: Any) -> bool:
    """Whether a number is in it that floats don't hold, as JSON may have them."""
    if isinstance(value, dict | list):
        return any(map(_is_too_large, value.values() if isinstance(value, dict) else value))
    if dataclasses.is_dataclass(value):
        return any(map(_is_too_large, vars(value).values()))
    return isinstance(value, int | float) and not -sys.float_info.max <= value <= sys.float_info.max


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The manifest as it lies on disk; content's own hash is its last key."""
    body = {name: value for name, value in content.items() if name != "sha256"}
    return (json.dumps({**body, "sha256": fingerprint(body)}, indent=1) + "\n").encode()


# Reading


def read_manifest(folder: Path, hint: str = "check the path") -> Mapping[str, Any]:
    """The manifest of `folder`, its own hash checked.

    Raises InputRefused where there is none, ArtifactDamaged where any byte of it differs from what was written.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        found = "no such folder" if not folder.is_dir() else f"a folder without {MANIFEST}"
        raise InputRefused(f"{folder}: found {found}, need a lorakit artifact", hint)
    raw = read_small(path, _MAX_MANIFEST_BYTES, hint)
    try:
        content = parse_json(raw)
        whole = _manifest_bytes(content) == raw
    except (ValueError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ArtifactDamaged(
            f"{path}: found a manifest whose bytes don't match their own hash, need it as lorakit wrote it",
            "make the artifact again: remove the folder and run the command that made it",
        )
    if type(content.get("format")) is int and content["format"] > FORMAT:
        raise InputRefused(
            f"{path}: found format {content['format']}, need at most {FORMAT}",
            f"use the lorakit that wrote it: {content.get('lorakit')} or newer",
        )
    if not _is_lorakits(content):
        raise InputRefused(
            f"{path}: found a manifest that lorakit doesn't write, though its hash is right; need one of lorakit's",
            "don't use this folder: someone made that file by hand",
        )
    return dict(content)


def _is_lorakits(content: Mapping[str, Any]) -> bool:
    """Whether a manifest has what one has, and names files of its own folder only."""
    parts = {name: content.get(name) for name in ("config", "parents", "facts", "files")}
    return (
        content.get("kind") in list(MADE_BY)
        and type(content.get("format")) is int
        and all(isinstance(part, dict) for part in parts.values())
        and all(isinstance(parent, str) for parent in content["parents"].values())
        and all(
            _FILE_NAME.fullmatch(name)
            and isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
            for name, entry in content["files"].items()
        )
    )


def require_kind(folder: Path, kind: str) -> Mapping[str, Any]:
    """The manifest of an artifact of this kind; its files aren't looked at. Raises InputRefused (nothing there, or
    another kind), ArtifactDamaged (its manifest)."""
    hint = f"`{MADE_BY[kind]}` makes {kind} folders"
    if folder.is_file():
        of_data = f"--dataset {shlex.quote(str(folder))}, which makes blocks of it first"
        raise InputRefused(f"{folder}: found a file, need a {kind} folder", of_data if kind == "blocks" else hint)
    manifest = read_manifest(folder, hint)
    if manifest["kind"] != kind:
        raise InputRefused(f"{folder}: found {manifest['kind']}, need {kind}", hint)
    return manifest


def open_artifact(folder: Path, kind: str) -> Artifact:
    """The artifact of this kind in `folder`, every file checked against the manifest.

    Raises InputRefused (nothing there, or another kind), ArtifactDamaged (a file isn't what the manifest says).
    """
    manifest = require_kind(folder, kind)
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            there = path.stat()
            found = f"{there.st_size} bytes" if stat.S_ISREG(there.st_mode) else "something that is no file"
            damaged = there.st_size != entry["bytes"] or not stat.S_ISREG(there.st_mode)
            if not damaged and disk.sha256(path) != entry["sha256"]:
                found, damaged = "other bytes than were written", True
        except FileNotFoundError:
            found, damaged = "no file", True
        except OSError as error:
            raise disk_failed(error, path) from error
        if damaged:
            raise ArtifactDamaged(
                f"{path}: found {found}, need {entry['bytes']} bytes with sha256 {entry['sha256'][:12]}…",
                f"restore the file, or remove {folder} and run `{MADE_BY[kind]}` again",
            )
    return Artifact(folder, manifest)


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


# Claiming an output


@contextlib.contextmanager
def lock(target: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `target` for one process and sweep what a killed one left there.

    Where another process holds it: raises Busy, or tells `on_wait` (again and again) and waits for it. Raises
    DiskFailed where the place can't be written, UsageError where its name leaves no room for that of a stage.
    """
    target = target.resolve()
    path = _lock_of(target)
    disk.make_folder(path.parent)
    _refuse_long_name(target)
    with disk.held(path, on_wait):
        try:
            _sweep(target)
        except OSError as error:
            raise disk_failed(error, target) from error
        yield


def is_held(target: Path) -> bool:
    """Whether a process holds `target` now, as far as that can be told without touching it."""
    try:
        return disk.keeps_out(_lock_of(target.resolve()))
    except OSError:
        return False


def _lock_of(target: Path) -> Path:
    return (target if os.path.ismount(target) else target.parent) / f".{target.name}.lock"


def _refuse_long_name(target: Path) -> None:
    """Raises UsageError where a stage or the lock's other files would have a name that the file system can't hold."""
    added = len(f"..lock.{uuid.uuid4().hex}.lock")
    try:
        longest = os.pathconf(target.parent, "PC_NAME_MAX") - added
    except (OSError, ValueError):
        return  # what it is, is found when a name is made
    if len(os.fsencode(target.name)) > longest:
        raise UsageError(
            f"--output …/{target.name[:30]}…: found a name of {len(os.fsencode(target.name))} bytes, need at most "
            f"{longest} ({added} are added while it is written)",
            "choose a shorter one",
        )


def claim(
    target: Path,
    kind: str,
    config: "StepConfig",
    parents: Mapping[str, str],
    *,
    overwrite: bool,
    unfinished: Collection[str] = (),
    may_differ: Collection[str] = (),
    may_lack: Collection[str] = (),
    hint: OtherWorkHint = _other_work,
) -> Artifact | None:
    """The artifact that this very work has made at `target` already, or None where the target may be written.

    `unfinished` names what work of this kind leaves at its target before it is done, `may_differ` settings that may be
    others than the artifact's, `may_lack` parents that one of an older lorakit doesn't name.

    Raises Mismatch where `target` holds other work, InputRefused where it holds something that isn't lorakit's: neither
    is ever touched, and only the first can be overwritten on request.
    """
    if not target.exists() or (target.is_dir() and set(_visible(target)) <= set(unfinished)):
        return None
    if not target.is_dir() or not is_artifact(target):
        raise InputRefused(
            f"{target}: found {'files that are not' if target.is_dir() else 'a file that is not'} lorakit's, "
            "need a new or empty folder",
            "choose another --output",
        )
    try:
        manifest = read_manifest(target)
        if manifest["kind"] != kind:
            raise Mismatch(
                f"{target}: found {manifest['kind']}, need a new or empty folder for {kind}",
                "choose another --output, or replace it with --overwrite",
            )
        artifact = Artifact(target, manifest)
        known = {name: parents[name] for name in parents if name not in may_lack or name in artifact.parents}
        refuse_other_work(artifact, config, known, hint, may_differ)
        return open_artifact(target, kind)
    except (ArtifactDamaged, Mismatch):
        if overwrite:
            refuse_foreign(target, unfinished)
            return None
        raise


def refuse_foreign(target: Path, own: Collection[str] = ()) -> None:
    """Raises Mismatch where an artifact that is to be replaced has files beside it that its manifest doesn't name, but
    for `own` that its maker leaves there: they would go with it. On a mount point they stay."""
    if os.path.ismount(target.resolve()):
        return
    foreign = sorted(set(_visible(target)) - {MANIFEST, BACKUP, *_named_in(target / MANIFEST), *own})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise Mismatch(
            f"{target}: found {foreign[0]}{more} that {MANIFEST} doesn't name, need a folder of lorakit's files alone "
            "to replace",
            "move what is yours elsewhere, or choose another --output",
        )


def refuse_other_work(
    artifact: Artifact,
    config: "StepConfig",
    parents: Mapping[str, str],
    hint: OtherWorkHint,
    may_differ: Collection[str] = (),
) -> None:
    """Raises Mismatch with the differences where `artifact` comes from other settings or inputs than these."""
    wanted = {name: value for name, value in config.identity().items() if name not in may_differ}
    made_with = {name: _made_with(artifact, config, name, value) for name, value in wanted.items()}
    changed = {name: made_with[name] for name in wanted if made_with[name] != wanted[name]}
    before, now = artifact.parents, dict(parents)
    others = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    lines = differences(changed, {name: wanted[name] for name in changed})
    lines += differences(*({name: _shown(each[name]) for name in others if name in each} for each in (before, now)))
    if changed or others:
        listed = "\n  ".join(lines)
        what_to_do = hint({**changed, **{name: before.get(name) for name in others}})
        raise Mismatch(f"{artifact.path}: found {artifact.kind} of other work, need the same:\n  {listed}", what_to_do)


def _made_with(artifact: Artifact, config: "StepConfig", name: str, wanted: object) -> object:
    """A setting of an artifact; of one that is newer than the artifact what it means there, as it is wanted now where
    that agrees with it."""
    before = config.settings()[name].extra["before"]
    if name in artifact.config or not before:
        return artifact.config.get(name)
    return wanted if wanted in before else before[0]


# Writing


def commit(
    target: Path,
    kind: str,
    files: Iterable[tuple[str, disk.Content]],
    *,
    config: "StepConfig",
    parents: Mapping[str, str],
    facts: Mapping[str, Any],
    keep: Iterable[str] = (),
    check: Callable[[Path], None] | None = None,
) -> Artifact:
    """Write `files` as an artifact at `target`: whole at its end, unchanged before. The caller holds the lock.

    `facts` may be filled while `files` is consumed. `keep` names files that lie in `target` already and become part of
    the artifact. `check` looks at the staged folder before it is put in place, and raises to refuse it.
    Raises DiskFailed; an artifact that is replaced stays whole until the new one is.
    """
    target = target.resolve()
    inside = target.is_dir() and (os.path.ismount(target) or not is_artifact(target))
    token = uuid.uuid4().hex
    stage = target / f".stage-{token}" if inside else target.parent / f".stage-{target.name}-{token}"
    placing = False
    try:
        try:
            os.mkdir(stage)
            entries = {name: disk.write_new(stage / name, content) for name, content in files}
            entries[SETTINGS] = disk.write_new(stage / SETTINGS, settings_text(config))
            entries |= {name: disk.described(target / name) for name in keep}
            if check is not None:
                check(stage)
            manifest = {
                "kind": kind,
                "format": FORMAT,
                "lorakit": __version__,
                "versions": _library_versions(),
                "config": config.flat(),
                "parents": dict(parents),
                "facts": dict(facts),
                "files": entries,
            }
            disk.write_new(stage / MANIFEST, _manifest_bytes(manifest))
            disk.fsync_folder(stage)
            if inside:
                placing = True  # from here on what fails is completed by the next sweep
                _move_in(stage, target)
            else:
                _replace(stage, target, target.parent / f".trash-{target.name}-{token}", ())
        except BaseException:
            if not placing:
                _discard(stage)
            raise
    except OSError as error:
        raise disk_failed(error, target) from error
    return Artifact(target, read_manifest(target))


def reopen(folder: Path, unfinished: Collection[str]) -> None:
    """Make an artifact the unfinished work again that it was: all but `unfinished` goes. The caller holds the lock.

    What goes is moved into a stage, manifest first, so that after a kill it is moved in again: before the stage is
    removed the artifact was never lost.
    """
    stage = folder / f".stage-{uuid.uuid4().hex}"
    names = [name for name in _visible(folder) if name not in unfinished]
    try:
        os.mkdir(stage)
        for name in sorted(names, key=lambda name: name != MANIFEST):
            os.rename(folder / name, stage / name)
        disk.fsync_folder(folder)
    except OSError as error:
        raise disk_failed(error, folder) from error
    _discard(stage)


def amend(folder: Path, name: str, content: bytes) -> None:
    """Replace one file of an artifact, under the caller's lock: whole before and after; what is killed between is
    completed by the next sweep.

    Raises InputRefused where the artifact has no such file, ArtifactDamaged where it isn't what the manifest says,
    DiskFailed.
    """
    manifest = read_manifest(folder)
    if name not in manifest["files"]:
        raise InputRefused(f"{folder / name}: found no such file in {MANIFEST}, need one", "check the folder")
    if disk.described(folder / name) != manifest["files"][name]:
        raise ArtifactDamaged(
            f"{folder / name}: found other bytes than were written, need those",
            f"restore the file, or remove {folder} and run `{MADE_BY[manifest['kind']]}` again",
        )
    stage = folder / f".stage-{uuid.uuid4().hex}"
    try:
        os.mkdir(stage)
        try:
            entries = {**manifest["files"], name: disk.write_new(stage / name, content)}
            disk.write_new(stage / MANIFEST, _manifest_bytes({**manifest, "files": entries}))
            disk.fsync_folder(stage)
        except BaseException:
            _discard(stage)
            raise
        _move_in(stage, folder)
    except OSError as error:
        raise disk_failed(error, folder) from error


def replace(new: Path, target: Path, own: Collection[str]) -> None:
    """Give a whole artifact the name of another one, which goes only after that, with what is its maker's `own` besides
    the files that its manifest names. Raises Mismatch where there is more, DiskFailed."""
    target = target.resolve()
    try:
        _replace(new, target, target.with_name(f".trash-{target.name}-{uuid.uuid4().hex}"), own)
    except OSError as error:
        raise disk_failed(error, target) from error


def sweep(folder: Path) -> None:
    """Remove the stages and trash that a killed process left in `folder`, under its lock. Raises DiskFailed."""
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            if re.fullmatch(r"\.(stage|trash)-(.+-)?[0-9a-f]{32}", path.name):
                _drop(path)
    except OSError as error:
        raise disk_failed(error, folder) from error


def set_aside(folder: Path) -> Path:
    """Rename a damaged artifact so that nothing takes it for a whole one, and nothing deletes it. Raises DiskFailed."""
    aside = folder.with_name(f"bad-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(folder, aside)
        disk.fsync_folder(folder.parent)
    except OSError as error:
        raise disk_failed(error, folder) from error
    return aside


def remove(folder: Path) -> None:
    """Remove an artifact: never half there under its name. Raises DiskFailed."""
    trash = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex}")
    try:
        os.rename(folder, trash)
        disk.fsync_folder(folder.parent)
        _discard(trash)
    except OSError as error:
        raise disk_failed(error, folder) from error


def settings_text(config: "StepConfig") -> bytes:
    """The resolved settings as the `lorakit.yaml` that `--config` accepts back."""
    return yaml.safe_dump(config.flat(), sort_keys=False).encode()  # in ASCII: PyYAML reads a raw U+0085 as a space


def _library_versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _replace(stage: Path, target: Path, trash: Path, own: Collection[str]) -> None:
    """Put the stage at the target's name; what was there goes only after that, and only where it is lorakit's."""
    replacing = target.exists()
    if replacing:
        refuse_foreign(target, own)
        os.rename(target, trash)
    try:
        os.rename(stage, target)
    except OSError:
        if replacing:
            with contextlib.suppress(OSError):
                os.rename(trash, target)
        raise
    disk.fsync_folder(target.parent)
    if replacing:
        _discard(trash)


def _move_in(stage: Path, target: Path) -> None:
    """Move the staged files into an existing folder, `lorakit.json` last; goes on where a killed one stopped."""
    disk.fsync_folder(target)  # the stage's name before anything leaves it: files without it would be nobody's
    replaced = stage / _REPLACED
    if is_artifact(target):  # a mount point that is overwritten: from here on it isn't an artifact until the end
        os.rename(target / MANIFEST, replaced)
    if replaced.exists():
        for name in _named_in(replaced) - set(read_manifest(stage)["files"]):
            (target / name).unlink(missing_ok=True)
        os.unlink(replaced)
    names = [name for name in os.listdir(stage) if name not in (MANIFEST, _NEXT_TO_LAST)]
    for name in [*sorted(names), *([_NEXT_TO_LAST] if (stage / _NEXT_TO_LAST).exists() else [])]:
        os.rename(stage / name, target / name)
    disk.fsync_folder(target)
    os.rename(stage / MANIFEST, target / MANIFEST)
    disk.fsync_folder(target)
    os.rmdir(stage)


def _named_in(manifest: Path) -> set[str]:
    """The files that a manifest names; none where there is none, or a damaged one, as --overwrite may find."""
    try:
        content = parse_json(manifest.read_bytes())
        return set(content["files"]) if _is_lorakits(content) else set()
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return set()


def _discard(folder: Path) -> None:
    """Remove a stage or trash as far as that is possible; the manifest first, so that no rest of it looks whole."""
    with contextlib.suppress(OSError):
        os.unlink(folder / MANIFEST)
    shutil.rmtree(folder, ignore_errors=True)


def _drop(path: Path) -> None:
    if path.is_dir():
        _discard(path)
    else:
        os.unlink(path)


def _sweep(target: Path) -> None:
    """Complete or remove what a killed process left beside and inside `target`. Only under its lock."""
    beside = re.compile(rf"\.(stage|trash)-{re.escape(target.name)}-[0-9a-f]{{32}}")
    leftovers = [path for path in target.parent.iterdir() if beside.fullmatch(path.name)]
    for path in leftovers:
        if path.name.startswith(".trash-") and not target.exists() and _was_moving_in(path, path):
            os.rename(path, target)  # killed between the two renames of a replacement, and not while it was removed
        else:
            _drop(path)
    if target.is_dir():
        for path in [path for path in target.iterdir() if re.fullmatch(r"\.stage-[0-9a-f]{32}", path.name)]:
            if _was_moving_in(path, target):
                _move_in(path, target)
        sweep(target)


def _was_moving_in(stage: Path, target: Path) -> bool:
    """Whether `stage` was complete: each file that its manifest names is in it, or in `target`, with its size."""
    try:
        files = read_manifest(stage)["files"]
        places = {name: stage / name if (stage / name).exists() else target / name for name in files}
        return all(places[name].stat().st_size == entry["bytes"] for name, entry in files.items())
    except (InputRefused, ArtifactDamaged, FileNotFoundError):
        return False


def _visible(folder: Path) -> list[str]:
    """What lies in `folder` besides lorakit's own lock and stages."""
    own = re.compile(r"\.(stage|trash)-.*|\..*\.lock|lost\+found")
    return [name for name in os.listdir(folder) if not own.fullmatch(name)]
