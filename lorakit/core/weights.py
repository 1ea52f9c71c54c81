"""A model folder's weights as its safetensors headers describe them: names, shapes, places. No torch, no tensor read.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header size, JSON header, tensor data).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.core import artifacts, disk
from lorakit.core.errors import ArtifactDamaged, InputRefused, disk_failed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
_MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: `start` and `end` are byte offsets in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Weights:
    """The weights of one model folder."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]

    @property
    def shards(self) -> list[str]:
        return sorted({place.shard for place in self.tensors.values()})

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the config and of every shard's bytes; which attention kernel the config asks for is no part of
        what the model is."""
        hashes = {shard: _content_sha256(self.folder / shard) for shard in self.shards}
        config = {key: value for key, value in self.config.items() if key != "attn_implementation"}
        return artifacts.fingerprint([config, hashes])


def open_weights(folder: Path) -> Weights:
    """The weights of a causal language model in safetensors.

    Raises InputRefused (no model, another kind of model, pickle files, quantized), ArtifactDamaged (a shard that is
    missing, cut off, or holds other tensors than the index says).
    """
    config = read_json_object(folder / "config.json", "a model folder has a config.json")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    if not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise InputRefused(
            f"{folder}: found the architecture {', '.join(map(str, architectures)) or '(none)'}, "
            "need a causal language model (…ForCausalLM)",
            "choose a text-generation model of the Llama family",
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise InputRefused(
            f"{folder}: found weights quantized by {method or 'an unnamed method'}, need the 16- or 32-bit base",
            "give the unquantized model",
        )
    if (folder / INDEX).is_file():
        weight_map = read_json_object(folder / INDEX, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ArtifactDamaged(f"{folder / INDEX}: found no weight_map, need one", "download the model again")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise InputRefused(
                    f"{folder / INDEX}: found the shard name {shard!r}, need a .safetensors file of that folder",
                    "don't use this model: its index points outside its folder",
                )
    elif (folder / SINGLE).is_file():
        weight_map = None
    else:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only pickle files ({pickles[0]})" if pickles else "no weights"
        raise InputRefused(
            f"{folder}: found {found}, need {SINGLE} or {INDEX}",
            "pickle files can run code and are never opened; convert the model once, where that does no harm: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            if pickles
            else "check the path; the folder must hold the model's weights as safetensors",
        )
    tensors: dict[str, TensorPlace] = {}
    for shard in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
        tensors |= read_header(folder / shard)
    if weight_map is not None and {name: place.shard for name, place in tensors.items()} != weight_map:
        raise ArtifactDamaged(
            f"{folder / INDEX}: found an index that names other tensors than its shards hold, need both the same",
            "download the model again",
        )
    return Weights(folder, config, tensors)


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Raises ArtifactDamaged where they don't fill it exactly, without overlap,
    DiskFailed."""
    problem = ""
    places: dict[str, TensorPlace] = {}
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
        at = 8 + header_bytes
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"the tensor {name} with the shape {shape}")
            size_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
            if start + 8 + header_bytes != at or end - start != size_bytes:
                raise ValueError(f"the tensor {name} at bytes {start}-{end}")
            places[name] = TensorPlace(path.name, dtype, shape, at, at + size_bytes)
            at += size_bytes
        if at != path.stat().st_size:
            raise ValueError(f"{path.stat().st_size} bytes where the header says {at}")
    except FileNotFoundError:
        problem = "no such file"
    except IsADirectoryError:
        problem = "a folder"
    except OSError as error:
        raise disk_failed(error, path) from error
    except KeyError as error:
        problem = f"the unknown entry {error}"
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise ArtifactDamaged(f"{path}: found {problem}, need a whole safetensors file", "download or copy it again")
    return places


def read_json_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises InputRefused, DiskFailed."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputRefused(f"{path.parent}: found no {path.name}, need one", hint or "check the path") from None
    except IsADirectoryError:
        raise InputRefused(f"{path}: found a folder, need a JSON file", hint or "restore the file") from None
    except OSError as error:
        raise disk_failed(error, path) from error
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path}: found {error}, need JSON", hint or "restore the file") from None
    if not isinstance(content, dict):
        raise InputRefused(f"{path}: found {type(content).__name__}, need a JSON object", hint or "restore the file")
    return content


def _content_sha256(path: Path) -> str:
    """The file's sha256; a file of the Hub's cache is a link to a blob that bears it as its name."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return disk.sha256(path)
