"""accelerate's config file → train's settings: how many processes, and which way of sharing the work is meant.

Strategies are translated, not imitated: what DeepSpeed and FSDP shard or offload so that a whole model can be trained
is mostly not there in LoRA, whose optimizer keeps a hundredth of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lorakit.core.config import TrainConfig
from lorakit.core.environment import free_gpu_bytes
from lorakit.core.errors import UsageError
from lorakit.core.events import Notice, Report
from lorakit.core.untrusted import MAX_SETTINGS_BYTES, parse_yaml, read_small

_DEFAULT_PORT = 29500  # accelerate's, where main_process_port is left out
_SHARDED = (
    "each GPU then keeps a share of the weights; where the base fits on every GPU, --parallel ddp is faster, and "
    "--parallel split puts layers on several GPUs from one process"
)
_WHY = {  # 0.6 GB: two fp32 moments of rank 64 on q, k, v and o, 67 M numbers
    "ZeRO-0": ("ddp", "that is plain data parallelism"),
    "ZeRO-1": ("ddp", "only LoRA's optimizer state would be sharded, about 0.6 GB for a 7B"),
    "ZeRO-2": ("ddp", "only LoRA's optimizer state and gradients would be sharded, about 0.6 GB for a 7B"),
    "ZeRO-3": ("fsdp", _SHARDED),
    "FULL_SHARD": ("fsdp", _SHARDED),
    "SHARD_GRAD_OP": ("ddp", "it shards only gradients and optimizer state, which LoRA has few of"),
    "NO_SHARD": ("ddp", "it shards nothing"),
    "HYBRID_SHARD": ("fsdp", f"sharded over all GPUs, not within each machine; {_SHARDED}"),
    "HYBRID_SHARD_ZERO2": ("ddp", "it shards only gradients and optimizer state, which LoRA has few of"),
    "MULTI_GPU": ("ddp", "a whole copy of the base on each GPU"),
    "MULTI_CPU": ("ddp", "a whole copy of the base in each process"),
}
"""A strategy of accelerate → lorakit's, and why."""
_ENOUGH = "if the base doesn't fit on one GPU, --parallel fsdp or split is the answer"
_STRATEGIES_BY_NUMBER = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")  # from 1

_KNOWN = {
    # read here
    *("compute_environment", "distributed_type", "num_processes", "num_machines"),
    *("main_process_ip", "main_process_port"),
    *("mixed_precision", "fp16", "use_cpu", "gpu_ids", "dynamo_backend", "dynamo_config"),
    *("deepspeed_config.zero_stage", "deepspeed_config.gradient_clipping", "deepspeed_config.deepspeed_config_file"),
    *("deepspeed_config.gradient_accumulation_steps",),
    *("fsdp_config.fsdp_sharding_strategy", "fsdp_config.fsdp_reshard_after_forward"),
    # what is so anyway, or isn't needed: machines find their numbers when they meet, adapters are always gathered whole
    *("machine_rank", "rdzv_backend", "same_network", "main_training_function", "debug", "fsdp_config.fsdp_version"),
    *("deepspeed_config.zero3_init_flag", "deepspeed_config.zero3_save_16bit_model"),
    *("deepspeed_config.deepspeed_multinode_launcher",),
    *("fsdp_config.fsdp_auto_wrap_policy", "fsdp_config.fsdp_transformer_layer_cls_to_wrap"),
    *("fsdp_config.fsdp_state_dict_type", "fsdp_config.fsdp_use_orig_params", "fsdp_config.fsdp_sync_module_states"),
    *("fsdp_config.fsdp_cpu_ram_efficient_loading", "fsdp_config.fsdp_activation_checkpointing"),
    *("fsdp_config.fsdp_backward_prefetch", "fsdp_config.fsdp_forward_prefetch"),
}
"""Any other key that is set is said not to be used."""
_NEUTRAL: tuple[Any, ...] = (None, False, "", "no", "NO", "none", "all", [], {})
"""Values that ask for nothing."""


def translated(config: TrainConfig, report: Report) -> TrainConfig:
    """Train's settings with what --accelerate-config says; options and settings that were given win over it.

    Reports why a strategy became another, and the keys that were not used. Raises UsageError for a file that isn't
    accelerate's, for what would change the result and can't be done, and for what contradicts the other settings.
    """
    path = config.devices.accelerate_config
    if path is None:
        return config
    file = _File(path)
    given = {name: value for name, value in config.flat().items() if _is_given(config, name, value)}
    strategy = file.strategy()
    meant, why = _WHY[strategy] if strategy else (None, "")
    parallel = given.get("parallel") or meant
    found: dict[str, object] = {"parallel": parallel}
    if parallel in ("ddp", "fsdp"):
        found |= file.processes()
    found |= file.training()
    if "effective_batch_size" in given:
        found.pop("gradient_accumulation_steps", None)
    if given.get("num_machines") == 1:
        found.pop("rendezvous", None)
    result = TrainConfig.resolve((None, {**found, **given}))
    if strategy and parallel == meant:
        processes = result.devices.num_processes or "all"
        each = f" with {processes} processes" + (" a machine" if result.devices.num_machines > 1 else "")
        more = f"; {_ENOUGH}" if parallel == "ddp" else ""
        report(Notice(f"{path.name}: {strategy} becomes --parallel {parallel}{each}: {why}{more}"))
    if unused := file.unused():
        report(Notice(f"{path.name}: not used: {', '.join(unused)}"))
    return result


def _is_given(config: TrainConfig, name: str, value: object) -> bool:
    if name == "accelerate_config" or value is None or (name, value) == ("dtype", "auto"):
        return False
    return name in getattr(config, config.settings()[name].section).model_fields_set


class _File:
    """One accelerate config file. Its questions raise UsageError where there is no answer in lorakit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            self._refuse("no such file", "an accelerate config file", "`accelerate config` writes one")
        try:
            raw = read_small(path, MAX_SETTINGS_BYTES, "`accelerate config` writes such a file")
            content = parse_yaml(raw, version_1_1=True)  # as accelerate reads it
        except ValueError as error:
            self._refuse(str(error), "YAML", "`accelerate config` writes such a file")
        if not isinstance(content, dict) or "distributed_type" not in content:
            self._refuse("no distributed_type", "an accelerate config file", "`accelerate config` writes one")
        self.top: Mapping[str, Any] = content
        self.deepspeed, self.fsdp = self._section("deepspeed_config"), self._section("fsdp_config")

    def strategy(self) -> str | None:
        """How the work is shared, in the words of accelerate; None for one process."""
        kind = self._word(self.top, "distributed_type").upper()
        if self.top.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
            self._cant("compute_environment", "LOCAL_MACHINE", "start lorakit on the machines themselves")
        others = self._section("parallelism_config")
        if any(self._count(others, name, 1) > 1 for name in others if name.endswith("_size")):
            self._cant("parallelism_config", "no other kinds of parallelism", "remove it, and see --parallel")
        if kind == "NO":
            return None
        if kind == "DEEPSPEED":
            if self.deepspeed.get("deepspeed_config_file") not in _NEUTRAL:
                self._cant(
                    "deepspeed_config.deepspeed_config_file",
                    "DeepSpeed's settings in this file",
                    "leave the file out and give --parallel, --num-processes, --max-grad-norm and --dtype",
                )
            stage = self._count(self.deepspeed, "zero_stage", 2, least=0)
            if stage > 3:
                self._cant("deepspeed_config.zero_stage", "0 to 3", "give --parallel fsdp or ddp")
            return f"ZeRO-{stage}"
        if kind == "FSDP":
            return self._fsdp_strategy()
        if kind not in _WHY:
            known = "NO, MULTI_GPU, MULTI_CPU, DEEPSPEED or FSDP"
            self._cant("distributed_type", known, "leave the file out and give --parallel and --num-processes")
        return kind

    def _fsdp_strategy(self) -> str:
        again = self.fsdp.get("fsdp_reshard_after_forward", True)
        strategy = self.fsdp.get("fsdp_sharding_strategy")
        if strategy is None:  # FSDP2 says it by a flag, accelerate's newer FSDP1 by this name
            strategy = again if isinstance(again, str) else "FULL_SHARD" if again else "SHARD_GRAD_OP"
        strategy = str(strategy).upper()
        if strategy.isdigit() and 1 <= int(strategy) <= len(_STRATEGIES_BY_NUMBER):
            strategy = _STRATEGIES_BY_NUMBER[int(strategy) - 1]
        if strategy not in _WHY:
            self._cant("fsdp_config.fsdp_sharding_strategy", "a strategy of FSDP", "give --parallel fsdp or ddp")
        return strategy

    def processes(self) -> dict[str, object]:
        """How many processes there are on each machine, how many machines, and where they meet."""
        machines = self._count(self.top, "num_machines", 1)
        found: dict[str, object] = {"num_machines": machines}
        if self.top.get("num_processes") not in (None, -1):
            processes = self._count(self.top, "num_processes", 1)
            if processes % machines:
                self._cant("num_processes", f"a multiple of num_machines ({machines}): it counts all", "correct one")
            found["num_processes"] = processes // machines
        address = self.top.get("main_process_ip")
        if machines > 1 and address not in _NEUTRAL:
            found["rendezvous"] = f"{address}:{self._count(self.top, 'main_process_port', _DEFAULT_PORT)}"
        return found

    def training(self) -> dict[str, object]:
        """What the file says of the training itself."""
        found: dict[str, object] = {}
        precision = self._word(self.top, "mixed_precision", "fp16" if self.top.get("fp16") is True else "no").lower()
        if precision not in ("no", "bf16", "fp16"):
            self._cant("mixed_precision", "no, bf16 or fp16", "give --dtype bf16 and set it to no")
        if precision != "no":
            found["dtype"] = precision
        for name, taken, parse in (
            ("gradient_clipping", "max_grad_norm", self._norm),
            ("gradient_accumulation_steps", "gradient_accumulation_steps", self._steps),
        ):
            # "auto" is transformers' word for what its own arguments say
            if self._is(self.top, "distributed_type", "DEEPSPEED") and self.deepspeed.get(name) not in (None, "auto"):
                found[taken] = parse(name)
        dynamo = self._section("dynamo_config").get("dynamo_backend", self.top.get("dynamo_backend", "no"))
        if str(dynamo).lower() == "inductor":
            found["torch_compile"] = True
        elif dynamo not in _NEUTRAL:
            self._cant("dynamo_config.dynamo_backend", "no or inductor", "set it to no")
        on_cpu = self.top.get("use_cpu") is True or self._is(self.top, "distributed_type", "MULTI_CPU")
        if on_cpu and free_gpu_bytes():
            self._cant("use_cpu", "a machine without a GPU", "hide the GPUs: CUDA_VISIBLE_DEVICES= lorakit train …")
        if (gpus := self.top.get("gpu_ids")) not in _NEUTRAL:
            self._cant("gpu_ids", "all GPUs that are seen", f"CUDA_VISIBLE_DEVICES={gpus} lorakit …, and remove it")
        return found

    def unused(self) -> list[str]:
        """The keys that are set and have no meaning here."""
        flat = {f"{name}.{inner}": value for name in self.top for inner, value in self._pairs(name)}
        flat |= {name: value for name, value in self.top.items() if not isinstance(value, dict)}
        return [name for name, value in flat.items() if name not in _KNOWN and value not in _NEUTRAL]

    def _pairs(self, name: str) -> list[tuple[str, Any]]:
        inside = self.top[name]
        kept_apart = {"dynamo_config", "parallelism_config"}  # asked about whole
        return list(inside.items()) if isinstance(inside, dict) and name not in kept_apart else []

    def _section(self, name: str) -> Mapping[str, Any]:
        found = self.top.get(name) or {}
        if not isinstance(found, dict):
            self._cant(name, "names with values", "`accelerate config` writes such a file")
        return found

    def _is(self, section: Mapping[str, Any], name: str, word: str) -> bool:
        return str(section.get(name)).upper() == word

    def _word(self, section: Mapping[str, Any], name: str, default: str = "no") -> str:
        found = section.get(name)
        return default if found is None else "no" if found is False else str(found)  # YAML's own no is False

    def _count(self, section: Mapping[str, Any], name: str, default: int, *, least: int = 1) -> int:
        found = section.get(name)
        if found is None:
            return default
        if isinstance(found, bool) or not str(found).isdecimal() or int(found) < least:
            self._refuse(f"{name}: {found!r}", f"a whole number ≥ {least}", "correct it")
        return int(found)

    def _steps(self, name: str) -> int:
        return self._count(self.deepspeed, name, 1)

    def _norm(self, name: str) -> float:
        try:
            return float(self.deepspeed[name])
        except (TypeError, ValueError):
            self._refuse(f"{name}: {self.deepspeed[name]!r}", "a number", "correct it")

    def _cant(self, key: str, need: str, hint: str) -> NoReturn:
        outer, _, inner = key.partition(".")
        value = self.top.get(outer)
        value = value.get(inner) if inner and isinstance(value, dict) else value
        self._refuse(f"{key}: {value!r}", need, hint)

    def _refuse(self, found: str, need: str, hint: str) -> NoReturn:
        raise UsageError(f"--accelerate-config {self.path}: found {found}, need {need}", hint)
