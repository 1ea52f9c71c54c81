"""A run as one page: settings, data, curves, memory, samples and the commands that go on from it.

The page is self-contained: styles and drawings lie inside, nothing is fetched, nothing is executed. The same run gives
the same bytes.
"""

import html
import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core.artifacts import Artifact
from lorakit.core.config import TrainConfig, option_name
from lorakit.core.errors import disk_failed

_CAUSES = {
    "weights": "weights of the base",
    "lora": "LoRA matrices",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "loss": "logits and loss",
    "workspace": "workspaces of kernels",
    "context": "CUDA, or Python with its libraries",
    "slack": "what the allocator can't use",
}
_BUCKETS = 400  # of a drawn line: more than a screen shows of it
_WORTH_SMOOTHING = 20  # points


@dataclass(frozen=True)
class _Figures:
    rows: int = 0
    validation_rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    rejected: int = 0
    truncated: int = 0
    longest_tokens: int = 0
    dropped_by_reason: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Facts:
    """What `prepare` says of a blocks folder, as far as the page shows it."""

    blocks: int
    validation_blocks: int
    fill: float
    format: str
    template: str
    figures: _Figures = _Figures()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's JSONL file (`metrics.jsonl`, `samples.jsonl`), none where it isn't there. A line that was
    torn by a kill is left out. Raises DiskFailed."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_failed(error, path) from error
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def data_summary(folders: Sequence[Artifact]) -> dict[str, Any]:
    """What the page says of the blocks that a run was trained on: the facts of all folders together. Raises
    InputRefused where someone else than `prepare` wrote them."""
    facts = [folder.facts_as(_Facts) for folder in folders]
    figures = [fact.figures for fact in facts]
    blocks = sum(fact.blocks + fact.validation_blocks for fact in facts)
    filled = sum(fact.fill * (fact.blocks + fact.validation_blocks) for fact in facts)
    dropped = sum((Counter(figure.dropped_by_reason) for figure in figures), Counter[str]())
    counted = ("rows", "validation_rows", "documents", "tokens", "trained_tokens", "rejected", "truncated")
    return {
        "folders": [str(folder.path) for folder in folders],
        "block_size": folders[0].config["block_size"],
        "blocks": sum(fact.blocks for fact in facts),
        "validation_blocks": sum(fact.validation_blocks for fact in facts),
        "fill": filled / max(blocks, 1),
        **{name: sum(getattr(figure, name) for figure in figures) for name in counted},
        "dropped": dict(dropped),
        "longest_document": max(figure.longest_tokens for figure in figures),
        "format": ", ".join(dict.fromkeys(fact.format for fact in facts)),
        "template": ", ".join(dict.fromkeys(fact.template for fact in facts)),
    }


def report_page(
    config: TrainConfig,
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    planned: Mapping[str, Mapping[str, int]] | None,
    path: Path,
) -> bytes:
    """`report.html` of the run in `path`.

    `facts` are those of the finished run (any may be missing), `metrics` and `samples` the lines of its JSONL files,
    `data` what `data_summary` gives, `planned` the bytes of each device by cause.
    """
    title = f"{path.name}: LoRA on {config.model.model}"
    on_cpu = planned is not None and "cpu" in planned  # where all that the process holds is measured
    expected = sum(planned["cpu"].values()) if planned and on_cpu else facts.get("planned_bytes")
    sections = (
        ("Curves", _curves(metrics, facts.get("best_step"), expected)),
        ("Memory", _memory(planned, facts.get("peak_bytes"), expected)),
        ("Samples", _samples(samples, _best_step(config, facts))),
        ("Data", _data(data)),
        ("Settings", _settings(config)),
        ("Go on from here", _commands(config, data, path)),
    )
    body = "\n".join(f"<section><h2>{name}</h2>\n{content}</section>" for name, content in sections if content)
    page = _PAGE.format(
        title=_escaped(title), style=_STYLE, summary=_summary({**facts, "planned_bytes": expected}), body=body
    )
    return page.encode("utf-8", "replace")  # a sample may hold half of a surrogate pair


# Words and numbers


def _escaped(value: object) -> str:
    return html.escape(str(value))


def _typed(value: object) -> str:
    """A setting as it is typed, or said where there is nothing to type."""
    if value is None or value in ((), []):
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _escaped(value)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; no header where none is given."""
    head = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in header)}</tr></thead>\n" if header else ""
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n{head}<tbody>\n{lines}\n</tbody></table></div>\n'


# Sections


def _summary(facts: Mapping[str, Any]) -> str:
    def pair(first: str, last: str) -> str | None:
        known = [f"{facts[name]:.4f}" for name in (first, last) if facts.get(name) is not None]
        return " → ".join(known) or None

    def shown(name: str, form: Any) -> str | None:
        return form(facts[name]) if facts.get(name) is not None else None

    held_out = shown("eval_loss", lambda loss: f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):,.4g})")
    tiles = {
        "steps": shown("steps", _count),
        "training loss": pair("first_loss", "last_loss"),
        "held-out loss": held_out,
        "best step": shown("best_step", _count),
        "speed": shown("tokens_per_second", lambda speed: f"{speed:,.0f} tokens/s"),
        "peak memory": shown("peak_bytes", _gib),
        "planned": shown("planned_bytes", _gib),
        "time": shown("seconds", _duration),
        "attention": shown("attention", str),
        "gone on after step": shown("resumed_from", _count) if facts.get("resumed_from") else None,
    }
    return "\n".join(
        f"<div><dt>{name}</dt><dd>{_escaped(value)}</dd></div>" for name, value in tiles.items() if value is not None
    )


def _best_step(config: TrainConfig, facts: Mapping[str, Any]) -> int | None:
    """The step whose adapter the run gave, where that isn't the last."""
    return facts.get("best_step") if config.evaluation.load_best_model_at_end else None


def _samples(samples: Sequence[Mapping[str, Any]], best_step: int | None) -> str:
    by_step: dict[int, dict[str, str]] = {}
    for sample in (sample for sample in samples if {"step", "prompt", "answer"} <= sample.keys()):
        by_step.setdefault(sample["step"], {})[_as_text(sample["prompt"])] = _as_text(sample["answer"])
    if not by_step:
        return ""
    before = min(by_step)
    after = best_step if best_step in by_step else max(by_step)
    shown = list(dict.fromkeys((before, after)))
    prompts = dict.fromkeys(prompt for step in shown for prompt in by_step[step])
    titles = {0: "before training (step 0)"}
    header = ["prompt", *(titles.get(step, f"after step {step:,}") for step in shown)]
    rows = [[prompt, *(by_step[step].get(prompt, "") for step in shown)] for prompt in prompts]
    table = _table(header, ([f'<div class="text">{_escaped(cell)}</div>' for cell in row] for row in rows))
    return f'<div class="samples">{table}</div>'


def _as_text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _data(data: Mapping[str, Any]) -> str:
    shown: dict[str, object] = {}
    for name, value in data.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            shown |= {f"{words}: {reason}": count for reason, count in value.items()}
        elif name == "fill":
            shown["room of the blocks that is filled"] = f"{value:.1%}"
        elif isinstance(value, list):
            shown[words] = ", ".join(map(str, value))
        else:
            shown[words] = value
    if data.get("tokens") and "trained_tokens" in data:
        shown["trained tokens"] = f"{data['trained_tokens']:,} ({data['trained_tokens'] / data['tokens']:.0%} of all)"
    return _table((), ([_escaped(name), _count(value)] for name, value in shown.items()))


def _settings(config: TrainConfig) -> str:
    flat, rows, changed = config.flat(), [], []
    for name, knob in config.settings().items():
        default = None if knob.field.is_required() else knob.field.get_default(call_default_factory=True)
        default = list(default) if isinstance(default, tuple) else default
        row = [f"<code>{_escaped(option_name(name))}</code>", _escaped(_typed(flat[name]))]
        row.append("" if knob.field.is_required() else _escaped(_typed(default)))
        rows.append([*row, _escaped(knob.field.description)])
        if knob.field.is_required() or flat[name] != default:
            changed.append(row)
    everything = _table(("option", "value", "default", "what it is"), rows)
    return (
        _table(("option", "value", "default"), changed)
        + f"<details><summary>All {len(rows)} settings</summary>\n{everything}</details>\n"
    )


def _commands(config: TrainConfig, data: Mapping[str, Any], path: Path) -> str:
    run, merged, again = (shlex.quote(str(path.with_name(path.name + end))) for end in ("", "-merged", "-again"))
    folders = data.get("folders") or config.data.blocks
    blocks = " ".join(f"--blocks {shlex.quote(str(folder))}" for folder in folders)
    commands = {
        "Talk with it": f"lorakit chat {run}",
        "Make one model of base and adapter": f"lorakit merge {run} --output {merged}",
        "Measure it, beside its base": f"lorakit evaluate {run} {blocks}",
        "Repeat the run": f"lorakit train --config {run} --output {again}",
    }
    return "".join(f"<p>{words}</p>\n<pre>{_escaped(command)}</pre>\n" for words, command in commands.items())


# Memory


def _memory(planned: Mapping[str, Mapping[str, int]] | None, measured: int | None, expected: int | None) -> str:
    if not planned:
        return ""
    totals = {device: sum(causes.values()) for device, causes in planned.items()}
    scale = max([*totals.values(), measured or 0, 1])

    def part(kind: str, size: int) -> str:
        return f'<i class="{kind}" style="width:{100 * size / scale:.2f}%"></i>'

    kinds = {cause: f"k{number}" for number, cause in enumerate(_CAUSES)}
    bars = "".join(
        _bar(f"{device}, planned", "".join(part(kinds[cause], causes.get(cause, 0)) for cause in kinds), totals[device])
        for device, causes in planned.items()
    )
    words = ""
    if measured is not None:
        bars += _bar("measured", part("measured", measured), measured)
        on_cpu = "cpu" in planned
        what = "the most that the process held" if on_cpu else "the most that torch held on the fullest device"
        counted = "in all" if on_cpu else "without CUDA itself and what the allocator can't use"
        beside = f": {measured / expected - 1:+.1%} beside the {_gib(expected)} planned {counted}" if expected else ""
        words = f"<p>Measured is {what}{beside}.</p>\n"
    there = [cause for cause in kinds if any(causes.get(cause) for causes in planned.values())]
    rows = [
        [
            f'<i class="{kinds[cause]} key"></i> {_CAUSES[cause]}',
            *(_gib(causes.get(cause, 0)) for causes in planned.values()),
        ]
        for cause in there
    ]
    rows.append(["<b>all</b>", *(f"<b>{_gib(total)}</b>" for total in totals.values())])
    return f'<div class="bars">{bars}</div>\n{words}{_table(("cause", *map(_escaped, planned)), rows)}'


def _bar(name: str, parts: str, size: int) -> str:
    return f'<div><span>{_escaped(name)}</span><span class="bar">{parts}</span><span>{_gib(size)}</span></div>\n'


# Curves

_INK, _GRID, _FIRST, _SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
"""What is drawn in these colours takes the page's, light or dark."""
_COLOURS = {_INK: "currentColor", _GRID: "var(--line)", _FIRST: "var(--first)", _SECOND: "var(--second)"}

_CURVES = {
    "loss": ("Loss", "loss", 1),
    "rate": ("Learning rate", "learning_rate", 1),
    "norm": ("Gradient norm", "grad_norm", 1),
    "speed": ("Tokens/s", "tokens_per_second", 1),
    "memory": ("Peak memory, GiB", "peak_bytes", 2**30),
}
"""What is drawn: its title, the metric's name, and how much of it makes one."""
_NOISY = ("loss", "norm", "speed")

_DRAWING: Mapping[str, Any] = {
    "svg.fonttype": "none",  # text as text
    "path.simplify": False,  # lines are thinned before
    "font.size": 9.0,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
}

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values."""
_NOTHING: Series = (np.zeros(0), np.zeros(0))


def _series(metrics: Sequence[Mapping[str, Any]], name: str, unit: int = 1) -> Series:
    """The finite values of a metric and their steps."""
    pairs = [(line["step"], line[name]) for line in metrics if line.get(name) is not None and "step" in line]
    found = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    found = found[np.isfinite(found).all(axis=1)]
    return found[:, 0], found[:, 1] / unit


def _thinned(series: Series) -> Series:
    """At most two points a bucket of steps, its lowest and its highest, so that no spike is lost."""
    steps, values = series
    if len(steps) <= 2 * _BUCKETS:
        return series
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(steps)), _BUCKETS):
        kept += sorted({int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])})
    return steps[kept], values[kept]


def _smoothed(series: Series) -> Series:
    """The mean of the values around each, of a 25th of them all; at the ends of fewer."""
    steps, values = series
    half = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    smooth = (sums[end] - sums[first]) / (end - first)
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), _BUCKETS)).round().astype(int))
    return steps[chosen], smooth[chosen]


def _curves(metrics: Sequence[Mapping[str, Any]], best_step: int | None, expected_bytes: int | None) -> str:
    held_out = _series(metrics, "eval_loss")
    found = ""
    for key, (title, name, unit) in _CURVES.items():
        series, others = _series(metrics, name, unit), held_out if key == "loss" else _NOTHING
        if len(series[0]) or len(others[0]):
            marks = {"best": best_step} if key == "loss" else {"planned": expected_bytes} if key == "memory" else {}
            svg = _inlined(_drawn(key, series, others, **marks), key, title)
            found += f'<figure class="{key}"><figcaption>{title}</figcaption>{svg}</figure>\n'
    return f'<div class="curves">\n{found}</div>\n' if found else ""


def _drawn(key: str, series: Series, held_out: Series, best: int | None = None, planned: int | None = None) -> str:
    """One curve as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update({**_DRAWING, **dict.fromkeys(colours, _INK), "svg.hashsalt": key})
        figure = Figure(figsize=(9.0, 3.2) if key == "loss" else (4.5, 2.4), layout="constrained")
        axes = figure.add_subplot()
        both = bool(len(held_out[0]))
        smooth = len(series[0]) >= _WORTH_SMOOTHING and key in _NOISY
        marker = "o" if len(series[0]) == 1 else "none"
        if len(series[0]):
            alpha, width = (0.35, 0.8) if smooth else (1.0, 1.4)
            label = "training" if both else None
            axes.plot(*_thinned(series), marker=marker, ms=3, color=_FIRST, alpha=alpha, linewidth=width, label=label)
        if smooth:
            axes.plot(*_smoothed(series), color=_FIRST, linewidth=1.6, label="training, smoothed" if both else None)
        if both:
            axes.plot(*_thinned(held_out), color=_SECOND, marker="s", ms=3, ls="--", label="held out")
        if best is not None:
            axes.axvline(best, color=_SECOND, linewidth=0.8, ls=":", label=f"best, step {best:,}")
        if planned:
            axes.axhline(planned / 2**30, color=_SECOND, linewidth=1.2, ls="--", label="planned")
        _rule(axes, key, np.concatenate([series[0], held_out[0]]), series[1])
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return written.getvalue()


def _rule(axes: Any, key: str, steps: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Scales, ticks and legend of a curve."""
    from matplotlib.ticker import MaxNLocator

    if key == "norm" and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    elif key in ("speed", "memory"):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if key == "speed":
        axes.yaxis.set_major_formatter(lambda speed, _: f"{speed:,.0f}")
    if steps.max() - steps.min() < 2:
        axes.set_xlim(steps.min() - 1, steps.max() + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("step")
    axes.grid(linewidth=0.5, color=_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _inlined(svg: str, key: str, title: str) -> str:
    """An SVG file as a part of a page: ids of its own, the page's colours and font, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    rest = re.sub(r' id="([^"]+)"', rf' id="{key}-\1"', rest)
    rest = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", rest)
    rest = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", rest)
    rest = re.sub("|".join(_COLOURS), lambda found: _COLOURS[found[0]], rest)
    rest = re.sub(r"<!--.*?-->\s*", "", rest, flags=re.DOTALL)
    assert view is not None
    link = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {view[0]} {link} role="img" aria-label="{_escaped(title)} by step">{rest}'


# The page

_STYLE = """
:root { color-scheme: light dark; --line: #d5d8dc; --paper: #fff; --ink: #1c2024; --soft: #f3f4f6;
  --first: #1f6feb; --second: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --line: #3b4048; --paper: #16181c; --ink: #e6e8eb; --soft: #22262c;
  --first: #6ea8fe; --second: #fb923c; } }
@media print { :root { color-scheme: light; --line: #d5d8dc; --paper: #fff; --ink: #000; --soft: #f3f4f6;
  --first: #1f6feb; --second: #c2410c; }
  figure, tr, pre, .bars { break-inside: avoid; } h2, p { break-after: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; font: 1rem/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem; margin: 0; }
dl div { background: var(--soft); border-radius: .4rem; padding: .5rem .7rem; }
dt { font-size: .8rem; opacity: .75; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem; }
.curves .loss { grid-column: 1 / -1; }
@media (max-width: 40rem) { .curves { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; overflow-x: auto; } .loss svg { min-width: 36rem; }
figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; } code { white-space: nowrap; }
pre { background: var(--soft); border-radius: .4rem; padding: .6rem .8rem; margin: .2rem 0 .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
p { margin: .4rem 0; } summary { cursor: pointer; padding: .5rem 0; }
.text { white-space: pre-wrap; } .samples table { table-layout: fixed; }
.bars div { display: grid; grid-template-columns: 9rem 1fr 6rem; gap: .7rem; align-items: center; margin: .25rem 0; }
.bar { display: flex; height: 1.1rem; background: var(--soft); }
.bar i { display: block; height: 100%; border-right: 1px solid var(--paper); }
.key { display: inline-block; width: .8rem; height: .8rem; }
.measured { background: var(--ink); }
.k0 { background: #1f6feb; } .k1 { background: #c2410c; } .k2 { background: #eab308; } .k3 { background: #7e57c2; }
.k4 { background: #159957; } .k5 { background: #d6336c; } .k6 { background: #0e9aa7; } .k7 { background: #7d8590; }
.k8 { background: #b08968; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{summary}
</dl>
{body}
</body>
</html>
"""
