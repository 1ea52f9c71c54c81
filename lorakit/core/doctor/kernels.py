"""The kernels that a run will use, run on each device and compared with plain torch.

What is compared with is computed here, in float64 by the formulas of the papers, from the same codes and scales: a
kernel that is wrong by one per cent is found, although the formats themselves are coarser than that.

Shapes by suffix: T tokens, I inputs, O outputs.
"""

import multiprocessing
import re
import socket
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.doctor.devices import driver_cuda, has_gpu
from lorakit.core.doctor.finding import (
    TORCH,
    Finding,
    Need,
    fail,
    in_container,
    install_torch,
    is_wsl,
    ok,
    pip_install,
    skip,
    together,
    warn,
)
from lorakit.core.environment import variables
from lorakit.core.errors import first_line

_ALLOWED = 0.006
"""Root-mean-square error, as a share of the result's size: rounding to bf16 and nested scales of 4 bits make 0.3 %."""
_ALLOWED_SLOPE = 0.004
"""How far the size of what is coarse by itself may be off on average: states of 8 bits are 1.5 % off each, not all."""
_SIZE_T, _SIZE_I, _SIZE_O = 64, 256, 192
_STATES = 64, 128  # as many elements as bitsandbytes keeps states of in 8 bits (min_8bit_size is 4,096)


def _gpus() -> list[torch.device]:
    """The GPUs that torch computes on."""
    return (
        [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )


def _devices() -> list[torch.device]:
    return [*_gpus(), torch.device("cpu")]


def _dtype(device: torch.device) -> torch.dtype:
    """The number type that a run has there by default."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class _Trial:
    """What a kernel gave and what it should have given."""

    name: str
    got: Tensor
    wanted: Tensor

    @property
    def wrong(self) -> str | None:
        """How it is wrong; None where it is right."""
        got, wanted = self.got.detach().double().cpu(), self.wanted.detach().double().cpu()
        if got.shape != wanted.shape:
            return f"{self.name} gives {tuple(got.shape)}, need {tuple(wanted.shape)}"
        if not bool(torch.isfinite(got).all()):
            return f"{self.name} gives NaN or infinity"
        off = float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
        return f"{self.name} is off by {off:.2%}, need ≤ {_ALLOWED:.1%}" if off > _ALLOWED else None


@dataclass(frozen=True)
class _Slope(_Trial):
    """The same for what is coarse by itself: only its size on average is judged."""

    @property
    def wrong(self) -> str | None:
        got, wanted = self.got.detach().double().cpu(), self.wanted.detach().double().cpu()
        off = float((got * wanted).sum() / wanted.square().sum()) - 1
        if abs(off) <= _ALLOWED_SLOPE:
            return None
        return f"{self.name} is off by {off:+.2%} on average, need ≤ {_ALLOWED_SLOPE:.1%}"


_WRONG = "a run would learn from wrong numbers, and nothing would say so"


def _judged(what: str, on_each: Iterable[tuple[torch.device, Sequence[_Trial] | str]], fix: str) -> Finding:
    """The answer over all devices: which of its trials are wrong, or why they can't be run. Where there is a GPU, what
    is wrong on the CPU costs nothing."""
    right, found = [], []
    on_each = list(on_each)
    has_gpus = any(device.type == "cuda" for device, _ in on_each)
    for device, trials in on_each:
        wrong = [trials] if isinstance(trials, str) else [words for one in trials if (words := one.wrong)]
        judge = warn if has_gpus and device.type == "cpu" else fail
        if wrong:
            found.append(judge(f"found on {device} that {' and '.join(wrong)}", _WRONG, fix))
        else:
            right.append(str(device))
    return together([*found, *([ok(f"{what} right on {', '.join(right)}")] if right else [])])


# torch on each GPU


_CUDA_FAILS = (
    (
        r"driver on your system is too old|driver version is insufficient",
        "torch's CUDA is newer than the driver's",
        None,
    ),
    (
        r"Error 802|system not yet initialized",
        "GPUs behind an NVSwitch wait for NVIDIA's fabric manager",
        "sudo systemctl enable --now nvidia-fabricmanager (of the driver's own version)",
    ),
    (
        r"Error 804|forward compatibility was attempted",
        "a CUDA compatibility library is loaded that this kind of GPU doesn't take",
        "remove CUDA's compat folder from LD_LIBRARY_PATH (a container's /usr/local/cuda/compat)",
    ),
    (
        r"Error 803|unsupported display driver",
        "the driver's library is of another version than its kernel module",
        "sudo reboot",
    ),
    (
        r"Error 46|busy or unavailable",
        "another process holds the GPU alone",
        "sudo nvidia-smi -c 0, or end that process",
    ),
    (
        r"unknown error|Error 999",
        "the driver's device files are stale, often after a suspend",
        "sudo nvidia-modprobe -u -c 0, or sudo reboot",
    ),
)
"""What CUDA says, what it means, and what helps; without a fix another build of torch does."""


def cuda(need: Need) -> Finding:
    """torch on each GPU: CUDA starts, the GPU's architecture is compiled in, a product is right."""
    if torch.version.cuda is None:
        return skip("torch is a build for CPUs; see torch")
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is False"
        except Exception as error:  # whatever a driver can fail with
            reason = first_line(error)
        return _cuda_failed(reason) if has_gpu() else skip("no NVIDIA GPU here")
    built = torch.cuda.get_arch_list()
    found = []
    for device in _gpus():
        capability = torch.cuda.get_device_capability(device)
        if not _is_built_for(capability, built):
            older = capability < (7, 5)
            found.append(
                fail(
                    f"found {device} of sm_{capability[0]}{capability[1]} and torch {torch.__version__} for "
                    f"{', '.join(built)}; need it compiled in",
                    "torch left old GPUs out" if older else "this GPU is newer than that build",
                    install_torch(driver_cuda(), capability),
                )
            )
            continue
        draw, dtype = torch.Generator().manual_seed(0), _dtype(device)
        a, b = (torch.randn(128, 128, generator=draw).to(dtype) for _ in range(2))
        try:
            trials = [_Trial("a matrix product", a.to(device) @ b.to(device), a.double() @ b.double())]
        except RuntimeError as error:
            found.append(_cuda_failed(f"{device}: {first_line(error)}"))
            continue
        memory = "sudo nvidia-smi -q -d ECC, and let that GPU be exchanged"
        found.append(_judged(f"a matrix product in {str(dtype).removeprefix('torch.')} is", [(device, trials)], memory))
    return together(found)


def _is_built_for(capability: tuple[int, int], built: Iterable[str]) -> bool:
    """Binary code runs on the same major version with the same minor one or a higher; PTX on all later ones."""
    for name in built:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name):
            major, minor = int(found[2]), int(found[3])
            if found[4] == "a":
                fits = (major, minor) == capability
            elif found[1] == "sm":
                fits = major == capability[0] and minor <= capability[1]
            else:
                fits = (major, minor) <= capability
            if fits:
                return True
    return False


def _cuda_failed(reason: str) -> Finding:
    for pattern, why, fix in _CUDA_FAILS:
        if re.search(pattern, reason):
            return fail(f"found that CUDA doesn't start ({reason}), need it", why, fix or install_torch(driver_cuda()))
    fix = "sudo reboot" if not in_container() else "start the container again, with --gpus all"
    return fail(f"found that CUDA doesn't start ({reason}), need it", "nothing is computed on the GPU", fix)


# bitsandbytes


_BITSANDBYTES = "bitsandbytes>=0.49"


def bitsandbytes(need: Need) -> Finding:
    """The library of kernels that bitsandbytes loads: the one it looked for, those that it has."""
    import bitsandbytes as bnb
    from bitsandbytes import cextension

    folder = Path(bnb.__file__).parent
    has = sorted(path.name for path in folder.glob("libbitsandbytes_*"))
    lib, looked_for = cextension.lib, _library_looked_for(cextension, folder)
    native = not isinstance(lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    on_gpu = torch.cuda.is_available()
    if native and (not on_gpu or lib.compiled_with_cuda):
        return ok(f"{bnb.__version__} loaded {looked_for.name}")
    why = "--quantize and 8-bit optimizers are computed by it"
    said = "it isn't the one for CUDA" if native else str(lib.error_msg)
    path = variables("LD_LIBRARY_PATH", "BNB_CUDA_VERSION")
    around = ", ".join(f"{name}={value}" for name, value in path.items()) or "no LD_LIBRARY_PATH"
    found = f"found that {looked_for.name} doesn't load ({_why_not_loaded(said, looked_for)}); {around}"
    need_it = f"need it or another of {', '.join(has) if has else 'its libraries, of which there are none'}"
    if "BNB_CUDA_VERSION" in path:
        return fail(f"{found}; {need_it}", "BNB_CUDA_VERSION chooses it", "unset BNB_CUDA_VERSION")
    if is_wsl() and "libcuda" in said:
        return fail(f"{found}; {need_it}", why, 'export LD_LIBRARY_PATH="/usr/lib/wsl/lib:$LD_LIBRARY_PATH"')
    if missing := re.search(r"(lib[\w.+-]+?\.so[\w.]*): cannot open shared object", said):
        again = f"{pip_install(TORCH, options='--force-reinstall')} (its packages hold {missing[1]})"
        return fail(f"{found}; {need_it}", f"it needs {missing[1]}, which comes with torch's CUDA packages", again)
    if looked_for.exists() or not has:
        return fail(f"{found}; {need_it}", why, _again())
    newer = f"{pip_install('bitsandbytes', options='--upgrade')}; or: {install_torch(driver_cuda())}"
    return fail(f"{found}; {need_it}", f"no library of it is for torch's CUDA {torch.version.cuda}", newer)


def _library_looked_for(cextension: Any, folder: Path) -> Path:
    """The file that bitsandbytes chooses by torch's CUDA, as it itself says."""
    specs = cextension.get_cuda_specs()
    if specs is not None:
        try:
            return Path(cextension.get_cuda_bnb_library_path(specs))
        except RuntimeError:  # BNB_CUDA_VERSION that is no number
            return folder / f"libbitsandbytes_cuda{variables('BNB_CUDA_VERSION').get('BNB_CUDA_VERSION', '')}.so"
    return folder / f"libbitsandbytes_cpu{cextension.DYNAMIC_LIBRARY_SUFFIX}"


def _why_not_loaded(said: str, path: Path) -> str:
    """The reason; on a CPU bitsandbytes keeps it to itself, so the file is loaded once more."""
    if "can run without native library" not in said:
        return " ".join(said.split())[:300]
    import ctypes

    if not path.exists():
        return "there is no such file"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return first_line(error)
    return "no reason is given"


def _again() -> str:
    return pip_install(_BITSANDBYTES, options="--force-reinstall --no-deps")


def _on_each(run: Any) -> Iterator[tuple[torch.device, Sequence[_Trial] | str]]:
    """A check's trials on every device, or what its kernels fail with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device in _devices():
            try:
                yield device, run(device)
            except Exception as error:  # whatever a native kernel can fail with
                yield device, f"its kernels fail: {first_line(error)[:200]}"


def _drawn(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in fp32 and, in the number type of a run there, inputs and the gradient of outputs."""
    draw, dtype = torch.Generator().manual_seed(0), _dtype(device)
    weight_OI = torch.randn(_SIZE_O, _SIZE_I, generator=draw) * 0.05
    x_TI, gradient_TO = torch.randn(_SIZE_T, _SIZE_I, generator=draw), torch.randn(_SIZE_T, _SIZE_O, generator=draw)
    x_TI[:, 7] *= 12  # LLM.int8 computes such columns in 16 bits
    return weight_OI.to(device), x_TI.to(device, dtype), gradient_TO.to(device, dtype)


def _passes(layer: torch.nn.Module, x_TI: Tensor, gradient_TO: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output and the gradient of its input, as in training."""
    x_TI = x_TI.clone().requires_grad_()
    out_TO = layer.train()(x_TI)
    out_TO.backward(gradient_TO.to(out_TO.dtype))
    assert x_TI.grad is not None
    return out_TO, x_TI.grad


def int8(need: Need) -> Finding:
    """`--quantize int8`: a weight quantized, and a layer's forward and backward pass."""
    import bitsandbytes as bnb

    return _judged("quantizing, forward and backward are", _on_each(lambda device: _int8(bnb, device)), _again())


def _int8(bnb: Any, device: torch.device) -> list[_Trial]:
    """LLM.int8 (Dettmers et al. 2022): a row of W, and one of x without what is ≥ 6, is scaled by its largest number to
    -127 … 127; columns of x with such numbers are computed apart. On a CPU bitsandbytes trains with W alone rounded."""
    weight_OI, x_TI, gradient_TO = _drawn(device)
    codes_OI, scale_O, _ = bnb.functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(_SIZE_I, _SIZE_O, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(codes_OI, requires_grad=False, has_fp16_weights=False, CB=codes_OI, SCB=scale_O)
    out_TO, dx_TI = _passes(layer, x_TI, gradient_TO)
    exact_OI = weight_OI.to(torch.float16).double()
    largest_O = exact_OI.abs().amax(1, keepdim=True)
    rounded_OI = (exact_OI / largest_O * 127).round() * largest_O / 127
    inputs_TI = x_TI.double()
    if device.type != "cpu":
        inputs_TI = _int8_inputs(x_TI)
    return [
        _Trial("int8 quantizing", codes_OI.double() * scale_O.double()[:, None] / 127, rounded_OI),
        _Trial("int8 forward", out_TO, inputs_TI @ rounded_OI.T),
        _Trial("int8 backward", dx_TI, gradient_TO.double() @ rounded_OI),
    ]


def _int8_inputs(x_TI: Tensor) -> Tensor:
    """Inputs as LLM.int8 rounds them, row by row; whole columns with an outlier stay as they are."""
    exact_TI = x_TI.to(torch.float16).double()
    outliers_TI = exact_TI.abs() >= 6
    largest_T = exact_TI.masked_fill(outliers_TI, 0).abs().amax(1, keepdim=True)
    rounded_TI = (exact_TI / largest_T * 127).round() * largest_T / 127
    return torch.where(outliers_TI.any(0), x_TI.double(), rounded_TI)


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Dettmers et al. 2023, QLoRA, appendix E."""
_E2M1 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_FP4 = (*_E2M1, *(-value for value in _E2M1))
"""bitsandbytes' FP4: a sign, two bits of exponent, one of mantissa, scaled to 1 (csrc/kernels.cu, dDequantizeFP4)."""


def nf4(need: Need) -> Finding:
    """`--quantize nf4` and `fp4`: a weight quantized and dequantized, and a layer's forward and backward pass."""
    import bitsandbytes as bnb

    def run(device: torch.device) -> list[_Trial]:
        return [*_four_bits(bnb, device, "nf4", _NF4), *_four_bits(bnb, device, "fp4", _FP4)]

    return _judged("nf4 and fp4 quantizing, dequantizing, forward and backward are", _on_each(run), _again())


def _four_bits(bnb: Any, device: torch.device, kind: str, table: Sequence[float]) -> list[_Trial]:
    """64 weights share a scale, their largest; each is the nearest of 16 values. Scales are quantized too."""
    weight_OI, x_TI, gradient_TO = _drawn(device)
    dtype = x_TI.dtype
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            _SIZE_I, _SIZE_O, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type=kind
        )
    layer.support_avx512bf16_for_cpu = False  # as `load_base` has it: training's kernels, not inference's
    # quantized where it lies: `to` does so, on a CPU too
    layer.weight = bnb.nn.Params4bit(weight_OI, requires_grad=False, quant_type=kind).to(device)
    values = torch.tensor(table, dtype=torch.float64, device=device)
    blocks = weight_OI.double().reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / scales)[..., None] - values).abs().argmin(-1)
    rounded_OI = (values[codes] * scales).reshape(_SIZE_O, _SIZE_I)
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1).long()
    found = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1, 64)
    out_TO, dx_TI = _passes(layer, x_TI, gradient_TO)
    return [
        _Trial(f"{kind} quantizing", (values[found] * scales).reshape(_SIZE_O, _SIZE_I), rounded_OI),
        _Trial(f"{kind} dequantizing", bnb.functional.dequantize_4bit(layer.weight.data, state), rounded_OI),
        _Trial(f"{kind} forward", out_TO, x_TI.double() @ rounded_OI.T),
        _Trial(f"{kind} backward", dx_TI, gradient_TO.double() @ rounded_OI),
    ]


def optimizer(need: Need) -> Finding:
    """`--optimizer adamw_8bit` and `lion_8bit`, and paged ones on a GPU: steps and states."""
    import bitsandbytes as bnb

    def run(device: torch.device) -> list[_Trial]:
        trials = [*_steps(bnb.optim.AdamW8bit, "adamw_8bit", device), *_steps(bnb.optim.Lion8bit, "lion_8bit", device)]
        if device.type == "cuda":
            trials += _steps(bnb.optim.PagedAdamW8bit, "paged_adamw_8bit", device)
        return trials

    return _judged("two steps of 8-bit AdamW and Lion are", _on_each(run), _again())


def _steps(kind: Any, name: str, device: torch.device) -> list[_Trial]:
    """Two steps beside AdamW (Loshchilov & Hutter 2019) or Lion (Chen et al. 2023) in float64. The first is exact, for
    its states are rounded after it; what follows is coarse."""
    rate, beta1, beta2, decay = 1e-2, 0.9, 0.99, 0.1
    draw = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(_STATES, generator=draw).to(device))
    steps = kind([parameter], lr=rate, betas=(beta1, beta2), weight_decay=decay)
    momentum = torch.zeros(_STATES, dtype=torch.float64)
    variance = torch.zeros_like(momentum)
    trials: list[_Trial] = []
    for step in (1, 2):
        gradient = torch.randn(_STATES, generator=draw)
        parameter.grad = gradient.to(device)
        before = parameter.detach().double().cpu()
        steps.step()
        exact = gradient.double()
        wanted = -rate * decay * before
        if name.startswith("lion"):
            wanted -= rate * (beta1 * momentum + (1 - beta1) * exact).sign()
            momentum = beta2 * momentum + (1 - beta2) * exact
        else:
            momentum = beta1 * momentum + (1 - beta1) * exact
            variance = beta2 * variance + (1 - beta2) * exact.square()
            spread = (variance / (1 - beta2**step)).sqrt() + 1e-8
            wanted -= rate * momentum / (1 - beta1**step) / spread
        judge = _Trial if step == 1 else _Slope
        trials.append(judge(f"{name}'s step {step}", parameter.detach().double().cpu() - before, wanted))
    state = steps.state[parameter]
    trials.append(_Slope(f"{name}'s first state", _dequantized(state, "1"), momentum))
    if not name.startswith("lion"):
        trials.append(_Slope(f"{name}'s second state", _dequantized(state, "2"), variance))
    return trials


def _dequantized(state: Any, which: str) -> Tensor:
    """A state as it stands in its 8 bits: a table's value times its block's largest."""
    values = state[f"qmap{which}"].double().cpu()[state[f"state{which}"].long().cpu()]
    largest = state[f"absmax{which}"].double().cpu()
    return (values.reshape(len(largest), -1) * largest[:, None]).reshape(_STATES)


# attention, compiling, processes


def attention(need: Need) -> Finding:
    """Which implementations of attention run here, each beside float64 on packed documents."""
    from transformers import LlamaConfig

    from lorakit.core.attention.proving import prove

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    gpus = _gpus()
    found = []
    for device in gpus[:1] or [torch.device("cpu")]:
        names = ("varlen", "flash_attention_3", "flash_attention_2", "sdpa", "eager")  # flex is compiled: `compile`
        cases = ("causal", "packed")
        proof = prove(config, _dtype(device), device, 256, 1, lambda event: None, names=names, only=cases)
        wrong = {row.backend: row.reason for row in proof.rows if not row.ok}
        packed = [row for row in proof.rows if row.case == "packed" and row.backend not in wrong]
        right = {row.backend: row.kernel.partition(":")[0] for row in packed}
        listed = ", ".join(f"{name} ({kernel})" for name, kernel in right.items())
        if wrong:
            use = f"lorakit train --attention {next(iter(right))}" if right else install_torch(driver_cuda())
            said = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
            found.append(fail(f"found wrong attention on {device}: {said}", _WRONG, use))
        elif set(right) <= {"eager", "sdpa"}:
            lacks = "; ".join(dict.fromkeys(f"{one.backend}: {one.reason}" for one in proof.skipped))
            newer = "use a GPU of compute capability 8.0 or newer"
            said = f"found on {device} only {listed}; {lacks}"
            found.append(warn(said, "packed documents need a dense mask: slow", newer))
        else:
            found.append(ok(f"{device}: {listed}"))
    return together(found)


def compile(need: Need) -> Finding:
    """triton, and a function that torch.compile makes of a Python one, forward and backward, on a GPU."""
    gpus = _gpus()
    if not gpus:
        return skip("no NVIDIA GPU here, and nothing is compiled for a CPU")
    return _compiled(gpus[0])


def _compiled(device: torch.device) -> Finding:
    why = "flex_attention and the fast engine are compiled; all else works without"
    try:
        import triton  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return warn("found no triton, need it", why, pip_install("triton"))

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * x.square().mean(-1, keepdim=True)

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=draw).to(device)
    results = []
    try:
        for one in (torch.compile(function, dynamic=False), lambda y: function(y.double())):
            y = x.clone().requires_grad_()
            out = one(y)
            out.sum().backward()
            assert y.grad is not None
            results.append((out, y.grad))
    except Exception as error:  # whatever a compiler can fail with
        reason = " ".join(str(error).split())
        if "C compiler" in reason or "gcc" in reason:
            return warn("found no C compiler, need one", why, "sudo apt install gcc (or set CC to a compiler)")
        if "Python.h" in reason:
            return warn("found no Python.h, need it", why, "sudo apt install python3-dev")
        return warn(
            f"found that compiling fails ({first_line(error)[:200]})",
            why,
            pip_install(TORCH, "triton", options="--upgrade"),
        )
    (out, gradient), (exact, exact_gradient) = results
    trials = [_Trial("a compiled function", out, exact), _Trial("its gradient", gradient, exact_gradient)]
    return _judged(
        f"triton {triton.__version__}, a compiled function is", [(device, trials)], pip_install(TORCH, "triton")
    )


def gloo(need: Need) -> Finding:
    """Two processes on the CPU that add up a tensor."""
    return _reduced("gloo")


def nccl(need: Need) -> Finding:
    """Two processes on a GPU each that add up a tensor."""
    count = len(_gpus())
    return _reduced("nccl") if count > 1 else skip(f"{count} NVIDIA GPU{'s' * (count != 1)} here, and it takes two")


def _reduced(backend: str) -> Finding:
    if not torch.distributed.is_available():
        return fail("found a torch without torch.distributed, need it", "--parallel needs it", pip_install(TORCH))
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        other = context.Process(target=_answer, args=(1, backend, folder, answers), daemon=True)
        other.start()
        first = _rank(0, backend, folder)
        other.join(_MEETING_SECONDS)
        second = answers.get(timeout=1) if not other.exitcode and other.exitcode is not None else "it ended"
    if first is None and second is None:
        return ok(f"two processes add up right by {backend}")
    reason = first or second
    why = "--parallel with several processes sums gradients by it"
    if "off by" in str(reason):
        return fail(f"found that {reason}", _WRONG, pip_install(TORCH, options="--force-reinstall"))
    named = variables("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    said = f"found that two processes don't find together by {backend} ({reason})"
    if named:
        listed = ", ".join(f"{name}={value}" for name, value in named.items())
        return fail(f"{said}, with {listed}", why, f"unset {' '.join(named)}, or name a network that `ip link` shows")
    if backend == "gloo":
        fix = f"export GLOO_SOCKET_IFNAME=lo, or add {socket.gethostname()} to /etc/hosts"
    else:
        fix = "NCCL_DEBUG=INFO lorakit doctor --only nccl says why; NCCL_P2P_DISABLE=1 goes without direct access"
        fix = f"docker run --ipc host …; {fix}" if in_container() else fix
    return fail(said, why, fix)


_MEETING_SECONDS = 20


def _answer(rank: int, backend: str, folder: str, answers: Any) -> None:
    answers.put(_rank(rank, backend, folder))


def _rank(rank: int, backend: str, folder: str) -> str | None:
    """One of two processes: adds its own numbers to the other's. Returns what is wrong."""
    import torch.distributed as dist

    try:
        store = dist.FileStore(f"{folder}/store", 2)  # type: ignore[attr-defined]
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=_MEETING_SECONDS)
        )
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        draw = torch.Generator().manual_seed(0)
        both = [torch.randn(1024, generator=draw) for _ in range(2)]
        mine = both[rank].to(device, copy=True)
        dist.all_reduce(mine)
        wrong = _Trial(f"{backend}'s sum", mine, both[0].double() + both[1].double()).wrong
        dist.destroy_process_group()
        return wrong
    except Exception as error:  # whatever a network can fail with
        return first_line(error)[:200]
