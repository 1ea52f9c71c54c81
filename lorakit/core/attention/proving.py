"""Each attention implementation beside float64: is it right, which kernel ran, how fast, in how much memory.

What a token may see is written down from the definition of each case and computed in float64, head by head, without any
code of transformers; what is judged is called as a model's layer calls it.
"""

import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorakit.core.attention.cases import Case, cases_of
from lorakit.core.attention.implementations import IMPLEMENTATIONS, Shape, lacking, register, shape_of
from lorakit.core.attention.miniature import answers_alike_with_a_cache, leak, leak_by_mask, miniature, rounding
from lorakit.core.attention.trials import Bench, Measured, Reference
from lorakit.core.errors import first_line, is_out_of_memory
from lorakit.core.events import Progress, Report
from lorakit.core.profiling import why_math

MOST_RMS_RATIO = 2.0
"""How many times eager's own root-mean-square error against float64 an implementation's may be."""
MOST_MAX_RATIO = 6.0
"""The same for the largest error; torch's own sdpa reaches 4 in single gradients."""
_MOST_EPSILONS = 16.0  # eager's own error, relative to what it computes, in units of the number type
_TIMES_ROUNDING, _MOST_ROUNDING = 8.0, 1e-4
"""A document may change those after it by so many times what one changes those before it, which is rounding, and by
no more than that: experts of Mixtral and Qwen round by 1e-6, and whole documents that leak change logits by 1."""
_NO_NUMBER = 1e9  # stands for an error of NaN or infinity, which JSON doesn't have


@dataclass(frozen=True)
class Row:
    """One implementation in one case. Differences are largest absolute ones against float64, of output and gradients;
    ratios are the largest of theirs to eager's own error in the same number type."""

    case: str
    backend: str
    """The implementation."""
    kernel: str
    """What the profiler saw."""
    max_difference: float
    rms_ratio: float
    max_ratio: float
    seconds: float
    peak_bytes: int | None
    """Above what was there before the mask; None where it can't be known (on a CPU)."""
    speed: float
    """How many times eager's speed."""
    host_syncs: int | None
    """How often the CPU waited for the GPU inside; None on a CPU."""
    ok: bool
    reason: str
    """Why it isn't right or not as fast as it could be; or what is worth knowing."""
    refused: Mapping[str, str]
    """sdpa's other kernels, and torch's own words why it can't use them."""

    def __str__(self) -> str:
        return f"{self.backend}, {self.case}: {self.reason}"


@dataclass(frozen=True)
class Skipped:
    """What could not run, and why."""

    case: str
    backend: str
    reason: str


Found = Row | Skipped


@dataclass(frozen=True)
class Proof:
    """All that ran and all that could not; `implementation` is the fastest right one for training, if there is one."""

    shape: Shape
    rows: Sequence[Row]
    skipped: Sequence[Skipped]
    implementation: str | None

    def notes(self) -> list[str]:
        """What is worth knowing beside the figures, a line each: reasons, kernels that sdpa can't use, what is left
        out."""
        found = [str(row) for row in self.rows if row.reason]
        refused: dict[tuple[str, str], dict[str, None]] = {}
        for row in self.rows:
            for kernel, why in row.refused.items():
                refused.setdefault((kernel, re.sub(r"Query\.sizes.*? instead", "They differ", why)), {})[row.case] = (
                    None
                )
        found += [f"sdpa in {', '.join(cases)}: no {kernel}: {why}" for (kernel, why), cases in refused.items()]
        for backend, reason in dict.fromkeys((one.backend, one.reason) for one in self.skipped):
            cases = [one.case for one in self.skipped if (one.backend, one.reason) == (backend, reason)]
            where = ", ".join(cases) if len(cases) < 4 else f"{len(cases)} cases"
            found.append(f"skipped: {backend} in {where}: {reason}")
        kernels = dict.fromkeys(row.kernel for row in self.rows if ": " in row.kernel)
        found += [f"kernel {kernel}" for kernel in kernels]
        return found


def prove(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    batch_size: int,
    report: Report,
    *,
    names: Sequence[str] = IMPLEMENTATIONS,
    only: Sequence[str] = (),
    measured: bool = True,
) -> Proof:
    """Run each implementation in each case of a model (of its transformers config), or `only` in some of them.

    Where it isn't `measured`, results are judged without timing and profile.
    Raises InputRefused where the model has no attention that goes through transformers' interface.
    """
    shape = shape_of(config)
    register()
    bench = Bench(config, shape, dtype, device, batch_size, measured)
    found: list[Found] = [] if only else _cases_that_dont_apply(shape)
    cases = [case for case in cases_of(shape, block_size) if not only or case.name in only]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler about itself, of cuBLAS about its first call
        for done, case in enumerate(cases):
            report(Progress("proving", done, len(cases), "cases", case.name))
            found += _in_one_case(case, names, bench)
        for name in (name for name in names if lacking(name, shape, dtype, device) is None):
            if name != "flex_attention":
                found += _whole_model(config, name, shape, device, packed_only=bool(only))
    rows = [one for one in found if isinstance(one, Row)]
    return Proof(shape, rows, [one for one in found if isinstance(one, Skipped)], best(rows, names))


def _in_one_case(case: Case, names: Sequence[str], bench: Bench) -> Iterator[Found]:
    """Each implementation in a case; eager is the first, beside which the others are judged."""
    reference = bench.reference(case)
    eager: Measured | None = None
    for name in ("eager", *(name for name in names if name != "eager")):
        reason = lacking(name, bench.shape, bench.dtype, bench.device)
        if name == "flex_attention" and reason is None and case.name != "packed":
            reason = "it is compiled anew for every case, and tried in one"
        if reason is not None:
            yield Skipped(case.name, name, reason)
            continue
        try:
            found = bench.measure(name, case, reference)
        except Exception as error:
            reason = first_line(error)[:300]
            if is_out_of_memory(error) or isinstance(error, NotImplementedError | ImportError):
                yield Skipped(case.name, name, reason)
            elif name in names:
                yield Row(case.name, name, "", 0.0, 0.0, 0.0, 0.0, None, 0.0, None, False, f"fails: {reason}", {})
            continue
        eager = found if name == "eager" else eager
        if name in names:
            yield _judged(name, case, found, eager, bench, reference)
    bench.forget()


def _cases_that_dont_apply(shape: Shape) -> list[Found]:
    found: list[Found] = []
    if shape.num_key_heads == shape.num_heads:
        found.append(Skipped("GQA", "every one", "the model has as many key heads as query heads"))
    if shape.sliding_window is None:
        found.append(Skipped("sliding window", "every one", "the model's config has none"))
    return found


def best(rows: Sequence[Row], names: Sequence[str], case: str = "packed") -> str | None:
    """The fastest in a case, of those that are right in every case that they ran in. Where packed blocks were tried
    under checkpointing too, as training runs them, who wasn't is left out."""
    right = {name for name in names if all(row.ok for row in rows if row.backend == name)}
    checkpointed = {row.backend for row in rows if row.case == "packed, checkpointed"}
    ran = [row for row in rows if row.case == case and row.backend in (right & checkpointed if checkpointed else right)]
    return min(ran, key=lambda row: (row.seconds, names.index(row.backend))).backend if ran else None


# Judging


def _judged(name: str, case: Case, found: Measured, eager: Measured | None, bench: Bench, reference: Reference) -> Row:
    """A row, with every reason why it isn't right. Where eager can't run, rounding alone has to explain the error."""
    errors = _errors(found, eager or found, reference)
    epsilon = torch.finfo(bench.dtype).eps
    reasons = []
    if not all(bool(torch.isfinite(result).all()) for result in _real(found.results, reference)):
        reasons.append("found NaN or infinity")
    elif errors.relative > _MOST_EPSILONS * epsilon and (eager is None or name == "eager"):
        reasons.append(f"{errors.relative:.2g} of its results' size away from float64")
    elif errors.rms_ratio > MOST_RMS_RATIO or errors.max_ratio > MOST_MAX_RATIO:
        reasons.append(
            f"{errors.rms_ratio:.2f} times eager's error, at most {MOST_RMS_RATIO:g} is right "
            f"({errors.max_ratio:.1f} in the largest, at most {MOST_MAX_RATIO:g})"
        )
    if case.documents and (leak := bench.leak(name, case, reference)):
        reasons.append(f"a document changes those after it by {leak:.2g}: the mask leaks")
    if case.name == "GQA":
        groups = bench.shape.num_heads // bench.shape.num_key_heads
        if (following := bench.heads_that_follow(name, case, reference)) != list(range(groups)):
            reasons.append(f"the query heads {following} follow the first key head, need the first {groups}")
    if name != "eager" and found.profile.fell_to_math:
        reasons.append(f"fell back to math: {why_math(found.refused, bench.shape.head_dim, bench.dtype)}")
    return _row(name, case, found, eager or found, errors, "; ".join(reasons), ok=not reasons)


def _row(name: str, case: Case, found: Measured, eager: Measured, errors: "_Errors", reason: str, *, ok: bool) -> Row:
    return Row(
        case=case.name,
        backend=name,
        kernel=found.profile.kernel,
        max_difference=errors.max_difference,
        rms_ratio=errors.rms_ratio,
        max_ratio=errors.max_ratio,
        seconds=found.seconds,
        peak_bytes=found.peak_bytes,
        speed=eager.seconds / found.seconds if found.seconds else 1.0,
        host_syncs=found.profile.host_syncs,
        ok=ok,
        reason=reason,
        refused=found.refused,
    )


@dataclass(frozen=True)
class _Errors:
    """Over output and gradients: the largest ratios of root-mean-square and of largest error to eager's, the largest
    difference from float64, and the largest root-mean-square error as a share of the result's size."""

    rms_ratio: float
    max_ratio: float
    max_difference: float
    relative: float


def _real(results: Sequence[Tensor], reference: Reference) -> Iterator[Tensor]:
    """Output where queries are text, and whole gradients."""
    output, *gradients = results
    yield output[reference.real_BT]
    yield from gradients


def _errors(found: Measured, eager: Measured, reference: Reference) -> _Errors:
    rms_ratios, max_ratios, differences, relatives = [], [], [], []
    triples = zip(*(_real(one.results, reference) for one in (found, eager, reference)), strict=True)
    for own, eagers, exact in triples:
        size = float(exact.square().mean().sqrt())
        smallest = torch.finfo(own.dtype).eps * size / 4  # below that, eager was lucky: few terms, hardly rounded
        error, eager_error = (
            (tensor.double() - exact).abs().nan_to_num(_NO_NUMBER, _NO_NUMBER) for tensor in (own, eagers)
        )
        rms, eager_rms = (float(one.square().mean().sqrt()) for one in (error, eager_error))
        rms_ratios.append(rms / max(eager_rms, smallest))
        max_ratios.append(float(error.max()) / max(float(eager_error.max()), smallest))
        differences.append(float(error.max()))
        relatives.append(rms / max(size, 1e-30))
    return _Errors(max(rms_ratios), max(max_ratios), max(differences), max(relatives))


# A whole model


def _whole_model(config: Any, name: str, shape: Shape, device: torch.device, *, packed_only: bool) -> list[Found]:
    """What a small whole model with such attention shows: documents are apart, a mask is refused, a cache is kept."""
    cases = ("whole model, packed", "whole model, all-ones mask", "whole model, cached")[: 1 if packed_only else 3]
    if name.startswith("flash_attention"):
        return [Skipped(case, name, "its kernels have no fp32, in which a whole model is tried") for case in cases]
    try:
        model = miniature(config, shape, name, device)
    except Exception as error:
        return [Skipped(case, name, f"no small model can be made of it: {first_line(error)[:200]}") for case in cases]
    found: list[Found] = []
    for case, trial in zip(cases, (_apart, _mask_refused, _cache_kept), strict=False):
        started = time.perf_counter()
        try:
            difference, ok, reason = trial(model)
        except Exception as error:
            difference, ok, reason = 0.0, False, f"fails: {first_line(error)[:200]}"
        seconds = time.perf_counter() - started
        found.append(Row(case, name, "", difference, 1.0, 1.0, seconds, None, 1.0, None, ok, reason, {}))
    return found


def _apart(model: Any) -> tuple[float, bool, str]:
    leaked = leak(model)
    apart = leaked <= min(_TIMES_ROUNDING * rounding(model), _MOST_ROUNDING)
    return leaked, apart, "" if apart else f"documents change those after them by {leaked:.2g}"


def _mask_refused(model: Any) -> tuple[float, bool, str]:
    leaked, refused = leak_by_mask(model)
    if not refused:
        return leaked, False, "an all-ones mask beside packed positions isn't refused"
    return leaked, True, f"with it documents change others by {leaked:.2g}; lorakit refuses it" if leaked else ""


def _cache_kept(model: Any) -> tuple[float, bool, str]:
    same = answers_alike_with_a_cache(model)
    return float(not same), same, "" if same else "the answer with a KV cache is another than without"
