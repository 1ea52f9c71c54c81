"""What a shell offers at Tab for a setting: its choices, recipes, models by name, and the folders that it can take.

Where nothing is offered, shells complete files themselves. Nothing that takes long to import or to look at is used.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.core.environment import cache_folder

Offered = list[tuple[str, str]]
"""Words, each with what it is."""
_MOST_FOLDERS, _DEEPEST = 1000, 3


def offered(command: str, name: str, words: Sequence[str]) -> Callable[[str], Offered] | None:
    """What completes a setting of this name from what is typed of it, or None where files do."""
    if words:
        return lambda incomplete: [(word, "") for word in words]
    if name == "blocks":
        return lambda incomplete: list({**dict(_local(incomplete, _is_blocks)), **dict(_cached())}.items())
    if name == "adapter":
        return lambda incomplete: _local(incomplete, _is_adapter)
    if command == "plan-devices" and name == "model":
        return lambda incomplete: _built_in() + _local(incomplete, _is_model)
    if name in ("model", "base", "tokenizer"):
        adapters_too = command in ("chat", "evaluate") and name == "model"
        return lambda incomplete: _local(incomplete, lambda at: _is_model(at) or (adapters_too and _is_adapter(at)))
    return None


def _built_in() -> Offered:
    from lorakit.core.shapes import built_in

    return [(name, "") for name in built_in()]


def _is_blocks(folder: Path) -> bool:
    return _manifest(folder).get("kind") == "blocks"


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _manifest(folder: Path) -> dict[str, Any]:
    from lorakit.core.disk import MANIFEST

    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _local(typed: str, is_wanted: Callable[[Path], bool]) -> Offered:
    """Wanted folders that begin with what is typed, some levels below the folder that it names already."""
    before, _ = os.path.split(typed)
    start = os.path.join(before, "")
    waiting, looked_at, found = [(start, 1)], 0, []
    while waiting and looked_at < _MOST_FOLDERS:
        folder, depth = waiting.pop(0)
        for name in _folders(Path(folder or ".").expanduser()):
            looked_at += 1
            path = folder + name
            if depth == 1 and not path.startswith(typed):
                continue
            if is_wanted(Path(path).expanduser()):
                found.append((path, ""))
            elif depth < _DEEPEST:
                waiting.append((path + os.sep, depth + 1))
    return found


def _folders(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return


def _cached() -> Offered:
    """Blocks in lorakit's cache, with what they were made of: their folders' names say nothing."""
    cache, offers = cache_folder() / "blocks", []
    for name in _folders(cache):
        config = _manifest(cache / name).get("config")
        datasets = config.get("dataset") if isinstance(config, dict) else None
        if isinstance(config, dict) and isinstance(datasets, list):
            rows = " ".join(os.path.basename(str(dataset)) for dataset in datasets)
            offers.append((str(cache / name), f"{rows}, blocks of {config.get('block_size')} tokens"))
    return offers
