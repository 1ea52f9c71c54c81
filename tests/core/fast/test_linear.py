"""The operator against autograd in fp64, and its 8-bit arithmetic against the formulas in numpy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorakit
from lorakit.core.fast import storage
from lorakit.core.fast.linear import frozen_linear, frozen_linear_backward, frozen_linear_forward
from lorakit.core.fast.storage import FrozenLinear, rounded, rounded_to_integers, store

ENDS, INPUTS, RANK, ROWS = [32, 48, 64], 48, 16, 7


def inputs(dtype: torch.dtype, *, rank: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    """x, A and B."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(ROWS, INPUTS), normal(len(ENDS) * rank, INPUTS), normal(ENDS[-1], rank)


def weight(dtype: torch.dtype) -> Tensor:
    return torch.randn(ENDS[-1], INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_definition(x: Any, w: Any, a: Any, b: Any, rank: int = RANK) -> Any:
    """x Wᵀ and each part's own LoRA, by whatever library the arrays are of."""
    parts, y = [], x @ w.T
    for number, (start, end) in enumerate(zip([0, *ENDS[:-1]], ENDS, strict=True)):
        parts.append(y[:, start:end] + x @ a[number * rank : (number + 1) * rank].T @ b[start:end].T)
    return torch.cat(parts, 1) if isinstance(x, Tensor) else np.concatenate(parts, 1)


@pytest.mark.parametrize("rank", [16, 0])
def test_forward_and_backward_are_autograds_in_fp64(rank: int) -> None:
    x, a, b = inputs(torch.float64, rank=rank)
    w = weight(torch.float64)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat(frozen_linear(x, (), [w], "plain", ENDS, a, b), 1)

    assert torch.allclose(run(x, a, b), by_definition(x, w, a, b, rank), rtol=1e-12)
    assert torch.autograd.gradcheck(run, (x, a, b) if rank else (x, a.detach(), b.detach()))


@pytest.mark.parametrize("needs_dx", [True, False])
def test_torch_finds_the_operators_in_order(needs_dx: bool) -> None:
    """Their schemas, and what they say of shapes without computing."""
    x, a, b = (each.detach() for each in inputs(torch.float32))
    base = ([weight(torch.float32)], "plain", ENDS)
    torch.library.opcheck(frozen_linear_forward, (x, None, None, None, *base, a, b))
    dys = list(torch.ones(ROWS, ENDS[-1]).split([32, 16, 16], 1))
    torch.library.opcheck(frozen_linear_backward, (dys, x, x @ a.t(), *base, a, b, False, needs_dx))


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int8 exact"])
def test_compiled_it_is_what_it_is(kind: str, needs_dx: bool) -> None:
    """In one graph, with parts whose gradients never lie together; and without gradients."""
    torch._dynamo.reset()
    layers = [torch.nn.Linear(INPUTS, size, bias=False) for size in (32, 16, 16)]
    base = store([FrozenLinear(layer, kind[:4].strip()) for layer in layers] if kind != "plain" else layers)
    rounding = {"fp8": rounded, "int8": rounded_to_integers}.get(kind, lambda x: ())

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x * 2
        q, k, v = frozen_linear(x, rounding(x), base.tensors, base.kind, base.ends, a, b)
        return (q[:, :16] * k.sin() + v).sum()

    found = []
    for each in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x, a, b = inputs(torch.float32)
        x.requires_grad_(needs_dx)
        loss = each(x, a, b)
        loss.backward()
        with torch.no_grad():
            found.append([loss.detach(), each(x, a, b), x.grad, a.grad, b.grad])
        x, a, b = (leaf.detach() for leaf in (x, a, b))
        found[-1].append(each(x, a, b))  # with gradients on, and nothing that needs one
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-5)
    assert (found[0][2] is None) != needs_dx


def test_what_torch_kept_of_another_lorakits_compilations_isnt_used(tmp_path: Path) -> None:
    """It knows the operator by its name only, and keeps the backward pass beside."""
    script = (
        "import torch; from lorakit.core.fast.linear import frozen_linear; from lorakit.core import model\n"
        "model.prepare_compiling()\n"
        "base, a, b = [torch.ones(16, 16)], *(torch.ones(16, 16, requires_grad=True) for _ in range(2))\n"
        "run = torch.compile(lambda x, a, b: frozen_linear(x, (), base, 'plain', [16], a, b)[0].sum())\n"
        "run(torch.ones(2, 16), a, b).backward()\n"
        "print(a.grad[0, 0].item())"
    )
    package = Path(lorakit.__file__).parent
    shutil.copytree(package, tmp_path / "lorakit")
    path = tmp_path / "lorakit" / "core" / "fast" / "linear.py"
    path.write_text(path.read_text().replace("None, da_PRK, db_NR, *", "None, da_PRK * 3, db_NR, *"))
    found = []
    for where in (package.parent, tmp_path):
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kept"), "PYTHONPATH": str(where)}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ, cwd=where)
        found.append(float(done.stdout))
    assert found == [32.0, 96.0]


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_an_input_that_needs_no_gradient_leaves_the_others_theirs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the base, which only that would take, isn't made into numbers again."""
    from lorakit.core.fast import linear

    x, a, b = inputs(torch.float32)
    layer = torch.nn.Linear(INPUTS, ENDS[-1], bias=False)
    base = store([FrozenLinear(layer, kind) if kind == "fp8" else layer])
    dy = torch.randn(ROWS, ENDS[-1], generator=torch.Generator().manual_seed(2))
    rounded_x = rounded(x) if kind == "fp8" else ()

    def gradients() -> list[Tensor | None]:
        y = torch.cat(frozen_linear(x, rounded_x, base.tensors, base.kind, ENDS, a, b), 1)
        with monkeypatch.context() as patched:
            if not x.requires_grad:
                patched.setattr(linear, "_fp8" if kind == "fp8" else "exact", None)
            y.backward(dy)
        found = [leaf.grad for leaf in (x, a, b)]
        x.grad = a.grad = b.grad = None
        return found

    with_x = gradients()
    x.requires_grad_(False)
    without = gradients()
    assert with_x[0] is not None
    assert without[0] is None
    for one, other in zip(with_x[1:], without[1:], strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def as_fp8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as 8-bit floats, by rounding the fraction to 3 bits in fp64, and their scales."""
    scale = np.abs(values).max(1, keepdims=True) / 448
    scaled = values / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-300))), -6)
    step = 2.0 ** (exponent - 3)
    return np.round(scaled / step) * step, scale  # numpy rounds ties to even, as float8 does


def test_8_bit_products_are_those_of_the_formulas() -> None:
    """y and dx with x, and dy times the base's scales, rounded row by row; dA and dB exact."""
    x, a, b = inputs(torch.float32)
    layers = [torch.nn.Linear(INPUTS, size, bias=False) for size in (32, 16, 16)]
    w = weight(torch.float32)
    for layer, part in zip(layers, w.split([32, 16, 16]), strict=True):
        layer.weight.data.copy_(part)
    base = store([FrozenLinear(layer, "fp8") for layer in layers])
    rounded_x = rounded(x)
    y = torch.cat(frozen_linear(x, rounded_x, base.tensors, base.kind, base.ends, a, b), 1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)

    x_, a_, b_, w_, dy_ = (tensor.detach().double().numpy() for tensor in (x, a, b, w, dy))
    (qx, sx), (qw, sw) = as_fp8(x_), as_fp8(w_)
    expected = by_definition(x_, np.zeros_like(w_), a_, b_) + (qx @ qw.T) * sx * sw.T
    assert y.detach().numpy() == pytest.approx(expected, abs=2e-4 * np.abs(expected).max())
    qd, sd = as_fp8(dy_ * sw.T)
    g = np.concatenate([dy_[:, s:e] @ b_[s:e] for s, e in zip([0, *ENDS[:-1]], ENDS, strict=True)], 1)
    wanted = {"x": (x, (qd @ qw) * sd + g @ a_), "a": (a, g.T @ x_)}
    h_ = x_ @ a_.T
    parts = zip([0, *ENDS[:-1]], ENDS, range(3), strict=True)
    wanted["b"] = (b, np.concatenate([dy_[:, s:e].T @ h_[:, p * RANK : (p + 1) * RANK] for s, e, p in parts]))
    for name, (leaf, gradient) in wanted.items():
        assert leaf.grad is not None
        # a number that lies between two codes may go either way, since scales are fp32 there and fp64 here
        assert leaf.grad.numpy() == pytest.approx(gradient, abs=1e-3 * np.abs(gradient).max()), name


def test_integer_products_leave_the_largest_columns_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """y from integers but for what the columns of outliers give, which no row's scale then looks at; dx exact."""
    monkeypatch.setattr(storage, "KEPT_COLUMNS", 2)
    x, a, b = inputs(torch.float32)
    with torch.no_grad():
        x[:, 5] *= 40
        x[2, 30] = -300
    layer = torch.nn.Linear(INPUTS, ENDS[-1], bias=False)
    base = store([FrozenLinear(layer, "int8")])
    y = torch.cat(frozen_linear(x, rounded_to_integers(x), base.tensors, base.kind, ENDS, a, b), 1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)

    x_, a_, b_, dy_ = (tensor.detach().double().numpy() for tensor in (x, a, b, dy))
    w_ = base.tensors[0].double().numpy() * base.tensors[1].double().numpy()[:, None]
    outliers = np.isin(np.arange(INPUTS), [5, 30])
    rest = np.where(outliers, 0, x_)
    scale = np.abs(rest).max(1, keepdims=True) / 127
    assert scale.max() < 0.1
    seen = np.where(outliers, x_, np.round(rest / scale) * scale)
    expected = by_definition(x_, np.zeros_like(w_), a_, b_) + seen @ w_.T
    assert y.detach().numpy() == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())
    g = np.concatenate([dy_[:, s:e] @ b_[s:e] for s, e in zip([0, *ENDS[:-1]], ENDS, strict=True)], 1)
    assert x.grad is not None
    assert x.grad.numpy() == pytest.approx(dy_ @ w_ + g @ a_, abs=1e-5 * np.abs(dy_ @ w_).max())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_stored_otherwise_is_rounded_for_each_pass(kind: str) -> None:
    """An 8-bit product over 4-bit codes is that over the numbers that they stand for."""
    from lorakit.core.fast.storage import exact
    from lorakit.core.quantization import Quantizing, quantized

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64, bias=False)
    layer = quantized(plain, Quantizing(kind, torch.float32)) if kind == "nf4" else FrozenLinear(plain, kind)
    base, x = store([layer]), torch.randn(5, 64, requires_grad=True)
    numbers = torch.nn.Linear(64, 64, bias=False)
    numbers.weight.data.copy_(exact(base.tensors, base.kind, base.ends, 64, torch.bfloat16))
    other, none = store([FrozenLinear(numbers, "fp8")]), torch.zeros(0, 64)
    rounded_x = rounded(x)
    empty = torch.zeros(64, 0)
    found = frozen_linear(x, rounded_x, base.tensors, base.kind, base.ends, none, empty)[0]
    wanted = frozen_linear(x, rounded_x, other.tensors, other.kind, other.ends, none, empty)[0]
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, wanted)))
