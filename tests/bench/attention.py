"""Attention on a GPU: kernels, speed, memory by length and waits, for packed rows of several lengths.

    python -m tests.bench.attention [--heads 32] [--key-heads 32] [--head-dim 128] [--lengths 2048,4096,8192]

For each length: what ran, its speed beside eager and beside sdpa with a mask, its memory a token, how often the CPU
waited for the GPU inside, and its error beside eager's.
"""

import argparse
import sys

import torch
import transformers

from lorakit.core.attention.implementations import IMPLEMENTATIONS
from lorakit.core.attention.proving import prove


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attention")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lengths", default="2048,4096,8192")
    options = parser.parse_args()
    config = transformers.LlamaConfig(
        hidden_size=options.heads * options.head_dim,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_heads,
        head_dim=options.head_dim,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    say(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, bf16")
    say(f"{options.heads} heads of {options.head_dim}, {options.key_heads} key heads; packed rows, forward + backward")
    for length in map(int, options.lengths.split(",")):
        proof = prove(config, torch.bfloat16, device, length, 1, lambda event: None, only=("packed",))
        by_name = {row.backend: row for row in proof.rows}
        for backend in IMPLEMENTATIONS:
            if (row := by_name.get(backend)) is None:
                continue
            masked = by_name["sdpa"].seconds / row.seconds
            memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / length / 1024:8.1f} KiB a token"
            say(
                f"{length:>6} {backend:<16} {row.seconds * 1000:9.3f} ms  {row.speed:6.2f} × eager  "
                f"{masked:6.2f} × masked sdpa  {memory}  {row.host_syncs} waits  rms {row.rms_ratio:.2f}  "
                f"{'ok' if row.ok else 'WRONG: ' + row.reason}  {row.kernel}"
            )
        for one in proof.skipped:
            say(f"{length:>6} {one.backend:<16} skipped: {one.reason}")


if __name__ == "__main__":
    main()
