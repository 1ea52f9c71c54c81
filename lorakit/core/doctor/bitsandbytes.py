"""bitsandbytes' kernels: which library it loads, layers in 8 and 4 bits, steps of 8-bit optimizers.

Shapes by suffix: T tokens, I inputs, O outputs.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.doctor.devices import driver_cuda
from lorakit.core.doctor.finding import TORCH, Finding, Need, fail, install_torch, is_wsl, ok, pip_install
from lorakit.core.doctor.trials import Slope, Trial, judged, on_each, run_dtype
from lorakit.core.environment import variables
from lorakit.core.errors import first_line

_SIZE_T, _SIZE_I, _SIZE_O = 64, 256, 192
_STATES = 64, 128  # as many elements as bitsandbytes keeps states of in 8 bits (min_8bit_size is 4,096)
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


def _drawn(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in fp32 and, in the number type of a run there, inputs and the gradient of outputs."""
    draw, dtype = torch.Generator().manual_seed(0), run_dtype(device)
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

    return judged("quantizing, forward and backward are", on_each(lambda device: _int8(bnb, device)), _again())


def _int8(bnb: Any, device: torch.device) -> list[Trial]:
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
        Trial("int8 quantizing", codes_OI.double() * scale_O.double()[:, None] / 127, rounded_OI),
        Trial("int8 forward", out_TO, inputs_TI @ rounded_OI.T),
        Trial("int8 backward", dx_TI, gradient_TO.double() @ rounded_OI),
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

    def run(device: torch.device) -> list[Trial]:
        return [*_four_bits(bnb, device, "nf4", _NF4), *_four_bits(bnb, device, "fp4", _FP4)]

    return judged("nf4 and fp4 quantizing, dequantizing, forward and backward are", on_each(run), _again())


def _four_bits(bnb: Any, device: torch.device, kind: str, table: Sequence[float]) -> list[Trial]:
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
        Trial(f"{kind} quantizing", (values[found] * scales).reshape(_SIZE_O, _SIZE_I), rounded_OI),
        Trial(f"{kind} dequantizing", bnb.functional.dequantize_4bit(layer.weight.data, state), rounded_OI),
        Trial(f"{kind} forward", out_TO, x_TI.double() @ rounded_OI.T),
        Trial(f"{kind} backward", dx_TI, gradient_TO.double() @ rounded_OI),
    ]


def optimizer(need: Need) -> Finding:
    """`--optimizer adamw_8bit` and `lion_8bit`, and paged ones on a GPU: steps and states."""
    import bitsandbytes as bnb

    def run(device: torch.device) -> list[Trial]:
        trials = [*_steps(bnb.optim.AdamW8bit, "adamw_8bit", device), *_steps(bnb.optim.Lion8bit, "lion_8bit", device)]
        if device.type == "cuda":
            trials += _steps(bnb.optim.PagedAdamW8bit, "paged_adamw_8bit", device)
        return trials

    return judged("two steps of 8-bit AdamW and Lion are", on_each(run), _again())


def _steps(kind: Any, name: str, device: torch.device) -> list[Trial]:
    """Two steps beside AdamW (Loshchilov & Hutter 2019) or Lion (Chen et al. 2023) in float64. The first is exact, for
    its states are rounded after it; what follows is coarse."""
    rate, beta1, beta2, decay = 1e-2, 0.9, 0.99, 0.1
    draw = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(_STATES, generator=draw).to(device))
    steps = kind([parameter], lr=rate, betas=(beta1, beta2), weight_decay=decay)
    momentum = torch.zeros(_STATES, dtype=torch.float64)
    variance = torch.zeros_like(momentum)
    trials: list[Trial] = []
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
        judge = Trial if step == 1 else Slope
        trials.append(judge(f"{name}'s step {step}", parameter.detach().double().cpu() - before, wanted))
    state = steps.state[parameter]
    trials.append(Slope(f"{name}'s first state", _dequantized(state, "1"), momentum))
    if not name.startswith("lion"):
        trials.append(Slope(f"{name}'s second state", _dequantized(state, "2"), variance))
    return trials


def _dequantized(state: Any, which: str) -> Tensor:
    """A state as it stands in its 8 bits: a table's value times its block's largest."""
    values = state[f"qmap{which}"].double().cpu()[state[f"state{which}"].long().cpu()]
    largest = state[f"absmax{which}"].double().cpu()
    return (values.reshape(len(largest), -1) * largest[:, None]).reshape(_STATES)
