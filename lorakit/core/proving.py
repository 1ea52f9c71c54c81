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
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit.core.cases import Case, cases_of, seen_from
from lorakit.core.errors import InputRefused, first_line
from lorakit.core.events import Progress, Report
from lorakit.core.implementations import IMPLEMENTATIONS, Shape, lacking, refuse_leaking_mask, register, shape_of
from lorakit.core.profiling import why_math
from lorakit.core.trials import Bench, Measured, Reference

MOST_RMS_RATIO = 2.0
"""How many times eager's own root-mean-square error against float64 an implementation's may be."""
MOST_MAX_RATIO = 6.0
"""The same for the largest error; torch's own sdpa reaches 4 in single gradients."""
_MOST_EAGER_EPSILONS = 16.0  # eager's own error, relative to what it computes, in units of the number type
_NEW_TOKENS = 8
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


@dataclass(frozen=True)
class Skipped:
    """What could not run, and why."""

    case: str
    backend: str
    reason: str


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
        found = [f"{row.backend}, {row.case}: {row.reason}" for row in self.rows if row.reason]
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
    rows: list[Row] = []
    skipped = [] if only else _cases_that_dont_apply(shape)
    cases = [case for case in cases_of(shape, block_size) if not only or case.name in only]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler about itself, of cuBLAS about its first call
        for done, case in enumerate(cases):
            report(Progress("proving", done, len(cases), "cases", case.name))
            for found in _in_one_case(case, names, bench):
                (rows if isinstance(found, Row) else skipped).append(found)  # type: ignore[arg-type]
        if not only:
            for name in (name for name in names if name != "flex_attention"):
                found = _generation(config, name, shape, device)
                (rows if isinstance(found, Row) else skipped).append(found)  # type: ignore[arg-type]
    return Proof(shape, rows, skipped, _best(rows, names))


def _in_one_case(case: Case, names: Sequence[str], bench: Bench) -> Iterator[Row | Skipped]:
    """Each implementation in a case; eager is the first, beside which the others are judged."""
    reference = bench.reference(case)
    eager: Measured | None = None
    for name in ("eager", *(name for name in names if name != "eager")):
        reason = lacking(name, bench.shape, bench.dtype, bench.device)
        if name == "flex_attention" and reason is None and case.name != "packed":
            reason = "it is compiled anew for every case, and tried in one"
        if reason is None:
            try:
                found = bench.measure(name, case, reference)
            except (RuntimeError, ValueError, NotImplementedError, TypeError, ImportError) as error:
                reason = first_line(error)[:300]
        if reason is not None:
            yield Skipped(case.name, name, reason)
        else:
            eager = found if name == "eager" else eager
            if name in names:
                yield _judged(name, case, found, eager or found, bench, reference)
    bench.forget()


def _cases_that_dont_apply(shape: Shape) -> list[Skipped]:
    found = []
    if shape.num_key_heads == shape.num_heads:
        found.append(Skipped("GQA", "every one", "the model has as many key heads as query heads"))
    if shape.sliding_window is None:
        found.append(Skipped("sliding window", "every one", "the model's config has none"))
    return found


def _best(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """The fastest of those that are right in every case that they ran in, packed blocks among them."""
    right = [name for name in names if all(row.ok for row in rows if row.backend == name)]
    if any(
        row.case == "packed, checkpointed" for row in rows
    ):  # which training runs in: who wasn't proven there is out
        right = [
            name for name in right if any(row.case == "packed, checkpointed" for row in rows if row.backend == name)
        ]
    packed = [row for row in rows if row.case == "packed" and row.backend in right]
    return min(packed, key=lambda row: (row.seconds, names.index(row.backend))).backend if packed else None


# Judging


def _judged(name: str, case: Case, found: Measured, eager: Measured, bench: Bench, reference: Reference) -> Row:
    """A row, with every reason why it isn't right."""
    if case.all_ones_mask:
        return _masked_row(name, case, found, eager, bench, reference)
    errors = _errors(found, eager, reference)
    epsilon = torch.finfo(bench.dtype).eps
    reasons = []
    if not all(bool(torch.isfinite(result).all()) for result in _real(found.results, reference)):
        reasons.append("found NaN or infinity")
    elif errors.relative > _MOST_EAGER_EPSILONS * epsilon and name == "eager":
        reasons.append(f"{errors.relative:.2g} of its results' size away from float64")
    elif errors.rms_ratio > MOST_RMS_RATIO or errors.max_ratio > MOST_MAX_RATIO:
        reasons.append(f"{errors.rms_ratio:.1f} times eager's error ({errors.max_ratio:.1f} in the largest)")
    if case.documents and (leak := bench.leak(name, case, reference)):
        reasons.append(f"a document changes those after it by {leak:.2g}: the mask leaks")
    if case.name == "GQA":
        groups = bench.shape.num_heads // bench.shape.num_key_heads
        if (following := bench.heads_that_follow(name, case, reference)) != list(range(groups)):
            reasons.append(f"the query heads {following} follow the first key head, need the first {groups}")
    if name != "eager" and found.profile.fell_to_math:
        reasons.append(f"fell back to math: {why_math(found.refused, bench.shape.head_dim, bench.dtype)}")
    return _row(name, case, found, eager, errors, "; ".join(reasons), ok=not reasons)


def _masked_row(name: str, case: Case, found: Measured, eager: Measured, bench: Bench, reference: Reference) -> Row:
    """With an all-ones mask beside packed positions, transformers isolates nothing; lorakit has to refuse the batch."""
    leak = bench.leak(name, case, reference)
    _, _, positions_BT = seen_from(case, bench.batch_size)
    try:
        refuse_leaking_mask(
            bench.module, (), {"attention_mask": torch.ones_like(positions_BT), "position_ids": positions_BT}
        )
        caught = False
    except InputRefused:
        caught = True
    reason = "" if caught else "an all-ones mask beside packed positions isn't refused"
    if caught and leak:
        reason = f"transformers isolates nothing here (documents change others by {leak:.2g}); lorakit refuses this"
    return _row(name, case, found, eager, _errors(found, eager, reference), reason, ok=caught)


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
        smallest = torch.finfo(own.dtype).eps * size / 8  # an error below that is luck, and no measure for others
        error, eager_error = (
            (tensor.double() - exact).abs().nan_to_num(_NO_NUMBER, _NO_NUMBER) for tensor in (own, eagers)
        )
        rms, eager_rms = (float(one.square().mean().sqrt()) for one in (error, eager_error))
        rms_ratios.append(rms / max(eager_rms, smallest))
        max_ratios.append(float(error.max()) / max(float(eager_error.max()), smallest))
        differences.append(float(error.max()))
        relatives.append(rms / max(size, 1e-30))
    return _Errors(max(rms_ratios), max(max_ratios), max(differences), max(relatives))


def _generation(config: Any, name: str, shape: Shape, device: torch.device) -> Row | Skipped:
    """Whether a small model with such attention says the same with a KV cache as without, token for token.

    In fp32, where rounding doesn't decide which token is the likeliest.
    """
    case = "generation, cached"
    if name.startswith("flash_attention") or (reason := lacking(name, shape, torch.float32, torch.device("cpu"))):
        reason = "its kernels have no fp32, in which this is compared" if name.startswith("flash") else str(reason)
        return Skipped(case, name, reason)
    small = {
        **config.to_dict(),
        **{"hidden_size": 8 * shape.num_heads, "intermediate_size": 64, "vocab_size": 199, "num_hidden_layers": 2},
        **{"head_dim": shape.head_dim, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None},
    }
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][:2]
    try:
        torch.manual_seed(0)
        built = AutoModelForCausalLM.from_config(type(config).from_dict(small), attn_implementation=name)
        model = built.to(device, torch.float32).eval()
        prompt = torch.randint(1, 199, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
        padded = torch.ones_like(prompt)
        padded[0, :3] = 0
        said = []
        started = time.perf_counter()
        for use_cache in (True, False):
            said.append(
                model.generate(
                    prompt, attention_mask=padded, max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=use_cache
                )
            )
        seconds = time.perf_counter() - started
    except (RuntimeError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        return Skipped(case, name, first_line(error)[:300])
    same = torch.equal(*said)
    reason = "" if same else "the answer with a KV cache is another than without"
    return Row(case, name, "", float(not same), 1.0, 1.0, seconds, None, 1.0, None, same, reason, {})
