"""How fast `merge` is, and in how much memory, beside peft and `cp`, on a 1.1B model in bf16; and on a sparse 70B one.

    python -m tests.bench.merge [--rounds 3] [--folder DIR] [--rank 64] [--large LAYERS]

The base has TinyLlama's shape with random weights, in five shards; the adapter is on every linear layer but the head.
In each round `cp` with `sync` of the copy, lorakit's whole command and peft (load, merge_and_unload, save_pretrained)
run one after the other, each in a process of its own, the base in the page cache before. Shown are wall seconds, CPU
seconds and the peak of the resident memory (getrusage). `--large` merges into so many of the 80 layers of a 70B model
instead, lorakit alone; that base is sparse files, the merged model takes 1.7 GB of disk a layer.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lorakit.core.weights import header_bytes

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_70B = {
    **TINYLLAMA,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(output, max_shard_size="500MB")
"""


def linears(config: dict[str, object]) -> Iterator[tuple[str, int, int]]:
    """(name, outputs, inputs) of a decoder layer's linear layers."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])  # type: ignore[call-overload]
    kv = hidden // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])  # type: ignore[call-overload]
    for name, outputs in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
        yield f"self_attn.{name}_proj", outputs, hidden
    yield from (("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner))


def tensors(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Llama, in the order of its layers."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])  # type: ignore[call-overload]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(int(config["num_hidden_layers"])):  # type: ignore[call-overload]
        for name, outputs, inputs in linears(config):
            yield f"model.layers.{layer}.{name}.weight", (outputs, inputs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make_base(folder: Path, config: dict[str, object], shards: int, *, sparse: bool = False) -> Path:
    """A base in bf16: random weights, or nothing but holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    listed = list(tensors(config))
    total = sum(2 * int(np.prod(shape)) for _, shape in listed)
    generator, weight_map = np.random.default_rng(0), {}
    for number in range(1, shards + 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        mine, size = [], 0
        while listed and (size < total / shards or number == shards):
            mine.append(listed.pop(0))
            size += 2 * int(np.prod(mine[-1][1]))
        with (folder / name).open("wb") as file:
            file.write(header_bytes((key, "BF16", shape) for key, shape in mine))
            if sparse:
                file.truncate(file.tell() + size)
            for _, shape in [] if sparse else mine:
                values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        weight_map |= {key: name for key, _ in mine}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(folder: Path, base: Path, config: dict[str, object], rank: int) -> Path:
    """An adapter on every linear layer, in fp32 as training saves it."""
    folder.mkdir()
    names = sorted({name.rpartition(".")[2] for name, _, _ in linears(config)})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    settings |= {"target_modules": names, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = np.random.default_rng(1)
    shapes = {}
    for layer in range(int(config["num_hidden_layers"])):  # type: ignore[call-overload]
        for name, outputs, inputs in linears(config):
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes |= {f"{prefix}.lora_A.weight": (rank, inputs), f"{prefix}.lora_B.weight": (outputs, rank)}
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header_bytes((name, "F32", shape) for name, shape in shapes.items()))
        for shape in shapes.values():
            file.write((generator.standard_normal(shape, dtype=np.float32) * np.float32(0.01)).tobytes())
    return folder


def measured(command: Sequence[object]) -> tuple[float, float, float]:
    """Wall seconds of a command, its CPU seconds, and its peak resident memory in GiB."""
    script = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; " + (
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss); sys.exit(code)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *map(str, command)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    cpu, peak = done.stdout.split()[-2:]
    return seconds, float(cpu), int(peak) * (1 if sys.platform == "darwin" else 1024) / 2**30


def sides(base: Path, adapter: Path, output: Path) -> dict[str, list[object]]:
    return {
        "cp": ["sh", "-c", f"cp -r {base} {output} && sync {output}/* {output}"],
        "lorakit": [sys.executable, "-m", "lorakit", "merge", adapter, "--output", output, "--quiet"],
        "peft": [sys.executable, "-c", PEFT, base, adapter, output],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the models are made (default: the temporary folder)")
    parser.add_argument("--large", type=int, default=0, metavar="LAYERS", help="layers of a sparse 70B-shaped base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = {**LLAMA_70B, "num_hidden_layers": options.large} if options.large else TINYLLAMA
        base = make_base(folder / "base", config, options.large or 5, sparse=bool(options.large))
        adapter = make_adapter(folder / "adapter", base, config, options.rank)
        os.sync()
        found: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(options.rounds):
            for side, command in sides(base, adapter, folder / "output").items():
                if options.large and side != "lorakit":
                    continue
                subprocess.run(["sh", "-c", f"cat {base}/* > /dev/null"], check=True)
                found.setdefault(side, []).append(measured(command))
                shutil.rmtree(folder / "output")
                os.sync()
                print(f"{side:<8}", "{:6.2f} s {:6.2f} CPU s {:5.2f} GiB".format(*found[side][-1]), flush=True)  # noqa: T201
    medians = {
        side: [statistics.median(figures) for figures in zip(*each, strict=True)] for side, each in found.items()
    }
    for side, (wall, cpu, peak) in medians.items():
        beside = "".join(f"  {wall / medians[other][0]:5.2f} × {other}" for other in medians if other != side)
        print(f"median {side:<8} {wall:6.2f} s {cpu:6.2f} CPU s {peak:5.2f} GiB{beside}")  # noqa: T201


if __name__ == "__main__":
    main()
