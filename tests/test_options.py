"""Config models as command lines: every option arrives as typed, a settings file is read strictly, help shows all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from lorakit import __version__
from lorakit.cli import COMMANDS
from lorakit.console import Console
from lorakit.core.artifacts import settings_text
from lorakit.core.config import (
    CONFIGS,
    ChatConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    MergeConfig,
    PatchAttentionConfig,
    PlanDevicesConfig,
    PrepareConfig,
    StepConfig,
    TrainConfig,
)
from lorakit.core.errors import DiskFailed, UsageError
from lorakit.options import command, read_settings
from tests.conftest import Ran

Cli = Callable[..., Ran]


def parsed(config_class: type[StepConfig], *arguments: str) -> tuple[Any, Console]:
    """The config and console that a command's body is given for a command line."""
    given: list[tuple[Any, Console]] = []
    alone = typer.Typer()
    [name] = [name for name, found in CONFIGS.items() if found is config_class]
    alone.command()(command(name, lambda config, console: given.append((config, console))))
    typer.main.get_command(alone).main(list(arguments), prog_name="lorakit", standalone_mode=False)
    [config_and_console] = given
    return config_and_console


def values(config_class: type[StepConfig], *arguments: str) -> dict[str, Any]:
    config, _ = parsed(config_class, *arguments)
    return dict(config.flat())


TRAIN = ("--model", "m", "--blocks", "/b")

TYPED: list[tuple[type[StepConfig], str, dict[str, Any]]] = [
    (
        PrepareConfig,
        "--split s --subset u --revision r --format alpaca --columns instruction=a,output=b --max-rows 7 "
        "--validation-split 0.125 --validation-dataset /d/v.csv --on-bad-row skip --num-workers 2 "
        "--seed 5 --preview 3 --preview-ids /d/r.jsonl /d/s.jsonl "
        "--tokenizer t --add-tokens <a>,<b> --block-size 64 --train-on all --template none --pack none --long drop "
        "--output /o --overwrite",
        {
            "dataset": ["/d/r.jsonl", "/d/s.jsonl"],
            "tokenizer": "t",
            "add_tokens": ["<a>", "<b>"],
            "seed": 5,
            "preview": 3,
            "preview_ids": True,
            "split": "s",
            "subset": "u",
            "revision": "r",
            "format": "alpaca",
            "columns": ["instruction=a", "output=b"],
            "max_rows": 7,
            "validation_split": 0.125,
            "validation_dataset": ["/d/v.csv"],
            "on_bad_row": "skip",
            "num_workers": 2,
            "block_size": 64,
            "train_on": "all",
            "template": "none",
            "pack": "none",
            "long": "drop",
            "output": "/o",
            "overwrite": True,
        },
    ),
    (
        TrainConfig,
        "--split s --subset u --revision r --format alpaca --columns instruction=a,output=b --max-rows 7 "
        "--validation-split 0.125 --validation-dataset /d/v.csv --on-bad-row skip --num-workers 2 "
        "--model m --dataset /d/r.jsonl --dtype bf16 --attention sdpa --quantize nf4 --engine fast "
        "--no-double-quantization --no-calibrate --cache-quantized "
        "--int8-threshold 6 --add-tokens <a> --block-size 32 --train-on all "
        "--template chat --pack none --long split --rank 4 --lora-alpha 7.5 --lora-dropout 0.25 "
        "--target-modules q_proj,v_proj --layers-to-transform 0,2-3 --use-rslora --use-dora "
        "--modules-to-save lm_head,embed_tokens --adapter a/b --optimizer lion_8bit "
        "--learning-rate 2e-5 --lr-scheduler-type polynomial --lr-scheduler-kwargs power=2,lr_end=1e-7 "
        "--warmup-ratio 0.5 --weight-decay 0.125 --max-grad-norm 3 "
        "--batch-size 2 --effective-batch-size 16 --epochs 0.5 --max-steps 7 --extend --no-gradient-checkpointing "
        "--torch-compile --seed 9 --deterministic "
        "--plan /p.json --parallel fsdp --num-processes 4 --num-machines 2 --rendezvous host:29500 "
        "--accelerate-config /a.yaml --eval-steps 5 --early-stopping-patience 3 --load-best-model-at-end "
        "--sample-prompts /p.txt --save-steps 11 --save-minutes 2.5 --keep-checkpoints 12 --logging-steps 13 "
        "--track mlflow --push-to-hub o/r --private --output /o --overwrite",
        {
            "model": "m",
            "blocks": [],
            "dataset": ["/d/r.jsonl"],
            "split": "s",
            "subset": "u",
            "revision": "r",
            "format": "alpaca",
            "columns": ["instruction=a", "output=b"],
            "max_rows": 7,
            "validation_split": 0.125,
            "validation_dataset": ["/d/v.csv"],
            "on_bad_row": "skip",
            "num_workers": 2,
            "dtype": "bf16",
            "attention": "sdpa",
            "quantize": "nf4",
            "engine": "fast",
            "double_quantization": False,
            "calibrate": False,
            "cache_quantized": True,
            "int8_threshold": 6.0,
            "add_tokens": ["<a>"],
            "block_size": 32,
            "train_on": "all",
            "template": "chat",
            "pack": "none",
            "long": "split",
            "rank": 4,
            "lora_alpha": 7.5,
            "lora_dropout": 0.25,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 2, 3],
            "use_rslora": True,
            "use_dora": True,
            "modules_to_save": ["lm_head", "embed_tokens"],
            "adapter": "a/b",
            "optimizer": "lion_8bit",
            "learning_rate": 2e-5,
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": ["power=2", "lr_end=1e-7"],
            "warmup_ratio": 0.5,
            "weight_decay": 0.125,
            "max_grad_norm": 3.0,
            "batch_size": 2,
            "gradient_accumulation_steps": 1,
            "effective_batch_size": 16,
            "epochs": 0.5,
            "max_steps": 7,
            "extend": True,
            "gradient_checkpointing": False,
            "torch_compile": True,
            "seed": 9,
            "deterministic": True,
            "plan": "/p.json",
            "parallel": "fsdp",
            "num_processes": 4,
            "num_machines": 2,
            "rendezvous": "host:29500",
            "accelerate_config": "/a.yaml",
            "eval_steps": 5,
            "early_stopping_patience": 3,
            "load_best_model_at_end": True,
            "sample_prompts": "/p.txt",
            "save_steps": 11,
            "save_minutes": 2.5,
            "keep_checkpoints": 12,
            "logging_steps": 13,
            "track": "mlflow",
            "push_to_hub": "o/r",
            "private": True,
            "output": "/o",
            "overwrite": True,
        },
    ),
    (
        PatchAttentionConfig,
        "m --block-size 256 --batch-size 2 --dtype fp16 --apply --implementation eager --apply-to /m",
        {
            "model": "m",
            "block_size": 256,
            "batch_size": 2,
            "dtype": "fp16",
            "apply": True,
            "implementation": "eager",
            "apply_to": "/m",
            "revert": None,
        },
    ),
    (
        PlanDevicesConfig,
        "m --dtype fp16 --quantize int8 --engine standard "
        "--no-double-quantization --attention sdpa --gpus 2x24GiB,48GB --parallel ddp "
        "--rank 4 --lora-alpha 7.5 --lora-dropout 0.25 --target-modules q_proj,v_proj --layers-to-transform 1,0 "
        "--optimizer sgd --block-size auto --batch-size 3 "
        "--gradient-accumulation-steps 2 --no-gradient-checkpointing --output /o.json --compare --probe",
        {
            "model": "m",
            "dtype": "fp16",
            "quantize": "int8",
            "engine": "standard",
            "double_quantization": False,
            "attention": "sdpa",
            "gpus": [24 * 2**30, 24 * 2**30, 48 * 10**9],
            "cpu": [],
            "parallel": "ddp",
            "rank": 4,
            "lora_alpha": 7.5,
            "lora_dropout": 0.25,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 1],
            "optimizer": "sgd",
            "block_size": "auto",
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "output": "/o.json",
            "compare": True,
            "probe": True,
        },
    ),
    (
        MergeConfig,
        "/a:0.7 owner/b:0.30 --base b --dtype bf16 --base-precision as-trained --verify full --blocks /x --blocks /y "
        "--push-to-hub owner/mine --private --output /o --overwrite",
        {
            "adapter": ["/a:0.7", "owner/b:0.3"],
            "base": "b",
            "dtype": "bf16",
            "base_precision": "as-trained",
            "verify": "full",
            "blocks": ["/x", "/y"],
            "push_to_hub": "owner/mine",
            "private": True,
            "output": "/o",
            "overwrite": True,
        },
    ),
    (
        ChatConfig,
        "m --base b --dtype fp32 --prompt Hi --prompt a,b --system S --max-new-tokens 5 --temperature 0.5 "
        "--top-p 0.25 --top-k 7 --seed 3 --quantize nf4",
        {
            "model": "m",
            "base": "b",
            "dtype": "fp32",
            "quantize": "nf4",
            "top_k": 7,
            "prompt": ["Hi", "a,b"],
            "system": "S",
            "max_new_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.25,
            "seed": 3,
        },
    ),
    (
        EvaluateConfig,
        "m --base b --dtype fp16 --quantize fp4 --engine fast --dataset /b --dataset /c --batch-size 3 --split s "
        "--subset t --revision r --columns prompt=q --template none --block-size 64 --limit 9 --exact-match "
        "--answer-pattern x(.*) --max-new-tokens 5 --rows-at-once 2",
        {
            "model": "m",
            "base": "b",
            "dtype": "fp16",
            "quantize": "fp4",
            "engine": "fast",
            "blocks": [],
            "dataset": ["/b", "/c"],
            "batch_size": 3,
            "split": "s",
            "subset": "t",
            "revision": "r",
            "columns": ["prompt=q"],
            "template": "none",
            "block_size": 64,
            "limit": 9,
            "exact_match": True,
            "answer_pattern": "x(.*)",
            "max_new_tokens": 5,
            "rows_at_once": 2,
        },
    ),
    (
        DoctorConfig,
        "--only int8 --only gpus --for train --report",
        {"only": ["int8", "gpus"], "for_": "train", "report": True},
    ),
    (DemoConfig, "--model m --output /o --epochs 2", {"model": "m", "output": "/o", "epochs": 2.0}),
]


@pytest.mark.parametrize(
    ("config_class", "arguments", "expected"), TYPED, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_option_arrives_as_it_was_typed(
    config_class: type[StepConfig], arguments: str, expected: dict[str, Any]
) -> None:
    assert values(config_class, *arguments.split()) == expected


def test_blocks_and_accumulation_arrive_too() -> None:
    found = values(TrainConfig, *TRAIN, "--gradient-accumulation-steps", "4")
    assert (found["blocks"], found["gradient_accumulation_steps"]) == (["/b"], 4)


def test_an_option_of_an_8_bit_base_arrives_beside_one() -> None:
    assert values(TrainConfig, *TRAIN, "--quantize", "int8", "--int8-threshold", "5")["int8_threshold"] == 5.0


def test_a_short_option_is_the_long_one() -> None:
    assert values(TrainConfig, *TRAIN, "-r", "4") == values(TrainConfig, *TRAIN, "--rank", "4")


def test_a_switch_can_be_turned_on_off_and_left() -> None:
    for arguments, expected in (
        ([], True),
        (["--gradient-checkpointing"], True),
        (["--no-gradient-checkpointing"], False),
    ):
        assert values(TrainConfig, *TRAIN, *arguments)["gradient_checkpointing"] is expected
    for arguments, expected in (([], False), (["--overwrite"], True)):
        assert values(TrainConfig, *TRAIN, *arguments)["overwrite"] is expected


@pytest.mark.parametrize("name", ["json", "quiet"])
def test_how_to_print_is_for_the_console(name: str) -> None:
    _, console = parsed(TrainConfig, *TRAIN)
    assert not getattr(console, name)
    _, console = parsed(TrainConfig, *TRAIN, f"--{name}")
    assert getattr(console, name)


def test_a_negative_number_is_a_value_and_not_an_option() -> None:
    with pytest.raises(UsageError, match="--seed: found '-1', need"):
        parsed(TrainConfig, *TRAIN, "--seed", "-1")


# Settings files


def settings_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read_settings(path)
    assert caught.value.message.startswith(f"--config {path}: found ")
    assert "lorakit.yaml" in caught.value.hint
    return caught.value


def test_a_file_fills_in_what_isnt_typed(tmp_path: Path) -> None:
    path = settings_file(
        tmp_path, "model: m\nblocks: /b\nrank: 8\nlearning_rate: 1.0e-3\ngradient_checkpointing: false\n"
    )
    found = values(TrainConfig, "--config", str(path), "--rank", "4")
    assert (found["model"], found["blocks"], found["rank"], found["learning_rate"]) == ("m", ["/b"], 4, 1e-3)
    assert found["gradient_checkpointing"] is False
    typed = values(TrainConfig, "--config", str(path), "--gradient-checkpointing")
    assert typed["gradient_checkpointing"] is True


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002", "'2e-4'", ".0002"])
def test_a_rate_is_a_number_however_it_is_written(text: str, tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-4, which has no dot, for text."""
    path = settings_file(tmp_path, f"learning_rate: {text}\n")
    assert values(TrainConfig, *TRAIN, "--config", str(path))["learning_rate"] == 2e-4


def test_a_folder_stands_for_the_settings_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "lorakit.yaml").write_text("rank: 8\n")
    assert values(TrainConfig, *TRAIN, "--config", str(tmp_path))["rank"] == 8


def test_a_file_of_another_alphabet_is_read_as_utf_8(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "system: Sei höflich 😀\n")
    assert values(ChatConfig, "m", "--config", str(path))["system"] == "Sei höflich 😀"


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    message = refused(settings_file(tmp_path, "rank: 8\nseed: 1\nrank: 16\n")).message
    assert "the key 'rank' twice" in message
    assert "in line 3, need YAML" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "found an empty file, need names with values"),
        ("# nothing yet\n", "found an empty file, need names with values"),
        ("just words", "found a value alone, need names with values"),
        ("- rank\n- 8\n", "found a list, need names with values"),
        ("rank: [8\n", "need YAML"),
        ("rank: 8\n\tseed: 1\n", "need YAML"),
        ("a: 1\n---\nb: 2\n", "need YAML"),
        ("rank: !!python/object/apply:os.getcwd []\n", "need YAML"),
        ("{[1]: 2}", "need YAML"),
        ("block_size: !!timestamp 2020-13-45\n", "need YAML"),
        ("[" * 20_000, "need YAML"),
        (b"rank: \xff8\n", "need YAML"),
        (b"rank: 8\x00\n", "need YAML"),
    ],
)
def test_what_isnt_a_list_of_settings_is_refused(content: str | bytes, words: str, tmp_path: Path) -> None:
    error = refused(settings_file(tmp_path, content))
    assert words in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize(("text", "seen"), [("epochs: 1:30", "'1:30'"), ("rank: 0x10", "'0x10'")])
def test_what_yaml_1_1_takes_for_a_number_is_none(text: str, seen: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"found {seen}, need a "):
        parsed(TrainConfig, *TRAIN, "--config", str(settings_file(tmp_path, text)))


def test_a_zero_in_front_doesnt_change_a_number(tmp_path: Path) -> None:
    assert values(TrainConfig, *TRAIN, "--config", str(settings_file(tmp_path, "rank: 010\n")))["rank"] == 10


def test_a_column_may_be_called_yes(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "columns: {completion: yes}\n")
    assert values(PrepareConfig, "d", "--tokenizer", "t", "--config", str(path))["columns"] == ["completion=yes"]


def test_the_settings_of_another_command_are_told_as_such(tmp_path: Path) -> None:
    path = settings_file(tmp_path, settings_text(MergeConfig.resolve((None, {"adapter": "owner/name"}))).decode())
    with pytest.raises(UsageError) as caught:
        parsed(TrainConfig, *TRAIN, "--config", str(path))
    found = "found the settings of `lorakit merge`, need those of `lorakit train`"
    assert caught.value.message == f"--config {path}: {found}"
    path = settings_file(tmp_path, "base: b\n")  # one key says little
    with pytest.raises(UsageError, match="unknown key 'base'"):
        parsed(TrainConfig, *TRAIN, "--config", str(path))


def test_a_file_that_isnt_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*missing\.yaml: found no such file"):
        read_settings(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="found no such file"):
        read_settings(tmp_path)


def test_a_file_that_cant_be_read_is_a_disk_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, *_: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    path = settings_file(tmp_path, "rank: 4\n")
    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(DiskFailed, match="found 'Input/output error'"):
        read_settings(path)


def test_a_problem_of_the_file_names_the_file_and_one_of_the_line_the_option(tmp_path: Path) -> None:
    path = settings_file(tmp_path, "rank: 0\nlearning_rte: 1\n")
    with pytest.raises(UsageError) as caught:
        parsed(TrainConfig, *TRAIN, "--config", str(path), "--epochs", "0")
    lines = caught.value.message.splitlines()
    assert [line.partition(": found")[0] for line in lines] == [str(path), f"{path}: rank", "--epochs"]
    assert "did you mean 'learning_rate'?" in caught.value.hint


# Help


@pytest.mark.parametrize("line", [["-h"], ["train", "-h"]])
def test_help_has_a_short_name(line: list[str], cli: Cli) -> None:
    ran = cli(*line)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == cli(*line[:-1], "--help").out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_with_what_it_does(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    ran = cli(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    shown = " ".join(ran.out.split())
    for knob in CONFIGS[name].settings().values():
        assert knob.label in shown, knob.name
        assert " ".join(knob.help.split()) in shown, knob.name
    assert [option for option in ("--config", "--json", "--quiet") if option not in shown] == []
    assert f"Example: lorakit {name}" in shown


def test_the_commands_stand_in_the_order_of_the_pipeline(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 0
    places = [ran.out.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert list(CONFIGS) == list(COMMANDS)


def test_the_version_is_printed(cli: Cli) -> None:
    ran = cli("--version")
    assert (ran.code, ran.out) == (0, f"lorakit {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words", "advice"),
    [
        (["trian"], "trian", "did you mean train?"),
        (["xyz"], "need one of prepare, patch-attention, plan-devices, train", "`lorakit --help`"),
        (["train", *TRAIN, "--quantize", "nf5"], "--quantize: found 'nf5'", "did you mean nf4?"),
        (["train", "--lora-rnak", "3"], "--lora-rnak", "--rank"),
        (["train", "--learning-rte", "3"], "--learning-rte", "did you mean --learning-rate"),
        (["train", "--rank"], "--rank: found no value, need one", "--help"),
        (["train", "extra", *TRAIN], "found extra behind all arguments", "--help"),
        (["prepare", "--json=yes", "r.jsonl"], "--json: found a value, need none", "--help"),
    ],
)
def test_a_misspelt_command_line_is_told_in_lorakits_voice(
    arguments: list[str], words: str, advice: str, cli: Cli
) -> None:
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    error, hint = ran.err.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")
    assert advice in ran.err
