"""Tokenizer and base model in, LoRA-wrapped model out."""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.core import artifacts, engines
from lorakit.core.adapters import WEIGHTS, Adapter, Change, Replacement, base_folder, match, open_adapter
from lorakit.core.blocks import Blocks
from lorakit.core.calibration import Calibration, calibrate
from lorakit.core.config import IN_8_BITS, AskedEngine, Engine, LoraKindSection, LoraSection, is_pattern
from lorakit.core.errors import EnvironmentUnusable, InputRefused, first_line, is_out_of_memory
from lorakit.core.events import Notice, Report
from lorakit.core.hub import model_folder
from lorakit.core.offloading import lora_to_devices, offload, offloaded
from lorakit.core.quantization import Quantizing, move, quantize_layers, say_how, stacks, unquantized
from lorakit.core.quantized_cache import QuantizedCache
from lorakit.core.shapes import FAMILIES, Module, Shape, is_called, refuse_uncounted, shape_of
from lorakit.core.tokenization import Codec, load_tokenizer, quiet_libraries, spec_of
from lorakit.core.weights import Weights, open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CANT_BE_LAID_OUT = (
    *(ValueError, KeyError, TypeError, AttributeError, ArithmeticError, ImportError, RuntimeError, StopIteration),
    StrictDataclassError,
)
_COMPILATIONS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Opened:
    """A model to talk with: `model` is a PeftModel where `adapter` isn't None."""

    model: PreTrainedModel | PeftModel
    tokenizer: "PreTrainedTokenizerBase"
    adapter: Adapter | None
    tokenizer_folder: Path | None = None
    """Where the tokenizer lies: with an adapter that has its own, else with the model."""
    kept_on: str | None = None
    """A tensor of the base that the adapter replaces for good, so that switching it off doesn't give the base."""
    engine: Engine = "standard"
    """What its loss is to be computed with: its base is kept as that needs it."""

    @cached_property
    def codec(self) -> Codec:
        """The tokenizer as it makes blocks. Raises InputRefused where it has no `tokenizers` backend."""
        return Codec(spec_of(self.tokenizer))

    @property
    def whole(self) -> Any:
        """The model without PEFT around it: its adapter, where it has one, is inside its layers all the same."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type of `--dtype`; auto is bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_config(folder: Path) -> Any:
    """A model's config as transformers knows it. Raises InputRefused."""
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise InputRefused(
            f"{folder}: found no config.json of a model that transformers knows ({first_line(error)}), need one",
            "choose a model of the Llama family; code that comes with a model is never run",
        ) from None


def dtype_name(dtype: torch.dtype) -> Literal["bf16", "fp16", "fp32"]:
    """What `--dtype` calls a number type."""
    return "fp32" if dtype is torch.float32 else "bf16" if dtype is torch.bfloat16 else "fp16"


def shape_for(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape of any dense causal language model: of a known family from its config, of another by transformers.

    Raises InputRefused.
    """
    return shape_of(name, config) if config.get("model_type") in FAMILIES else meta_shape(name, config)


def meta_shape(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape of any causal language model that transformers itself lays out, on the meta device: no weights.

    Raises InputRefused: a model that transformers doesn't know, a mixture of experts, no decoder layers or no head.
    """
    refuse_uncounted(name, config)
    family = str(config.get("model_type"))
    fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        with quiet_libraries(), torch.device("meta"):
            known = AutoConfig.for_model(family, **fields)
            model = AutoModelForCausalLM.from_config(known, trust_remote_code=False)
        text = model.config.get_text_config()
        refuse_uncounted(name, {**text.to_dict(), "model_type": family})  # with what the config leaves to its class
        lists = {key: found for key, found in model.named_modules() if isinstance(found, torch.nn.ModuleList)}
        layers = next(key for key, found in lists.items() if 0 < len(found) == text.num_hidden_layers)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        heads = int(text.num_attention_heads)
        return Shape(
            name=name,
            model_type=family,
            hidden_size=int(text.hidden_size),
            intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
            num_layers=len(model.get_submodule(layers)),
            num_heads=heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocab_size=int(embedding.weight.shape[0]),
            tied=head.weight is embedding.weight,
            head=next(key for key, module in model.named_modules() if module is head),
            modules=tuple(_meta_modules(model, layers)),
            known=False,
        )
    except _CANT_BE_LAID_OUT as error:
        raise InputRefused(
            f"{name}: found the model type {family!r}, which transformers can't lay out ({first_line(error)}); "
            "need a decoder-only language model",
            "choose a model of the Llama family; code that comes with a model is never run",
        ) from None


def _meta_modules(model: PreTrainedModel, layers: str) -> Iterator[Module]:
    """Every module that holds parameters or buffers of its own, in order."""
    for name, module in model.named_modules():
        inside = re.match(rf"{re.escape(layers)}\.(\d+)\.", name)
        layer = int(inside[1]) if inside else None
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.pop("weight", None), own.pop("bias", None) is not None
        if isinstance(module, torch.nn.Embedding):
            yield Module(name, "embedding", module.num_embeddings, module.embedding_dim, layer=layer)
        elif isinstance(module, torch.nn.Linear):
            yield Module(name, "linear", module.out_features, module.in_features, bias, layer)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, its weight the other way round
            yield Module(name, "linear", module.weight.shape[1], module.weight.shape[0], bias, layer)
        elif weight is not None or own:
            elements = sum(found.numel() for found in (weight, *own.values()) if found is not None)
            yield Module(name, "norm", elements, bias=bias, layer=layer)
        elif next(module.buffers(recurse=False), None) is not None:
            elements = sum(found.numel() for found in module.buffers(recurse=False))
            yield Module(name, "buffer", elements, layer=layer)


def load_base(
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str = "none",
    device_map: Mapping[str, int | str] | None = None,
    computed_on: Mapping[str, int | str] | None = None,
    *,
    double_quantization: bool = True,
    int8_threshold: float = 6.0,
    fast: bool = False,
    sharded: bool = False,
    calibration: Calibration | None = None,
    ready: Callable[[PreTrainedModel], None] = lambda model: None,
    cache: QuantizedCache | None = None,
    report: Report = lambda event: None,
) -> PreTrainedModel:
    """The base model, frozen and in evaluation mode, its linear layers quantized while they are loaded; on `device`, or
    where `device_map` says. Layers that `computed_on` names lie in CPU memory and are computed there. `fast`: for the
    fast engine, which multiplies by 8-bit integers as they are. `sharded`: for FSDP. `calibration`: rounded by what
    goes through it, all on `device`. `ready` is called with the model as it was read, before anything goes through it.
    `cache`: quantized layers are found there, or kept there. `report` hears what can't be quantized.

    Raises InputRefused where transformers can't build it whole, NonFinite.
    """
    if quantize == "none" and not computed_on:
        model = _from_pretrained(weights, dtype, dict(device_map) if device_map else None)
        ready(model)
        model = model if device_map else model.to(device)
    else:
        # As the files have it, which is read when it is placed: another number type would be a copy of the whole model.
        model = _from_pretrained(weights, "auto", None)
        ready(model)
        by_rows = Quantizing.is_by_rows(quantize, fast=fast)
        how = Quantizing(quantize, dtype, double_quantization, int8_threshold, by_rows, sharded)
        kept = cache.find(model, how, device, calibration) if cache is not None else None
        if calibration is not None and kept is None:
            calibrate(model, decoder_layers(model), how, device, calibration)
        else:
            places = {**(device_map or {}), **(computed_on or {})} or {"": str(device)}
            _place(model, how, places, computed_on or (), quantize_layers if kept is None else kept.put_into)
        if cache is not None and kept is None:
            cache.keep(model, how, device, calibration)
        if quantize != "none" and (left := unquantized(model)) is not None:
            report(Notice(left))
        model.config.dtype = dtype
        say_how(model, how)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _from_pretrained(
    weights: Weights, dtype: torch.dtype | Literal["auto"], places: dict[str, int | str] | None
) -> PreTrainedModel:
    try:
        with quiet_libraries():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                weights.folder,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                device_map=places,
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, StrictDataclassError) as error:
        if is_out_of_memory(error):
            raise
        raise InputRefused(
            f"{weights.folder}: found a model that transformers can't load ({first_line(error)}), "
            "need an architecture that it knows itself",
            "choose a model of the Llama family; code that comes with a model is never run",
        ) from None
    lacking = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if lacking:
        raise InputRefused(
            f"{weights.folder}: found weights without {lacking[0]} ({len(lacking)} such), need every tensor",
            "download the model again",
        )
    return model


def _place(
    model: PreTrainedModel,
    how: Quantizing,
    devices: Mapping[str, int | str],
    in_cpu_memory: Collection[str],
    quantize: Callable[[PreTrainedModel, str, Quantizing, torch.device], None],
) -> None:
    """Put each module of a model that was loaded on the CPU on the device that computes it, one matrix after the other,
    quantized there; then what belongs into CPU memory back there."""
    for name, device in ((name, torch.device(device)) for name, device in devices.items()):
        quantize(model, name, how, device)
        module = model.get_submodule(name)
        move(module, device, how.dtype)
        if name in in_cpu_memory:
            offload(module, device)
    if len(set(devices.values())) > 1:  # what crosses over is moved as from_pretrained has it moved: by accelerate
        first, skipped = next(iter(devices.values())), model._skip_keys_device_placement
        add_hook_to_module(model, AlignDevicesHook(first, io_same_device=True, skip_keys=skipped))
        for name, place in devices.items():
            add_hook_to_module(model.get_submodule(name), AlignDevicesHook(place, skip_keys=skipped))


def random_base(
    config: Mapping[str, Any], kind: str, dtype: torch.dtype, device: torch.device, *, fast: bool = False
) -> PreTrainedModel:
    """A model of this config with random weights, as `load_base` gives one: frozen, and quantized."""
    fields = {key: value for key, value in config.items() if key not in ("ids", "model_type", "auto_map")}
    with quiet_libraries(), torch.device(device):
        known = AutoConfig.for_model(str(config["model_type"]), **fields)
        model = AutoModelForCausalLM.from_config(known, dtype=dtype, trust_remote_code=False)
    how = Quantizing(kind, dtype, by_rows=Quantizing.is_by_rows(kind, fast=fast))
    quantize_layers(model, "", how, device)
    say_how(model, how)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def add_lora(
    base: PreTrainedModel,
    lora: LoraSection,
    seed: int,
    base_name: str,
    kind: LoraKindSection | None = None,
    new_tokens: Sequence[int] = (),
) -> PeftModel:
    """The base with new LoRA matrices in fp32, A drawn from (seed, tensor name) and B zero, so that any engine and any
    number of processes starts from the same adapter. `new_tokens` are the ids of tokens whose embeddings are trained.

    Raises InputRefused where a target or a module to save matches nothing, listing what there is.
    """
    kind = kind or LoraKindSection()
    targets, saved, targeted = _targets(base, lora), set(kind.modules_to_save), _targeted(base, lora)
    _refuse_unsavable(base, kind.modules_to_save, targeted)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    named = {name: module for name, module in base.named_modules() if module in (embedding, head)}
    whole = saved & {name.rpartition(".")[2] for name in named}
    tied = bool(base.config.tie_word_embeddings)
    # of what isn't trained whole, nor has LoRA for all its rows; where they are tied, the embedding stands for both
    ends = [name for name, module in named.items() if not tied or (module is embedding and not whole)]
    learned = sorted({name.rpartition(".")[2] for name in ends if name not in targeted} - saved)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.lora_alpha) if lora.lora_alpha.is_integer() else lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        **targets,
        use_rslora=kind.use_rslora,
        use_dora=kind.use_dora,
        modules_to_save=sorted(saved) or None,
        trainable_token_indices={name: list(new_tokens) for name in learned} if learned and new_tokens else None,
        ensure_weight_tying=tied and bool(whole),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=False,
    )
    with quiet_libraries():
        model = _with_lora(base, config)
    lora_to_devices(model)
    model.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in trained_parameters(model).items():
        if ".lora_A." in name:
            seed_bytes = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(seed_bytes, "little", signed=True))
            # He et al. 2015 with a = √5, as peft does: uniform in ±1/√in
            bound = 1 / math.sqrt(parameter.shape[1])
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(drawn)
    return _learn_in_fp32(model)


def _with_lora(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """By PEFT. Raises InputRefused where it takes names for those that experts had before transformers made stacks of
    their matrices, and would put LoRA on these."""
    try:
        model = get_peft_model(base, config)
        found = model.peft_config["default"].target_parameters
    except ValueError as error:
        if not stacks(base) or "Cannot convert PEFT target" not in str(error):
            raise
        found = config.target_modules
    if found:
        raise InputRefused(
            f"target_modules: found names that PEFT takes for experts ({', '.join(sorted(found))}), need linear layers "
            "alone: LoRA on stacks of matrices can't be merged",
            "--target-modules q_proj,k_proj,v_proj,o_proj",
        )
    assert isinstance(model, PeftModel)
    return model


def continue_lora(base: PreTrainedModel, adapter: Adapter, base_name: str) -> PeftModel:
    """The base with the matrices of an adapter from disk, in fp32, to be trained further."""
    with quiet_libraries():
        model = PeftModel.from_pretrained(base, str(adapter.folder), is_trainable=True, local_files_only=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    return _learn_in_fp32(model)


def _learn_in_fp32(model: PeftModel) -> PeftModel:
    """All that is trained in fp32, for 16 bits lose what one step adds; a whole embedding still gives the base's own
    number type, or everything after it would be computed in fp32."""
    embedding = model.get_input_embeddings()
    dtype = model.get_base_model().dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if dtype is not torch.float32 and any(parameter.requires_grad for parameter in embedding.parameters()):
        embedding.register_forward_hook(lambda _module, _inputs, hidden: hidden.to(dtype))
    return model


def _refuse_unsavable(base: PreTrainedModel, names: Sequence[str], targeted: Collection[str]) -> None:
    """Raises InputRefused where a module can't be trained whole beside LoRA on the modules that are `targeted`."""
    layers = decoder_layers(base)
    modules: dict[str, list[torch.nn.Module]] = {}
    for inner, module in base.named_modules():
        modules.setdefault(inner.rpartition(".")[2], []).append(module)

    def lacks(name: str) -> str | None:
        inside = [part for module in modules.get(name, ()) for part in module.modules()]
        if not inside:
            return "which is no module"
        if layers in inside:
            return "which holds the layers that LoRA is for"
        if not any(True for part in inside for _ in part.parameters()):
            return "which has no parameters to train"
        return None

    for name in names:
        if (reason := lacks(name)) is not None:
            usable = ", ".join(part for part in sorted(modules) if not (part.isdigit() or lacks(part)))
            raise InputRefused(
                f"modules_to_save: found {name!r}, {reason}; need some of {usable}", "correct --modules-to-save"
            )
        if any(not parameter.is_floating_point() for module in modules[name] for parameter in module.parameters()):
            raise InputRefused(
                f"modules_to_save: found {name!r}, which is quantized and can't be trained whole; need one that isn't",
                "embed_tokens, lm_head and norms aren't quantized; or --quantize none",
            )
    if targeted and all(set(names) & set(name.split(".")) for name in targeted):
        raise InputRefused(
            f"modules_to_save: found {', '.join(names)}, which hold all that LoRA would be on; need some left for it",
            "leave one out of --modules-to-save, or name more in --target-modules",
        )


def grow(base: PreTrainedModel, rows: int) -> None:
    """Room for new tokens: embeddings and head get rows up to `rows`, each the mean of those that were there."""
    old = base.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    means = [
        module.weight[:old].float().mean(0) for module in (base.get_input_embeddings(), base.get_output_embeddings())
    ]
    with quiet_libraries():
        base.resize_token_embeddings(rows, mean_resizing=False)
    for module, mean in zip((base.get_input_embeddings(), base.get_output_embeddings()), means, strict=True):
        module.weight.data[old:] = mean.to(module.weight.dtype)
    base.requires_grad_(False)


def make_ready(model: PeftModel, dtype: torch.dtype, *, checkpointing: bool) -> None:
    """What a model with LoRA needs before it is trained in a number type."""
    if checkpointing:
        checkpoint_activations(model)
    if dtype is not torch.float32:
        leave_casts_to_autocast(model)
    model.train()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What a training step computes under: nothing in fp32, else torch's autocast."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def checkpoint_activations(model: PeftModel) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass (Chen et al. 2016).

    By the reentrant kind where bitsandbytes keeps as an attribute what the other kind, made of hooks on saved tensors,
    can't drop, so that nothing would be freed: MatMul8bitLt keeps each input so, and MatMul4Bit the weight, of which
    offloaded layers make copies.
    """
    base = model.get_base_model()
    in_8bit, in_4bit = (getattr(base, f"is_loaded_in_{bits}bit", False) for bits in (8, 4))
    reentrant = bool(in_8bit or (in_4bit and offloaded(base)))
    with quiet_libraries():  # the newest transformers warns that it will rename this, the oldest knows no other name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()


def compile_layers(model: PeftModel) -> None:
    """Have torch compile each decoder layer: all are alike, so that one compilation serves them all."""
    prepare_compiling()
    for layer in decoder_layers(model):
        layer.compile()


def prepare_compiling() -> None:
    """With and without gradients, for evaluations, for rows of one document and of many: all decoder layers share the
    eight compilations that torch allows a function, and after those it computes without a word as it is written.

    On the disk torch keeps compilations by what calls the fast engine's operators, not by how these are written: those
    of another lorakit would give its gradients, or fail.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILATIONS)
    sources = sorted(Path(__file__).with_name("fast").glob("*.py"))
    tag = f"lorakit {artifacts.fingerprint([source.read_text(encoding='utf-8') for source in sources])}"
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += tag


def decoder_layers(model: PreTrainedModel | PeftModel) -> ModuleList:
    """The decoder layers of a model."""
    whole: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    count = whole.config.get_text_config().num_hidden_layers
    lists = (found for found in whole.modules() if isinstance(found, ModuleList))
    return next(found for found in lists if 0 < len(found) == count)


def leave_casts_to_autocast(model: PeftModel) -> None:
    """Keep PEFT from casting what LoRA reads to the adapter's fp32, which autocast then casts back: a copy of every
    linear layer's input that lives until the backward pass."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def trained_parameters(model: PeftModel, names: Mapping[str, str] | None = None) -> dict[str, torch.nn.Parameter]:
    """The trained parameters, each once, by the name that they have in PEFT's files; `names` are those of
    `trained_names`, where the model has been cut into shards since."""
    parameters = dict(model.named_parameters())
    names = trained_names(model) if names is None else names
    once: dict[str, str] = {}
    for name, inner in names.items():
        once.setdefault(inner, name)
    return {name: parameters[inner] for inner, name in once.items()}


def trained_names(model: PeftModel) -> dict[str, str]:
    """The names of the trained parameters: in PEFT's files → in the model. Of a head that is tied to the embedding both
    names are in the files."""
    inner = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with quiet_libraries():
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: inner[tensor.data_ptr()] for name, tensor in saved.items() if tensor.data_ptr() in inner}


def longer_embeddings(model: PeftModel) -> dict[str, Tensor]:
    """The embedding and head of a model that has got new rows, by their names in PEFT's files, which hold them then."""
    trained = trained_names(model)
    with quiet_libraries():
        saved = get_peft_model_state_dict(model, save_embedding_layers=True)
    return {name: tensor.detach().cpu().clone() for name, tensor in saved.items() if name not in trained}


def _targets(base: PreTrainedModel, lora: LoraSection) -> dict[str, Any]:
    """What PEFT is told of --target-modules and --layers-to-transform."""
    head = base.get_output_embeddings()
    linears = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    inner = [name for name, module in linears.items() if module is not head]
    layers, names = lora.layers_to_transform, lora.target_modules
    if layers and max(layers) >= base.config.num_hidden_layers:
        raise InputRefused(
            f"layers_to_transform: found {max(layers)}, need layers 0 to {base.config.num_hidden_layers - 1}",
            "correct --layers-to-transform",
        )
    there = [name for name in linears if not layers or _layer_of(name) in layers]
    of_layers: dict[str, Any] = {"layers_to_transform": list(layers)} if layers else {}
    if names == ("all-linear",):
        leaves = sorted({name.rpartition(".")[2] for name in inner})
        # of experts PEFT's all-linear means bare parameters too, which no other command could use
        return {"target_modules": leaves if layers or stacks(base) else "all-linear", **of_layers}
    for target in names:
        matched = [name for name in there if is_called(name, target)]
        if not matched:
            there_are = sorted({name.rsplit(".", 1)[-1] for name in inner if name in there})
            raise InputRefused(
                f"target_modules: found {target!r}, which matches no linear layer; need some of {', '.join(there_are)}",
                "correct --target-modules, or leave it out: all-linear",
            )
        if any(linears[name] is head for name in matched) and base.config.tie_word_embeddings:
            raise InputRefused(
                f"target_modules: found {target!r}, whose weight is the embedding's too; need layers of their own",
                "leave it out of --target-modules",
            )
    if is_pattern(names[0]):  # PEFT takes a pattern or layers: of both the names that they mean
        if not layers:
            return {"target_modules": names[0]}
        return {"target_modules": [name for name in there if is_called(name, names[0])]}
    return {"target_modules": sorted(names), **of_layers}


def _targeted(base: PreTrainedModel, lora: LoraSection) -> list[str]:
    """The linear layers that --target-modules and --layers-to-transform mean."""
    head, layers = base.get_output_embeddings(), lora.layers_to_transform
    linears = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    there = [name for name in linears if not layers or _layer_of(name) in layers]
    if lora.target_modules == ("all-linear",):
        return [name for name in there if linears[name] is not head]
    return [name for name in there if any(is_called(name, target) for target in lora.target_modules)]


def _layer_of(name: str) -> int | None:
    numbers = re.findall(r"\.(\d+)\.", name)
    return int(numbers[0]) if numbers else None


def open_model(
    name: str,
    base_name: str | None,
    dtype: str,
    report: Report,
    quantize: str = "none",
    engine: AskedEngine = "standard",
) -> Opened:
    """An adapter on its base, or a base or merged model, ready for evaluation, with its tokenizer; the base's linear
    layers quantized where that is asked for, as the engine needs them.

    Raises InputRefused, Mismatch (an adapter for another base), ArtifactDamaged, HubFailed, EnvironmentUnusable where
    the engine asked for can't be had.
    """
    device = pick_device()
    number_type, folder = pick_dtype(dtype, device), model_folder(name)
    if (folder / "config.json").is_file():
        if base_name is not None:
            raise InputRefused(
                f"{name}: found a whole model, need an adapter where --base is given", "leave out --base"
            )
        weights = open_weights(folder)
        chosen = _engine(engine, weights, None, number_type, device, quantize, report)
        base = load_base(weights, number_type, device, quantize, fast=chosen == "fast", report=report)
        return Opened(base, load_tokenizer(folder), None, folder, engine=chosen)
    adapter = open_adapter(folder, report)
    weights = open_weights(base_folder(adapter, base_name))
    changes = match(adapter, weights)
    if adapter.config.get("use_dora"):
        require_readable(quantize, f"the DoRA adapter {folder}")
    if adapter.is_calibrated and quantize != "none":
        report(Notice(f"the base in {quantize} is rounded to the nearest; the adapter learned over a calibrated one"))
    chosen = _engine(engine, weights, adapter, number_type, device, quantize, report)
    base = load_base(weights, number_type, device, quantize, fast=chosen == "fast", report=report)
    replaced = _replaced(base, adapter, changes)
    model = wrap(base, adapter)
    modules = {name: model.get_base_model().get_submodule(name.rpartition(".")[0]) for name in replaced}
    kept_on = next((name for name, module in modules.items() if not isinstance(module, ModulesToSaveWrapper)), None)
    tokenizer_folder = folder if (folder / "tokenizer.json").is_file() else weights.folder
    return Opened(model, load_tokenizer(tokenizer_folder), adapter, tokenizer_folder, kept_on, chosen)


def _engine(
    asked: AskedEngine,
    weights: Weights,
    adapter: Adapter | None,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str,
    report: Report,
) -> Engine:
    """What computes a model that isn't trained: nothing is dropped there. Raises EnvironmentUnusable."""
    base = {**weights.config, "attention_dropout": 0}
    lora = {**(adapter.config if adapter is not None else {}), "lora_dropout": 0}

    def lacks() -> str | None:
        return engines.lacking(base, dtype_name(dtype), lora) or engines.lacking_on(device, quantize)

    return engines.choose(asked, engines.ON_REQUEST if asked == "fast" else {}, lacks, device, report)


def _replaced(base: PreTrainedModel, adapter: Adapter, changes: Sequence[Change]) -> list[str]:
    """The base's tensors that an adapter brings with other numbers: many bring an embedding that nothing has changed,
    or that has only got new rows."""
    found = []
    with safe_open(adapter.folder / WEIGHTS, "pt") as tensors:
        for change in (change for change in changes if isinstance(change, Replacement)):
            there = base.get_parameter(change.target)
            brought = tensors.get_tensor(change.name).to(there)
            rows = min(len(there), len(brought))
            if not torch.equal(there[:rows], brought[:rows]):
                found.append(change.target)
    return found


def wrap(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The base with an adapter from disk, by peft itself; as long as the adapter's vocabulary, if that is another."""
    with quiet_libraries():
        if adapter.vocabulary not in (None, base.get_input_embeddings().weight.shape[0]):
            base.resize_token_embeddings(adapter.vocabulary, mean_resizing=False)
        model = PeftModel.from_pretrained(base, str(adapter.folder), local_files_only=True)
    return model.eval()


def require_readable(quantize: str, dora: str) -> None:
    """Raises InputRefused where PEFT can't compute DoRA over a base of this kind."""
    if quantize in IN_8_BITS:
        raise InputRefused(
            f"--quantize {quantize}: found {dora}, need a base whose numbers PEFT can read: DoRA's lengths are theirs",
            "--quantize nf4, or leave it out",
        )


def require_vocabulary(model: Any, largest_id: int, place: Path) -> None:
    """Raises InputRefused where blocks hold token ids that the model doesn't know."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest_id >= vocabulary:
        raise InputRefused(
            f"{place}: found the token id {largest_id}, need ids below the model's {vocabulary}",
            "prepare the blocks with this model's tokenizer",
        )


def require_positions(model: Any, blocks: Blocks, report: Report) -> None:
    """Says where documents are longer than the model was made for. Raises InputRefused where it has no such positions:
    angles (RoPE) go on, a table of positions ends."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not most or blocks.size <= most:
        return
    rotary = any(name.startswith("rope") for name in config.to_dict())
    tokens = blocks.largest_position(trained=rotary) + 1
    if tokens > most and rotary:
        report(Notice(f"documents of up to {tokens:,} tokens: more than the {most:,} that the model was made for"))
    elif tokens > most:
        raise InputRefused(
            f"{blocks.path}: found {tokens} tokens in a row, need at most {most}: the model knows no more positions",
            f"`lorakit prepare … --block-size {most}`",
        )


def require_device(dtype: torch.dtype, device: torch.device, report: Report) -> None:
    """Says what a dtype means on this device. Raises EnvironmentUnusable where it can't be trained in."""
    if (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise EnvironmentUnusable(
            f"--dtype bf16: found {torch.cuda.get_device_name()}, need a GPU that computes in bf16", "use --dtype fp16"
        )
    if device.type == "cpu" and dtype is not torch.float32:
        report(Notice("16-bit on a CPU is slower than fp32; it is for trying things out"))
