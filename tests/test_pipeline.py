"""The whole flow through the command line, on a tiny model."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]


@pytest.mark.parametrize("kind", ["prompt/completion", "messages", "text"])
def test_from_rows_to_a_merged_model(cli: Cli, tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """Every row format trains, and base + adapter, and the merged model, lose the same on the trained blocks."""
    rows = {
        "prompt/completion": {"prompt": "Say a word", "completion": "papaya"},
        "messages": {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": "Say a word"},
                {"role": "assistant", "content": "papaya"},
                {"role": "user", "content": "Another"},
                {"role": "assistant", "content": "kumquat"},
            ]
        },
        "text": {"text": "papaya, kumquat, papaya, kumquat"},
    }
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(rows[kind]) + "\n" + json.dumps(rows[kind]) + "\n")
    run, merged = tmp_path / "run", tmp_path / "merged"
    blocks = cli("prepare", data, "--tokenizer", tiny_llama, "--block-size", 256, "--json")
    assert blocks.code == 0, blocks.err
    assert f"read as {kind} rows" in blocks.err
    steps = ("--max-steps", 25, "--learning-rate", "1e-2", "--json")
    trained = cli("train", "--model", tiny_llama, "--dataset", data, "--block-size", 256, "--output", run, *steps)
    assert trained.code == 0, trained.err
    assert trained.json["last_loss"] < 0.9 * trained.json["first_loss"]
    assert cli("merge", run, "--output", merged).code == 0
    adapter_loss = cli("evaluate", run, "--blocks", blocks.json["path"], "--json").json["loss"]
    merged_loss = cli("evaluate", merged, "--blocks", blocks.json["path"], "--json").json["loss"]
    assert merged_loss == pytest.approx(adapter_loss, rel=1e-5)


def test_train_finds_in_the_cache_what_prepare_made(
    cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path
) -> None:
    prepared = cli("prepare", rows_file, "--tokenizer", tiny_llama, "--block-size", 128, "--json").json
    given = ("--model", tiny_llama, "--block-size", 128, "--max-steps", 1, "--output")
    cli("train", "--dataset", rows_file, *given, tmp_path / "run")
    assert len(list(Path(prepared["path"]).parent.iterdir())) == 1
    again = cli(
        "train", "--model", tiny_llama, "--blocks", prepared["path"], "--max-steps", 1, "--output", tmp_path / "b"
    )
    assert again.code == 0
    one, two = (json.loads((tmp_path / name / "lorakit.json").read_text())["parents"] for name in ("run", "b"))
    assert one == two


def test_any_run_can_be_repeated_from_its_folder(cli: Cli, tiny_llama: Path, rows_file: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    given = ("--block-size", 128, "--rank", 3, "--target-modules", "q_proj,o_proj", "--max-steps", 2)
    assert cli("train", "--model", tiny_llama, "--dataset", rows_file, "--output", first, *given).code == 0
    assert cli("train", "--config", first).code == 0  # already done, at the same output
    repeated = cli("train", "--config", first / "lorakit.yaml", "--output", tmp_path / "second")
    assert repeated.code == 0
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_conversation_keeps_its_history(cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question is asked after all that was said before; the answer to the first isn't the first's alone."""
    import io
    import sys

    from lorakit.core.templates import Template

    asked: list[str] = []
    original = Template.chat

    def watched(template: Template, messages: list[dict[str, str]], **more: Any) -> Any:
        asked.append(" | ".join(message["role"] for message in messages))
        return original(template, messages, **more)

    monkeypatch.setattr(Template, "chat", watched)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/exit\nnever asked\n"))
    ran = cli("chat", tiny_llama, "--system", "Be kind.", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    assert [json.loads(line)["prompt"] for line in ran.out.splitlines()] == ["one", "two"]
    assert asked == ["system | user", "system | user | assistant | user"]


def test_chat_gives_what_transformers_generates(cli: Cli, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor(
        [tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True).input_ids]
    )
    for _ in range(12):  # token by token, without a cache: the slow way
        with torch.no_grad():
            step = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, step[None, None]], dim=1)
    expected = tokenizer.decode(ids[0, -12:], skip_special_tokens=True)
    ran = cli("chat", tiny_llama, "--prompt", "hello", "--max-new-tokens", 12, "--json")
    assert ran.json["answer"] == expected
    assert cli("chat", tiny_llama, "--prompt", "hello", "--max-new-tokens", 12).out.strip() == expected.strip()


def test_sampling_follows_its_seed(cli: Cli, tiny_llama: Path) -> None:
    given = (
        "chat",
        tiny_llama,
        "--prompt",
        "hello",
        "--max-new-tokens",
        24,
        "--temperature",
        2,
        "--top-p",
        0.99,
        "--json",
    )
    one, same, other = (cli(*given, "--seed", seed).json["answer"] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_model_without_a_chat_template_completes_text(cli: Cli, tmp_path: Path, rows_file: Path) -> None:
    plain = make_llama(tmp_path / "plain", chat_template=None)
    ran = cli("prepare", rows_file, "--tokenizer", plain, "--block-size", 128)
    assert "rendered by plain joining" in ran.err
    assert cli("prepare", rows_file, "--tokenizer", plain, "--block-size", 128, "--template", "chat").code == 3
    assert cli("chat", plain, "--prompt", "hello", "--max-new-tokens", 4).code == 0


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_go_from_prepare_to_the_merged_model(
    cli: Callable[..., Ran], rows_file: Path, tmp_path: Path, tied: bool
) -> None:
    """A vocabulary without room for them grows; PEFT alone loads the adapter, and answers as the merged model does."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    model = make_llama(tmp_path / "model", vocab_size=259, tie_word_embeddings=tied)
    tokens = ("--add-tokens", "<think>,plus")
    blocks, run, merged = (tmp_path / name for name in ("blocks", "run", "merged"))
    given = ("--tokenizer", model, "--block-size", 128, "--output", blocks)
    assert cli("prepare", rows_file, *tokens, *given).code == 0
    trained = ("train", "--model", model, "--blocks", blocks, "--max-steps", 3, "--learning-rate", 1e-2)
    assert cli(*trained, "--output", run).code == 5  # blocks hold tokens that this run doesn't know of
    assert cli(*trained, *tokens, "--output", run).code == 0
    assert cli("merge", run, "--output", merged).code == 0
    whole = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert whole.config.vocab_size == 261
    ids = torch.tensor([[5, 259, 260, 9]])
    by_peft = AutoPeftModelForCausalLM.from_pretrained(run).eval()
    torch.testing.assert_close(whole(input_ids=ids).logits, by_peft(input_ids=ids).logits, rtol=0, atol=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight.mean(0)
    assert not torch.allclose(whole.get_input_embeddings().weight[260], untrained, atol=1e-3)


def test_each_hint_can_be_pasted_into_a_shell(
    cli: Cli, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From prepare to the merged model by what each command says at its end, in folders with spaces and quotes."""
    folder = tmp_path / "Ada's models"
    folder.mkdir()
    monkeypatch.chdir(folder)
    model = make_llama(folder / "tiny llama")

    def hinted(*arguments: object) -> list[str]:
        ran = cli(*arguments)
        assert ran.code == 0, ran.err
        return shlex.split(ran.err.splitlines()[-1].removeprefix("hint: lorakit "))

    training = hinted("prepare", rows_file, "--tokenizer", model, "--block-size", 128, "--output", "some blocks")
    merging = hinted(*training, "--max-steps", 1)
    talking = hinted(*merging)
    assert cli(*talking, "--prompt", "hello", "--max-new-tokens", 2).code == 0
    assert hinted("patch-attention", model, "--block-size", 128) == ["patch-attention", str(model), "--apply"]
