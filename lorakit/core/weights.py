"""A model folder's weights as its safetensors headers describe them: names, shapes, places. No torch, no tensor read.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header size, JSON header, tensor data).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit.core import artifacts, disk
from lorakit.core.errors import ArtifactDamaged, InputRefused, disk_failed
from lorakit.core.untrusted import opened, parse_json, read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_BYTES |= {"U64": 8, "U32": 4, "U16": 2}
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")
NUM_LAYERS = ("num_hidden_layers", "n_layer")
"""Config fields of how many layers a model has."""
_MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_SIZE = 2**40  # of a dimension, also of a tensor that holds nothing
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""What a config may ask for; another name is one of a kernel on the Hub, which is code."""
_COMPARED_BYTES = 2**20  # at a time
_THREADS = 8  # files hashed at once: more than cores, so that a last one is not alone

HEAD = "lm_head.weight"
_EMBEDDING = re.compile(r"(?:.+\.)?(?:embed_tokens|wte|embed_in|word_embeddings)\.weight")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: `start` and `end` are byte offsets in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def rows(self) -> int:
        """Its first dimension; a vector is a column of numbers."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return (self.end - self.start) // self.rows if self.rows else 0


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
    def embedding(self) -> str:
        """The tensor of the token embedding; where there is none that is known, the name that Llama's has."""
        return next((name for name in self.tensors if _EMBEDDING.fullmatch(name)), "model.embed_tokens.weight")

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's: as the config says, else where there is no other. A head of
        other numbers beside the embedding isn't tied, as transformers loads it, whatever the config says."""
        tied = bool(self.config.get("tie_word_embeddings", HEAD not in self.tensors))
        if not tied or not {HEAD, self.embedding} <= set(self.tensors):
            return tied
        head, embedding = (self.tensors[name] for name in (HEAD, self.embedding))
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            return False
        with (self.folder / head.shard).open("rb") as one, (self.folder / embedding.shard).open("rb") as other:
            one.seek(head.start)
            other.seek(embedding.start)
            sizes = [min(_COMPARED_BYTES, head.end - at) for at in range(head.start, head.end, _COMPARED_BYTES)]
            return all(one.read(size) == other.read(size) for size in sizes)

    def place(self, name: str) -> TensorPlace | None:
        """Where a parameter of the model lies; a tied head lies where the embedding does."""
        return self.tensors.get(self.embedding if name == HEAD and self.is_tied else name)

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the config and of every shard's bytes; which attention kernel the config asks for is no part of
        what the model is."""
        with ThreadPoolExecutor(_THREADS) as threads:  # hashing holds no lock
            found = threads.map(_content_sha256, [self.folder / shard for shard in self.shards])
            hashes = dict(zip(self.shards, found, strict=True))
        config = {key: value for key, value in self.config.items() if key != "attn_implementation"}
        return artifacts.fingerprint([config, hashes])


def has_a_row_a_token(name: str) -> bool:
    """Whether a tensor is the embedding or the head: as long as the vocabulary."""
    return name == HEAD or _EMBEDDING.fullmatch(name) is not None


def open_weights(folder: Path) -> Weights:
    """The weights of a causal language model in safetensors.

    Raises InputRefused (no model, another kind of model, pickle files, quantized), ArtifactDamaged (a shard that is
    missing, cut off, or holds other tensors than the index says).
    """
    refuse_gguf(folder)
    config = read_json_object(folder / "config.json", "a model folder has a config.json")
    _refuse_code(folder, config)
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
            f"give the unquantized model{_unquantized_name(folder, config)}: numbers that were rounded to a few bits "
            "can't be taken back",
        )
    if (folder / SINGLE).is_file():  # also beside an index, as transformers reads it
        weight_map = None
    elif (folder / INDEX).is_file():
        weight_map = read_json_object(folder / INDEX, "", _MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ArtifactDamaged(f"{folder / INDEX}: found no weight_map, need one", "download the model again")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
                raise InputRefused(
                    f"{folder / INDEX}: found the shard name {shard!r}, need a .safetensors file of that folder",
                    "don't use this model: its index points outside its folder",
                )
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
    _refuse_empty_layers(folder, config, len(tensors))
    return Weights(folder, config, tensors)


def _refuse_empty_layers(folder: Path, config: Mapping[str, Any], num_tensors: int) -> None:
    """Raises InputRefused where a config asks for more layers than there are tensors: who loads the model makes them
    all before it looks for their weights, and a number is quickly written."""
    inner = config.get("text_config")
    for sizes in (config, inner if isinstance(inner, dict) else {}):
        for name in NUM_LAYERS:
            if isinstance(sizes.get(name), int) and sizes[name] > num_tensors:
                raise InputRefused(
                    f"{folder / 'config.json'}: found {name} = {sizes[name]} beside {num_tensors} tensors, need no "
                    "more layers than tensors",
                    "download the model again",
                )


def _refuse_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises InputRefused where a config asks for code of its own. `auto_map` alone does not: it isn't followed."""
    asked = {key: value for key, value in config.items() if key.lstrip("_").startswith("attn_implementation")}
    found = [key for key, value in asked.items() if not (value is None or type(value) is bool or value in _ATTENTION)]
    found += ["trust_remote_code"] if config.get("trust_remote_code") else []
    if found:
        raise InputRefused(
            f"{folder / 'config.json'}: found {found[0]} = {str(config[found[0]])[:60]!r}, "
            f"need a plain config (attention: {', '.join(_ATTENTION)})",
            "don't use this model: it asks for code to be run",
        )


def refuse_gguf(folder: Path) -> None:
    """Raises InputRefused where a folder, or a path, is a model in llama.cpp's format."""
    found = folder.name if folder.suffix == ".gguf" else next((path.name for path in folder.glob("*.gguf")), None)
    if found is not None and not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise InputRefused(
            f"{folder}: found GGUF ({found}), need the model's safetensors",
            "give the model that the GGUF file was made from; where there is only the file, convert it once: "
            "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE).save_pretrained(NEW)",
        )


def _unquantized_name(folder: Path, config: Mapping[str, Any]) -> str:
    """What the model that was quantized is called, where the name of the quantized one says it."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(folder.parent.parent.name))
    name = "/".join(cached.groups()) if cached else str(config.get("_name_or_path") or folder.name)
    plain = re.sub(r"(?i)(-unsloth)?-(bnb-)?(4bit|8bit|nf4|int8|int4|fp8|awq|gptq)([-_.]\w+)*$", "", name)
    return f", by its name {plain}" if plain != name else ""


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> bytes:
    """The beginning of a safetensors file that holds these tensors (name, type, shape) one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Raises ArtifactDamaged where they don't fill it exactly, without overlap,
    DiskFailed."""
    problem = ""
    places: dict[str, TensorPlace] = {}
    try:
        with opened(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            header = parse_json(file.read(header_bytes))
        at = 8 + header_bytes
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"__metadata__ that isn't texts by name ({str(metadata)[:60]})")
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(size) is int and 0 <= size <= _MAX_SIZE for size in shape):
                raise ValueError(f"the tensor {name} with the shape {shape}")
            size_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
            if type(start) is not int or type(end) is not int:
                raise ValueError(f"the tensor {name} at {start!r}-{end!r}")
            if start + 8 + header_bytes != at or end - start != size_bytes:
                raise ValueError(f"the tensor {name} at bytes {start}-{end}")
            places[name] = TensorPlace(path.name, dtype, shape, at, at + size_bytes)
            at += size_bytes
        if at != path.stat().st_size:
            raise ValueError(f"{path.stat().st_size} bytes where the header says {at}")
    except FileNotFoundError:
        problem = "no such file"
    except OSError as error:
        raise disk_failed(error, path) from error
    except KeyError as error:
        problem = f"the unknown entry {error}"
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        problem = str(error) or type(error).__name__
    if problem:
        raise ArtifactDamaged(f"{path}: found {problem}, need a whole safetensors file", "download or copy it again")
    return places


def _content_sha256(path: Path) -> str:
    """The file's sha256; a file of the Hub's cache is a link to a blob that bears it as its name."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return disk.sha256(path)
