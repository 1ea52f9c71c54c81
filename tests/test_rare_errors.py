"""Errors that no other test comes by: a disk that fails while it reads, a GPU that isn't there, files changed by hand.

Each shows its text, hint and exit code. `tests/shown_errors.py` says which places of lorakit none shows.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn
from transformers import LlamaConfig

from lorakit.core import (
    accelerate_config,
    adapters,
    artifacts,
    blocks,
    disk,
    elastic,
    hub,
    launching,
    model,
    offloading,
    parallel,
    readers,
    records,
    sources,
    starter,
    tokenization,
)
from lorakit.core.config import DemoConfig, TrainConfig
from lorakit.core.environment import Worker
from lorakit.core.errors import ExitCode, LorakitError
from lorakit.core.merging import plan as merging_plan
from lorakit.core.training import checkpoints, loop
from lorakit.core.weights import TensorPlace, open_weights
from lorakit.signals import Noted
from tests.conftest import Ran, make_llama, make_tokenizer

Cli = Callable[..., Ran]


def silent(event: object) -> None: ...


def shows(code: ExitCode, found: str, hint: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """That a call ends in an error with this exit code, these words in its text, and these in its hint."""
    with pytest.raises(LorakitError) as caught:
        call(*arguments, **named)
    assert caught.value.exit_code == code
    assert found in caught.value.message
    assert hint in caught.value.hint


def failing(*_: object, **__: object) -> Any:
    raise OSError(5, "Input/output error")


IO = (ExitCode.DISK, "found 'Input/output error'", "check the disk")


# A disk that fails


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A whole artifact of one file."""
    folder = tmp_path / "whole"
    config = DemoConfig.resolve()
    with artifacts.lock(folder):
        artifacts.commit(folder, "base", [("a", b"bytes")], config=config, parents={}, facts={})
    return folder


@pytest.mark.parametrize(
    "call", [artifacts.reopen, artifacts.amend, artifacts.remove, artifacts.replace, artifacts.set_aside]
)
def test_an_artifact_whose_disk_fails_is_named(
    call: Callable[..., Any], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(os, "mkdir", failing)
    arguments: tuple[Any, ...] = {
        artifacts.reopen: (artifact, ()),
        artifacts.amend: (artifact, "a", b"others"),
        artifacts.replace: (artifact, artifact.with_name("other"), ()),
    }.get(call, (artifact,))
    shows(*IO, call, *arguments)
    monkeypatch.undo()
    assert artifacts.open_artifact(artifact, "base").path == artifact


def test_reading_an_artifact_on_a_disk_that_fails(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "sha256", failing)
    shows(*IO, artifacts.open_artifact, artifact, "base")
    monkeypatch.setattr(os, "open", failing)
    shows(*IO, artifacts.read_manifest, artifact)
    monkeypatch.setattr(Path, "stat", failing)
    shows(*IO, disk.stamp, artifact)


def test_sweeping_on_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", failing)
    shows(*IO, artifacts.sweep, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(artifacts, "_sweep", failing)
    with pytest.raises(LorakitError, match="Input/output error"), artifacts.lock(tmp_path / "a"):
        pass


def test_a_lock_on_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ftruncate", failing)
    with pytest.raises(LorakitError, match="Input/output error") as caught, disk.held(tmp_path / ".lock"):
        pass
    assert caught.value.exit_code == ExitCode.DISK
    assert not (tmp_path / ".lock").exists()


def test_inputs_that_cant_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = TrainConfig.resolve((None, {"model": "m", "blocks": "/b", "accelerate_config": str(tmp_path)}))
    refused = ExitCode.INPUT_REFUSED
    shows(refused, "found a folder, need a file", "", accelerate_config.translated, config, silent)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        shows(*IO, sources._readme_configs, tmp_path, "there")
    monkeypatch.setattr(disk, "sha256", failing)
    make_tokenizer(tmp_path / "tokenizer")
    shows(*IO, tokenization._key, tmp_path / "tokenizer", ())
    monkeypatch.setattr(os, "scandir", failing)
    shows(*IO, sources._data_paths, tmp_path)


def test_an_upload_whose_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", failing)
    shows(*IO, hub.push_folder, tmp_path, "owner/mine", private=False, report=silent)


# Adapters, models and files that a hand changed


def adapter_folder(folder: Path, dtype: Any = np.float32, **config: object) -> Path:
    folder.mkdir()
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": np.ones((2, 64), dtype), f"{module}.lora_B.weight": np.ones((64, 2), dtype)}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_that_cant_be_used(tmp_path: Path) -> None:
    odd = adapter_folder(tmp_path / "odd", rank_pattern=["q_proj"])
    shows(ExitCode.INPUT_REFUSED, "alpha_pattern that is no mapping", "correct it", adapters.open_adapter, odd, silent)
    run = tmp_path / "run"
    (run / "checkpoints" / "step-7").mkdir(parents=True)
    shows(ExitCode.INPUT_REFUSED, "stopped after step 7", "same `lorakit train`", adapters.open_adapter, run, silent)
    nameless = adapters.open_adapter(adapter_folder(tmp_path / "nameless"), silent)
    shows(ExitCode.INPUT_REFUSED, "found no base named", "--base", adapters.base_folder, nameless, None)
    named = adapter_folder(tmp_path / "named", base_model_name_or_path="./gone")
    opened = adapters.open_adapter(named, silent)
    shows(ExitCode.INPUT_REFUSED, "./gone", "give the base with --base", adapters.base_folder, opened, None)


def test_numbers_that_cant_be_merged(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    whole = adapter_folder(tmp_path / "whole-numbers", np.int32)
    ran = cli("merge", whole, "--base", tiny_llama, "--output", tmp_path / "merged")
    assert ran.code == ExitCode.INPUT_REFUSED
    assert "found I32, need floating-point numbers\nhint: use another adapter" in ran.err
    base = make_llama(tmp_path / "base")
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors.numpy.save_file({**tensors, name: tensors[name].astype(np.int32)}, base / "model.safetensors")
    ran = cli("merge", adapter_folder(tmp_path / "adapter"), "--base", base, "--output", tmp_path / "merged")
    assert ran.code == ExitCode.INPUT_REFUSED
    assert f"{name}: found I32, need F32, BF16 or F16\nhint: merge into the 16-bit base" in ran.err
    assert not (tmp_path / "merged").exists()


def test_a_tensor_that_ends_too_early(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    place = TensorPlace("model.safetensors", "F32", (2, 1), 0, 8)
    stored = merging_plan.Stored(tmp_path / "model.safetensors", place)
    shows(ExitCode.ARTIFACT_DAMAGED, "found it cut off, need all of it", "copy it again", stored.rows, 0, 2)


def test_models_that_cant_be_loaded(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_llama(tmp_path / "base")
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    shows(
        *(ExitCode.INPUT_REFUSED, "found weights without model.norm.weight (1 such)", "download the model again"),
        *(model._from_pretrained, open_weights(base), torch.float32, None),
    )

    huge = make_llama(tmp_path / "huge")
    config = json.loads((huge / "config.json").read_bytes())
    (huge / "config.json").write_text(json.dumps(config | {"vocab_size": 10**30}))
    shows(
        *(ExitCode.INPUT_REFUSED, "transformers can't load", "choose a model of the Llama family"),
        *(model._from_pretrained, open_weights(huge), torch.float32, None),
    )

    def refuse(*_: object, **__: object) -> Any:
        raise ValueError("an architecture of tomorrow")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    shows(
        *(ExitCode.INPUT_REFUSED, "can't load (an architecture of tomorrow)", "code that comes with a model is never"),
        *(model._from_pretrained, open_weights(tiny_llama), torch.float32, None),
    )


def test_a_quantized_module_isnt_trained_whole() -> None:
    base: Any = nn.Module()
    base.config = LlamaConfig(num_hidden_layers=1)
    base.layers = nn.ModuleList([nn.Linear(1, 1)])
    base.q_proj = nn.Module()
    base.q_proj.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    shows(
        ExitCode.INPUT_REFUSED,
        "'q_proj', which is quantized",
        "--quantize none",
        model._refuse_unsavable,
        base,
        ["q_proj"],
        [],
    )


def test_a_chat_template_that_refuses_a_system_prompt(cli: Cli, tmp_path: Path) -> None:
    strict = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ message['content'] }}{% endfor %}"
    )
    folder = make_llama(tmp_path / "strict", chat_template=strict)
    ran = cli("chat", folder, "--prompt", "Hi", "--system", "Be kind.")
    assert ran.code == ExitCode.INPUT_REFUSED
    assert "error: found messages that the chat template refuses (" in ran.err
    assert "no system role" in ran.err
    assert "hint: leave out --system if the template has none" in ran.err


def test_files_that_cant_be_text(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "template.jinja").write_bytes(b"\xff\xfe")
    ran = cli("prepare", "rows.jsonl", "--tokenizer", "tokenizer", "--template", "template.jinja")
    assert ran.code == ExitCode.USAGE
    assert "template.jinja: found 'utf-8' codec can't decode" in ran.err
    assert "hint: check the file" in ran.err
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 16)
    monkeypatch.setattr(readers, "_TEXT_BYTES", 4)
    (tmp_path / "long.txt").write_text("x" * 100)
    ran = cli("prepare", "long.txt", "--tokenizer", "tokenizer", "--num-workers", "1")
    assert ran.code == ExitCode.INPUT_REFUSED
    assert "long.txt: found a line over 0 MiB, need less\nhint: break the text into lines" in ran.err


def test_a_pattern_that_is_none() -> None:
    shows(
        ExitCode.INPUT_REFUSED, "found the pattern '[z-a].csv'", "correct it", sources._pattern, "[z-a].csv", "README"
    )


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    config = TrainConfig.resolve((None, {"model": "m", "blocks": "/b"}))
    step = tmp_path / "checkpoints" / "step-00000001"
    with artifacts.lock(step):
        artifacts.commit(step, "checkpoint", [("a", b"bytes")], config=config, parents={}, facts={})
    (step / "a").write_bytes(b"other")
    kept = checkpoints.Checkpoints(tmp_path, config, {}, silent)
    shows(ExitCode.ARTIFACT_DAMAGED, "found other bytes", "same command again begins anew", kept.newest, ())


# Machines that this one isn't


def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    shows(
        *(ExitCode.ENVIRONMENT, "--dtype bf16: found Tesla T4, need a GPU that computes in bf16", "--dtype fp16"),
        *(model.require_device, torch.bfloat16, torch.device("cuda"), silent),
    )


def test_memory_that_cant_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    weights = [nn.Parameter(torch.zeros(8))]
    shows(
        *(ExitCode.OUT_OF_MEMORY, "of CPU memory (CUDA error 2), need it", "plan with less of it"),
        *(offloading._into_cpu_memory, weights, torch.device("cuda")),
    )


def test_a_demo_without_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    shows(ExitCode.ENVIRONMENT, "found no package gguf", "lorakit[demo]", starter._convert, tmp_path / "x.gguf")


def enter(worker: Worker) -> None:
    with parallel.joined(worker, "ddp", torch.device("cpu"), lambda: None):
        pass


def test_processes_that_dont_find_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("connect() timed out")

    worker = Worker(rank=0, local_rank=0, world_size=2, local_world_size=2)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    shows(ExitCode.ENVIRONMENT, "(connect() timed out), need all of them", "address is reachable", enter, worker)
    monkeypatch.setattr(torch.distributed, "init_process_group", silent_too)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shows(ExitCode.ENVIRONMENT, "found WORLD_SIZE 2, where torch sees 3", "--num-processes", enter, worker)


def silent_too(*_: object, **__: object) -> None: ...


def test_a_rank_that_failed_is_heard_of() -> None:
    def raise_heard(told: dict[str, Any]) -> None:
        raise parallel._heard(3, told)

    for code, hint, said in ((ExitCode.BUSY, "do b", "do b"), (ExitCode.RANK_FAILED, "", "same command")):
        shows(code, "rank 3: found a", said, raise_heard, {"failed": "found a", "hint": hint, "code": int(code)})


def test_a_run_whose_other_processes_are_gone() -> None:
    run: Any = SimpleNamespace(world=SimpleNamespace(size=2, rank=1), state=SimpleNamespace(step=4))
    error = loop.Run._understood(run, RuntimeError("Connection closed by peer\nmore"))
    assert isinstance(error, LorakitError)
    assert error.message == "rank 1, step 5: found Connection closed by peer, need all processes"
    assert error.exit_code == ExitCode.RANK_FAILED
    assert "the same command goes on" in error.hint


def test_a_run_that_goes_on_where_its_number_type_is_another(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("train", "--model", tiny_llama, "--dataset", rows_file, "--block-size", 128, "--output", tmp_path / "run")
    assert cli(*given, "--max-steps", 1).code == 0
    monkeypatch.setattr(loop, "pick_dtype", lambda *_: torch.bfloat16)
    ran = cli(*given, "--max-steps", 2, "--extend")
    assert ran.code == ExitCode.MISMATCH
    assert "--dtype auto: found bf16 here, need fp32, with which the run began" in ran.err
    assert "hint: --dtype fp32, or begin anew with --overwrite" in ran.err


def test_a_machine_that_isnt_needed_or_cant_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    start = (launching.start, [sys.executable, "-c", ""], 1, 2, where, silent)
    monkeypatch.setattr(elastic._Agent, "run", lambda self: None)
    shows(ExitCode.ENVIRONMENT, "found 2 machines without this", "on each of the 2 machines", *start)

    def refuse(self: object) -> Any:
        raise elastic.RendezvousError("the store is another's")

    monkeypatch.setattr(elastic._Meeting, "connect", refuse)
    shows(ExitCode.ENVIRONMENT, "found the store is another's, need machines that meet", "free port", *start)


@pytest.mark.parametrize(("asked", "code"), [("interrupt", 130), ("terminate", 75)])
def test_a_signal_before_there_is_anything_to_save(asked: str, code: int) -> None:
    with Noted() as signals:
        signals.stop_if_asked()
        signals.asked = asked
        shows(ExitCode(code), "before anything was written", "run the same command again", signals.stop_if_asked)


def test_blocks_that_cant_be_mapped_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"tokens": np.uint32, "trained": np.uint8, "document": np.uint16}
    path = tmp_path / "blocks-00001.safetensors"
    safetensors.numpy.save_file({name: np.zeros((2, 8), kind) for name, kind in kinds.items()}, path)
    opened: Any = SimpleNamespace(size=8, _shards=[], _firsts=[0])
    blocks.Blocks._add_shard(opened, path)
    assert opened._firsts == [0, 2]
    monkeypatch.setattr(blocks, "safe_open", failing)
    code, found, hint = ExitCode.ARTIFACT_DAMAGED, "found [Errno 5] Input/output error, need blocks", "lorakit prepare"
    shows(code, found, hint, blocks.Blocks._add_shard, opened, path)


def test_a_connection_to_another_rank_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")

    monkeypatch.setattr(parallel, "_all_told", broken)
    found = "found that the connection to another process broke (Connection closed by peer [127.0.0.1]:4242)"
    shows(ExitCode.RANK_FAILED, found, "look for the first error", parallel._exchange, {}, 2)


def test_a_stop_that_comes_before_anything_begins(tmp_path: Path) -> None:
    from lorakit.core import training

    config = TrainConfig.resolve((None, {"model": "m", "blocks": "b"}))
    with pytest.raises(LorakitError) as caught:
        training.train(config, tmp_path / "run", [], lambda _: None, lambda: "terminate")
    assert caught.value.exit_code == 75
    assert caught.value.hint


def test_a_checkpoints_tensors_that_safetensors_doesnt_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "read_header", lambda path: {})
    (tmp_path / "optimizer.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(LorakitError, match="need tensors") as caught:
        checkpoints._tensors(tmp_path / "optimizer.safetensors")
    assert caught.value.hint == "remove this checkpoint"
