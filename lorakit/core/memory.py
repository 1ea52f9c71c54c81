"""How many bytes a training step takes, cause by cause, from a shape and the settings of `train`. No torch.

What is counted is what `train` does: transformers' model with PEFT's LoRA in fp32 under autocast, logits in chunks
(evaluation.py), an optimizer that makes no copies, and no weight gradient for the base. Nothing is fitted to a
configuration. Weights follow bitsandbytes' formats; activations are what autograd keeps for each operation of a decoder
layer, which the tests hold against autograd's own saved tensors and against the live tensors of real steps, byte for
byte.

Symbols, per token: h hidden, i intermediate, q and kv the widths of queries and keys, d of one head, a heads, r rank,
V vocabulary, e bytes of a number of the residual stream; T tokens of a micro-step, P LoRA parameters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from lorakit.core.config import Engine, Optimizer, PlanDevicesConfig, Quantization, TrainConfig
from lorakit.core.shapes import Module, Shape

LOSS_TOKENS = 256
"""Trained tokens whose logits exist at once: of a vocabulary of 128,256 they and what the loss makes of them take
0.4 GB, where those of 2,048 tokens take 3."""
_LOGITS = 2**25  # at a time with the fast engine

CONTEXT_BYTES = 820 * 2**20
"""What CUDA and its kernels take on a card before the first tensor, outside of torch's allocator: 752 MiB with a 16-bit
base, up to 818 with bitsandbytes (an H100, torch 2.11, CUDA 13)."""

CPU_PROCESS_BYTES = 400 * 2**20
"""What a process takes on a CPU before the first tensor: Python with torch, transformers and PEFT (398 MiB)."""

SLACK_SHARE = 0.03
"""Share of what comes and goes that torch's allocator holds in pieces too small to use."""

PAGED_ELEMENTS = 100_000
"""Elements of the smallest tensor whose states a paged optimizer pages (bitsandbytes, Optimizer8bit)."""

_ROUNDING = 512  # bytes, of every allocation: kMinBlockSize of torch's CUDACachingAllocator
_CUBLAS_BYTES = 2 * 32 * 2**20  # for the forward and the backward thread each; 32 MiB on Hopper: CublasHandlePool.cpp
_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
_MLP_INPUTS = ("gate_proj", "up_proj")


AttentionKind = Literal["varlen", "documents", "sdpa", "eager"]
"""What attention keeps: what flash kernels do; the same document after document, as varlen on a CPU; with a dense mask;
or with all scores."""


def attention_kind(name: str, *, on_gpu: bool) -> AttentionKind:
    """What kind of attention `--attention` names."""
    if name == "sdpa" or name == "eager":
        return name  # type: ignore[return-value]
    return "varlen" if on_gpu else "documents"


@dataclass(frozen=True)
class Workload:
    """The settings that decide what a step takes. `dtype` is resolved: no auto."""

    dtype: Literal["bf16", "fp16", "fp32"]
    quantize: Quantization
    rank: int
    target_modules: tuple[str, ...]
    lora_dropout: float
    block_size: int
    batch_size: int
    accumulates: bool
    gradient_checkpointing: bool
    attention: AttentionKind = "varlen"
    loss_tokens: int = LOSS_TOKENS
    optimizer: Optimizer = "adamw"
    double_quantization: bool = True
    layers_to_transform: tuple[int, ...] = ()
    engine: Engine = "standard"

    @classmethod
    def of(
        cls,
        config: TrainConfig | PlanDevicesConfig,
        dtype: Literal["bf16", "fp16", "fp32"],
        block_size: int,
        batch_size: int,
        *,
        accumulates: bool,
        on_gpu: bool,
        engine: Engine,
    ) -> "Workload":
        """What `config` asks for, with what it may leave open: the number type, the block, the batch, and whether
        gradients are kept from one micro-step to the next. Attention that is left open is varlen."""
        return cls(
            dtype=dtype,
            quantize=config.model.quantize,
            rank=config.lora.rank,
            target_modules=tuple(sorted(config.lora.target_modules)),
            lora_dropout=config.lora.lora_dropout,
            block_size=block_size,
            batch_size=batch_size,
            accumulates=accumulates,
            gradient_checkpointing=config.batch.gradient_checkpointing,
            attention=attention_kind(config.model.attention, on_gpu=on_gpu),
            optimizer=config.optimizer_kind.optimizer,
            double_quantization=config.model.double_quantization,
            layers_to_transform=config.lora.layers_to_transform,
            engine=engine,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a micro-step."""
        return self.block_size * self.batch_size

    @property
    def trained_tokens(self) -> int:
        """The most of them whose prediction can be trained: the first of a block has nothing before it."""
        return (self.block_size - 1) * self.batch_size

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2


def loss_tokens(engine: Engine, vocab_size: int) -> int:
    """Tokens whose logits exist at a time: with the fast engine as many as keep the GPU busy, some 400 MB of logits."""
    return max(LOSS_TOKENS, _LOGITS // vocab_size // LOSS_TOKENS * LOSS_TOKENS) if engine == "fast" else LOSS_TOKENS


class Part(NamedTuple):
    """What one device holds of a model: decoder layers [first, end), and whether the embedding, the last norm and the
    head (with the loss) lie there. The weights of the first `offloaded` of its layers lie in CPU memory."""

    first: int
    end: int
    embedding: bool
    norm: bool
    head: bool
    offloaded: int = 0


class Bytes(NamedTuple):
    """One device at its fullest moment. `workspace` and what comes before it are what torch allocates; `context` and
    `slack` lie outside."""

    weights: int = 0
    lora: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    workspace: int = 0
    context: int = 0
    slack: int = 0

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` measures."""
        return self.total - self.context - self.slack

    @property
    def total(self) -> int:
        return sum(self)


def weight_bytes(module: Module, work: Workload, *, quantized: bool) -> int:
    """A frozen module's tensors, each rounded up as torch allocates it.

    int8: a byte an element, an fp32 scale a row (Dettmers et al. 2022, LLM.int8(); bitsandbytes Int8Params: CB, SCB);
    fp8 likewise.
    nf4, fp4: half a byte an element, for each 64 of them an fp32 scale and a code table of 16 fp32 numbers; with double
    quantization a byte of scale, for each 256 of those an fp32 one, an offset, and another table of 256 (Dettmers et
    al. 2023, QLoRA; bitsandbytes QuantState). The rest: the base's own number type.
    """
    if module.kind == "buffer":
        return 2 * _rounded(4 * module.out_features)  # rotary frequencies, and as they were before rescaling
    elements = module.weight_elements
    bias = _rounded(work.element_bytes * module.out_features) if module.bias else 0
    if not quantized or work.quantize == "none":
        return _rounded(work.element_bytes * elements) + bias
    if work.quantize in ("int8", "fp8"):
        return _rounded(elements) + _rounded(4 * module.out_features) + bias
    scales = -(-elements // 64)
    if not work.double_quantization:
        return sum(map(_rounded, (-(-elements // 2), 4 * scales, 4 * 16))) + bias
    return sum(map(_rounded, (-(-elements // 2), scales, 4 * -(-scales // 256), 4, 4 * 16, 4 * 256))) + bias


def is_quantized(module: Module, shape: Shape) -> bool:
    """Whether --quantize changes a module: every linear layer but the head; embeddings and norms stay as they are."""
    return module.kind == "linear" and module.name != shape.head


def lora_parameters(modules: Iterable[Module], rank: int) -> int:
    """A is [rank, in], B is [out, rank] (Hu et al. 2021)."""
    return sum(rank * (module.in_features + module.out_features) for module in modules)


def optimizer_bytes(modules: Iterable[Module], work: Workload) -> int:
    """What the optimizer keeps of LoRA's matrices on the device that trains them.

    AdamW two moments an element, Lion one, SGD none; 4 bytes each, or one and an fp32 scale for each 256 of them, for
    matrices of at least 4,096 elements (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization;
    bitsandbytes, min_8bit_size). What pages is not counted, for it leaves the device when that is full: the states of
    matrices of at least 100,000 elements (bitsandbytes, Optimizer8bit.get_state_buffer).
    """
    kind = work.optimizer
    moments = 0 if kind == "sgd" else 1 if "lion" in kind else 2
    total = 0
    for module in modules:
        for elements in (work.rank * module.in_features, work.rank * module.out_features):
            if kind.startswith("paged") and elements >= PAGED_ELEMENTS:
                continue
            in_8_bits = kind.endswith("8bit") and elements >= 4096
            each = _rounded(elements) + _rounded(4 * -(-elements // 256)) if in_8_bits else 4 * elements
            total += moments * each
    return total


def _rounded(size: int) -> int:
    return -(-size // _ROUNDING) * _ROUNDING


@dataclass(frozen=True)
class _Layer:
    """Bytes of one decoder layer. `moved`: those of its weights that lie in CPU memory when it is offloaded. `kept`:
    what autograd keeps from forward to backward. `moments`: those of its backward pass (with checkpointing after a
    second forward pass) that can be its fullest, each as the gradients that LoRA has by then, copies of its weights
    that are there when it is offloaded, and all else."""

    weights: int
    moved: int
    parameters: int
    optimizer: int
    kept: int
    moments: list[tuple[int, int, int]]


class StepMemory:
    """What one training step of a shape takes on a device that holds some part of it. `offloads`: some layers of the
    model are offloaded, wherever."""

    def __init__(self, shape: Shape, work: Workload, *, offloads: bool = False) -> None:
        """Raises InputRefused where a LoRA target matches no layer."""
        self.shape, self.work = shape, work
        # model.checkpoint_activations
        quantized_kinds = ("int8", "nf4", "fp4") if offloads else ("int8",)
        self._reentrant = work.gradient_checkpointing and work.quantize in quantized_kinds
        self._targets: dict[int | None, list[Module]] = {}
        for module in shape.targets(work.target_modules, work.layers_to_transform):
            self._targets.setdefault(module.layer, []).append(module)
        self._modules: dict[int | None, list[Module]] = {}
        for module in shape.modules:
            self._modules.setdefault(module.layer, []).append(module)
        kinds: dict[tuple[object, ...], _Layer] = {}
        self.layers = [self._layer(number, kinds) for number in range(shape.num_layers)]

    def peak(self, part: Part, *, copies: int = 1, shards: int = 1) -> Bytes:
        """A device at its fullest moment, as one of `copies` data-parallel ones or one of `shards` of FSDP.

        The moments that can be the fullest: the loss, forward (logits in fp32 and their log-softmax, 8 bytes each, and
        a 16-bit copy of all LoRA weights, which autocast keeps until it ends) and backward (log-softmax and two
        gradients, 12 bytes), or both at once with the fast engine; the last norm's backward pass; each layer's, where
        what lies below is still kept and the gradients above are there; and the optimizer's step.
        Data-parallel devices hold all gradients and as much again in the buffer by which they are summed; FSDP's hold
        1/shards of the layers' weights and states, whole what lies outside of the layers, and two of them, one computed
        and one fetched ahead (torch's fully_shard). Of offloaded layers the one whose backward pass runs is there.
        """
        layers = self.layers[part.first : part.end]
        outside, parameters, optimizer = self._outside(part)
        of_layers = sum(layer.weights for layer in layers) - self.moved_bytes(part)
        if shards > 1:
            of_layers = of_layers // shards + 2 * max(layer.weights for layer in self.layers)
        parameters += -(-sum(layer.parameters for layer in layers) // shards)
        optimizer += -(-sum(layer.optimizer for layer in layers) // shards)
        weights = outside + of_layers
        all_gradients = 4 * parameters
        always = all_gradients * (2 if copies > 1 else 1) if self.work.accumulates or copies > 1 else 0
        outside_layers = [(always or all_gradients, 0, 0), *self._loss(part), *self._last_norm(part)]
        moments = [(max(gradients, always), kept, loss, 0) for gradients, kept, loss in outside_layers]
        moments += [
            (max(gradients // shards, always), kept, 0, copies) for gradients, copies, kept in self._backward(part)
        ]
        gradients, activations, loss, copies = max(moments, key=sum)
        return Bytes(
            weights=weights + copies,
            lora=4 * parameters,
            gradients=gradients,
            optimizer=optimizer,
            activations=activations,
            loss=loss,
            workspace=_CUBLAS_BYTES,
            context=CONTEXT_BYTES,
            slack=round(SLACK_SHARE * (activations + loss)),
        )

    def _outside(self, part: Part) -> tuple[int, int, int]:
        """Weights, LoRA parameters and their optimizer's states of what a device holds outside of the layers."""
        weights = parameters = optimizer = 0
        for module in self._modules.get(None, ()):
            of_head = module.name == self.shape.head
            here = part.head if of_head else part.embedding if module.kind in ("embedding", "buffer") else part.norm
            if here:
                weights += 0 if of_head and self.shape.tied else self._weights(module)
                if module in self._targets.get(None, ()):
                    parameters += lora_parameters([module], self.work.rank)
                    optimizer += optimizer_bytes([module], self.work)
        return weights, parameters, optimizer

    def _weights(self, module: Module) -> int:
        return weight_bytes(module, self.work, quantized=is_quantized(module, self.shape))

    @cached_property
    def _shared(self) -> int:
        """Kept for the whole step wherever there are layers: the cosines and sines of the rotary embedding, 2de. For
        a second forward pass also the positions, 8, and the mask of documents for each pair of tokens of a block: a
        byte for sdpa, a number for eager."""
        of_mask = {"sdpa": 1, "eager": self.work.element_bytes}.get(self.work.attention, 0)
        again = 8 + of_mask * self.work.block_size
        rotary = 2 * self.shape.head_dim * self.work.element_bytes
        return self.work.tokens * (rotary + (again if self.work.gradient_checkpointing else 0))

    def _kept_until(self, part: Part, end: int) -> int:
        """What is kept of the layers [first, end): with checkpointing each one's input, eh."""
        if not self.layers[part.first : part.end]:
            return 0
        if self.work.gradient_checkpointing:
            boundary = self.work.tokens * self.work.element_bytes * self.shape.hidden_size
            return self._shared + (end - part.first) * boundary
        kept = sum(layer.kept for layer in self.layers[max(part.first, self._first_learning) : end])
        return self._shared + kept - (self._not_kept_at_first if part.first <= self._first_learning < end else 0)

    @cached_property
    def _first_learning(self) -> int:
        """The first layer with a backward pass: with checkpointing, which makes the embedding need a gradient, all have
        one; without, those below the first LoRA matrices keep nothing."""
        if self.work.gradient_checkpointing:
            return 0
        return min((number for number in self._targets if number is not None), default=self.shape.num_layers)

    @cached_property
    def _not_kept_at_first(self) -> int:
        """Without checkpointing what comes into the first layer that learns needs no gradient: its first norm keeps
        nothing, nor do the 16-bit copies of A in q, k and v."""
        copies = [m for m in self._targets.get(self._first_learning, ()) if m.name.endswith(_ATTENTION_INPUTS)]
        in_copies = sum(2 * self.work.rank * module.in_features for module in copies) if self._has_copies else 0
        return self.work.tokens * (4 * self.shape.hidden_size + 4) + in_copies

    @property
    def _has_copies(self) -> bool:
        return self.work.element_bytes == 2

    def _loss(self, part: Part) -> list[tuple[int, int, int]]:
        """(gradients, activations, loss) while the loss is computed, forward and backward: on the device of the head,
        the last norm's fp32 input, the trained tokens' hidden states (and their gradients), and a chunk's logits."""
        if not part.head:
            return []
        work, hidden = self.work, self.shape.hidden_size
        norm = work.tokens * (4 * hidden + 4) if part.norm else 0
        kept = self._kept_until(part, part.end) + norm
        chunk = min(work.loss_tokens, work.trained_tokens)
        states = work.trained_tokens * (work.element_bytes * hidden + 8)
        logits = chunk * self.shape.vocab_size
        parameters = sum(layer.parameters for layer in self.layers[part.first : part.end])
        copies = 2 * parameters if self._has_copies and work.gradient_checkpointing else 0
        other_chunks = (work.trained_tokens - chunk) * work.element_bytes * hidden
        learns = any(module.name == self.shape.head for module in self._targets.get(None, ()))
        if work.engine == "fast" and not learns:
            # fast.loss: a chunk's logits, which become their gradient; then that of all states
            forward = states + work.trained_tokens * work.element_bytes * hidden + work.element_bytes * logits
            return [(0, kept + copies, 16 * work.tokens + forward)]
        backward = states + other_chunks + 12 * logits
        return [(0, kept + copies, states + 16 * work.tokens + 8 * logits), (0, kept, backward)]

    def _last_norm(self, part: Part) -> list[tuple[int, int, int]]:
        """(gradients, activations, loss) in the backward pass of the last norm."""
        if not part.norm:
            return []
        return [(0, self._kept_until(part, part.end) + self.work.tokens * _norm_busiest(self.shape.hidden_size), 0)]

    def moved_bytes(self, part: Part) -> int:
        """What the offloaded layers of a device take in CPU memory, and as copies on the bus."""
        return sum(layer.moved for layer in self.layers[part.first : part.first + part.offloaded])

    def _backward(self, part: Part) -> list[tuple[int, int, int]]:
        """(gradients, copies of weights, activations) in the backward pass of each layer: 4P of the layers above, and
        its own so far."""
        moments, above = [], 0
        for number in range(part.end - 1, max(part.first, self._first_learning) - 1, -1):
            layer = self.layers[number]
            kept = self._kept_until(part, number + 1 if self.work.gradient_checkpointing else number)
            is_offloaded = number < part.first + part.offloaded
            moments += [
                (above + gradients, copies * is_offloaded, kept + activations)
                for gradients, copies, activations in layer.moments
            ]
            above += 4 * layer.parameters
        return moments

    def _layer(self, number: int, kinds: dict[tuple[object, ...], _Layer]) -> _Layer:
        targets = self._targets.get(number, [])
        modules = self._modules.get(number, [])
        kind = (len(targets), sum(module.parameters for module in modules), *(_leaf(module) for module in targets))
        fast = self.work.engine == "fast"
        if kind not in kinds:
            moved = {module.name: self._moved(module) for module in modules}
            kinds[kind] = _Layer(
                weights=sum(map(self._weights, modules)),
                moved=sum(moved.values()),
                parameters=lora_parameters(targets, self.work.rank),
                optimizer=optimizer_bytes(targets, self.work),
                kept=(_fast_kept if fast else _kept)(self.shape, self.work, targets, all_of_it=True),
                moments=_fast_moments(self.shape, self.work, targets)
                if fast
                else _moments(self.shape, self.work, targets, moved, reentrant=self._reentrant),
            )
        return kinds[kind]

    def _moved(self, module: Module) -> int:
        """Bytes of a module that lie in CPU memory when its layer is offloaded: buffers and the scales of 4-bit weights
        stay where they are."""
        if module.kind == "buffer":
            return 0
        if self.work.quantize == "none" or not is_quantized(module, self.shape):
            return self._weights(module)
        bias = _rounded(self.work.element_bytes * module.out_features) if module.bias else 0
        return _rounded(-(-module.weight_elements // 2)) + bias


def _leaf(module: Module) -> str:
    return module.name.rpartition(".")[2]


def _is_early(module: Module) -> bool:
    """Whether it belongs to attention, which comes first in a layer."""
    return _leaf(module) in (*_ATTENTION_INPUTS, "o_proj")


def _kept(shape: Shape, work: Workload, targets: list[Module], *, all_of_it: bool) -> int:
    """What autograd keeps of one layer between its forward and its backward pass, each storage once, in bytes; without
    `all_of_it`, as far as the end of its attention.

    RMSNorm (two; of queries and keys too in Qwen3)   its input in fp32 and 1/rms     4h + 4
    q, k, v and gate, up                              their input, where LoRA reads it  eh
    attention                                         see _attention_kept
    SwiGLU                                            gate, silu(gate), up              3ei
    down                                              its input, where LoRA reads it    ei
    each LoRA module                                  A's output                        er
                                                      and autocast's 16-bit copy        2P

    A frozen linear layer keeps nothing: without a weight gradient its backward pass reads its weight only. LLM.int8
    keeps every input (bitsandbytes MatMul8bitLt, ctx.tensors). Dropout makes LoRA keep a copy of its input, and a mask.
    """
    e, h, i = work.element_bytes, shape.hidden_size, shape.intermediate_size
    q, kv, heads = shape.q_size, shape.kv_size, shape.num_heads
    counted = targets if all_of_it else [module for module in targets if _is_early(module)]
    norms = 4 * h + 4
    if shape.qk_norms:
        norms += 4 * (q + kv) + 4 * (heads + shape.num_kv_heads)
    inputs = _inputs_kept(h, work, targets, _ATTENTION_INPUTS)
    swiglu = 0
    if all_of_it:
        norms += 4 * h + 4
        inputs += _inputs_kept(h, work, targets, _MLP_INPUTS) + _inputs_kept(i, work, targets, ("down_proj",))
        swiglu = 3 * e * i
    if work.lora_dropout > 0:
        inputs += sum(module.in_features * (e + 1) for module in counted)
    copies = 2 * lora_parameters(counted, work.rank) if e == 2 else 0
    attention = _attention_kept(shape, work, read=_inputs_kept(q, work, targets, ("o_proj",)) > 0)
    return work.tokens * (norms + attention + inputs + swiglu + len(counted) * e * work.rank) + copies


def _fast_kept(shape: Shape, work: Workload, targets: list[Module], *, all_of_it: bool) -> int:
    """What the fast engine keeps of one layer between its forward and its backward pass, in bytes; without `all_of_it`,
    as far as the end of its attention. Each layer is compiled: what is cheap to compute again isn't kept.

    RMSNorm (two)        its input and 1/rms, and its output, which LoRA reads           2eh + 4
    attention            see _attention_kept
    Qwen3's own norms    queries and keys before them, and 1/rms                         e(q + kv) + 4 for each head
    SwiGLU, down         gate, up, and their product                                     3ei
    LoRA                 A's outputs, for all layers of a group as wide as the widest, in steps of 16      er each
                         and 16-bit copies, as wide                                      2P
    """
    e, h, i = work.element_bytes, shape.hidden_size, shape.intermediate_size
    q, kv, heads = shape.q_size, shape.kv_size, shape.num_heads
    a_token = 2 * e * h + 4 + _attention_kept(shape, work, read=True)
    if shape.qk_norms:
        a_token += e * (q + kv) + 4 * (heads + shape.num_kv_heads)
    groups = [(_ATTENTION_INPUTS, h, (q, kv, kv)), (("o_proj",), q, (h,))]
    if all_of_it:
        a_token += 2 * e * h + 4 + 3 * e * i
        groups += [(_MLP_INPUTS, h, (i, i)), (("down_proj",), i, (h,))]
    rank, copies = -(-work.rank // 16) * 16, 0
    for leaves, inputs, outputs in groups:
        if any(_leaf(module) in leaves for module in targets):
            a_token += e * rank * len(outputs)
            copies += e * rank * (len(outputs) * inputs + sum(outputs))
    return work.tokens * a_token + copies


def _fast_moments(shape: Shape, work: Workload, targets: list[Module]) -> list[tuple[int, int, int]]:
    """As `_moments`, of the fast engine. `matrix`: the bytes of what a stored number is made into for a backward pass:
    codes in another order (fp8), through 16 bits (nf4, fp4), 16 bits (int8).

    down: the layer's gradient, rounded to 8 bits, and its input's gradient ei. SwiGLU: that, and what comes of it, 2ei.
    gate and up: these side by side, in 8 bits 2i, else 2ei, and the gradient of their input, eh. Attention as in
    `_moments`.
    """
    e, h, i, tokens = work.element_bytes, shape.hidden_size, shape.intermediate_size, work.tokens
    twice = tokens * e * h if work.gradient_checkpointing else 0  # the layer's input, which checkpointing keeps too
    kept = _fast_kept(shape, work, targets, all_of_it=True) - twice
    until_mlp = _fast_kept(shape, work, targets, all_of_it=False) - twice
    down = [module for module in targets if _leaf(module) == "down_proj"]
    late = [module for module in targets if not _is_early(module)]
    of_down, of_mlp, of_all = (4 * lora_parameters(modules, work.rank) for modules in (down, late, targets))
    matrix = {"none": 0, "int8": 2, "fp8": 1}.get(work.quantize, 3) * h * i
    rounded = 1 if work.quantize in ("fp8", "nf4", "fp4") else 0
    gradient, one = tokens * e * h, tokens * e * i
    side_by_side = tokens * 2 * i if rounded else 2 * one
    return [
        (of_down, 0, kept + gradient + one + matrix + rounded * tokens * h),
        (of_down, 0, kept + gradient + 2 * one),
        (of_mlp, 0, kept - 3 * one + gradient + 2 * one + gradient + 2 * matrix + side_by_side),
        (of_mlp, 0, until_mlp + gradient + tokens * _attention_moment(shape, work)),
        (of_all, 0, 4 * gradient),
    ]


def _attention_kept(shape: Shape, work: Workload, *, read: bool) -> int:
    """Bytes a token that attention keeps, its output included, where LoRA at o_proj reads it; s tokens of a block.

    varlen      queries, keys, values, output, fp32 logsumexp (Dao 2023, FlashAttention-2)     e(2q + 2kv) + 4a
    documents   the same, and where it is read the output that is joined of all documents      e(3q + 2kv) + 4a
    sdpa        keys and values of every head, and the mask in numbers                         e(4q + s) + 4a
    eager       keys and values of every head, the output where it is read, softmax in fp32, and in 16 bits what the
                values are weighted by                                                         e(4q) + 4as + 2as
    """
    e, q, kv, heads, block = work.element_bytes, shape.q_size, shape.kv_size, shape.num_heads, work.block_size
    if work.attention == "eager":
        return e * (3 + read) * q + heads * block * (4 if e == 4 else 6)
    if work.attention == "sdpa":
        return e * (4 * q + block) + 4 * heads
    outputs = 1 if work.attention == "varlen" else 1 + read
    return e * (q + 2 * kv + outputs * q) + 4 * heads


def _inputs_kept(size: int, work: Workload, targets: list[Module], leaves: tuple[str, ...]) -> int:
    """Bytes a token of one input that several linear layers share."""
    read = work.lora_dropout == 0 and any(_leaf(module) in leaves for module in targets)
    return work.element_bytes * size if read or work.quantize == "int8" else 0


def _attention_moment(shape: Shape, work: Workload) -> int:
    """Bytes a token in attention's backward pass, beside what it kept; see _moments."""
    e = work.element_bytes
    wide = 2 * e * shape.q_size if shape.num_kv_heads != shape.num_heads else 0
    scores = (e + 4 + 4) * shape.num_heads * work.block_size if work.attention == "eager" else 0
    return 2 * e * (shape.q_size + shape.kv_size) + 4 * shape.q_size + 4 * shape.num_heads + wide + scores


def _norm_busiest(size: int) -> int:
    """Bytes a token in RMSNorm's backward pass: what it kept (4h + 4), and in fp32 the gradients through its two
    factors, of the mean square, the power of its input, that times two, and their product."""
    return 4 * size + 4 + 5 * 4 * size


def _moments(
    shape: Shape, work: Workload, targets: list[Module], moved: Mapping[str, int], *, reentrant: bool
) -> list[tuple[int, int, int]]:
    """(LoRA's gradients, copies of the layer's weights where it is offloaded, all else) at each moment of a layer's
    backward pass that can be its fullest; `moved` has the bytes of each module's copy:

    down_proj: the layer's gradient eh; its input's gradient through LoRA, ei; then through the base, ei, for which
    bitsandbytes makes the whole matrix in 16 bits (MatMul4Bit and MatMul8bitLt, backward); then their sum, ei. What it
    kept is gone by then, except LLM.int8's input. SwiGLU's product takes as much next: its gradient and its factors'.
    The second norm, where the MLP is done. Attention (FlashAttention-2): the gradients of output, queries, keys and
    values, an fp32 accumulator of the queries' gradient, and with grouped queries the keys' and values' gradients of
    every head; eager's scores have gradients too, in e and twice in fp32. The first norm, at the layer's end.
    LLM.int8's quantization of down's input in the second forward pass: a cast to fp16, its codes, its absolute values,
    and which are outliers (bitsandbytes int8_vectorwise_quant): 2i + i + 2i + i.
    """
    e, h, i, tokens = work.element_bytes, shape.hidden_size, shape.intermediate_size, work.tokens
    # In fp32 the first norm keeps the layer's own input, which checkpointing keeps already.
    twice = tokens * 4 * h if work.gradient_checkpointing and e == 4 else 0
    kept = _kept(shape, work, targets, all_of_it=True) - twice
    until_mlp = _kept(shape, work, targets, all_of_it=False) - twice
    gradient = tokens * e * h * (2 if reentrant else 1)
    down = [module for module in targets if _leaf(module) == "down_proj"]
    late = [module for module in targets if not _is_early(module)]
    of_down, of_mlp, of_all = (4 * lora_parameters(modules, work.rank) for modules in (down, late, targets))

    one, matrix = tokens * e * i, e * h * i if work.quantize != "none" else 0
    lora_input = i * (e + 1) if work.lora_dropout > 0 else 0 if work.quantize == "int8" else e * i
    gone = tokens * (e * work.rank + lora_input) + (of_down // 2 if e == 2 else 0) if down else 0
    sums = one + max(one + matrix, 2 * one) if down else max(one + matrix, 3 * one)
    flash = _attention_moment(shape, work)
    norm = tokens * _norm_busiest(h) + gradient
    copies = sum(moved.values())
    after_down, after_mlp = copies, copies
    if work.quantize == "none":
        after_down -= sum(size for name, size in moved.items() if name.endswith("down_proj"))
        after_mlp = sum(size for name, size in moved.items() if name.endswith(("norm", *_ATTENTION_INPUTS, "o_proj")))
    moments = [
        (of_down, copies, kept - gone + gradient + (2 if down else 1) * one + matrix),
        (of_down, after_down, kept - gone + gradient + sums),
        (of_mlp, after_mlp, until_mlp + norm),
        (of_mlp, after_mlp, until_mlp + gradient + tokens * flash),
        (of_all, after_mlp, norm - twice),
    ]
    if work.quantize == "int8":
        cast = 2 * i if work.dtype != "fp16" else 0
        moments.append((0, 0, until_mlp + gradient + tokens * (4 * h + 4 + e * h + 4 * e * i + cast + 4 * i)))
    return moments
