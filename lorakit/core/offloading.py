"""Decoder layers whose frozen weights lie in CPU memory, and are copied to the device that computes for as long as they
are needed there.

Each module that holds weights asks for copies of them when it runs. What autograd needs of a copy it keeps, so that it
is freed with the layer's backward pass; under gradient checkpointing the first forward pass keeps nothing and the
second one copies again. The weights therefore cross the bus twice in a micro-step, and one layer of them is there at
once. accelerate's hooks can't do that: they put the weights back right after the forward pass.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.core.errors import OutOfMemory

_ALIGNMENT = 64  # bytes: torch's own for CPU memory


def offload(layer: nn.Module, device: torch.device) -> None:
    """Move a frozen layer's weights from `device` into CPU memory (pinned where `device` is a GPU), and let its modules
    copy them back whenever they run. Scales of 4-bit weights stay on `device`, and LoRA that is put on later belongs
    there: `lora_to_devices`.

    Raises OutOfMemory where the memory can't be pinned.
    """
    memory = _into_cpu_memory(list(layer.parameters()), device)
    for module in layer.modules():
        if module._parameters:
            module.forward = _Copying(module, device, memory)


def offloaded(model: nn.Module) -> dict[nn.Module, torch.device]:
    """The modules whose weights lie in CPU memory, each with the device that computes it."""
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    return {module: found.device for module, found in forwards.items() if isinstance(found, _Copying)}


def lora_to_devices(model: nn.Module) -> None:
    """Move LoRA of offloaded layers to where it is trained; PEFT makes it where the base's weight lies."""
    there = offloaded(model)
    for module in model.modules():
        device = there.get(getattr(module, "base_layer", None))  # type: ignore[arg-type]
        for parameter in module.parameters() if device else ():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device)


class _Copying:
    """The forward of a module whose weights lie elsewhere. `memory` is what they lie in."""

    def __init__(self, module: nn.Module, device: torch.device, memory: Tensor) -> None:
        self.device, self._memory, self._plain = device, memory, _Plain(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._plain.module._parameters.items()
        copies = {f"module.{name}": _copy(weight, self.device) for name, weight in own if weight is not None}
        return functional_call(self._plain, copies, args, kwargs, tie_weights=False)


class _Plain(nn.Module):
    """A module by its class's own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def _copy(weight: Tensor, device: torch.device) -> Tensor:
    """A copy of a weight, with what bitsandbytes' Params4bit knows of it. Its own `to` would move the one set of scales
    back and forth."""
    made = Tensor.to(weight, device, non_blocking=True, copy=True)
    made.__dict__.update(vars(weight))
    return made


def _into_cpu_memory(weights: list[nn.Parameter], device: torch.device) -> Tensor:
    """Put weights one behind the other into CPU memory, which is returned. It is pinned in place: torch's own pinned
    memory takes up to twice as much, rounded up to a power of two (CachingHostAllocator)."""
    sizes = [-(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in weights]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    if device.type == "cuda":
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1))  # 1: for all GPUs
        if code:
            raise OutOfMemory(
                f"found no way to pin {memory.nbytes / 2**30:.1f} GiB of CPU memory (CUDA error {code}), need it",
                "free memory, or plan with less of it: `lorakit plan-devices --gpus … --cpu …`",
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    at = 0
    for weight, size in zip(weights, sizes, strict=True):
        place = memory[at : at + weight.nbytes].view(weight.dtype).view(weight.shape)
        place.copy_(weight.data)
        weight.data = place
        at += size
    return memory
