"""A model's name → a local folder: the folder itself, or a snapshot from the Hub."""

import os
import re
from pathlib import Path

from lorakit.core.errors import HubFailed, InputRefused, disk_failed, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MAX_HUB_ID = 96  # the Hub's own limit
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def model_folder(name: str, timeout_seconds: float = 10.0) -> Path:
    """The folder of a model or adapter; a hub id is downloaded (safetensors and JSON only) or found in the Hub's cache.

    Raises InputRefused where `name` is neither, HubFailed where the Hub can't be reached or refuses.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not _HUB_ID.fullmatch(name) or len(name) > _MAX_HUB_ID:
        found = "a file" if os.path.exists(name) else "no such folder"
        raise InputRefused(f"{name}: found {found}, need a model folder or a hub id (owner/name)", "check the path")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, etag_timeout=timeout_seconds))
    except errors.GatedRepoError:
        raise HubFailed(
            f"{name}: found a gated model, need your access to it",
            f"accept its terms at huggingface.co/{name}, then `hf auth login` or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubFailed(
            f"{name}: found neither a local folder nor a model on the Hub, need one of them",
            "check the spelling; for a private model, `hf auth login` or set HF_TOKEN",
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
            "check the spelling or the network, or give a folder that holds the model",
        ) from None
