"""A name → a local folder: the folder itself, or a snapshot from the Hub; and a folder → a repository on the Hub."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lorakit import __version__
from lorakit.core.errors import HubFailed, InputRefused, UsageError, disk_failed, first_line
from lorakit.core.events import Notice, Report

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MAX_HUB_ID = 96  # the Hub's own limit
_KEPT_HERE = ["lorakit.json", "lorakit.yaml", "checkpoints/*", "checkpoints/**", ".*"]
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


def is_hub_id(name: str) -> bool:
    """Whether a repository of the Hub may bear this name; a folder here may bear it too."""
    return len(name) <= _MAX_HUB_ID and _HUB_ID.fullmatch(name) is not None


def model_folder(name: str, timeout_seconds: float = 10.0, need: str = "a model") -> Path:
    """The folder of a model or adapter; a hub id is downloaded (safetensors and JSON only) or found in the Hub's cache.
    `need` is what errors call it.

    Raises InputRefused where `name` is neither, HubFailed where the Hub can't be reached or refuses.
    """
    return _model(name, _FILES, timeout_seconds, need)


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
    if not is_hub_id(name):
        raise InputRefused(
            f"{name}: found no such file or folder, need one or a hub id of a dataset (owner/name)", "check the path"
        )
    patterns = ["README.md", *(f"*{suffix}{packing}" for suffix in DATA_KINDS for packing in ("", *PACKINGS))]
    folder = _snapshot(name, "dataset", revision or "main", patterns, timeout_seconds)
    return folder, folder.name


def push_folder(folder: Path, name: str, *, private: bool, report: Report) -> str:
    """Upload the model or adapter in a folder to a repository, made where it isn't there; returns its address.

    lorakit's manifest and settings stay here: they name paths of this machine, and are whole only with every file. So
    do checkpoints and hidden files. Raises UsageError where `name` is no hub id, HubFailed, DiskFailed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not is_hub_id(name):
        raise UsageError(f"--push-to-hub {name}: found no hub id, need owner/name", "correct the name")
    report(Notice(f"uploading {folder} to {name}"))
    again = f"{folder} is whole, and the same command goes on with the upload"
    try:
        with _quiet_hub():
            api = huggingface_hub.HfApi()
            made = api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                ignore_patterns=_KEPT_HERE,
                commit_message=f"Upload by lorakit {__version__}",
            )
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as caught:  # type: ignore[attr-defined]
        error = caught.__cause__ if isinstance(caught, RuntimeError) and caught.__cause__ else caught
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, OSError) and error.errno is not None and status is None:
            raise disk_failed(error, folder) from error
        if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            raise HubFailed(
                f"{name}: found that the Hub doesn't let you write there ({first_line(error)}), need a token that may",
                f"`hf auth login` with a token that may write; {again}",
            ) from None
        raise HubFailed(
            f"{name}: found that the upload failed ({first_line(error)}), need the Hub to take it",
            f"check the network; {again}",
        ) from None
    return str(made)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """huggingface_hub's own progress bars kept off the terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _model(name: str, patterns: Iterable[str], timeout_seconds: float, need: str = "a model") -> Path:
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not is_hub_id(name):
        found = "a file" if os.path.exists(name) else "no such folder"
        raise InputRefused(f"{name}: found {found}, need {need} folder or a hub id (owner/name)", "check the path")
    return _snapshot(name, "model", "main", patterns, timeout_seconds, need)


def _snapshot(
    name: str, what: str, revision: str, patterns: Iterable[str], timeout_seconds: float, need: str | None = None
) -> Path:
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
            f"check the spelling or the network, or give a folder that holds {need or f'the {what}'}",
        ) from None
