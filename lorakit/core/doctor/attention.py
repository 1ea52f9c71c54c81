"""Implementations of attention, each beside float64 on packed documents."""

import torch
from transformers import LlamaConfig

from lorakit.core.attention.proving import prove
from lorakit.core.doctor.devices import driver_cuda
from lorakit.core.doctor.finding import Finding, Need, fail, install_torch, ok, together, warn
from lorakit.core.doctor.trials import WRONG_NUMBERS, cuda_devices, run_dtype


def attention(need: Need) -> Finding:
    """Which implementations of attention run here, each beside float64 on packed documents."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    gpus = cuda_devices()
    found = []
    for device in gpus[:1] or [torch.device("cpu")]:
        names = ("varlen", "flash_attention_3", "flash_attention_2", "sdpa", "eager")  # flex is compiled: `compile`
        cases = ("causal", "packed")
        proof = prove(config, run_dtype(device), device, 256, 1, lambda event: None, names=names, only=cases)
        wrong = {row.backend: row.reason for row in proof.rows if not row.ok}
        packed = [row for row in proof.rows if row.case == "packed" and row.backend not in wrong]
        right = {row.backend: row.kernel.partition(":")[0] for row in packed}
        listed = ", ".join(f"{name} ({kernel})" for name, kernel in right.items())
        if wrong:
            use = f"lorakit train --attention {next(iter(right))}" if right else install_torch(driver_cuda())
            said = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
            found.append(fail(f"found wrong attention on {device}: {said}", WRONG_NUMBERS, use))
        elif set(right) <= {"eager", "sdpa"}:
            lacks = "; ".join(dict.fromkeys(f"{one.backend}: {one.reason}" for one in proof.skipped))
            newer = "use a GPU of compute capability 8.0 or newer"
            said = f"found on {device} only {listed}; {lacks}"
            found.append(warn(said, "packed documents need a dense mask: slow", newer))
        else:
            found.append(ok(f"{device}: {listed}"))
    return together(found)
