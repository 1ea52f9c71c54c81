"""Datasets wherever they lie (files, folders, patterns, the Hub) → chunks of raw rows in a fixed order.

    names → which files, of which subset and split → rows as they stand, each with its place

Nothing of a row is looked at here but where it begins and ends; no code that comes with a dataset is run.
"""

import datetime
import glob
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core import artifacts, disk
from lorakit.core.errors import InputRefused, disk_failed
from lorakit.core.events import Notice, Report
from lorakit.core.hub import DATA_KINDS, PACKINGS, dataset_snapshot
from lorakit.core.readers import Chunk, File, kind_of, read_chunks, size_bytes_of
from lorakit.core.untrusted import TakesTooLong, bounded, parse_yaml, read_json_object

_KNOWN = f"{', '.join(DATA_KINDS)}, also with {' or '.join(PACKINGS)} behind"
_LEFT_OUT = re.compile(r"readme\..*|licen[sc]e(\..*)?|dataset_(info|infos|dict)\.json|state\.json", re.IGNORECASE)
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/[0-9]{4}\.parquet")
_CONVERTED_REVISION = "refs/convert/parquet"
_MAX_README_BYTES = 2**20
_CPU_SECONDS = 10.0  # for what someone wrote into it
_SAVE_AGAIN = "save the dataset again with save_to_disk"


@dataclass(frozen=True)
class Dataset:
    """Files that are read one after the other; `names` are those that were asked for."""

    names: tuple[str, ...]
    files: tuple[File, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files as they lie on disk. Raises DiskFailed."""
        return sum(size_bytes_of(file) for file in self.files)

    def fingerprint(self) -> str:
        """The hash of every file's kind and bytes, in order; names, places and times don't count. Raises DiskFailed."""
        return artifacts.fingerprint([[file.kind, _hash(file)] for file in self.files])

    def stamps(self) -> dict[Path, disk.Stamp | None]:
        """`disk.stamp` of every file. Raises DiskFailed."""
        return {file.path: disk.stamp(file.path) for file in self.files}

    def chunks(self) -> Iterator[Chunk]:
        """The raw rows of all files, in order, a chunk at a time.

        Raises InputRefused naming the file (and line or row) where it is damaged or isn't what its kind says,
        DiskFailed where the disk fails.
        """
        before_bytes = 0
        for file in self.files:
            yield from read_chunks(file, before_bytes)
            before_bytes += size_bytes_of(file)


def _hash(file: File) -> str:
    try:
        return disk.sha256(file.path)
    except OSError as error:
        raise disk_failed(error, file.path) from error


@dataclass(frozen=True)
class _Choice:
    """What to take of a dataset that has several splits or subsets."""

    split: str | None
    subset: str | None
    default_splits: Sequence[str]

    def default_split(self, there: Collection[str]) -> str | None:
        return next((split for split in self.default_splits if split in there), None)


def open_dataset(
    names: Sequence[str],
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    default_splits: Sequence[str] = ("train",),
    timeout_seconds: float = 10.0,
    report: Report,
) -> Dataset:
    """The files that `names` stand for: each a file, a folder, a pattern or a dataset on the Hub, in this order.

    `split` and `subset` choose in folders and Hub datasets, `revision` is the Hub's; without a split the first of
    `default_splits` that there is; what is chosen so is reported. Raises InputRefused where there is no such data,
    HubFailed where the Hub can't be reached or refuses.
    """
    found_as = {_named_as(name) for name in names}
    for option, value, able in (
        ("--split", split, {"folder", "hub id"}),
        ("--subset", subset, {"folder", "hub id"}),
        ("--revision", revision, {"hub id"}),
    ):
        if value is not None and not found_as & able:
            found = " and ".join(sorted(found_as)) or "nothing"
            raise InputRefused(
                f"{option} {value}: found a dataset named by {found}, need a {' or '.join(sorted(able))} for it",
                f"leave out {option}",
            )
    choice = _Choice(split, subset, default_splits)
    files: list[File] = []
    for name in names:
        match _named_as(name):
            case "file":
                files.append(_file(Path(name), name))
            case "pattern":
                files += _matching(name)
            case "folder":
                files += _in_folder(Path(name), str(Path(name)), choice, report)
            case _:
                files += _on_hub(name, choice, revision, timeout_seconds, report)
    if not files:
        raise InputRefused("found no dataset, need one", "name a file, a folder or a hub id")
    return Dataset(tuple(names), tuple(files))


# Names → files


def _named_as(name: str) -> str:
    """What a name means: "file", "folder", "pattern" or "hub id"."""
    if os.path.isfile(name):
        return "file"
    if os.path.isdir(name):
        return "folder"
    if os.path.lexists(name):
        raise InputRefused(f"{name}: found neither a file nor a folder, need one of them", "name a data file or folder")
    if any(sign in name for sign in "*?["):
        return "pattern"
    if kind_of(name) is not None:
        raise InputRefused(f"{name}: found no such file, need a data file", "check the path")
    return "hub id"


def _file(path: Path, name: str) -> File:
    kind = kind_of(path.name)
    if kind is None:
        raise InputRefused(f"{name}: found a file of unknown kind, need one of {_KNOWN}", "convert it, or rename it")
    return File(path, name, kind)


def _matching(pattern: str) -> list[File]:
    try:
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    except ValueError:  # a NUL byte
        found = []
    if not found:
        raise InputRefused(f"{pattern}: found no file that matches, need at least one", "check the pattern")
    nearest: dict[str, str] = {}  # of the names of one file, which links give it
    for name in sorted(found, key=lambda name: (name.count("/"), name)):
        nearest.setdefault(os.path.realpath(name), name)
    return [_file(Path(name), name) for name in sorted(nearest.values())]


def _on_hub(name: str, choice: _Choice, revision: str | None, timeout_seconds: float, report: Report) -> list[File]:
    folder, _ = dataset_snapshot(name, revision, timeout_seconds)
    if revision is None and not _data_paths(folder):  # a dataset made by a script, which isn't run
        report(Notice(f"{name}: no data files; taking the Parquet files that the Hub made of it"))
        folder, _ = dataset_snapshot(name, _CONVERTED_REVISION, timeout_seconds)
    return _in_folder(folder, name, choice, report)


# Folders → files


def _in_folder(folder: Path, name: str, choice: _Choice, report: Report) -> list[File]:
    """The data files of one split of one subset; `name` is the folder's in messages."""
    split, subset = choice.split, choice.subset
    if artifacts.is_artifact(folder):
        kind = artifacts.read_manifest(folder)["kind"]
        raise InputRefused(
            f"{name}: found a {kind} folder of lorakit, need a dataset",
            "blocks go into `lorakit train --blocks`; a dataset is files of rows",
        )
    if (folder / "dataset_dict.json").is_file():
        there = _listed_splits(folder, name)
        chosen = _chosen("split", split, there, choice.default_split(there), name)
        _refuse_subset(subset, name)
        _tell(report, name, None, (chosen, there) if split is None else None, files := _saved(folder, name, chosen))
        return files
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        _refuse_subset(subset, name)
        own = read_json_object(folder / "state.json", _SAVE_AGAIN).get("_split")
        if split is not None and split != own:
            _chosen("split", split, [str(own)], None, name)
        return _saved(folder, name, "")
    paths = _data_paths(folder)
    subsets, default = _subsets(folder, name, paths)
    chosen_subset = None
    if subsets:
        chosen_subset = _chosen("subset", subset, list(subsets), default, name)
        splits = subsets[chosen_subset]()
    else:
        splits = _splits_by_name(_under(paths, subset, name))
    if not splits:
        raise InputRefused(f"{name}: found no data files, need files of {_KNOWN}", "check the path")
    chosen = _chosen("split", split, list(splits), choice.default_split(splits), name)
    if not splits[chosen]:
        raise InputRefused(
            f"{name}: found no data file that README.md's patterns for split {chosen} match, need at least one",
            "name the files themselves, or correct data_files in README.md",
        )
    files = [File(folder / path, f"{name}/{path}", str(kind_of(path))) for path in splits[chosen]]
    if subsets:  # what a README chose, not the user
        for file in files:
            _refuse_outside(file.path, file.name, folder)
    _tell(
        report,
        name,
        (str(chosen_subset), list(subsets)) if subset is None and subsets else None,
        (chosen, list(splits)) if split is None else None,
        files,
    )
    return files


def _chosen(what: str, wanted: str | None, there: Sequence[str], default: str | None, name: str) -> str:
    """The split or subset that is wanted, else the default one, else the only one."""
    if wanted is None and (default in there or len(there) == 1):
        return default if default is not None and default in there else there[0]
    if wanted is not None and wanted in there:
        return wanted
    listed = ", ".join(there) or "none"
    raise InputRefused(
        f"{name}: found the {what}s {listed}; need {'one of them' if wanted is None else wanted}",
        f"choose one that is there with --{what}",
    )


def _tell(
    report: Report,
    name: str,
    subset: tuple[str, Sequence[str]] | None,
    split: tuple[str, Sequence[str]] | None,
    files: Sequence[File],
) -> None:
    """Report what was chosen for the user among several: (chosen, what there is), or None where they chose."""
    choices = [
        f"{what} {choice[0]} of {', '.join(choice[1])}"
        for what, choice in (("subset", subset), ("split", split))
        if choice is not None and len(choice[1]) > 1
    ]
    if choices:
        report(Notice(f"{name}: {'; '.join(choices)} ({len(files)} files)"))


def _data_paths(folder: Path) -> list[str]:
    """Every file of a known kind in `folder`, sorted, relative to it; links are followed, but not in circles. What
    lorakit made in there (blocks, runs) is no data."""

    def walk(inside: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(folder / inside)
        if real in above:
            return
        for entry in os.scandir(folder / inside):
            path = f"{inside}/{entry.name}" if inside else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if not artifacts.is_artifact(folder / path):
                    yield from walk(path, (*above, real))
            elif entry.is_file() and kind_of(path) is not None and not _LEFT_OUT.fullmatch(entry.name):
                yield path

    if not folder.is_dir():
        return []  # a snapshot of nothing
    try:
        return sorted(walk("", ()))
    except OSError as error:
        raise disk_failed(error, folder) from error


def _under(paths: Sequence[str], subset: str | None, name: str) -> Mapping[str, str]:
    """The paths in the sub-folder of a subset, each with what it says of its split: its place below that folder."""
    if subset is None:
        return {path: path for path in paths}
    prefix = subset.rstrip("/") + "/"
    found = {path: path[len(prefix) :] for path in paths if path.startswith(prefix)}
    if not found:
        there = sorted({path.partition("/")[0] for path in paths if "/" in path})
        raise InputRefused(
            f"{name}: found the subsets {', '.join(there) or '(none)'}; need {subset}",
            "choose one that is there with --subset, or leave it out",
        )
    return found


def _splits_by_name(paths: Mapping[str, str]) -> Mapping[str, list[str]]:
    """Paths by the split that their last telling part names (train where none does), in the order of learning."""
    tables = {path: inside for path, inside in paths.items() if kind_of(path) != "txt"}
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for path, inside in (tables or paths).items():  # prose beside tables is about them
        splits[_split_of(inside)].append(path)
    return {split: found for split, found in splits.items() if found}


def _split_of(path: str) -> str:
    for part in reversed(path.lower().split("/")):
        for word in re.split(r"[-_. 0-9]+", part):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _refuse_outside(path: Path, name: str, folder: Path) -> None:
    """Raises InputRefused where `path` leads out of `folder` (but into the Hub's cache where that holds the folder)."""
    home = Path(os.path.realpath(folder))
    if home.parent.name == "snapshots" and (home.parent.parent / "blobs").is_dir():
        home = home.parent.parent
    if not Path(os.path.realpath(path)).is_relative_to(home):
        raise InputRefused(
            f"{name}: found a link out of the dataset's folder, need a file in it", "copy the file there"
        )


# Folders by datasets.save_to_disk


def _refuse_subset(subset: str | None, name: str) -> None:
    if subset is not None:
        raise InputRefused(
            f"{name}: found a dataset saved by save_to_disk, which has no subsets; need no --subset",
            "leave out --subset, or name the folder of that subset",
        )


def _listed_splits(folder: Path, name: str) -> list[str]:
    where = f"{name}/dataset_dict.json"
    splits = read_json_object(folder / "dataset_dict.json", _SAVE_AGAIN).get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise InputRefused(f"{where}: found no list of splits, need it as save_to_disk wrote it", "save it again")
    return splits


def _saved(folder: Path, name: str, split: str) -> list[File]:
    """The Arrow files of a saved dataset, in its own order; `split` is its sub-folder or ""."""
    inside = f"{split}/" if split else ""
    where = f"{name}/{inside}state.json"
    _refuse_leaving(inside, where, folder)
    state = read_json_object(folder / inside / "state.json", _SAVE_AGAIN)
    listed = state.get("_data_files")
    if state.get("_indices_data_files"):
        raise InputRefused(
            f"{where}: found rows that are chosen by indices, need them written out",
            "save it again after flatten_indices()",
        )
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("filename"), str) for entry in listed
    ):
        raise InputRefused(f"{where}: found no list of data files, need it as save_to_disk wrote it", "save it again")
    files = []
    for entry in listed:
        path = inside + entry["filename"]
        _refuse_leaving(path, where, folder)
        if not (folder / path).is_file():
            raise InputRefused(
                f"{name}/{path}: found no such file, need it: {where} lists it", "save the dataset again"
            )
        files.append(File(folder / path, f"{name}/{path}", "arrow"))
    return files


def _refuse_leaving(path: str, where: str, folder: Path) -> None:
    """Raises InputRefused where a path that a dataset's own metadata gives leads out of its folder."""
    if os.path.isabs(path) or ".." in path.split("/") or "\0" in path or "://" in path:
        raise InputRefused(f"{where}: found the path {path!r}, need one inside the dataset's folder", "correct it")
    _refuse_outside(folder / path, f"{where}: {path}", folder)


# Subsets


def _subsets(
    folder: Path, name: str, paths: Sequence[str]
) -> tuple[Mapping[str, Callable[[], Mapping[str, list[str]]]], str | None]:
    """Each subset's splits (found when called), and the default subset; none where folders are all there is."""
    configs = _readme_configs(folder, f"{name}/README.md")
    if configs:
        subsets = {
            subset: lambda config=config: _config_splits(config, folder, name, paths)
            for subset, config in configs.items()
        }
        marked = [subset for subset, config in configs.items() if config.get("default") is True]
        return subsets, (marked[0] if marked else "default")
    converted: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        found = _CONVERTED.fullmatch(path)
        if found is None:
            return {}, None
        converted.setdefault(found[1], {}).setdefault(found[2], []).append(path)
    return {subset: lambda splits=splits: splits for subset, splits in converted.items()}, "default"


def _readme_configs(folder: Path, where: str) -> Mapping[str, Mapping[str, Any]]:
    """`configs` of the README's front matter by name, in its order; empty where it has none."""
    if not (folder / "README.md").is_file():  # none, or what a read of may never end
        return {}
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_MAX_README_BYTES).decode(errors="replace").removeprefix("\ufeff")
    except OSError as error:
        raise disk_failed(error, folder / "README.md") from error
    front = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if front is None:
        return {}
    hint = "correct it, or name the data files themselves"
    try:
        content = parse_yaml(front[1].encode())
    except ValueError as error:
        found = f"front matter that isn't plain YAML ({error})"
        raise InputRefused(f"{where}: found {found}, need each key once and no aliases", hint) from None
    configs = content.get("configs") if isinstance(content, dict) else None
    if configs is None:
        return {}
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise InputRefused(f"{where}: configs: found no list of subsets, need config_name and data_files of each", hint)
    return {_word(config.get("config_name", "default"), f"{where}: configs"): config for config in configs}


def _word(value: Any, where: str) -> str:
    """A name or path in a README: text, or a number or date that was meant as such. Raises InputRefused."""
    if not isinstance(value, str | int | float | datetime.date):
        raise InputRefused(
            f"{where}: found {reprlib.repr(value)}, need text", "correct it, or name the data files themselves"
        )
    return str(value)


def _config_splits(config: Mapping[str, Any], folder: Path, name: str, paths: Sequence[str]) -> Mapping[str, list[str]]:
    """The files of each split that one subset of README.md names: by its patterns, or all files of its data_dir."""
    where = f"{name}/README.md: configs"
    data_files, data_dir = config.get("data_files"), _word(config.get("data_dir") or "", where)
    _refuse_leaving(data_dir, where, folder)
    root = os.path.normpath(data_dir) if data_dir else "."
    prefix = "" if root == "." else f"{root}/"
    if data_files is None:
        return _splits_by_name({path: path[len(prefix) :] for path in paths if path.startswith(prefix)})
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits: dict[str, dict[str, None]] = {}  # each path once, where it is first matched
    for entry in entries:
        split, patterns = ("train", entry) if isinstance(entry, str) else _split_entry(entry, where)
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            _refuse_leaving(pattern, where, folder)
            matches = _pattern(prefix + pattern.removeprefix("./"), where).fullmatch
            known = splits.setdefault(split, {})
            try:
                with bounded(_CPU_SECONDS):
                    known.update((path, None) for path in paths if matches(path))
            except TakesTooLong:
                raise InputRefused(
                    f"{where}: found the pattern {pattern[:60]!r}, which takes over {_CPU_SECONDS:.0f} s to match; "
                    "need a simple one",
                    "name the data files themselves",
                ) from None
    return {split: list(known) for split, known in splits.items()}


def _split_entry(entry: Any, where: str) -> tuple[str, Any]:
    """Split and patterns of one entry {split, path} of data_files."""
    patterns = entry.get("path") if isinstance(entry, dict) else None
    listed = patterns if isinstance(patterns, list) else [patterns]
    if not isinstance(entry, dict) or not listed or not all(isinstance(pattern, str) for pattern in listed):
        raise InputRefused(
            f"{where}: found data_files of {reprlib.repr(entry)!r}, need paths, or split and path of each",
            "correct it, or name the data files themselves",
        )
    return _word(entry.get("split", "train"), where), patterns


def _pattern(pattern: str, where: str) -> re.Pattern[str]:
    """A glob pattern as a regular expression on whole paths: * and ? within a folder, ** through folders."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]/]*\])", pattern)
    source = ""
    for part in parts:
        if part.startswith("[") and part.endswith("]") and len(part) > 2:
            inside = part[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            source += f"[^{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"
        else:
            source += signs.get(part, re.escape(part))
    try:
        return re.compile(source, re.DOTALL)
    except re.error:
        raise InputRefused(f"{where}: found the pattern {pattern!r}, need a glob pattern", "correct it") from None
