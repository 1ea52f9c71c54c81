"""P4 and P5: files of strangers mutated a hundred thousand times, and every byte of an artifact flipped.

A mutated file is refused with a LorakitError, or used rightly: what is merged is what a few lines of torch make of the
same files, read by `json` and the safetensors library; blocks and checkpoints are what the safetensors library reads;
tokens are those of the tokenizers library. No file outside of the folders is opened meanwhile. Files of an artifact are
mutated behind its manifest, whose hashes are set right, as someone would who knows the format.
"""

import copy
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import safetensors.numpy
import safetensors.torch
import tokenizers
import torch
import yaml

from lorakit.core import adapters, artifacts, disk, tokenization, weights
from lorakit.core.blocks import Blocks
from lorakit.core.config import TrainConfig
from lorakit.core.errors import LorakitError
from lorakit.core.merging import apply
from lorakit.core.merging.plan import Weighted, make_plan
from lorakit.core.placement import read_plan
from lorakit.core.records import Rendered, parse_row
from lorakit.core.reporting import data_summary
from lorakit.core.templates import Template, TemplateRefused
from lorakit.core.tokenization import Codec, load_spec
from lorakit.core.training import Trained, checkpoints
from lorakit.options import read_settings
from tests.bench import merge as bench
from tests.conftest import CHATML, make_tokenizer
from tests.faults.merging import expected
from tests.faults.server import command, forked, said_by, said_by_each
from tests.faults.tally import Tally

CONFIG = {**bench.TINYLLAMA, "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "dtype": "float32"}

_MOST_BYTES = 2**30
_LONGEST_SECONDS = 8.0  # what is bounded ends in five
_REFUSALS = (2, 3, 4, 5, 7, 8)
_BOX = "/dev/shm" if Path("/dev/shm").is_dir() else None

HOSTILE: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e308, -1e-308, 1e38, float(2**53)),
    *("", "../secret", "/etc/passwd", "~/x", "a/../../b", "model.safetensors\0", "\x00", "nan", "ＬＯＲＡ", "😀" * 40),
    *("(a+)+$", "(.*)*x", "[", "(?P<a>", "\\", "{{ 7*7 }}", "owner/kernel", "x" * 70_000, "__class__", "-0", "1e400"),
    *([], {}, [[]], [{}], {"a": {}}, ["q_proj"], [0], [1, 2], [2**62, 0], {"": 0}, {"q_proj": 3}, {".*": 1}),
)
RAW: Sequence[bytes] = (
    *(b"NaN", b"-Infinity", b"1e999", b"[" * 300 + b"]" * 300, b'{"a":' * 70 + b"1" + b"}" * 70, b'"\\ud800"'),
    *(b"9" * 5000, b'"\xff"', b"01", b"'a'", b"\xef\xbb\xbf1", b"nul"),
)


# Mutators


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside of another."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated_json(raw: bytes, chance: random.Random) -> bytes:
    """Another value, another key, one less, one twice; or bytes of it."""
    if chance.random() < 0.25:
        return mutated_bytes(raw, chance)
    content = json.loads(raw)
    marks = []
    for _ in range(1 if chance.random() < 0.7 else 3):
        ways = list(places(content))
        if not ways:
            break
        *way, key = chance.choice(ways)
        inside = content
        for step in way:
            inside = inside[step]
        what = chance.random()
        if what < 0.15:
            del inside[key]
        elif what < 0.3 and isinstance(inside, dict):
            inside[chance.choice([*map(str, HOSTILE[15:20]), str(key).upper(), f"{key}.", f"_{key}"])] = inside[key]
        elif what < 0.4:
            marks.append(chance.choice(RAW))
            inside[key] = f"@{len(marks) - 1}@"
        elif what < 0.6 and type(inside[key]) in (int, float):
            with suppress(OverflowError):  # where it was made huge before
                inside[key] += chance.choice((-1, 1, 8, -8, 0.5, 2**32))
        else:
            inside[key] = copy.deepcopy(chance.choice(HOSTILE))
    text = json.dumps(content).encode()
    for number, mark in enumerate(marks):
        text = text.replace(f'"@{number}@"'.encode(), mark)
    if chance.random() < 0.03 and text.startswith(b'{"'):  # a key twice
        text = b"{" + text[1 : text.index(b",") + 1 if b"," in text else 1] + text[1:]
    return text


def mutated_bytes(raw: bytes, chance: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 4))):
        at = chance.randrange(len(changed) + 1)
        what = chance.random()
        if what < 0.5 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif what < 0.6:
            del changed[at:]
        elif what < 0.8:
            changed[at:at] = chance.choice((b"\0", b"{", b"[" * 9, b'"', b"\xff", b",", b"-", b"e9", b"\\u"))
        else:
            end = min(len(changed), at + chance.randrange(1, 30))
            changed[at:at] = changed[at:end]
    return bytes(changed)


def mutated_safetensors(raw: bytes, chance: random.Random) -> bytes:
    """The header of a safetensors file, with its length set right mostly."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length], raw[8 + length :]
    header = mutated_json(header, chance)
    said = (
        len(header) if chance.random() < 0.9 else chance.choice((0, 1, len(header) + 1, 2**63, 10**8 + 1, 99 * 10**6))
    )
    return struct.pack("<Q", said) + header + (data if chance.random() < 0.95 else data[: chance.randrange(len(data))])


def mutated_manifest(raw: bytes, chance: random.Random) -> bytes:
    """Mostly with its hash set right, as someone would who knows the format."""
    changed = mutated_json(raw, chance)
    if chance.random() < 0.9:
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            return artifacts._manifest_bytes(json.loads(changed))
    return changed


def mutated_settings(raw: bytes, chance: random.Random) -> bytes:
    """Settings in YAML: other bytes, or another value, of which JSON is one way to write it."""
    if chance.random() < 0.5:
        return mutated_bytes(raw, chance)
    return mutated_json(json.dumps(yaml.safe_load(raw)).encode(), chance)


def sealed(folder: Path) -> None:
    """Make an artifact's manifest say what its files are now."""
    path = folder / artifacts.MANIFEST
    manifest = json.loads(path.read_bytes())
    files = {name: disk.described(folder / name) for name in manifest["files"]}
    path.write_bytes(artifacts._manifest_bytes({**manifest, "files": files}))


# The oracle


def reference(base: Path, adapter: Path) -> Mapping[str, Any]:
    """The tensors of base + adapter in fp64. KeyError: by a file of another kind."""
    shards = {"model.safetensors"}
    if not (base / "model.safetensors").exists():
        shards = set(json.loads((base / "model.safetensors.index.json").read_bytes())["weight_map"].values())
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(shards):
        tensors |= safetensors.torch.load_file(base / shard)
    return {name: tensor.numpy() for name, tensor in expected(tensors, adapter).items()}


def differing(found: Mapping[str, Any], exact: Mapping[str, Any]) -> str | None:
    """The first tensor that isn't as it should be."""
    if found.keys() != exact.keys():
        return f"other names: {sorted(found.keys() ^ exact.keys())[:3]}"
    for name, tensor in exact.items():
        if found[name].shape != tensor.shape:
            return f"{name}: {found[name].shape}, need {tensor.shape}"
        if not np.allclose(found[name], tensor, rtol=1e-5, atol=1e-6 * max(1.0, float(np.abs(tensor).max(initial=0)))):
            return f"{name}: off by {float(np.abs(found[name] - tensor).max()):.3g}"
    return None


# In this process


def merged(box: Path) -> Mapping[str, Any]:
    """What `merge` would write, as far as bytes go. Raises LorakitError."""
    adapter = adapters.open_adapter(box / "adapter", lambda _: None)
    base = weights.open_weights(box / "base")
    plan = make_plan(base, [Weighted(adapter, 1.0, adapters.match(adapter, base))], None, None)
    found: dict[str, Any] = {}
    for _, pieces in apply.shards(plan, lambda _: None):
        raw = b""
        for piece in [pieces] if isinstance(pieces, bytes) else pieces:
            if isinstance(piece, disk.FileRange):
                raw += piece.path.read_bytes()[piece.start : piece.end]
            else:
                raw += bytes(piece)
        found |= safetensors.numpy.load(raw)
    return found


def check_merge(box: Path) -> str | None:
    found = merged(box)
    return differing(found, reference(box / "base", box / "adapter"))


def check_row(box: Path) -> str | None:
    raw = (box / "row.json").read_bytes()
    row = parse_row(raw.strip(), "row.json:1")
    return None if row.columns == json.loads(raw.decode("utf-8-sig")) else "another row"


def check_settings(box: Path) -> str | None:
    config = TrainConfig.resolve(("run.yaml", read_settings(box / "run.yaml")), (None, {"model": "m", "dataset": "d"}))
    with any_digits():
        given, found = yaml.safe_load((box / "run.yaml").read_bytes()), config.flat()
        given.pop("model", None)
        other = [name for name, value in given.items() if found[name] != value and str(found[name]) != str(value)]
    return f"other settings: {other}" if other else None


@contextmanager
def any_digits() -> Iterator[None]:
    """PyYAML reads a whole number of any length, which lorakit takes as text: a name may be one."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def check_template(box: Path) -> str | None:
    with suppress(TemplateRefused, UnicodeDecodeError):
        template = Template((box / "chat.jinja").read_text(encoding="utf-8"), "chat.jinja", {"eos_token": "</s>"})
        template.chat([{"role": "user", "content": "Hi"}], open_turn=True)
    return None


def check_plan(box: Path) -> str | None:
    found = read_plan(box / "plan.json")
    return None if found == json.loads((box / "plan.json").read_bytes().decode("utf-8-sig")) else "another plan"


def check_own_adapter(box: Path) -> str | None:
    """An adapter with a manifest: as `merge` reads it, and `train` where it is done already."""
    adapter = adapters.open_adapter(box / "run", lambda _: None)
    assert adapter.artifact is not None
    trained = adapter.artifact.facts_as(Trained, path=box, already_done=True)
    said = json.loads((box / "run" / artifacts.MANIFEST).read_bytes())["facts"]
    other = [name for name, value in said.items() if getattr(trained, name, value) != value]
    if other:
        return f"another {other}"
    needed = {adapters.CONFIG, adapters.WEIGHTS}
    return None if needed <= set(adapter.artifact.manifest["files"]) else "an adapter of unchecked files"


def check_blocks(box: Path) -> str | None:
    folder = box / "blocks"
    found = Blocks(folder)
    data_summary(found.artifacts)
    names = [name for name in found.artifacts[0].manifest["files"] if name.startswith("blocks-")]
    shards = [safetensors.numpy.load_file(folder / name) for name in sorted(names)]
    expected = [row for shard in shards for row in zip(*(shard[name] for name in _ARRAYS), strict=True)]
    if len(found) != len(expected):
        return f"{len(found)} blocks, need {len(expected)}"
    for index, row in enumerate(expected):
        if not all(map(np.array_equal, found.arrays(index), row)):
            return f"block {index} is another"
        found.batch([index])
    return None


def check_checkpoint(box: Path) -> str | None:
    folder = box / "checkpoint"
    tensors, states, state = checkpoints.read(artifacts.open_artifact(folder, "checkpoint"))
    for name, found in (("adapter_model.safetensors", tensors), ("optimizer.safetensors", states)):
        for key, tensor in safetensors.numpy.load_file(folder / name).items():
            if not np.array_equal(found[key].numpy(), tensor, equal_nan=True):
                return f"{name}: {key} is another"
    said = json.loads((folder / "state.json").read_bytes())
    other = [name for name, value in said.items() if getattr(state, name, value) != value]
    return f"another {other}" if other else None


_TEXTS = ("", "Hi", "<|im_start|>user\nHi<|im_end|>\n", "naïve 😀\x00 \u2028")
_ARRAYS = ("tokens", "trained", "document")


def check_tokenizer(box: Path) -> str | None:
    """A tokenizer: as `prepare` takes it, each text alone and a template in its hands."""
    spec = load_spec(box / "tokenizer")
    codec = Codec(spec)
    with suppress(TemplateRefused):
        if codec.template is not None:
            codec.template.chat([{"role": "user", "content": "Hi"}], open_turn=True)
    plain = tokenizers.Tokenizer.from_file(str(box / "tokenizer" / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    texts = [Rendered(text, ((0, len(text)),), needs_bos=False, needs_eos=False) for text in _TEXTS]
    for text, document in zip(texts, codec.encode(texts), strict=True):
        expected = plain.encode(text.text, add_special_tokens=False).ids
        # other special tokens, as its settings may name, split a text elsewhere; it says the same
        if document.tokens.tolist() != expected and codec.decode(document.tokens) != text.text:
            return f"{text.text!r} is {document.tokens.tolist()[:20]}, need {expected[:20]}"
        if document.trained.tolist() != [at > 0 for at in range(len(document.tokens))]:
            return f"{text.text!r} is trained at {document.trained.tolist()[:20]}"
    return None


@dataclass(frozen=True)
class Kind:
    """A file that is mutated, how, what is looked at then, and how many trials of a thousand it gets. `sealed` names
    the artifact whose manifest is set right after it; `line` is the command that uses it."""

    path: str
    mutate: Callable[[bytes, random.Random], bytes]
    check: Callable[[Path], str | None]
    share: int
    line: tuple[str, ...] = ()
    sealed: str | None = None


_RECIPE = ("--config", "run.yaml", "--model", "tiny", "--dataset", "rows.jsonl")
_FROM_ROWS = ("train", *_RECIPE, "--max-steps", "1", "--quiet")
_SMALL = ("--max-steps", "4", "--save-steps", "2", "--keep-checkpoints", "2", "--no-gradient-checkpointing", "--quiet")
MERGE = ("merge", "adapter", "--base", "base")
MERGE_OWN = ("merge", "run", "--base", "tiny")
TRAIN = ("train", "--model", "tiny", "--blocks", "blocks", *_SMALL)
PREPARE = ("prepare", "rows.jsonl", "--tokenizer", "tokenizer", "--block-size", "64", "--quiet")
KINDS: Mapping[str, Kind] = {
    "adapter_config": Kind("adapter/adapter_config.json", mutated_json, check_merge, 260, MERGE),
    "config": Kind("base/config.json", mutated_json, check_merge, 100, MERGE),
    "index": Kind("base/model.safetensors.index.json", mutated_json, check_merge, 130, MERGE),
    "adapter's header": Kind("adapter/adapter_model.safetensors", mutated_safetensors, check_merge, 140, MERGE),
    "base's header": Kind("base/model-00001-of-00002.safetensors", mutated_safetensors, check_merge, 140, MERGE),
    "row": Kind("row.json", mutated_json, check_row, 30),
    "plan": Kind("plan.json", mutated_json, check_plan, 20, (*TRAIN, "--plan", "plan.json")),
    "recipe": Kind("run.yaml", mutated_settings, check_settings, 20, _FROM_ROWS),
    "template": Kind("chat.jinja", mutated_bytes, check_template, 20),
    "manifest of an adapter": Kind("run/lorakit.json", mutated_manifest, check_own_adapter, 20, MERGE_OWN),
    "manifest of blocks": Kind("blocks/lorakit.json", mutated_manifest, check_blocks, 20, TRAIN),
    "manifest of a checkpoint": Kind("checkpoint/lorakit.json", mutated_manifest, check_checkpoint, 20, TRAIN),
    "blocks": Kind("blocks/blocks-00000.safetensors", mutated_safetensors, check_blocks, 20, TRAIN, sealed="blocks"),
    "state of a run": Kind("checkpoint/state.json", mutated_json, check_checkpoint, 20, TRAIN, sealed="checkpoint"),
    "state of an optimizer": Kind(
        "checkpoint/optimizer.safetensors", mutated_safetensors, check_checkpoint, 10, TRAIN, sealed="checkpoint"
    ),
    "tokenizer": Kind("tokenizer/tokenizer.json", mutated_json, check_tokenizer, 15, PREPARE),
    "tokenizer's config": Kind("tokenizer/tokenizer_config.json", mutated_json, check_tokenizer, 10, PREPARE),
    "tokenizer's template": Kind("tokenizer/chat_template.jinja", mutated_bytes, check_tokenizer, 5, PREPARE),
}


def make_box(folder: Path, inputs: Path) -> Path:
    """A base of two shards, an adapter without a manifest, artifacts of each kind, and the other files, as they should
    be."""
    base, numbers = folder / "base", np.random.default_rng(0)
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: numbers.standard_normal(shape, dtype=np.float32) for name, shape in bench.tensors(CONFIG)}
    names, weight_map = list(tensors), {}
    for number, mine in enumerate((names[:5], names[5:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in mine}, base / shard)
        weight_map |= dict.fromkeys(mine, shard)
    index = {"metadata": {"total_size": 4 * sum(tensor.size for tensor in tensors.values())}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    bench.make_adapter(folder / "adapter", base, CONFIG, 2)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_bytes())
    config |= {"rank_pattern": {}, "alpha_pattern": {"k_proj": 3}, "use_rslora": False, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "use_dora": False}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "n": [1, 2.5, None]}
    (folder / "row.json").write_text(json.dumps(row))
    (folder / "run.yaml").write_bytes(
        (Path(weights.__file__).parents[1] / "data/recipes/smollm2-135m-cpu-8gb.yaml").read_bytes()
    )
    (folder / "chat.jinja").write_text(CHATML)
    for name in ("tiny", "blocks"):
        shutil.copytree(inputs / name, folder / name)
    shutil.copy(inputs / "rows.jsonl", folder)
    make_tokenizer(folder / "tokenizer")
    assert command(line_of(TRAIN, folder, folder / "run")) == 0
    shutil.copytree(folder / "run" / "checkpoints" / "step-00000002", folder / "checkpoint")
    plan = ["plan-devices", folder / "tiny", "--cpu", "8GiB", "--block-size", 64, "--batch-size", 1, "--dtype", "fp32"]
    command([*plan, "--no-gradient-checkpointing", "--output", folder / "plan.json", "--quiet"])
    return folder


def line_of(line: Sequence[str], box: Path, output: Path) -> list[object]:
    """A command line whose files are those of the box."""
    return [*(box / part if (box / part).exists() else part for part in line), "--output", output]


_OWN = (sys.prefix, sys.base_prefix, str(Path(weights.__file__).parents[2]), "/proc/", "/dev/null", "/usr/share/")
_WATCHING: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        for opened in _WATCHING:
            opened.append(os.fsdecode(arguments[0]))


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """What Python opens meanwhile; for the rest of this process, for no such watch can be taken away again."""
    opened: list[str] = []
    _WATCHING.append(opened)
    sys.addaudithook(_hook)
    yield opened
    _WATCHING.remove(opened)


def opened_outside(box: Path, opened: Sequence[str]) -> list[str]:
    """What was opened outside of a folder, lorakit and Python themselves left out."""
    notes = os.environ.get("LORAKIT_TESTS_SEEN")  # where the tests' own guard writes down each error
    allowed = (f"{box}/", *_OWN, *([os.path.realpath(notes)] if notes else []))
    return [path for path in opened if not f"{os.path.realpath(path)}/".startswith(allowed)]


def in_process(inputs: Path, first_seed: int, count: int, without: str | None) -> Any:
    """So many trials of every kind by its share, in a child of its own."""
    take_away(without)
    adapters._MATCHING_SECONDS = 0.5  # there are patterns enough that would take all of it
    tally, accepted = Tally(), 0
    with boxed(inputs) as box, opened_files() as opened:
        chance = random.Random(first_seed)
        for name, kind in KINDS.items():
            good = (box / kind.path).read_bytes()
            assert tried(kind, box) is None
            for number in range(max(1, count * kind.share // 1000)):
                changed, problems = kind.mutate(good, chance), []
                (box / kind.path).write_bytes(changed)
                opened.clear()
                began = time.process_time()
                try:
                    wrong = tried(kind, box)
                    accepted += 1
                    problems += [f"accepted, and wrong: {wrong}"] if wrong else []
                except LorakitError:
                    pass
                except Exception as error:
                    problems.append(f"{type(error).__name__}: {error}"[:200])
                seconds = time.process_time() - began
                problems += opened_outside(box, opened)
                problems += [f"{seconds:.1f} s"] if seconds > _LONGEST_SECONDS else []
                problems += [f"{changed[:1500]!r}"] if problems else []
                tally.add(f"{name} {first_seed}/{number}", problems)
            (box / kind.path).write_bytes(good)
            assert tried(kind, box) is None
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [tally.count, tally.failures[:20], len(tally.failures), accepted, peak_bytes]


def tried(kind: Kind, box: Path) -> str | None:
    if kind.sealed is not None:
        sealed(box / kind.sealed)
    return kind.check(box)


@contextmanager
def boxed(inputs: Path) -> Iterator[Path]:
    """A box, with a cache of its own inside, as the trials may write one."""
    with tempfile.TemporaryDirectory(dir=_BOX) as folder:
        box = make_box(Path(folder) / "box", inputs)
        os.environ["LORAKIT_CACHE"], tempfile.tempdir = str(box / "cache"), str(box)
        yield box
        tempfile.tempdir = None


def by_command_line(inputs: Path, first_seed: int, count: int) -> Any:
    """The commands that use these files, a child each."""
    tally, accepted = Tally(), 0
    kinds = {name: kind for name, kind in KINDS.items() if kind.line}
    with boxed(inputs) as box:
        log, output, chance = box / "log", box / "output", random.Random(first_seed)
        good = {name: (box / kind.path).read_bytes() for name, kind in kinds.items()}
        for name, kind in itertools.islice(itertools.cycle(kinds.items()), count):
            changed, problems = kind.mutate(good[name], chance), []
            (box / kind.path).write_bytes(changed)
            if kind.sealed is not None:
                sealed(box / kind.sealed)
            if kind.path.startswith("checkpoint/"):
                shutil.copytree(box / "checkpoint", output / "checkpoints" / "step-00000002")
            code = forked(lambda kind=kind: command(line_of(kind.line, box, output)), log, 30)  # type: ignore[misc]
            said = log.read_text(errors="replace")
            if code not in (0, *_REFUSALS) or "Traceback" in said or (code != 0) != (said.count("error: ") == 1):
                problems.append(f"exit code {code}: {said[-300:]}")
            if code == 0:
                accepted += 1
                wrong = wrong_in(output, kind, box)
                problems += [f"accepted, and wrong: {wrong}"] if wrong else []
            shutil.rmtree(output, ignore_errors=True)
            (box / kind.path).write_bytes(good[name])
            if kind.sealed is not None:
                sealed(box / kind.sealed)
            problems += [f"{changed[:1500]!r}"] if problems else []
            tally.add(f"{kind.line[0]}, {name}", problems)
    return [tally.count, tally.failures[:20], len(tally.failures), accepted, 0]


def wrong_in(output: Path, kind: Kind, box: Path) -> str | None:
    """What a command wrote that it mustn't have."""
    found: dict[str, Any] = {}
    for shard in output.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(shard)
    if kind.line[0] == "merge":
        return differing(found, reference(box / kind.line[3], box / kind.line[1]))
    artifacts.open_artifact(output, "adapter" if kind.line[0] == "train" else "blocks")
    return None if all(np.isfinite(tensor).all() for tensor in found.values()) else "no numbers"


def take_away(without: str | None) -> None:
    if without == "checks of adapter_config":
        adapters._refuse_unusable = lambda *_: None
    elif without == "checks of shard names":
        weights._SHARD_NAME = re.compile(".*", re.DOTALL)
    elif without == "checks of facts":
        artifacts.as_dataclass = lambda kind, content, _: pydantic.TypeAdapter(kind).validate_json(
            json.dumps(content, default=str)
        )
    elif without == "checks of tokenizers":
        tokenization._refuse_unusable = lambda _: None
        tokenization._of_strangers = lambda _: nullcontext()  # type: ignore[assignment]
    elif without == "checks of hashes":
        disk.sha256 = lambda path: artifacts.read_manifest(path.parent)["files"][path.name]["sha256"]


def prove(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """P4."""
    total, by_line = (2000, 0) if without else (2000, 20) if short else (100_000, 1000)
    tally, accepted, peak_bytes, inputs = Tally(), 0, 0, work / "inputs"
    bodies: list[Callable[[], Any]] = [
        partial(in_process, inputs, number, total // jobs, without) for number in range(jobs)
    ]
    bodies += [partial(by_command_line, inputs, number, by_line // jobs) for number in range(jobs) if by_line]
    for few in (bodies[:jobs], bodies[jobs:]):
        for count, failures, bad, taken, peak in said_by_each(few, work / "mutating.log", 1800) if few else ():
            tally += Tally(count, [*failures, *["…"] * (bad - len(failures))])
            accepted, peak_bytes = accepted + taken, max(peak_bytes, peak)
    if peak_bytes > _MOST_BYTES:
        tally.failures.append(f"{peak_bytes / 2**20:.0f} MiB")
    tally.note = (
        f"{accepted:,} accepted and compared, {by_line:,} by whole command lines, peak {peak_bytes / 2**20:.0f} MiB"
    )
    return tally


# P5


def flipped(folder: str, kind: str, names: Sequence[str], every: int, without: str | None) -> Any:
    """Every `every`-th byte of these files flipped, one at a time: each has to be found when the artifact is opened."""
    take_away(without)
    tally, chance = Tally(), random.Random(0)
    for name in names:
        path = Path(folder) / name
        raw = bytearray(path.read_bytes())
        with path.open("r+b", buffering=0) as file:
            for at in range(0, len(raw), every):
                changed = raw[at] ^ (1 << chance.randrange(8))
                os.pwrite(file.fileno(), bytes([changed]), at)
                try:
                    artifacts.open_artifact(Path(folder), kind)
                    problems = ["not found"]
                except LorakitError as error:
                    problems = [] if error.exit_code == 4 else [f"exit code {error.exit_code}"]
                os.pwrite(file.fileno(), bytes([raw[at]]), at)
                tally.add(f"{name} at {at}", problems)
    artifacts.open_artifact(Path(folder), kind) if without is None else None
    return [tally.count, tally.failures[:20], len(tally.failures)]


def prove_flips(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """P5: manifest, settings, index and state byte for byte; tensors at 10,000 places."""
    tally = Tally()
    room = Path(tempfile.mkdtemp(dir=_BOX))
    try:
        merged_model = room / "merged"
        shutil.copytree(work / "older" / "merge", merged_model)
        shutil.copytree(work / "inputs" / "blocks", room / "blocks")
        shutil.copytree(work / "inputs" / "adapter", room / "adapter")
        checkpoint = next((room / "adapter" / "checkpoints").iterdir())
        jobs_of = []
        for folder, kind in (
            (room / "blocks", "blocks"),
            (checkpoint, "checkpoint"),
            (room / "adapter", "adapter"),
            (merged_model, "merged model"),
        ):
            files = [path.name for path in folder.iterdir() if path.is_file()]
            tensors = [name for name in files if name.endswith(".safetensors")]
            small = [name for name in files if name not in tensors and (folder / name).stat().st_size < 20_000]
            size_bytes = sum((folder / name).stat().st_size for name in tensors)
            jobs_of.append((str(folder), kind, small, 97 if short or without else 1))
            jobs_of.append((str(folder), kind, tensors, max(1, size_bytes // (100 if short or without else 2500))))
        for number, arguments in enumerate(jobs_of):
            count, failures, bad = said_by(
                lambda arguments=arguments: flipped(*arguments, without), work / f"flips-{number}.log", 1800
            )
            tally += Tally(count, [*failures, *["…"] * (bad - len(failures))])
    finally:
        shutil.rmtree(room)
    return tally
