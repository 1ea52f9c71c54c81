"""What accelerate's files come to in lorakit, and what is refused or said not to be used."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.core import accelerate_config
from lorakit.core.accelerate_config import translated
from lorakit.core.config import TrainConfig
from lorakit.core.errors import UsageError
from lorakit.core.events import Notice, Progress

ZERO_2 = """\
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_multinode_launcher: standard
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: cpu
  zero3_init_flag: false
  zero_stage: 2
distributed_type: DEEPSPEED
downcast_bf16: no
dynamo_backend: 'no'
fsdp_config: {}
machine_rank: 0
main_training_function: main
megatron_lm_config: {}
mixed_precision: 'no'
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
use_cpu: false
"""
"""A file of the kind that the script which lorakit replaces was started with."""


class Translation:
    """A file translated: the settings, and what was said."""

    def __init__(self, path: Path, content: str | dict[str, Any], **settings: object) -> None:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        given = {"model": "m", "blocks": ["b"], "accelerate_config": str(path), **settings}
        self.said: list[str] = []
        self.config = translated(TrainConfig.resolve((None, given)), self._hear)
        self.devices = self.config.devices

    def _hear(self, event: Progress | Notice) -> None:
        assert isinstance(event, Notice)
        self.said.append(event.text)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(accelerate_config, "free_gpu_bytes", lambda: [])
    return tmp_path / "accelerate.yaml"


def test_zero_2_with_offload_becomes_ddp_with_its_processes_and_clipping(path: Path) -> None:
    found = Translation(path, ZERO_2.replace("clipping: 1.0", "clipping: 0.7"))
    assert (found.devices.parallel, found.devices.num_processes, found.devices.num_machines) == ("ddp", 8, 1)
    assert found.config.optimizer.max_grad_norm == 0.7
    assert found.config.model.dtype == "auto"
    assert found.devices.accelerate_config is None  # what it says is in the settings now
    why, unused = found.said
    for words in ("ZeRO-2 becomes --parallel ddp with 8 processes", "0.6 GB", "--parallel fsdp or split"):
        assert words in why
    offloads = ("deepspeed_config.offload_optimizer_device", "deepspeed_config.offload_param_device")
    assert unused == f"accelerate.yaml: not used: {', '.join(offloads)}"


BASIC = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 4, "mixed_precision": "no"}
FSDP_1 = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_forward_prefetch": False,
    "fsdp_offload_params": False,
    "fsdp_sharding_strategy": 1,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_sync_module_states": True,
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_use_orig_params": True,
}
FSDP_2 = {
    "fsdp_version": 2,
    "fsdp_activation_checkpointing": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
}


@pytest.mark.parametrize(
    ("content", "parallel"),
    [
        ({"distributed_type": "MULTI_GPU", "gpu_ids": "all"}, "ddp"),
        ({"distributed_type": "MULTI_CPU", "use_cpu": True}, "ddp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "ddp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}, "ddp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {}}, "ddp"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True}}, "fsdp"),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP_1}, "fsdp"),
        ({"distributed_type": "FSDP", "fsdp_config": FSDP_2}, "fsdp"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_reshard_after_forward": "FULL_SHARD"}}, "fsdp"),
        ({"distributed_type": "FSDP", "fsdp_config": {**FSDP_1, "fsdp_sharding_strategy": "SHARD_GRAD_OP"}}, "ddp"),
        ({"distributed_type": "FSDP", "fsdp_config": {**FSDP_2, "fsdp_reshard_after_forward": False}}, "ddp"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}}, "ddp"),
    ],
)
def test_each_strategy_has_its_translation_and_reason(content: dict[str, Any], parallel: str, path: Path) -> None:
    found = Translation(path, {**BASIC, **content})
    assert (found.devices.parallel, found.devices.num_processes) == (parallel, 4)
    assert len(found.said) == 1
    assert f"becomes --parallel {parallel} with 4 processes: " in found.said[0]


def test_one_process_stays_one(path: Path) -> None:
    found = Translation(path, {**BASIC, "distributed_type": "NO", "num_processes": 1, "mixed_precision": "bf16"})
    assert (found.devices.parallel, found.devices.num_processes, found.said) == (None, None, [])
    assert found.config.model.dtype == "bf16"


def test_a_json_file_is_read_too(path: Path) -> None:
    assert Translation(path, '{"distributed_type": "MULTI_GPU", "num_processes": 2}').devices.num_processes == 2


def test_processes_are_counted_over_all_machines(path: Path) -> None:
    machines = {"num_machines": 2, "num_processes": 16, "machine_rank": 1, "main_process_ip": "10.0.0.5"}
    found = Translation(path, {**BASIC, **machines, "distributed_type": "MULTI_GPU", "main_process_port": 1234})
    devices = found.devices
    assert (devices.num_processes, devices.num_machines, devices.rendezvous) == (8, 2, "10.0.0.5:1234")
    assert found.config.data_parallel_size == 16
    assert "with 8 processes a machine" in found.said[0]
    assert len(found.said) == 1
    default_port = Translation(path, {**BASIC, **machines, "distributed_type": "MULTI_GPU", "main_process_port": None})
    assert default_port.devices.rendezvous == "10.0.0.5:29500"
    alone = Translation(path, {**BASIC, **machines, "distributed_type": "MULTI_GPU"}, num_machines=1)
    assert (alone.devices.num_machines, alone.devices.rendezvous) == (1, None)


def test_a_machine_count_without_an_address_needs_one(path: Path) -> None:
    with pytest.raises(UsageError, match="need both: --num-machines 2 --rendezvous"):
        Translation(path, {**BASIC, "num_machines": 2, "distributed_type": "MULTI_GPU"})


def test_what_was_given_wins_over_the_file(path: Path) -> None:
    content = ZERO_2.replace("mixed_precision: 'no'", "mixed_precision: fp16").replace("clipping: 1.0", "clipping: 0.3")
    assert Translation(path, content).config.model.dtype == "fp16"
    given: dict[str, object] = {"parallel": "fsdp", "num_processes": 2, "max_grad_norm": 1.0, "dtype": "bf16"}
    found = Translation(path, content, **given)
    assert (found.devices.parallel, found.devices.num_processes) == ("fsdp", 2)
    assert (found.config.optimizer.max_grad_norm, found.config.model.dtype) == (1.0, "bf16")
    assert not any("becomes" in text for text in found.said)
    assert Translation(path, content, dtype="auto").config.model.dtype == "fp16"
    split = Translation(path, content, parallel="split")
    assert (split.devices.parallel, split.devices.num_processes) == ("split", None)
    assert split.config.optimizer.max_grad_norm == 0.3


def test_accumulation_is_taken_unless_the_steps_size_was_given(path: Path) -> None:
    content = ZERO_2.replace("zero_stage: 2", "zero_stage: 2\n  gradient_accumulation_steps: 4")
    assert Translation(path, content).config.batch.gradient_accumulation_steps == 4
    assert Translation(path, content, gradient_accumulation_steps=2).config.batch.gradient_accumulation_steps == 2
    sized = Translation(path, content, effective_batch_size=16).config.batch
    assert (sized.effective_batch_size, sized.gradient_accumulation_steps) == (16, 1)
    auto = content.replace("steps: 4", "steps: auto").replace("clipping: 1.0", "clipping: auto")
    assert Translation(path, auto).config.batch.gradient_accumulation_steps == 1


def test_compiling_is_taken(path: Path) -> None:
    compiled = {**BASIC, "distributed_type": "NO", "dynamo_config": {"dynamo_backend": "INDUCTOR"}}
    assert Translation(path, compiled).config.batch.torch_compile
    assert not Translation(path, ZERO_2).config.batch.torch_compile


def test_keys_without_a_meaning_here_are_named(path: Path) -> None:
    content = {**BASIC, "distributed_type": "MULTI_GPU", "downcast_bf16": "yes", "new_key": 3, "tpu_env": []}
    content["fsdp_config"] = {"fsdp_offload_params": True}
    found = Translation(path, content)
    assert found.said[1] == "accelerate.yaml: not used: fsdp_config.fsdp_offload_params, downcast_bf16, new_key"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"distributed_type": "TPU"}, "distributed_type: 'TPU', need NO, MULTI_GPU"),
        ({"distributed_type": "XLA"}, "'XLA'"),
        ({"distributed_type": "MEGATRON_LM"}, "'MEGATRON_LM'"),
        ({"distributed_type": "MULTI_XPU"}, "'MULTI_XPU'"),
        ({"compute_environment": "AMAZON_SAGEMAKER", "distributed_type": "NO"}, "compute_environment"),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp8"}, "mixed_precision: 'fp8'"),
        ({"distributed_type": "MULTI_GPU", "gpu_ids": "2,3"}, "gpu_ids: '2,3'"),
        ({"distributed_type": "MULTI_GPU", "num_machines": 3}, "num_processes: 4, need a multiple of num_machines"),
        ({"distributed_type": "MULTI_GPU", "num_processes": "many"}, "num_processes: 'many'"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 0}, "num_processes: 0"),
        ({"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "TENSORRT"}}, "dynamo_backend"),
        ({"distributed_type": "MULTI_GPU", "parallelism_config": {"parallelism_config_tp_size": 2}}, "parallelism"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}}, "ds.json"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "zero_stage: 4"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": "x"}}, "gradient_clipping: 'x'"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": "ds.json"}, "deepspeed_config: 'ds.json'"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "HALF"}}, "sharding_strategy: 'HALF'"),
        ({"num_processes": 4}, "no distributed_type"),
        ("[1, 2", "need YAML"),
        ("just words", "no distributed_type"),
    ],
)
def test_what_cant_be_done_is_refused_by_name(content: str | dict[str, Any], words: str, path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Translation(path, {**BASIC, **content} if isinstance(content, dict) else content)
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_training_on_the_cpu_beside_gpus_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate_config, "free_gpu_bytes", lambda: [2**30])
    for content in ({"distributed_type": "MULTI_CPU"}, {"distributed_type": "NO", "use_cpu": True}):
        with pytest.raises(UsageError) as caught:
            Translation(path, {**BASIC, **content})
        assert "CUDA_VISIBLE_DEVICES=" in caught.value.hint


def test_what_contradicts_other_settings_is_refused(path: Path) -> None:
    zero_3 = ZERO_2.replace("zero_stage: 2", "zero_stage: 3")
    with pytest.raises(UsageError, match="--parallel fsdp with --quantize int8"):
        Translation(path, zero_3, quantize="int8")
    with pytest.raises(UsageError, match="effective_batch_size: found 12, need a multiple of"):
        Translation(path, ZERO_2, effective_batch_size=12)


def test_a_file_that_isnt_there_is_named(path: Path) -> None:
    settings = {"model": "m", "blocks": ["b"], "accelerate_config": str(path)}
    with pytest.raises(UsageError, match="found no such file"):
        translated(TrainConfig.resolve((None, settings)), lambda event: None)
