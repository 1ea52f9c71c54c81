"""P4 and P5: files of strangers mutated a hundred thousand times, and every byte of an artifact flipped.

A mutated file is refused with a LorakitError, or used rightly: what is merged is what a few lines of numpy make of the
same files, read by `json` and the safetensors library. No file outside of the folders is opened meanwhile.
"""

import copy
import itertools
import json
import math
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
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lorakit.core import adapters, artifacts, disk, weights
from lorakit.core.config import TrainConfig
from lorakit.core.errors import LorakitError
from lorakit.core.merging import apply
from lorakit.core.merging.plan import Weighted, make_plan
from lorakit.core.placement import read_plan
from lorakit.core.records import parse_row
from lorakit.core.templates import Template, TemplateRefused
from lorakit.options import read_settings
from tests.bench import merge as bench
from tests.conftest import CHATML
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
    if chance.random() < 0.8:
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            return artifacts._manifest_bytes(json.loads(changed))
    return changed


# The oracle


def reference(base: Path, adapter: Path) -> Mapping[str, Any]:
    """Base + adapter in fp64, a tensor each, as peft's documentation has it. KeyError: by a file of another kind."""
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    weight_map = json.loads((base / "model.safetensors.index.json").read_bytes())["weight_map"]
    tensors: dict[str, Any] = {}
    for shard in sorted(set(weight_map.values())):
        tensors |= safetensors.numpy.load_file(base / shard)
    parts = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in parts if name.endswith(".lora_A.weight")]:
        a, b = parts.pop(name), parts.pop(name.replace(".lora_A.", ".lora_B."))
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")

        def chosen(patterns: Mapping[str, Any] | None, default: Any, module: str = module) -> Any:
            fitting = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
            return next(fitting, default)

        rank, alpha = chosen(config.get("rank_pattern"), config["r"]), config["lora_alpha"]
        alpha = chosen(config.get("alpha_pattern"), alpha)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + scale * (b.astype(float) @ a.astype(float))
    if parts:
        raise KeyError(f"tensors that the reference doesn't know: {sorted(parts)[:3]}")
    return tensors


def differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first tensor that isn't as it should be."""
    if found.keys() != expected.keys():
        return f"other names: {sorted(found.keys() ^ expected.keys())[:3]}"
    for name, tensor in expected.items():
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
    TrainConfig.resolve(("run.yaml", read_settings(box / "run.yaml")), (None, {"model": "m", "dataset": "d.jsonl"}))
    return None


def check_template(box: Path) -> str | None:
    with suppress(TemplateRefused, UnicodeDecodeError):
        template = Template((box / "chat.jinja").read_text(encoding="utf-8"), "chat.jinja", {"eos_token": "</s>"})
        template.chat([{"role": "user", "content": "Hi"}], open_turn=True)
    return None


def check_plan(box: Path) -> str | None:
    read_plan(box / "plan.json")
    return None


def check_manifest(box: Path) -> str | None:
    adapter = adapters.open_adapter(box / "adapter", lambda _: None)
    return None if set(adapter.artifact.manifest["files"]) >= {"adapter_model.safetensors"} else "files left out"


KINDS: Mapping[str, tuple[str, Callable[[bytes, random.Random], bytes], Callable[[Path], str | None], int]] = {
    "adapter_config": ("adapter/adapter_config.json", mutated_json, check_merge, 30),
    "config": ("base/config.json", mutated_json, check_merge, 12),
    "index": ("base/model.safetensors.index.json", mutated_json, check_merge, 15),
    "adapter's header": ("adapter/adapter_model.safetensors", mutated_safetensors, check_merge, 17),
    "base's header": ("base/model-00001-of-00002.safetensors", mutated_safetensors, check_merge, 17),
    "row": ("row.json", mutated_json, check_row, 3),
    "plan": ("plan.json", mutated_json, check_plan, 2),
    "recipe": ("run.yaml", mutated_bytes, check_settings, 2),
    "template": ("chat.jinja", mutated_bytes, check_template, 2),
}
"""File, mutator, check, and its share of the trials in hundredths."""


def make_box(folder: Path) -> Path:
    """A base of two shards, an adapter without a manifest, and the other files, as they should be."""
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
        (Path(weights.__file__).parents[1] / "data/recipes/qlora-7b-16gb.yaml").read_bytes()
    )
    (folder / "chat.jinja").write_text(CHATML)
    command(["plan-devices", "smollm2-135m", "--cpu", "8GiB", "--output", folder / "plan.json", "--quiet"])
    return folder


OPENED: list[str] = []
_own = (sys.prefix, sys.base_prefix, str(Path(weights.__file__).parents[2]), "/proc/", "/usr/share/zoneinfo")
_watched = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(arguments[0]))


@contextmanager
def opened_outside(box: Path, found: list[str]) -> Iterator[None]:
    """What is opened outside of a folder meanwhile, lorakit and Python themselves left out."""
    global _watched
    if not _watched:
        sys.addaudithook(_hook)
        _watched = True
    OPENED.clear()
    yield
    notes = os.environ.get("LORAKIT_TESTS_SEEN")  # where the tests' own guard writes down each error
    allowed = (str(box), *_own, *([os.path.realpath(notes)] if notes else []))
    found += [path for path in OPENED if not os.path.realpath(path).startswith(allowed)]


def in_process(first_seed: int, count: int, without: str | None) -> Any:
    """So many trials of every kind by its share, in a child of its own."""
    take_away(without)
    tally, accepted = Tally(), 0
    with tempfile.TemporaryDirectory(dir=_BOX) as folder:
        box = make_box(Path(folder) / "box")
        good = {kind: (box / path).read_bytes() for kind, (path, *_) in KINDS.items()}
        assert all(check(box) is None for _, _, check, _ in KINDS.values())
        chance = random.Random(first_seed)
        for kind, (path, mutate, check, share) in KINDS.items():
            for number in range(max(1, count * share // 100)):
                changed, problems = mutate(good[kind], chance), []
                (box / path).write_bytes(changed)
                began = time.process_time()
                with opened_outside(box, problems):
                    try:
                        wrong = check(box)
                        accepted += 1
                        problems += [f"accepted, and wrong: {wrong}"] if wrong else []
                    except LorakitError:
                        pass
                    except Exception as error:
                        problems.append(f"{type(error).__name__}: {error}"[:200])
                if time.process_time() - began > _LONGEST_SECONDS:
                    problems.append(f"{time.process_time() - began:.1f} s")
                problems += [f"{changed[:1500]!r}"] if problems else []
                tally.add(f"{kind} {first_seed}/{number}", problems)
            (box / path).write_bytes(good[kind])
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [tally.count, tally.failures[:20], len(tally.failures), accepted, peak_bytes]


def by_command_line(first_seed: int, count: int) -> Any:
    """`lorakit merge` on mutated files, a child each."""
    tally, accepted = Tally(), 0
    kinds = [kind for kind, (*_, check, _) in KINDS.items() if check is check_merge]
    with tempfile.TemporaryDirectory(dir=_BOX) as folder:
        box, log = make_box(Path(folder) / "box"), Path(folder) / "log"
        good = {kind: (box / KINDS[kind][0]).read_bytes() for kind in kinds}
        chance = random.Random(first_seed)
        for kind in itertools.islice(itertools.cycle(kinds), count):
            path, mutate, *_ = KINDS[kind]
            changed, problems = mutate(good[kind], chance), []
            (box / path).write_bytes(changed)
            output = box / "merged"
            line = ["merge", box / "adapter", "--base", box / "base", "--output", output]
            code = forked(lambda line=line: command(line), log, 30)  # type: ignore[misc]
            said = log.read_text(errors="replace")
            if code not in (0, *_REFUSALS) or "Traceback" in said or (code != 0) != (said.count("error: ") == 1):
                problems.append(f"exit code {code}: {said[-300:]}")
            if code == 0:
                accepted += 1
                found: dict[str, Any] = {}
                for shard in output.glob("*.safetensors"):
                    found |= safetensors.numpy.load_file(shard)
                wrong = differing(found, reference(box / "base", box / "adapter"))
                problems += [f"accepted, and wrong: {wrong}"] if wrong else []
            shutil.rmtree(output, ignore_errors=True)
            (box / path).write_bytes(good[kind])
            problems += [f"{changed[:1500]!r}"] if problems else []
            tally.add(f"merge, {kind}", problems)
    return [tally.count, tally.failures[:20], len(tally.failures), accepted, 0]


def take_away(without: str | None) -> None:
    if without == "checks of adapter_config":
        adapters._refuse_unusable = lambda *_: None
    elif without == "checks of shard names":
        weights._SHARD_NAME = re.compile(".*", re.DOTALL)
    elif without == "checks of hashes":
        disk.sha256 = lambda path: artifacts.read_manifest(path.parent)["files"][path.name]["sha256"]


def prove(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    """P4."""
    total, by_line = (2000, 0) if without else (2000, 20) if short else (100_000, 1000)
    tally, accepted, peak_bytes = Tally(), 0, 0
    bodies: list[Callable[[], Any]] = [partial(in_process, number, total // jobs, without) for number in range(jobs)]
    bodies += [partial(by_command_line, number, by_line // jobs) for number in range(jobs) if by_line]
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
