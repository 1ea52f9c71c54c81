"""What this machine and its environment variables say. The only file of the core that reads environment variables."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where everything cached lies: `$LORAKIT_CACHE`, else the platform's cache folder."""
    if own := os.environ.get("LORAKIT_CACHE"):
        return Path(own).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorakit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lorakit"
