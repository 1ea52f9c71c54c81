"""P10: merged models beside base + adapter in fp64, number by number."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorakit.core import adapters, merging
from tests.conftest import make_llama
from tests.core.merging.adapted import LISTED, make_adapter
from tests.faults.server import command, forked, said_by, spread
from tests.faults.tally import Tally

BASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "as many key heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "sharded": {"max_shard_size": "60KB"},
    "one layer": {"num_hidden_layers": 1},
}
ADAPTERS = ("plain", "rslora", "rank 1", "patterns", "some layers", "modules to save")
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def expected(base: Mapping[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """Base + scale · B·A in fp64, as peft's documentation has it; every tensor of the adapter used once. KeyError where
    there is no such tensor to change."""
    config, parts = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / adapters.WEIGHTS)
    found = {name: tensor.double() for name, tensor in base.items()}
    for name in [name for name in parts if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = parts.pop(name).double(), parts.pop(name.replace("lora_A", "lora_B")).double()
        fitting = [
            [value for key, value in (config.get(which) or {}).items() if re.match(rf"(.*\.)?({key})$", module)]
            for which in ("rank_pattern", "alpha_pattern")
        ]
        rank, alpha = (*fitting[0], config["r"])[0], (*fitting[1], config["lora_alpha"])[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        found[f"{module}.weight"] = found[f"{module}.weight"] + scale * (b @ a)
    for name in list(parts):
        found[name.removeprefix("base_model.model.")] = parts.pop(name).double()
    return found


def problems_of(base: Path, adapter: Path, folder: Path) -> Iterator[str]:
    before, after = tensors(base), tensors(folder)
    exact = expected(before, adapter)
    if after.keys() - before.keys() - {"lm_head.weight"} or before.keys() - after.keys():
        yield f"other names: {sorted(after.keys() ^ before.keys())}"
        return
    for name, tensor in before.items():
        merged, target = after[name], exact[name]
        if (merged.shape, merged.dtype) != (tensor.shape, tensor.dtype):
            yield f"{name}: {merged.dtype} {merged.shape}"
        elif torch.equal(target, tensor.double()):
            if merged.view(torch.uint8).numpy().tobytes() != tensor.view(torch.uint8).numpy().tobytes():
                yield f"{name}: changed bytes"
        else:
            places = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[tensor.dtype]
            smallest = {torch.float32: 1e-9, torch.bfloat16: 1e-9, torch.float16: 2**-24}[tensor.dtype]
            rounded = target.to(tensor.dtype).double()
            # one place apart at most; sums that nearly cancel are as exact as what they are sums of
            allowed = 2 * places * rounded.abs() + smallest + 1e-6 * target.abs().amax(dim=-1, keepdim=True)
            if bool(((merged.double() - rounded).abs() > allowed).any()):
                yield f"{name}: off by {float((merged.double() - rounded).abs().max()):.3g}"


def one(work: Path, without: str | None, case: tuple[str, str, str]) -> list[str]:
    name, dtype, kind = case
    folder = work / f"merging-{'-'.join(case)}".replace(" ", "-")
    folder.mkdir()
    log = folder / "log"
    try:
        said_by(partial(_made, folder, name, dtype, kind), log)

        def body() -> int:
            if without is not None:
                scale = adapters.Adapter.scale
                adapters.Adapter.scale = lambda self, module: 1.01 * scale(self, module)  # type: ignore[method-assign]
                merging.verify_rows = lambda *_: 0.0
            return command(["merge", folder / "adapter", "--base", folder / "base", "--output", folder / "merged"])

        if forked(body, log):
            return [log.read_text()[-300:]]
        return list(problems_of(folder / "base", folder / "adapter", folder / "merged"))
    finally:
        shutil.rmtree(folder)


def _made(folder: Path, name: str, dtype: str, kind: str) -> int:
    base = make_llama(folder / "base", dtype=DTYPES[dtype], **BASES[name])
    given = dict(LISTED[kind])
    if kind == "patterns" and name == "one layer":
        given.pop("alpha_pattern")
    if kind == "some layers" and name == "one layer":
        given["layers_to_transform"] = [0]
    if kind == "modules to save" and name == "tied":
        given["modules_to_save"] = ["norm"]
    make_adapter(folder / "adapter", base, **given)
    return 0


def prove(work: Path, *, short: bool, jobs: int, without: str | None = None) -> Tally:
    cases: Sequence[tuple[str, str, str]] = [
        (name, dtype, kind) for name in BASES for dtype in DTYPES for kind in ADAPTERS
    ]
    if short or without:
        cases = cases[:: 13 if short else 40]
    tally = Tally()
    for case, problems in zip(cases, spread(partial(one, work, without), cases, jobs), strict=True):
        tally.add(", ".join(case), problems)
    return tally
