"""report.html: what it shows is what it was given, read back from the page; nothing of a run's text is markup."""

import html
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.core import artifacts
from lorakit.core.blocks import VALIDATION, Blocks
from lorakit.core.config import ChatConfig, EvaluateConfig, MergeConfig, TrainConfig
from lorakit.core.errors import DiskFailed
from lorakit.core.memory import Workload
from lorakit.core.placement import make_plan
from lorakit.core.reporting import data_summary, read_metrics, report_page
from lorakit.core.shapes import config_of, shape_of
from tests.conftest import Ran
from tests.test_options import parsed

Cli = Callable[..., Ran]
NASTY = "<script>alert('x')</script> & \"$q_1$\" \ud800"


class _Page(HTMLParser):
    """The page's tags, held to be balanced, and its text."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


def config(**given: Any) -> TrainConfig:
    return TrainConfig.resolve((None, {"model": "m", "blocks": "/b", **given}))


def lines(values: Any, name: str = "loss") -> list[dict[str, Any]]:
    return [{"step": step, name: value} for step, value in enumerate(values, 1)]


def page_of(metrics: Any = (), **given: Any) -> bytes:
    usual: dict[str, Any] = {"config": config(), "facts": {}, "samples": (), "data": {}, "planned": None}
    return report_page(metrics=metrics, **{**usual, "path": Path("/runs/mine"), **given})


def figure(page: bytes, key: str) -> str:
    [found] = re.findall(rf'<figure class="{key}">.*?</figure>', page.decode(), re.DOTALL)
    return str(found)


def curves(page: bytes, key: str, colour: str) -> list[np.ndarray[Any, Any]]:
    """The points [:, (x, y)] of each long line that a figure draws in a colour, upwards."""
    drawn = re.findall(rf'<path d="(M[^"]+)"[^>]*stroke: var\(--{colour}\)', figure(page, key))
    points = [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path), dtype=float) * (1, -1) for path in drawn]
    return [path for path in points if len(path) > 6]  # fewer are markers and legends


def cells(part: str) -> list[list[str]]:
    """The rows of the tables of a part of a page, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)]
        for row in rows
        if "<td>" in row
    ]


def section(page: bytes, name: str) -> str:
    return page.decode().split(f"<h2>{name}</h2>", 1)[1].split("</section>", 1)[0]


EVERYTHING: dict[str, Any] = {
    "metrics": [
        {**line, "learning_rate": 1e-4, "grad_norm": 1.5, "tokens_per_second": 900.0, "peak_bytes": 2**30, "epoch": 0.5}
        for line in lines(np.linspace(3, 1, 40))
    ]
    + lines([2.5, 2.0], "eval_loss"),
    "facts": {"steps": 40, "first_loss": 3.0, "last_loss": 1.0, "best_step": 20, "peak_bytes": 2**30, "seconds": 7.0},
    "samples": [{"step": step, "prompt": NASTY, "answer": NASTY} for step in (0, 40)],
    "data": {"folders": [NASTY], "block_size": 64, "fill": 0.5, "template": NASTY, "dropped": {NASTY: 2}},
    "planned": {"cuda:0": {"weights": 2**29, "lora": 2**28, "context": 2**28}},
}


def test_nothing_of_a_runs_text_is_markup_and_nothing_is_fetched() -> None:
    page = page_of(**{**EVERYTHING, "config": config(model=NASTY.strip("\ud800 ")), "path": Path("/runs/<i>mine")})
    found = _Page(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert "<i>mine" in found.text
    assert found.text.count("<script>alert('x')</script> & \"$q_1$\" ?") == 6
    for _, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "action", "formaction")
            if name in ("href", "xlink:href"):
                assert value is not None
                assert value.startswith("#")
    assert b"@import" not in page
    assert re.findall(rb"url\((?!#)", page) == []


def test_every_id_is_there_once_and_every_reference_leads_to_one() -> None:
    found = _Page(page_of(**EVERYTHING))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    page = page_of(**EVERYTHING).decode()
    references = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page))
    assert references
    assert references <= set(ids)
    assert [
        len(re.findall(f'<figure class="{key}">', page)) for key in ("loss", "rate", "norm", "speed", "memory")
    ] == [1] * 5


def test_the_same_run_gives_the_same_bytes_in_any_process_and_with_any_matplotlibrc(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\naxes.grid: True\nsvg.fonttype: path\n")
    code = (
        "import sys; from tests.core.test_reporting import EVERYTHING, page_of; page = page_of(**EVERYTHING); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules; sys.stdout.buffer.write(page)"
    )
    root = str(Path(__file__).parents[2])
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": root, "PYTHONHASHSEED": seed, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=True,
            cwd=tmp_path,
        )
        assert ran.stdout == page_of(**EVERYTHING)


def test_a_curve_is_the_metrics() -> None:
    """Drawn points are an affine map of steps and values: found from two of them, it holds for all."""
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 3, size=15)
    metrics = [*lines(values), *lines(values[::-1] / 2, "eval_loss"), {"step": 16, "loss": float("nan")}]
    [training], [held_out] = (curves(page_of(metrics), "loss", colour) for colour in ("first", "second"))
    low, high = values.argmin(), values.argmax()
    scale = (training[high] - training[low])[1] / (values[high] - values[low])
    right = (training[-1] - training[0])[0] / 14
    for drawn, given in ((training, values), (held_out, values[::-1] / 2)):
        assert drawn[:, 0] - training[0, 0] == pytest.approx(right * np.arange(15), abs=1e-3)
        assert drawn[:, 1] - training[low, 1] == pytest.approx(scale * (given - values[low]), abs=1e-3)


def test_a_noisy_curve_has_its_running_mean_beside_it() -> None:
    values = np.random.default_rng(0).uniform(1, 3, size=200)
    raw, smooth = curves(page_of(lines(values)), "loss", "first")
    scale = np.ptp(raw[:, 1]) / np.ptp(values)
    expected = [values[max(0, place - 4) : place + 5].mean() for place in range(200)]  # a 25th, and its middle
    assert smooth[:, 1] - raw[:, 1].min() == pytest.approx(scale * (np.array(expected) - values.min()), abs=1e-2)
    assert len(curves(page_of(lines(values[:10])), "loss", "first")) == 1


def test_a_hundred_thousand_steps_are_thinned_and_a_spike_stays() -> None:
    values = np.linspace(3, 1, 100_000)
    values[50_001] = 40.0
    metrics = [{**line, "grad_norm": 1.0, "peak_bytes": 2**30} for line in lines(values)]
    page = page_of(metrics)
    raw, smooth = curves(page, "loss", "first")
    assert len(raw) <= 800
    assert len(smooth) <= 400
    assert len(page) < 300_000
    top = raw[raw[:, 1].argmax()]
    middle = (50_002 - 1) / (100_000 - 1)
    assert (top[0] - raw[0, 0]) / (raw[-1, 0] - raw[0, 0]) == pytest.approx(middle, abs=1e-3)
    assert (top[1] - raw[-1, 1]) / (raw[0, 1] - raw[-1, 1]) == pytest.approx((40 - 1) / (3 - 1), rel=1e-3)


@pytest.mark.parametrize("metrics", [lines([2.0]), lines([2.0, 2.0]), lines([0.5], "eval_loss")])
def test_one_step_is_enough(metrics: list[dict[str, Any]]) -> None:
    assert figure(page_of(metrics), "loss").count("<use") > 0
    _Page(page_of(metrics, facts={"steps": 1, "best_step": 1}))


@pytest.mark.parametrize("metrics", [[], [{"step": 1}], lines([float("inf"), None])])
def test_without_anything_to_draw_there_are_no_curves(metrics: list[dict[str, Any]]) -> None:
    page = page_of(metrics)
    assert b"<h2>Curves" not in page
    assert b"<h2>Memory" not in page
    assert b"<h2>Samples" not in page
    assert b"<h2>Settings" in page


def test_settings_that_were_changed_come_first_and_all_are_there() -> None:
    chosen = config(rank=64, max_steps=100_000, target_modules="q_proj,v_proj", gradient_checkpointing=False)
    first, rest = section(page_of(config=chosen), "Settings").split("<details>")
    assert cells(first) == [
        ["--model", "m", ""],
        ["--blocks", "/b", "not set"],
        ["--rank", "64", "16"],
        ["--target-modules", "q_proj,v_proj", "all-linear"],
        ["--max-steps", "100000", "not set"],
        ["--gradient-checkpointing", "off", "on"],
    ]
    everything = cells(rest)
    assert [row[0].removeprefix("--").replace("-", "_") for row in everything] == list(TrainConfig.settings())
    assert all(row[3] for row in everything)


def test_planned_memory_is_the_plans_and_stands_beside_what_was_measured() -> None:
    shape = shape_of("llama-7b", config_of("llama-7b"))
    work = Workload("bf16", "nf4", 16, ("all-linear",), 0.0, 512, 1, accumulates=True, gradient_checkpointing=True)
    plan = make_plan(shape, {0: 8 * 2**30, 1: 8 * 2**30}, work, "split")
    planned = {load.name: load.bytes._asdict() for load in plan.loads}
    measured = round(1.1 * plan.allocated_bytes)
    facts = {"peak_bytes": measured, "planned_bytes": plan.allocated_bytes}
    page = page_of(lines([measured], "peak_bytes"), facts=facts, planned=planned)
    text = section(page, "Memory")
    assert f"+10.0% beside the {plan.allocated_bytes / 2**30:.2f} GiB planned without CUDA itself" in text
    rows = {row[0]: row[1:] for row in cells(text)}
    assert rows["weights of the base"] == [f"{load.bytes.weights / 2**30:.2f} GiB" for load in plan.loads]
    assert rows["all"] == [f"{load.bytes.total / 2**30:.2f} GiB" for load in plan.loads]
    bars = [
        sum(float(width) for width in re.findall(r"width:([\d.]+)%", bar))
        for bar in re.findall(r'<span class="bar">(.*?)</span>', text)
    ]
    sizes = [*(load.bytes.total for load in plan.loads), measured]
    assert bars == pytest.approx([100 * size / max(sizes) for size in sizes], abs=0.05)
    on_cpu = {"cpu": {"weights": 3 * 2**30, "context": 2**30}}
    page = page_of(facts={"peak_bytes": 3 * 2**30, "planned_bytes": 3 * 2**30}, planned=on_cpu)
    assert "-25.0% beside the 4.00 GiB planned in all" in section(page, "Memory")


def test_samples_before_and_after_lie_side_by_side() -> None:
    samples = [
        {"step": step, "prompt": prompt, "answer": f"{prompt} at {step}"}
        for step in (0, 5, 10)
        for prompt in ("a", "b")
    ]
    assert cells(section(page_of(samples=samples), "Samples")) == [
        ["a", "a at 0", "a at 10"],
        ["b", "b at 0", "b at 10"],
    ]
    best = config(load_best_model_at_end=True, eval_steps=5)
    page = page_of(samples=samples, config=best, facts={"best_step": 5})
    assert cells(section(page, "Samples"))[0] == ["a", "a at 0", "a at 5"]
    once = [{"step": 7, "prompt": [{"role": "user", "content": "é"}], "answer": "x"}, {"step": 8}]
    assert cells(section(page_of(samples=once), "Samples")) == [['[{"role": "user", "content": "é"}]', "x"]]


def test_what_a_run_found_out_is_at_the_top() -> None:
    facts = {"steps": 1200, "first_loss": 2.5, "last_loss": 1.25, "eval_loss": 0.0, "seconds": 3725.0}
    facts |= {"tokens_per_second": 8011.4, "peak_bytes": 3 * 2**30, "planned_bytes": None, "attention": "varlen"}
    top = page_of(facts=facts).decode().split("</dl>")[0]
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", top))
    assert shown == {
        "steps": "1,200",
        "training loss": "2.5000 → 1.2500",
        "held-out loss": "0.0000 (perplexity 1)",
        "speed": "8,011 tokens/s",
        "peak memory": "3.00 GiB",
        "time": "1 h 02 min",
        "attention": "varlen",
    }


def test_the_commands_are_whole_and_repeat_the_run(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    made = config(blocks=[str(tmp_path / "my blocks")], rank=8, output=str(run), learning_rate=1e-4)
    (run / artifacts.SETTINGS).write_bytes(artifacts.settings_text(made))
    page = page_of(config=made, path=run)
    commands = [
        shlex.split(html.unescape(command))
        for command in re.findall(r"<pre>(.*?)</pre>", section(page, "Go on from here"))
    ]
    assert [command[:2] for command in commands] == [
        ["lorakit", name] for name in ("chat", "merge", "evaluate", "train")
    ]
    chat, merge, evaluate, train = (
        parsed(step, *command[2:])[0]
        for step, command in zip((ChatConfig, MergeConfig, EvaluateConfig, TrainConfig), commands, strict=True)
    )
    assert chat.model.model == evaluate.model.model == str(run)
    assert merge.adapter.adapter == (str(run),)
    assert evaluate.data.blocks == (tmp_path / "my blocks",)
    assert merge.output.output == tmp_path / "my run-merged"
    assert train.identity() == made.identity()
    assert train.output.output == tmp_path / "my run-again"


def test_the_data_is_summed_up_from_its_folders(cli: Cli, rows_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folders = []
    for name, more in (("one", ()), ("two", ("--validation-split", 0.3, "--max-rows", 20))):
        common = ("--tokenizer", tiny_llama, "--block-size", 128, "--output", tmp_path / name)
        assert cli("prepare", rows_file, *common, *more).code == 0
        folders.append(tmp_path / name)
    blocks, held_out = Blocks(folders), Blocks(folders, VALIDATION)
    found = data_summary(blocks.artifacts)
    arrays = [part.arrays(index) for part in (blocks, held_out) for index in range(len(part))]
    tokens = sum(int(np.isin(document, document[trained == 1]).sum()) for _, trained, document in arrays)
    assert (found["blocks"], found["validation_blocks"]) == (len(blocks), len(held_out))
    assert found["tokens"] == tokens
    assert found["trained_tokens"] == sum(int(trained.sum()) for _, trained, _ in arrays)
    assert found["fill"] == pytest.approx(tokens / (128 * len(arrays)))
    assert (found["rows"], found["block_size"]) == (44, 128)
    rows = dict(cells(section(page_of(data=found), "Data")))
    assert rows["tokens"] == f"{tokens:,}"
    assert rows["folders"] == ", ".join(map(str, folders))
    assert rows["template"] == "the tokenizer's chat template"


def test_metrics_are_read_without_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    whole = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1e-9, "text": "é\u2028"}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole) + '{"step": 3, "lo', "utf-8")
    assert read_metrics(path) == whole
    with pytest.raises(DiskFailed):
        read_metrics(tmp_path)
