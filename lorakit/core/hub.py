"""The name of a model or dataset → a local folder: the folder itself, or a snapshot from the Hub."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorakit.core.errors import HubFailed, InputRefused, disk_failed, first_line
from lorakit.core.events import Report

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MAX_HUB_ID = 96  # the Hub's own limit
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]

DATA_KINDS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
}
"""Suffix → kind of every data file that is read, and so of all that is downloaded of a dataset."""

PACKINGS = (".gz", ".zst")
"""Suffixes of compression, behind one of a kind."""


def model_folder(name: str, timeout_seconds: float = 10.0) -> Path:
    """The folder of a model or adapter; a hub id is downloaded (safetensors and JSON only) or found in the Hub's cache.

    Raises InputRefused where `name` is neither, HubFailed where the Hub can't be reached or refuses.
    """
    return _model(name, _FILES, timeout_seconds)


def config_folder(name: str, timeout_seconds: float = 10.0) -> Path:
    """The folder that holds a model's config.json: of a hub id nothing else is downloaded.

    Raises InputRefused where `name` is neither, HubFailed where the Hub can't be reached or refuses.
    """
    return _model(name, ["config.json"], timeout_seconds)


def dataset_snapshot(name: str, revision: str | None, timeout_seconds: float = 10.0) -> tuple[Path, str]:
    """The snapshot of a Hub dataset at `revision` (default: main), and its commit.

    Only README.md and files of known kinds are downloaded, never code; what lies in the Hub's cache isn't downloaded
    again and is found without a network. The folder doesn't exist where the dataset has none of these files.
    Raises InputRefused where `name` is no hub id, HubFailed where the Hub can't be reached or refuses.
    """
    if not _HUB_ID.fullmatch(name) or len(name) > _MAX_HUB_ID:
        raise InputRefused(
            f"{name}: found no such file or folder, need one or a hub id of a dataset (owner/name)", "check the path"
        )
    patterns = ["README.md", *(f"*{suffix}{packing}" for suffix in DATA_KINDS for packing in ("", *PACKINGS))]
    folder = _snapshot(name, "dataset", revision or "main", patterns, timeout_seconds)
    return folder, folder.name


def _model(name: str, patterns: Iterable[str], timeout_seconds: float) -> Path:
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not _HUB_ID.fullmatch(name) or len(name) > _MAX_HUB_ID:
        found = "a file" if os.path.exists(name) else "no such folder"
        raise InputRefused(f"{name}: found {found}, need a model folder or a hub id (owner/name)", "check the path")
    return _snapshot(name, "model", "main", patterns, timeout_seconds)


def _snapshot(name: str, what: str, revision: str, patterns: Iterable[str], timeout_seconds: float) -> Path:
    """The local folder of a repository on the Hub, which is named by its commit; `what` is "model" or "dataset"."""
    import huggingface_hub
    from huggingface_hub import errors

    page = f"huggingface.co/{name}" if what == "model" else f"huggingface.co/datasets/{name}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                repo_type=what,
                revision=revision,
                allow_patterns=list(patterns),
                etag_timeout=timeout_seconds,
            )
        )
    except errors.GatedRepoError:
        raise HubFailed(
            f"{name}: found a gated {what}, need your access to it",
            f"accept its terms at {page}, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubFailed(
            f"{name}: found neither a local folder nor a {what} on the Hub, need one of them",
            f"check the spelling; for a private {what}, `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise HubFailed(
            f"{name}: found no revision {revision} of this {what} on the Hub, need a branch, tag or commit",
            f"look at the branches and tags at {page}/tree/main",
        ) from None
    except (OSError, errors.HFValidationError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno is not None:
            raise disk_failed(error, Path(name)) from error
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            raise HubFailed(
                f"{name}: found that the Hub refuses the token (401 Unauthorized), need a valid one or none",
                "`hf auth login`, or correct or remove HF_TOKEN",
            ) from None
        raise HubFailed(
            f"{name}: found no such folder and no answer of the Hub ({first_line(error)}), need one of them",
            f"check the spelling or the network, or give a folder that holds the {what}",
        ) from None


def push_folder(folder: Path, name: str, *, private: bool, report: Report) -> str:
    raise NotImplementedError
