"""Hostile files, each from a known hole of this field's tools: refused in one sentence, in time, with nothing run.

Where each comes from stands beside it: a CVE, an issue of another project, or what was measured in one.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core import adapters, artifacts, blocks, untrusted, weights
from lorakit.core.errors import InputRefused, LorakitError
from lorakit.core.templates import Template, TemplateRefused
from lorakit.core.untrusted import MAX_DEPTH, TakesTooLong, bounded, parse_json, parse_yaml, read_json_object
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import make_adapter

Cli = Callable[..., Ran]

# JSON


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "too deep"),  # segfaults datasets 5.2 and pyarrow.json 26.0.1
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "too deep"),  # the same, as a row of 60 KB
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "too deep"),
        (b'{"a": 1, "a": 2}', "a key twice"),  # parsers differ in which they take
        (b'{"lora_alpha": NaN}', "NaN"),  # peft 0.21 merges NaN weights
        (b'{"lora_alpha": 1e400}', "1e400"),  # infinity, by another name
        (b'{"r": ' + b"9" * 5000 + b"}", r"^a whole number of over 4,300 digits$"),
        (b'{"r": [-' + b"9" * 5000 + b"]}", r"^a whole number of over 4,300 digits$"),
        (b'{"a": "\xff"}', "0xff"),
        (b'{"a": 1} x', "Extra data"),
    ],
)
def test_json_that_isnt_strict_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(raw)


@pytest.mark.parametrize("version_1_1", [False, True])
@pytest.mark.parametrize("number", ["!!int " + "9" * 5000, "!!int nine", "!!int '" + "9" * 5000 + "'"])
def test_yaml_that_calls_a_whole_number_what_cant_be_read_as_one_is_refused(number: str, version_1_1: bool) -> None:
    with pytest.raises(ValueError, match=r"^what can't be read as a whole number in line 2$"):
        parse_yaml(f"a: 1\nb: {number}\n".encode(), version_1_1=version_1_1)


def test_a_whole_number_that_python_cant_print_is_text_in_settings_and_refused_in_a_dataset_card() -> None:
    raw = b"a: " + b"9" * 5000
    assert parse_yaml(raw) == {"a": "9" * 5000}
    with pytest.raises(ValueError, match=r"^what can't be read as a whole number in line 1$"):
        parse_yaml(raw, version_1_1=True)


def test_json_that_is_strict_is_what_json_says() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    wide = json.dumps([{"a": [1.5, -0.0, None, True, "é[[[{{{" * 50]}] * 100).encode()
    for raw in (deep, wide, b"\xef\xbb\xbf{}", b"1e308"):
        assert parse_json(raw) == json.loads(raw.decode("utf-8-sig"))


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(InputRefused, match="need a file"):
        read_json_object(tmp_path / "config.json", "")
    (tmp_path / "large.json").write_bytes(b" " * (untrusted.MAX_SETTINGS_BYTES + 1))
    with pytest.raises(InputRefused, match="over 4 MiB"):
        read_json_object(tmp_path / "large.json", "")


# YAML


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",  # "billion laughs", CVE-2003-1564 in XML
        "a: !!python/object/apply:os.system ['touch canary']\n",  # CVE-2017-18342: yaml.load
        "a: !!python/object/new:os.system ['touch canary']\n",  # CVE-2020-14343: FullLoader
        "a: 1\na: 2\n",
        "[" * 5000,
        "a: !!timestamp 2020-13-45\n",
        "? [x]\n: y\n",
    ],
)
def test_yaml_that_is_more_than_settings_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_yaml(text.encode())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1:30", "1:30"), ("010", "010"), ("0x10", "0x10"), ("yes", "yes"), ("no", "no"), ("On", "On")),
        *(("2020-01-01", "2020-01-01"), ("<<", "<<"), ("=", "="), ("9" * 101, "9" * 101), ("1e5", "1e5")),
        *(("true", True), ("False", False), ("~", None), ("", None), ("null", None), ("-0", 0), ("12", 12)),
        *(("1.5", 1.5), (".5", 0.5), ("1.0e-3", 0.001), ("-.inf", -math.inf), ("'12'", "12")),
    ],
)
def test_what_is_no_plain_number_or_boolean_is_text(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}\n".encode())["a"]
    assert (found, type(found)) == (value, type(value))


@given(st.one_of(st.text(max_size=12), st.from_regex(r"[-+]?[0-9.:_eExo~+-]{1,8}", fullmatch=True)))
def test_text_that_was_written_comes_back_as_text(text: str) -> None:
    assert parse_yaml(yaml.safe_dump({"a": text}).encode()) == {"a": text}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"rank: 1\nseed: 2\nalpha: 3\nrank: 4\n", "the key 'rank' twice in line 4"),
        (b"a: 1\nb: [8\n", "in line 3"),
        (b"a: 1\nb: \xff\n", "what isn't UTF-8 in line 2"),
        (b"a: 1\nb: 8\x00\n", "the character U+0000 in line 2"),
        (b"a: 1\nb: *x\n", "an alias in line 2"),
    ],
)
def test_the_line_of_what_is_wrong_is_said(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_yaml(raw)
    assert words in str(caught.value)
    assert "unicode string" not in str(caught.value)


# Templates

BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long string": "{{ 'x' * 2000000000 }}",
    "thirty doublings": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list of lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "padding": "{{ '%2000000000d' % 1 }}",
    "centering": "{{ 'x'.center(2000000000) }}",
    "one instruction without end": (
        "{% set n = namespace(x=[1], y=[1]) %}"
        "{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
    ),
    "a constant that is folded": "{{ ('x' * 100000000) ~ ('y' * 2000000000) }}",
}
ESCAPES = {
    # CVE-2024-34359 (llama-cpp-python), CVE-2026-5760 (SGLang): templates rendered without a sandbox
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch canary').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch canary') }}",
    # CVE-2024-56326: str.format by reference
    "format": "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(namespace) }}",
    "format filter": "{{ ['{0.__class__.__mro__}'] | map('format', cycler) | list }}",
    # CVE-2025-27516: |attr finds what the sandbox hides
    "attr": "{{ ('{0.__class__}'|attr('format'))(cycler) }}",
    "attr of init": "{{ (cycler|attr('__init__'))|attr('__globals__') }}",
    "import": "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "include": "{% include '/etc/passwd' %}",
    "changing": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_wants_all_time_or_memory_is_stopped(name: str) -> None:
    script = (
        "import resource, sys, time\nfrom lorakit.core import templates\n"
        "from lorakit.core.templates import Template, TemplateRefused\ntemplates._CPU_SECONDS = 1.0\n"
        "began = time.process_time()\n"
        "try:\n    Template(sys.argv[1], 't', {}).chat([{'role': 'user', 'content': 'Hi'}], open_turn=True)\n"
        "except TemplateRefused as error:\n    print(error)\n"
        "print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, BOMBS[name]], capture_output=True, text=True, check=True)
    reason, figures = ran.stdout.splitlines()
    seconds, gibibytes = map(float, figures.split())
    assert reason
    assert seconds < 4
    assert gibibytes < 1.5


ONE_INSTRUCTION = BOMBS["one instruction without end"]
LATER = (
    "import sys\nfrom lorakit.core import templates\nfrom lorakit.core.templates import Template\n"
    "templates._CPU_SECONDS = float(sys.argv[2])\nt = Template(sys.argv[1], 't', {})\n"
    "for said in ('Hi', 'never'):\n"
    "    print('begun', flush=True)\n    t.chat([{'role': 'user', 'content': said}], open_turn=True)\n"
)


def test_a_later_text_without_end_ends_the_process() -> None:
    template = "{% if messages[0].content == 'never' %}" + ONE_INSTRUCTION + "{% endif %}"
    ran = subprocess.run([sys.executable, "-c", LATER, template, "0.5"], capture_output=True, timeout=60)
    assert ran.stdout.count(b"begun") == 2
    assert ran.returncode == -signal.SIGPROF


def test_ctrl_c_ends_a_template_inside_of_one_instruction() -> None:
    ran = subprocess.Popen(
        [sys.executable, "-c", LATER, ONE_INSTRUCTION, "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert ran.stdout is not None
    assert ran.stdout.readline() == b"begun\n"
    time.sleep(1)
    ran.send_signal(signal.SIGINT)
    _, said = ran.communicate(timeout=20)
    assert b"KeyboardInterrupt" in said


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_that_looks_around_finds_nothing(name: str, tmp_path: Path) -> None:
    try:
        text = Template(ESCAPES[name], "t", {}).chat([{"role": "user", "content": "Hi"}], open_turn=True).text
    except TemplateRefused:
        text = ""
    assert not any(word in text for word in ("class", "globals", "root:", "module", "function"))
    assert not (tmp_path / "canary").exists()


def test_the_bounds_are_gone_afterwards() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TakesTooLong), bounded(0.05, 2**30):
        all(True for _ in itertools.count())
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(MemoryError), bounded(5, 2**28):
        bytearray(2**30)
    end = time.process_time() + 0.2
    with bounded(10):
        pass
    while time.process_time() < end:
        pass


# Model folders


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("bases") / "base", max_shard_size="60KB")


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in base.iterdir():
        os.link(path, folder / path.name)
    return folder


def changed(path: Path, **values: Any) -> None:
    content = json.loads(path.read_bytes())
    path.unlink()
    path.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "someone/kernel"),  # CVE-2026-4372: transformers 4.56 to 5.2 ran hub code
        ("_attn_implementation", "someone/kernel"),
        ("attn_implementation", "someone/kernel:function"),
        ("trust_remote_code", True),  # CVE-2026-5241: the flag, nested where nobody looked
    ],
)
def test_a_config_that_asks_for_code_is_refused(key: str, value: Any, model: Path) -> None:
    changed(model / "config.json", **{key: value})
    with pytest.raises(InputRefused, match=key):
        weights.open_weights(model)


@pytest.mark.parametrize("value", ["sdpa", "flash_attention_2", None])
def test_a_config_that_asks_for_a_known_attention_is_not(value: Any, model: Path) -> None:
    changed(model / "config.json", attn_implementation=value, _attn_implementation_autoset=True, auto_map={"A": "b.C"})
    assert weights.open_weights(model).tensors


@pytest.mark.parametrize(
    "name",
    [
        "../secret/s.safetensors",  # transformers 5.23.0 loads it (its issue 47176); diffusers' issue 14175
        "/etc/passwd",
        "a/b.safetensors",
        "..\\s.safetensors",
        "s.safetensors\0",
        "~/s.safetensors",
        "",
        "s.bin",
    ],
)
def test_an_index_that_points_outside_is_refused(name: str, model: Path) -> None:
    index = json.loads((model / weights.INDEX).read_bytes())
    first = next(iter(index["weight_map"]))
    changed(model / weights.INDEX, weight_map={**index["weight_map"], first: name})
    with pytest.raises(InputRefused, match=r"need a \.safetensors file"):
        weights.open_weights(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_never_opened(name: str, cli: Cli, model: Path, tmp_path: Path) -> None:
    """CVE-2025-32434 and CVE-2026-24747: torch.load with weights_only; CVE-2026-1839: rng_state.pth of a Trainer."""
    for path in model.glob("*.safetensors*"):
        path.unlink()
    canary = tmp_path / "canary"
    (model / name).write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR.")
    for line in (("chat", model, "--prompt", "Hi"), ("merge", model, "--output", tmp_path / "out")):
        assert cli(*line).code == 3
    assert not canary.exists()


# Adapters


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "adapter", base)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 1e308},
        {"r": 10**400},  # math.isfinite(10**400) raises OverflowError
        {"r": "8"},
        {"r": -4},
        {"peft_type": "IA3"},  # peft 0.21 merges it with nothing applied
        {"rank_pattern": {"(a|a)*(a|a)*(a|a)*(a|a)*$": 4, "(.*)*(.*)*(.*)*(.*)*x$": 4}},  # backtracks without end
        {"target_modules": "(([a-z_.0-9])*)*x"},
        {"exclude_modules": "(((.)*)*)*!"},
        {"rank_pattern": {"[": 4}},
        {"rank_pattern": [1]},
    ],
    ids=lambda values: "-".join(values),
)
def test_an_adapter_of_nonsense_is_refused_in_time(
    values: dict[str, Any], base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_MATCHING_SECONDS", 0.5)
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in adapter.iterdir():
        os.link(path, folder / path.name)
    changed(folder / "adapter_config.json", **values)
    began = time.process_time()
    with pytest.raises(LorakitError):
        adapters.match(adapters.open_adapter(folder, lambda _: None), weights.open_weights(base))
    assert time.process_time() - began < 2


# Manifests


def manifest(folder: Path, **values: Any) -> Path:
    """A manifest whose hash is right."""
    content = {"kind": "blocks", "format": 1, "lorakit": "9", "versions": {}, "config": {}, "parents": {}, "facts": {}}
    folder.mkdir(exist_ok=True)
    (folder / artifacts.MANIFEST).write_bytes(artifacts._manifest_bytes({**content, "files": {}, **values}))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"files": {"../victim": {"bytes": 4, "sha256": "0" * 64}}},
        {"files": {"/etc/passwd": {"bytes": 4, "sha256": "0" * 64}}},
        {"files": {"..": {"bytes": 4, "sha256": "0" * 64}}},
        {"files": {"a": None}},
        {"files": {"a": {"bytes": "4", "sha256": 4}}},
        {"files": ["a"]},
        {"kind": "virus"},
        {"kind": ["blocks"]},
        {"format": "1"},
        {"format": None},
        {"parents": {"base": 5}},
        {"facts": None},
    ],
    ids=str,
)
def test_a_manifest_that_someone_made_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="lorakit doesn't write"):
        artifacts.read_manifest(manifest(tmp_path / "hostile", **values))


@dataclass
class Facts:
    steps: int
    loss: float = 0.0
    best: float | None = None


@pytest.mark.parametrize(
    "facts",
    [
        *({}, {"steps": "2"}, {"steps": None}, {"steps": 2.5}, {"steps": True}, {"steps": [2]}),
        *({"steps": 2, "loss": 10**400}, {"steps": 2, "loss": "1"}, {"steps": 2, "best": "1"}, {"steps": 10**400}),
    ],
    ids=lambda facts: str(facts)[:40],
)
def test_facts_that_someone_made_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    folder = manifest(tmp_path / "hostile", facts=facts)
    with pytest.raises(InputRefused, match="that lorakit doesn't write"):
        artifacts.open_artifact(folder, "blocks").facts_as(Facts)


def test_facts_of_a_newer_lorakit_are_no_obstacle(tmp_path: Path) -> None:
    folder = manifest(tmp_path / "newer", facts={"steps": 2, "mood": "good"})
    assert artifacts.open_artifact(folder, "blocks").facts_as(Facts, loss=1) == Facts(2, 1.0)


def test_a_manifest_without_end_is_refused_and_so_is_none(tmp_path: Path) -> None:
    for number, made in enumerate(
        (lambda path: os.truncate(path, 2**26), lambda path: (path.unlink(), os.mkfifo(path)))
    ):
        folder = manifest(tmp_path / str(number))
        made(folder / artifacts.MANIFEST)
        with pytest.raises(InputRefused, match=r"found (over 16 MiB|no file)"):
            artifacts.read_manifest(folder)


def test_blocks_without_a_size_or_a_tokenizer_are_refused(tmp_path: Path) -> None:
    for values in ({}, {"config": {"block_size": "64"}, "parents": {"tokenizer": "t"}}):
        with pytest.raises(InputRefused, match="without their size or tokenizer"):
            blocks.Blocks(manifest(tmp_path / "hostile", **values))


def test_an_adapter_that_doesnt_say_what_it_comes_from_is_refused(tmp_path: Path) -> None:
    for parents in ({}, {"base": "0" * 64}):
        folder = manifest(tmp_path / "hostile", kind="adapter", parents=parents)
        with pytest.raises(InputRefused, match="doesn't say what it comes from or what it holds"):
            adapters.open_adapter(folder, lambda _: None)


def test_what_a_damaged_manifest_names_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    hostile = tmp_path / "replaced.json"
    for raw in (b"no JSON", (manifest(tmp_path / "x", files={"../victim": None}) / artifacts.MANIFEST).read_bytes()):
        hostile.write_bytes(raw)
        assert artifacts._named_in(hostile) == set()


@pytest.mark.parametrize(
    ("work", "keeps"),
    [
        (lambda: None, True),
        (lambda: {}["no key"], True),  # which is seen again where it isn't tried only
        (lambda: (_ for _ in ()).throw(untrusted.TakesTooLong), False),
        (lambda: (_ for _ in ()).throw(MemoryError), False),
        (lambda: os.kill(os.getpid(), signal.SIGPROF), False),  # of the kernel's bound
        (lambda: os.kill(os.getpid(), signal.SIGKILL), False),  # for want of memory
        (lambda: os.kill(os.getpid(), signal.SIGABRT), True),  # of a library that can't be forked
    ],
)
def test_work_that_is_tried_first_keeps_its_bounds_or_not(work: Callable[[], object], keeps: bool) -> None:
    assert untrusted.keeps_bounds(work) is keeps
