"""This machine and its environment variables. The only file of the core that reads or sets one."""

import os
import sys
from pathlib import Path


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread_for_tokenizers() -> None:
    """Keep the `tokenizers` library to one thread, for one of several worker processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def cache_folder() -> Path:
    """Where everything cached lies: `$LORAKIT_CACHE`, else the platform's cache folder."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorakit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lorakit"
