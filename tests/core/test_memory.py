"""Planned bytes against what really is there: autograd's saved tensors, live tensors of whole steps, real weights."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lorakit.core.attention.implementations import register
from lorakit.core.blocks import Batch
from lorakit.core.config import LoraSection, Optimizer, TrainConfig
from lorakit.core.evaluation import loss_sum
from lorakit.core.memory import Part, StepMemory, Workload, is_quantized, optimizer_bytes, weight_bytes
from lorakit.core.model import add_lora, checkpoint_activations, leave_casts_to_autocast, load_base, trained_parameters
from lorakit.core.shapes import Module, Shape, config_of, shape_of
from lorakit.core.training.optimizers import make_optimizer
from lorakit.core.weights import open_weights
from tests.conftest import make_tokenizer
from tests.live import LiveBytes, allocated_peak, saved_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Flash(torch.autograd.Function):
    """Keeps and makes the tensors that torch's variable-length flash attention does, without their numbers."""

    @staticmethod
    def forward(ctx: Any, *qkv_BHTD: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in qkv_BHTD)
        output = torch.zeros_like(query)
        logsumexp = torch.zeros(query.shape[1], query.shape[0])
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.shapes = [x.shape for x in qkv_BHTD]
        return output

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gradients = [torch.zeros_like(x) for x in ctx.saved_tensors[:3]]
        return tuple(
            x.view(size[0], size[2], size[1], size[3]).transpose(1, 2)
            for x, size in zip(gradients, ctx.shapes, strict=True)
        )


@pytest.fixture(autouse=True, scope="module")
def _varlen() -> None:
    from transformers import AttentionInterface

    def attend(_: Any, query: Any, key: Any, value: Any, __: Any, **___: Any) -> Any:
        return Flash.apply(query, key, value).view(*query.transpose(1, 2).shape), None

    AttentionInterface.register("keeps_like_varlen", attend)
    register()


@pytest.fixture
def build(tmp_path: Path) -> Any:
    """A tiny model with LoRA as train makes it, its shape and its workload."""

    def built(
        *, model_type: str = "llama", targets: tuple[str, ...] = ("all-linear",), rank: int = 8, **given: Any
    ) -> tuple[Any, Shape, Workload]:
        from transformers import AutoConfig, AutoModelForCausalLM

        work = {name: given.pop(name) for name in list(given) if name in Workload.__dataclass_fields__}
        work = {"dtype": "bf16", "quantize": "none", "block_size": 64, "batch_size": 2, "lora_dropout": 0.0, **work}
        work = {"gradient_checkpointing": True, "accumulates": False, "loss_tokens": 32, **work}
        count = given.pop("offloaded", 0)
        workload = Workload(rank=rank, target_modules=targets, **work)
        torch.manual_seed(0)
        folder = tmp_path / "model"
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **given})).save_pretrained(folder)
        make_tokenizer(folder)
        shape = shape_of("tiny", json.loads((folder / "config.json").read_bytes()))
        names = [module.name if module.layer is None else f"model.layers.{module.layer}" for module in shape.modules]
        places = dict.fromkeys(names, "cpu"), {f"model.layers.{number}": "cpu" for number in range(count)}
        how = {"double_quantization": workload.double_quantization}
        dtype = DTYPES[workload.dtype]
        base = load_base(open_weights(folder), dtype, torch.device("cpu"), workload.quantize, *places, **how)
        implementations = {"varlen": "keeps_like_varlen", "documents": "varlen"}
        base.set_attn_implementation(implementations.get(workload.attention, workload.attention))
        lora = LoraSection(rank=rank, target_modules=targets, layers_to_transform=workload.layers_to_transform)
        model = add_lora(base, lora, 0, "tiny")
        if workload.gradient_checkpointing:
            checkpoint_activations(model)
        if workload.dtype != "fp32":
            leave_casts_to_autocast(model)
        return model.train(), shape, workload

    return built


def autocast(work: Workload) -> Any:
    return nullcontext() if work.dtype == "fp32" else torch.autocast("cpu", DTYPES[work.dtype])


def whole(shape: Shape) -> Part:
    return Part(0, shape.num_layers, embedding=True, norm=True, head=True)


@pytest.mark.parametrize("attention", ["varlen", "documents", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 16, "intermediate_size": 100},
        {"num_key_value_heads": 4, "batch_size": 1},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 48},
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("o_proj", "up_proj", "down_proj")},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16},
        {"quantize": "nf4"},
        {"quantize": "int8"},
    ],
    ids=str,
)
def test_a_layer_keeps_what_autograd_keeps(given: dict[str, Any], dtype: str, attention: str, build: Any) -> None:
    """To the byte, counted by hooks on saved tensors (and on what bitsandbytes keeps beside them, which is the same
    storage here), for the second layer; every layer is alike."""
    model, shape, work = build(dtype=dtype, attention=attention, gradient_checkpointing=False, **given)
    base = model.get_base_model().model
    hidden = torch.randn(work.batch_size, work.block_size, shape.hidden_size, dtype=DTYPES[dtype], requires_grad=True)
    positions = torch.arange(work.block_size)[None].expand(work.batch_size, -1)
    rotary = base.rotary_emb(hidden, positions)
    how: dict[str, Any] = {"attention_mask": None, "position_embeddings": rotary}
    if attention in ("sdpa", "eager"):
        size = (work.batch_size, 1, work.block_size, work.block_size)
        how["attention_mask"] = torch.ones(size, dtype=torch.bool if attention == "sdpa" else DTYPES[dtype]).tril()
    elif attention == "documents":
        how["cu_seq_lens_q"] = torch.arange(0, work.tokens + 1, 32, dtype=torch.int32)
        how["max_length_q"] = 32

    def run() -> torch.Tensor:
        with autocast(work):
            return base.layers[1](hidden, **how)  # type: ignore[no-any-return]

    run()
    ignored = [*model.parameters(), *model.buffers(), *rotary]
    if work.quantize == "nf4":
        ignored += [module.weight.quant_state.absmax for module in base.modules() if hasattr(module, "quant_state")]
    assert saved_bytes(run, ignored) == StepMemory(shape, work).layers[1].kept


STEPS = [
    {},
    {"gradient_checkpointing": False},
    {"intermediate_size": 400, "num_key_value_heads": 4},
    {"num_hidden_layers": 6, "batch_size": 1, "block_size": 128},
    {"vocab_size": 8000, "loss_tokens": 16},
    {"vocab_size": 8000, "loss_tokens": 4096},
    {"vocab_size": 8000, "loss_tokens": 4096, "gradient_checkpointing": False},
    {"hidden_size": 128, "rank": 32},
    {"targets": ("q_proj", "v_proj"), "gradient_checkpointing": False},
    {"quantize": "nf4"},
    {"quantize": "fp4", "gradient_checkpointing": False},
    {"quantize": "int8"},
    {"quantize": "int8", "gradient_checkpointing": False},
    {"attention": "documents"},
    {"attention": "documents", "gradient_checkpointing": False, "num_key_value_heads": 4},
    {"attention": "sdpa"},
    {"attention": "eager", "gradient_checkpointing": False, "block_size": 16},
    {"attention": "sdpa", "gradient_checkpointing": False, "quantize": "nf4"},
    {"accumulates": True},
    {"num_hidden_layers": 8, "rank": 64, "block_size": 16},
    {"layers_to_transform": (0, 2)},
    {"layers_to_transform": (0,), "gradient_checkpointing": False},
    {"layers_to_transform": (3, 4), "gradient_checkpointing": False, "num_hidden_layers": 5},
    {"layers_to_transform": (1, 2), "rank": 32, "targets": ("q_proj", "down_proj")},
    {"optimizer": "lion"},
    {"optimizer": "sgd", "quantize": "nf4", "double_quantization": False},
    {"optimizer": "adamw_8bit", "rank": 64, "block_size": 256},
    {"optimizer": "lion_8bit", "rank": 64, "block_size": 256, "gradient_checkpointing": False},
]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("given", STEPS, ids=str)
def test_a_whole_step_takes_what_is_planned(given: dict[str, Any], dtype: str, build: Any) -> None:
    """Every tensor that lives at the fullest moment of a real step, counted from outside: within 0.1 %, and within 1 %
    where one gradient is added to another or the norms' backward pass is the fullest."""
    shape, work, step, optimizer = stepping(build(dtype=dtype, **given))
    optimizer.zero_grad(set_to_none=not work.accumulates)
    with LiveBytes() as counted:
        step()
    planned = StepMemory(shape, work).peak(whole(shape))
    there = planned.gradients if work.accumulates else 0  # when counting began
    there += 8 * work.tokens if work.gradient_checkpointing else 0  # positions, which no operation makes
    tolerance = 1e-2 if work.accumulates or shape.num_layers == 8 else 1e-3
    assert planned.gradients + planned.activations + planned.loss - there == pytest.approx(counted.peak, rel=tolerance)
    parameters = optimizer.param_groups[0]["params"]
    assert planned.lora == sum(parameter.nbytes for parameter in parameters)
    assert planned.optimizer == state_bytes(optimizer)


OFFLOADED: list[dict[str, Any]] = [
    {"offloaded": 1},
    {"offloaded": 3},
    {"offloaded": 2, "intermediate_size": 400, "num_key_value_heads": 4},
    {"offloaded": 2, "num_hidden_layers": 6, "batch_size": 1, "block_size": 512},
    {"offloaded": 3, "block_size": 16, "batch_size": 1},
    {"offloaded": 3, "targets": ("q_proj", "v_proj")},
    {"offloaded": 2, "model_type": "qwen2", "accumulates": True},
]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("given", OFFLOADED, ids=str)
def test_a_step_with_offloaded_layers_takes_what_is_planned(
    given: dict[str, Any], quantize: str, dtype: str, build: Any
) -> None:
    """The copies of a layer's weights too, which the CPU makes of its own memory here: within 0.4 %, of which most is
    the rounding of tiny tensors, which the CPU doesn't do."""
    shape, work, step, optimizer = stepping(build(dtype=dtype, quantize=quantize, attention="documents", **given))
    optimizer.zero_grad(set_to_none=not work.accumulates)
    with LiveBytes() as counted:
        step()
    memory, part = StepMemory(shape, work, offloads=True), whole(shape)._replace(offloaded=given["offloaded"])
    planned, all_weights = memory.peak(part), memory.peak(whole(shape)).weights
    copies = planned.weights - (all_weights - memory.moved_bytes(part))
    there = 8 * work.tokens + (planned.gradients if work.accumulates else 0)  # when counting began
    taken = planned.gradients + planned.activations + planned.loss + copies - there
    assert taken == pytest.approx(counted.peak, rel=4e-3)
    assert 0 <= copies <= memory.layers[0].moved


@pytest.mark.parametrize("quantize", ["none", "nf4", "fp4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_what_is_moved_into_cpu_memory_is_what_is_planned(model_type: str, quantize: str, build: Any) -> None:
    """Against the tensors of the offloaded layers; the scales of 4-bit weights aren't among them."""
    model, shape, work = build(quantize=quantize, offloaded=2, model_type=model_type)
    layers = model.get_base_model().model.layers[:2]
    moved = [weight for layer in layers for weight in layer.parameters() if not weight.requires_grad]
    assert len({weight.untyped_storage().data_ptr() for weight in moved}) == 2
    part = whole(shape)._replace(offloaded=2)
    taken = sum(-(-weight.nbytes // 512) * 512 for weight in moved)
    assert StepMemory(shape, work, offloads=True).moved_bytes(part) == taken


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_the_allocator_says_so_too(quantize: str, gradient_checkpointing: bool, build: Any) -> None:
    """torch's own allocator, as its profiler saw it, in a step that nobody watches: within 1 %. The blocks are long
    enough to hide the fp32 copy of a matrix that torch makes inside an operation of int8 on the CPU only."""
    given = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "block_size": 256}
    built = build(quantize=quantize, gradient_checkpointing=gradient_checkpointing, attention="sdpa", **given)
    shape, work, step, optimizer = stepping(built)
    optimizer.zero_grad()
    planned = StepMemory(shape, work).peak(whole(shape))
    assert planned.gradients + planned.activations + planned.loss == pytest.approx(allocated_peak(step), rel=1e-2)


def test_a_head_that_learns_has_its_logits_planned_as_before() -> None:
    """The fast engine's loss makes its own gradient only over a frozen head."""
    shape = shape_of("llama-2-7b", config_of("llama-2-7b"))
    usual = ("bf16", "fp8", 16, ("q_proj",), 0.0, 512, 1, False, True)
    frozen = Workload(*usual, engine="fast", loss_tokens=512, attention="varlen")  # type: ignore[arg-type]
    learning = replace(frozen, target_modules=("q_proj", "lm_head"))
    planned = [max(loss for _, _, loss in StepMemory(shape, work)._loss(whole(shape))) for work in (frozen, learning)]
    logits = 511 * shape.vocab_size
    assert planned[0] == 511 * (2 * 2 * shape.hidden_size + 8) + 16 * 512 + 2 * logits
    assert planned[1] == 511 * (2 * shape.hidden_size + 8) + 12 * logits


def stepping(built: tuple[Any, Shape, Workload]) -> tuple[Shape, Workload, Callable[[], None], torch.optim.Optimizer]:
    """A training step on a batch of random blocks, run once already, so that the optimizer has its moments."""
    model, shape, work = built
    ids = np.random.default_rng(0).integers(0, 320, (work.batch_size, work.block_size))
    positions = np.tile(np.arange(work.block_size), (work.batch_size, 1))
    if work.attention != "varlen":
        positions[:, work.block_size // 2 :] -= work.block_size // 2  # two documents, so that there is a mask
    batch = Batch(ids, positions, positions > -1)
    batch.trained_BT[:, 0] = False
    optimizer = optimizer_of(work.optimizer, trained_parameters(model))

    def step() -> None:
        with autocast(work):
            loss = loss_sum(model, batch, work.loss_tokens)
        loss.backward()
        optimizer.step()

    step()
    return shape, work, step, optimizer


def optimizer_of(kind: str, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """train's own, but fused as on a GPU: without, torch makes copies."""
    if kind == "adamw":
        return torch.optim.AdamW(parameters.values(), fused=True)
    config = TrainConfig.resolve((None, {"model": "m", "blocks": "b", "optimizer": kind}))
    return make_optimizer(config, parameters)


def state_bytes(optimizer: torch.optim.Optimizer, below_elements: int = 10**9) -> int:
    """The storages of all states, without counts and tables that all share; what is kept in 8 bits, and its scales, in
    pieces of 512 bytes as torch allocates them."""
    total = 0
    for parameter, state in optimizer.state.items():
        in_8_bits = any(isinstance(value, torch.Tensor) and value.dtype is torch.uint8 for value in state.values())
        for name, value in state.items():
            if name != "step" and not name.startswith("qmap") and parameter.numel() < below_elements:
                size = value.untyped_storage().nbytes()
                total += -(-size // 512) * 512 if in_8_bits else size
    return total


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("rank", [1, 8, 24, 64, 256])
@pytest.mark.parametrize("kind", get_args(Optimizer))
def test_states_take_what_is_planned(kind: str, rank: int) -> None:
    """Of matrices that are kept in 8 bits and of ones that are too small for it; what pages counts as nothing."""
    modules = [Module("a", "linear", 500, 64), Module("b", "linear", 63, 1000), Module("c", "linear", 4096, 11000)]
    parameters = {
        f"{module.name}.{side}": torch.nn.Parameter(torch.zeros(size))
        for module in modules
        for side, size in (("A", (rank, module.in_features)), ("B", (module.out_features, rank)))
    }
    optimizer = optimizer_of(kind, parameters)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    usual = ("bf16", "none", rank, ("all-linear",), 0.0, 512, 1, False, True)
    work = Workload(*usual, optimizer=kind)  # type: ignore[arg-type]
    paged = {"below_elements": 100_000} if kind.startswith("paged") else {}
    assert optimizer_bytes(modules, work) == state_bytes(optimizer, **paged)
    assert (optimizer_bytes(modules, work) == 0) is (kind == "sgd")


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_scales_take_what_is_planned(quantize: str, double_quantization: bool) -> None:
    """Against bitsandbytes' own quantization of one matrix: every tensor of its state."""
    import bitsandbytes as bnb

    for rows, columns in ((64, 64), (250, 64), (100, 192), (1024, 512)):
        matrix = torch.randn(rows, columns)
        codes, state = bnb.functional.quantize_4bit(
            matrix, quant_type=quantize, compress_statistics=double_quantization, blocksize=64
        )
        tensors = [codes, state.absmax, state.code]
        if double_quantization:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        found = sum(-(-tensor.untyped_storage().nbytes() // 512) * 512 for tensor in tensors)
        usual = ("bf16", quantize, 16, ("all-linear",), 0.0, 512, 1, False, True)
        work = Workload(*usual, double_quantization=double_quantization)  # type: ignore[arg-type]
        assert weight_bytes(Module("m", "linear", rows, columns), work, quantized=True) == found


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize(
    "given", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}, {"double_quantization": False}], ids=str
)
def test_weights_take_what_is_planned(quantize: str, given: dict[str, Any], build: Any) -> None:
    """Against every tensor that the loaded base holds, with each one's bytes rounded up to 512."""
    model, shape, work = build(quantize=quantize, intermediate_size=250, **given)
    found: dict[int, int] = {}
    for name, module in model.get_base_model().named_modules():
        tensors = [x for key, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if "lora_" in name:
            continue
        for tensor in list(tensors):
            state = getattr(tensor, "quant_state", None)
            tensors += [] if state is None else [state.absmax, state.code]
            tensors += (
                [state.offset, state.state2.absmax, state.state2.code] if state is not None and state.nested else []
            )
            tensors += [tensor.SCB] if getattr(tensor, "SCB", None) is not None else []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = -(-storage.nbytes() // 512) * 512
    assert StepMemory(shape, work).peak(whole(shape)).weights == sum(found.values())


def test_a_billion_parameters_take_what_the_papers_say() -> None:
    """QLoRA: 0.127 bits a parameter of scales with double quantization, so 4.127 of 4; LLM.int8: one byte."""
    shape = shape_of("llama-7b", config_of("llama-7b"))
    linears = [module for module in shape.modules if is_quantized(module, shape)]
    elements = sum(module.weight_elements for module in linears)
    for quantize, bits in (("nf4", 4.127), ("fp4", 4.127), ("int8", 8.0), ("none", 16.0)):
        work = Workload("bf16", quantize, 16, ("all-linear",), 0.0, 512, 1, False, True)  # type: ignore[arg-type]
        taken = sum(weight_bytes(module, work, quantized=True) for module in linears)
        assert 8 * taken / elements == pytest.approx(bits, rel=2e-3)


def test_more_of_anything_never_takes_less() -> None:
    shape = shape_of("llama-7b", config_of("llama-7b"))

    def total(**given: Any) -> int:
        usual = {"dtype": "bf16", "quantize": "none", "rank": 16, "target_modules": ("all-linear",)}
        usual |= {"lora_dropout": 0.0, "block_size": 1024, "batch_size": 2, "accumulates": False}
        work = Workload(**{**usual, "gradient_checkpointing": True, **given})  # type: ignore[arg-type]
        return StepMemory(shape, work).peak(whole(shape)).total

    for more in (
        {"block_size": 2048},
        {"batch_size": 3},
        {"rank": 64},
        {"gradient_checkpointing": False},
        {"attention": "documents"},
        {"attention": "sdpa"},
        {"attention": "eager"},
        {"dtype": "fp32"},
        {"lora_dropout": 0.05},
        {"loss_tokens": 2048},
        {"accumulates": True},
    ):
        assert total(**more) >= total(), more
    assert total(gradient_checkpointing=False, lora_dropout=0.05) > total(gradient_checkpointing=False)
    assert total(quantize="nf4") < total(quantize="int8") < total()


def test_parts_of_a_model_sum_up_to_it() -> None:
    """Cut between any two layers, weights and LoRA of the parts are those of the whole."""
    shape = shape_of("llama-7b", config_of("llama-7b"))
    work = Workload("bf16", "nf4", 16, ("all-linear",), 0.0, 512, 1, False, True)
    memory = StepMemory(shape, work)
    everything = memory.peak(whole(shape))
    for cut in (0, 7, 32):
        parts = [Part(0, cut, True, False, False), Part(cut, 32, False, True, True)]
        found = [memory.peak(part) for part in parts]
        assert sum(part.weights for part in found) == everything.weights
        assert sum(part.lora for part in found) == everything.lora


def test_data_parallel_and_sharded_devices_hold_what_their_engines_do() -> None:
    shape = shape_of("llama-7b", config_of("llama-7b"))
    work = Workload("bf16", "none", 16, ("all-linear",), 0.0, 512, 1, False, True)
    memory = StepMemory(shape, work)
    alone, copy = memory.peak(whole(shape)), memory.peak(whole(shape), copies=4)
    shard = memory.peak(whole(shape), shards=4)
    assert copy.gradients == 2 * alone.lora
    assert (copy.weights, copy.lora, copy.optimizer) == (alone.weights, alone.lora, alone.optimizer)
    layers = 32 * memory.layers[0].weights
    assert shard.weights == layers // 4 + (alone.weights - layers) + 2 * memory.layers[0].weights
    assert shard.lora == alone.lora // 4


def test_what_is_learned_of_the_head_is_whole_on_every_sharded_device() -> None:
    shape = shape_of("llama-7b", config_of("llama-7b"))
    work = Workload("bf16", "none", 16, ("q_proj", "lm_head"), 0.0, 512, 1, False, True)
    memory = StepMemory(shape, work)
    of_head = 4 * 16 * (4096 + 32000)
    alone, shard = memory.peak(whole(shape)), memory.peak(whole(shape), shards=4)
    assert shard.lora == (alone.lora - of_head) // 4 + of_head
    assert shard.optimizer == (alone.optimizer - 2 * of_head) // 4 + 2 * of_head
