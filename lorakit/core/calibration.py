"""Rounding a base by what goes through it: some tokens of the training data pass its exact layers one after the other,
and each matrix is rounded so that its outputs for them change least.

Rounding to the nearest code makes each weight's own error least; the outputs are better served where the error of one
weight is made good by those after it (Frantar et al. 2022, GPTQ, arXiv 2210.17323). The scales stay those of plain
rounding, so that nothing else knows the difference. On the way each matrix's error is measured, and the loss of the
exact base, which nobody could load whole.

Shapes by suffix: N outputs, K inputs, T tokens, G scales of a row.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.nn import ModuleList
from transformers import PreTrainedModel

from lorakit.core.errors import NonFinite, base_gives_no_numbers, is_out_of_memory
from lorakit.core.fast.storage import FP8, LARGEST, FrozenLinear, exact
from lorakit.core.quantization import Quantizing, linear_layers, move, quantize_layers, quantized, weight_of

CALIBRATION_TOKENS = 4096
"""What is calibrated on, unless one block is longer."""
_DAMPING = 0.01
"""Of the mean second moment, added to all: as in the paper."""
_TOO_MUCH = 0.5
"""Of a matrix's outputs: a real base's lose up to 3 % in 8 bits and 19 % in nf4, rounded to the nearest."""
_BLOCK = 128
"""Columns whose errors are spread over the rest of the matrix in one product."""


@dataclass
class Calibration:
    """What a base is calibrated on, and what came out.

    `loss_of` computes the mean loss of a model over the tokens. Where `compensates` is false, codes are the nearest
    ones, and only measured.
    """

    loss_of: Callable[[Any], float]
    compensates: bool
    batch: str = ""
    """The fingerprint of the tokens."""
    exact_loss: float = float("nan")
    quantized_loss: float = float("nan")
    errors: dict[str, float] = field(default_factory=dict)
    """Of each quantized matrix: the size of its outputs' error beside that of its outputs."""
    kept: list[str] = field(default_factory=list)
    """Where it compensates: matrices that stay in 16 bits, for they or their neighbours would have lost too much."""
    unmeasured: list[str] = field(default_factory=list)
    """Matrices rounded to the nearest, because there was no memory for their moments or no token passed them."""
    recoded: int = 0
    """How many matrices got other codes than the nearest."""
    out_of_memory: bool = False
    """Whether some are unmeasured for want of memory, of which there may be more another time."""

    @property
    def changes(self) -> bool:
        """Whether the base isn't what rounding to the nearest makes of it."""
        return bool(self.compensates and (self.recoded or self.kept))

    @property
    def exceptions(self) -> list[str]:
        """Matrices that weren't compensated as the others were."""
        return [*self.kept, *self.unmeasured] if self.compensates else []

    def told(self, kind: str, dtype: str) -> str:
        """One line on what the base has lost."""
        how = "calibrated" if self.recoded else "rounded to the nearest"
        ordered = sorted(self.errors.items(), key=lambda error: error[1]) or [("none", 0.0)]
        middle, (name, worst) = ordered[len(ordered) // 2][1], ordered[-1]
        kept = f"; in {dtype} stay {', '.join(self.kept)}" if self.kept else ""
        kept += f"; {len(self.unmeasured)} rounded to the nearest, unmeasured" if self.unmeasured else ""
        return (
            f"base in {kind}, {how}: loss {self.quantized_loss:.4f} on the first blocks, {self.exact_loss:.4f} in "
            f"{dtype}; its matrices' outputs are off by {middle:.1%}, at most {worst:.1%} ({name}){kept}"
        )


class Grid(NamedTuple):
    """The numbers that a matrix can be stored as: those of a table, times a scale for each run of a row's columns."""

    scales_GN: Tensor
    table: Tensor | None
    """Sorted, for 4 bits; None: 8-bit floats."""

    def nearest(self, values_N: Tensor, group: int) -> Tensor:
        """The nearest numbers of a column, whose scales are those of a group."""
        scales_N = self.scales_GN[group]
        scaled_N = values_N / scales_N
        if self.table is None:
            return scaled_N.clamp_(-LARGEST, LARGEST).to(FP8).float().mul_(scales_N)
        return self.table[torch.bucketize(scaled_N, _between(self.table))] * scales_N


def _between(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


def calibrate(
    model: PreTrainedModel, layers: ModuleList, how: Quantizing, device: torch.device, calibration: Calibration
) -> None:
    """Quantize a model that lies in CPU memory and bring it to the device: the matrices of `layers` while the tokens
    pass them, one decoder layer in 16 bits at a time; linear layers elsewhere but the head are rounded to the nearest.

    Raises NonFinite.
    """
    inner = {id(module) for layer in layers for module in layer.modules()}
    for name in [name for name, module in linear_layers(model, model).items() if id(module) not in inner]:
        quantize_layers(model, name, how, device)
    for module in model.modules():
        if id(module) not in inner:
            move(module, device, how.dtype, recurse=False)
    hooks, names = [], {id(layer): name for name, layer in model.named_modules()}
    for layer in layers:
        through = _Through(model, layer, names[id(layer)], how, device, calibration)
        hooks.append(layer.register_forward_pre_hook(through.begin))
        hooks.append(layer.register_forward_hook(through.end))
    try:
        calibration.exact_loss = calibration.loss_of(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not math.isfinite(loss := calibration.exact_loss):
        dtype = "fp16" if how.dtype is torch.float16 else str(how.dtype)
        raise base_gives_no_numbers(f"calibration: found a loss of {loss} on the first blocks", dtype)
    calibration.quantized_loss = calibration.loss_of(model)


class _Through:
    """What is kept of a decoder layer's inputs while the tokens pass it."""

    def __init__(self, model: Any, layer: Any, name: str, how: Quantizing, device: Any, into: Calibration) -> None:
        self.model, self.layer, self.name, self.how, self.device, self.into = model, layer, name, how, device, into
        self.inputs: dict[str, Tensor] = {}
        self.hooks: list[Any] = []

    def begin(self, _layer: Any, _arguments: Any) -> None:
        move(self.layer, self.device, self.how.dtype)
        for name, linear in linear_layers(self.model, self.layer).items():
            self.hooks.append(linear.register_forward_pre_hook(self._keeper(name)))

    def _keeper(self, name: str) -> Callable[[Any, tuple[Tensor]], None]:
        def keep(_linear: Any, arguments: tuple[Tensor]) -> None:
            self.inputs[name] = arguments[0]

        return keep

    def end(self, _layer: Any, _arguments: Any, _output: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        together: dict[int, list[str]] = {}
        for name, inputs in self.inputs.items():
            together.setdefault(id(inputs), []).append(name)
        for names in together.values():
            self._try(names, self.inputs[names[0]])
        self.inputs.clear()
        for name in list(linear_layers(self.model, self.layer)):
            whole = f"{self.name}.{name}"
            if whole not in self.into.kept:
                self.into.unmeasured.append(whole)
                self.layer.set_submodule(name, quantized(self.layer.get_submodule(name), self.how, whole))

    def _try(self, names: list[str], inputs: Tensor) -> None:
        """Leaves the matrices as they are where the moments of wide inputs take more room than there is, or can't be
        inverted."""
        try:
            self._quantize(names, inputs)
        except RuntimeError as error:
            if not (isinstance(error, LinAlgError) or is_out_of_memory(error)):
                raise
            self.into.out_of_memory |= is_out_of_memory(error)

    def _quantize(self, names: list[str], inputs: Tensor) -> None:
        """The matrices that read the same inputs: all of them, or none."""
        x_TK = inputs.flatten(0, -2).float()
        moments_KK = x_TK.t() @ x_TK / len(x_TK)
        if not bool(torch.isfinite(moments_KK).all()):
            raise NonFinite(
                f"{self.name}: found NaN or infinity in what its layers read, need numbers",
                "--dtype bf16 or fp32; or the base is damaged: download it again",
            )
        spread = Spread.of(moments_KK) if self.into.compensates else None
        made, errors, recoded = {}, {}, 0
        for name in names:
            linear, whole = self.layer.get_submodule(name), f"{self.name}.{name}"
            exact_NK = weight_of(linear).float()
            made[name] = quantized(linear, self.how, whole)
            if spread is not None:
                recoded += _recode(made[name], exact_NK, spread)
            errors[whole] = _error(exact_NK, _numbers(made[name]), moments_KK)
        if self.into.compensates and max(errors.values()) > _TOO_MUCH:
            self.into.kept += errors
            return
        self.into.errors |= errors
        self.into.recoded += recoded
        for name in names:
            self.layer.set_submodule(name, made[name])


def _error(exact_NK: Tensor, stored_NK: Tensor, moments_KK: Tensor) -> float:
    """The root of the mean square of the outputs' error, beside that of the outputs."""
    lost_NK = exact_NK - stored_NK
    lost, whole = (((each @ moments_KK) * each).sum().item() for each in (lost_NK, exact_NK))
    return float((max(lost, 0.0) / max(whole, 1e-30)) ** 0.5)


def _numbers(made: Any) -> Tensor:
    """The numbers that a quantized layer stores, [N, K] in fp32."""
    if isinstance(made, FrozenLinear):
        return exact([made.weight, made.scale], made.kind, [made.out_features], made.in_features, torch.float32)
    from bitsandbytes import functional

    if hasattr(made.weight, "CB"):
        numbers: Tensor = functional.int8_vectorwise_dequant(made.weight.CB, made.weight.SCB)
        return numbers
    return functional.dequantize_4bit(made.weight.data, made.weight.quant_state).float()


class Spread(NamedTuple):
    """How the error of one column is made good by those that follow: for the inverse of the moments H⁻¹ = UᵀU, U upper
    triangular, an error e of column k changes column j > k by −e · U[k, j] / U[k, k] (eq. 3 of the paper and its
    'Cholesky reformulation'). The columns that count most come first."""

    order_K: Tensor
    factors_KK: Tensor

    @classmethod
    def of(cls, moments_KK: Tensor) -> "Spread":
        """From the second moments of the inputs."""
        order = moments_KK.diagonal().argsort(descending=True, stable=True)
        found_KK = moments_KK[order][:, order]
        found_KK.diagonal().add_(_DAMPING * found_KK.diagonal().mean().clamp_min(1e-12))
        found_KK = torch.linalg.cholesky(found_KK)
        found_KK = torch.cholesky_inverse(found_KK)
        found_KK = torch.linalg.cholesky(found_KK, upper=True)
        return cls(order, found_KK.div_(found_KK.diagonal()[:, None].clone()))


def _recode(made: Any, exact_NK: Tensor, spread: Spread) -> bool:
    """Give a quantized layer, made by rounding each weight for itself, the codes of `compensated`; whether it can have
    them."""
    if isinstance(made, FrozenLinear):
        grid = Grid(made.scale[None], None)
        found_NK = compensated(exact_NK, spread, grid)
        made.weight.data.copy_((found_NK / made.scale[:, None]).to(FP8).view(torch.int8))
        return True
    if made.in_features % made.weight.blocksize:  # a block of theirs would begin in one row and end in the next
        return False
    from bitsandbytes import functional

    state = made.weight.quant_state
    scales = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    table, codes = state.code.sort()
    scales_NG = scales.view(len(exact_NK), -1).clamp_min(1e-30)
    found_NK = compensated(exact_NK, spread, Grid(scales_NG.t().contiguous(), table))
    scaled = found_NK.contiguous().view(-1, made.weight.blocksize) / scales_NG.view(-1, 1)
    code = codes[torch.bucketize(scaled, _between(table))].flatten().to(torch.uint8)
    made.weight.data.copy_((code[::2] << 4 | code[1::2])[:, None])  # bitsandbytes puts the first into the upper half
    return True


def compensated(weight_NK: Tensor, spread: Spread, grid: Grid) -> Tensor:
    """The weights as numbers of the grid, column after column, the error of each made good by those that follow."""
    order, factors_KK = spread
    inputs = len(order)
    # columns as rows, which lie in one piece
    left_KN = weight_NK.t()[order].contiguous()
    made_KN = torch.empty_like(left_KN)
    groups_K = order // (inputs // len(grid.scales_GN))
    for start in range(0, inputs, _BLOCK):
        at = slice(start, min(start + _BLOCK, inputs))
        made_KN[order[at]], lost = _block(left_KN[at], factors_KK[at, at].contiguous(), grid, groups_K[at])
        left_KN[at.stop :].addmm_(factors_KK[at, at.stop :].t(), lost, alpha=-1)
    return made_KN.t()


def _block(left_KN: Tensor, factors_KK: Tensor, grid: Grid, groups_K: Tensor) -> tuple[Tensor, Tensor]:
    """Some columns as numbers of the grid, and the errors that they leave to others."""
    if _has_kernel(left_KN.device, grid.table is None):
        from lorakit.core.fast import kernels

        between = _between(grid.table) if grid.table is not None else None
        return kernels.compensated(left_KN, factors_KK, grid.scales_GN, groups_K, grid.table, between)
    made_KN, lost_KN = torch.empty_like(left_KN), torch.empty_like(left_KN)
    for at, group in enumerate(groups_K.tolist()):
        made_KN[at] = grid.nearest(left_KN[at], group)
        torch.sub(left_KN[at], made_KN[at], out=lost_KN[at])
        left_KN[at + 1 :].addr_(factors_KK[at, at + 1 :], lost_KN[at], alpha=-1)
    return made_KN, lost_KN


@functools.cache
def _has_kernel(device: torch.device, in_fp8: bool) -> bool:
    """Whether Triton's kernel runs on a device: it may be there without a compiler, or not know the GPU."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from lorakit.core.fast import kernels

        ones, table = torch.ones(16, 16, device=device), None if in_fp8 else torch.linspace(-1, 1, 16, device=device)
        groups = torch.zeros(16, dtype=torch.int64, device=device)
        kernels.compensated(ones, ones, ones, groups, table, _between(table) if table is not None else None)
        torch.cuda.synchronize(device)
    except Exception:  # of Triton, its compiler, the driver: each its own; torch does the same more slowly
        return False
    return True
