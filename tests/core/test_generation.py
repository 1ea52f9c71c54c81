"""Answers: the tokens that transformers generates, in pieces, ended where a model ends turns, within its context."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lorakit.core.config import SamplingSection
from lorakit.core.errors import InputRefused, UsageError
from lorakit.core.events import Notice
from lorakit.core.generation import Conversation, answer, complete, context_tokens, end_ids, prompt_ids
from lorakit.core.model import Opened, open_model
from tests.conftest import Ran, make_llama
from tests.core.merging.adapted import make_adapter

ENDS = [257, 258]
"""What the tiny model's config and its tokenizer end with: they disagree, as they do in many a real model."""
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT writes it, without lorakit's manifest or a tokenizer."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "stock", tiny_llama)


def opened(model: Path, quantize: str = "none") -> Opened:
    return open_model(str(model), None, "fp32", lambda event: None, quantize)


def generated(model: Any, ids: list[int], new: int, **how: Any) -> list[int]:
    """What stock transformers adds to a prompt, without the token that ends it."""
    ids_1T = torch.tensor([ids])
    given = {"attention_mask": torch.ones_like(ids_1T), "pad_token_id": 256, "eos_token_id": ENDS}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = model.generate(input_ids=ids_1T, max_new_tokens=new, **given, **how)
    new_ids = made[0, len(ids) :].tolist()
    return new_ids[:-1] if new_ids[-1] in ENDS else new_ids


def said(found: Opened, sampling: SamplingSection, **more: Any) -> str:
    return answer(found, HELLO, sampling, lambda _: None, **more).answer


def test_base_and_adapter_say_what_transformers_and_peft_generate(tiny_llama: Path, adapter: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True).input_ids
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
    sampling = SamplingSection(max_new_tokens=20)
    expected = [tokenizer.decode(generated(model, ids, 20, do_sample=False)) for model in (base, with_adapter)]
    assert expected[0] != expected[1]
    assert said(opened(tiny_llama), sampling) == expected[0]
    assert said(opened(adapter), sampling) == expected[1]
    talk = Conversation(opened(adapter), None, sampling, lambda event: None)
    assert [talk.understand("/base hello"), talk.ask("hello", lambda _: None).answer] == ["hello", expected[0]]
    assert talk.understand("/adapter") == "hello"
    assert talk.ask("hello", lambda _: None).answer == expected[1]


@pytest.mark.parametrize(
    "how", [{"temperature": 1.5}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "top_p": 0.6, "top_k": 40}]
)
def test_sampling_is_transformers_own(how: dict[str, Any], tiny_llama: Path) -> None:
    found = opened(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(7)
    given = {"top_k": 0, "top_p": 1.0, **how}
    expected = generated(base, prompt_ids(found, HELLO), 24, do_sample=True, **given)
    made = said(found, SamplingSection(max_new_tokens=24, seed=7, **how))
    assert made == found.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("quantize", ["int8", "nf4", "fp4"])
def test_a_quantized_base_answers_with_its_adapter_and_without(quantize: str, adapter: Path, tiny_llama: Path) -> None:
    """As the same base that bitsandbytes quantizes while stock transformers loads it."""
    found = opened(adapter, quantize)
    kinds = {type(module).__name__ for module in found.model.modules()}
    assert {"int8": "Linear8bitLt"}.get(quantize, "Linear4bit") in kinds
    four_bits = {"bnb_4bit_quant_type": quantize, "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(
        **({"load_in_8bit": True} if quantize == "int8" else {"load_in_4bit": True, **four_bits})
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, quantization_config=config)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    sampling = SamplingSection(max_new_tokens=12)
    talk = Conversation(found, None, sampling, lambda event: None)
    ids = prompt_ids(found, HELLO)
    by_adapter = talk.ask("hello", lambda _: None).answer
    talk.understand("/base")
    by_base = talk.ask("hello", lambda _: None).answer
    assert by_base == found.tokenizer.decode(generated(base, ids, 12, do_sample=False), skip_special_tokens=True)
    stock = PeftModel.from_pretrained(base, adapter)
    assert by_adapter == found.tokenizer.decode(generated(stock, ids, 12, do_sample=False), skip_special_tokens=True)


def test_pieces_are_the_answer(tiny_llama: Path) -> None:
    pieces: list[str] = []
    found = answer(opened(tiny_llama), HELLO, SamplingSection(max_new_tokens=40, temperature=3.0), pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == found.answer
    assert (found.completion_tokens < 40) is (found.finish_reason == "stop")


def test_every_token_that_generation_config_names_ends_an_answer(tmp_path: Path) -> None:
    """Also where neither the config nor the tokenizer knows it as an end token; the tokenizer's own ends it too."""
    plain = make_llama(tmp_path / "model")
    found = opened(plain)
    ids = prompt_ids(found, HELLO)
    likely = generated(AutoModelForCausalLM.from_pretrained(plain), ids, 10, do_sample=False)
    config = found.whole.generation_config
    config.eos_token_id = [300, likely[3]]
    config.save_pretrained(plain)
    again = opened(plain)
    assert end_ids(again) == sorted({300, likely[3], again.tokenizer.eos_token_id})
    made = answer(again, HELLO, SamplingSection(max_new_tokens=10), lambda _: None)
    at = likely.index(likely[3])
    assert (made.completion_tokens, made.finish_reason) == (at + 1, "stop")
    assert complete(again, [ids], 10) == [again.tokenizer.decode(likely[:at], skip_special_tokens=True)]


def test_prompts_together_are_completed_as_each_alone(adapter: Path) -> None:
    """Padding on the left is neither seen nor counted; each row ends at its own end."""
    found = opened(adapter)
    prompts = [prompt_ids(found, [{"role": "user", "content": text}]) for text in ("a", "what is it?", "b c d", "a")]
    assert len(set(map(len, prompts))) == 3
    alone = [
        found.tokenizer.decode(generated(found.model, ids, 16, do_sample=False), skip_special_tokens=True)
        for ids in prompts
    ]
    assert len(set(alone)) == 3
    assert complete(found, prompts, 16) == alone


def test_an_answer_ends_as_soon_as_it_is_asked_to(tiny_llama: Path) -> None:
    asked: list[None] = []

    def stopped() -> bool:
        asked.append(None)
        return len(asked) == 5

    found = answer(opened(tiny_llama), HELLO, SamplingSection(max_new_tokens=50), lambda _: None, stopped)
    assert (found.completion_tokens, found.finish_reason) == (5, "interrupted")


# Conversations


class Talk:
    """A conversation with the prompts that were asked and what was told."""

    def __init__(self, model: Opened, monkeypatch: pytest.MonkeyPatch, system: str | None = None, new: int = 8) -> None:
        from lorakit.core import generation

        self.told: list[str] = []
        self.prompts: list[str] = []
        original = generation._generated

        def watched(opened: Opened, ids: torch.Tensor, *rest: Any) -> Any:
            self.prompts.append(opened.tokenizer.decode(ids[0]))
            return original(opened, ids, *rest)

        def report(event: Any) -> None:
            assert isinstance(event, Notice)
            self.told.append(event.text)

        monkeypatch.setattr(generation, "_generated", watched)
        self.conversation = Conversation(model, system, SamplingSection(max_new_tokens=new), report)

    def __call__(self, line: str) -> str | None:
        """The answer to a line, or None where it asks nothing."""
        question = self.conversation.understand(line)
        return self.conversation.ask(question, lambda _: None).answer if question else None


def chatml(*turns: tuple[str, str]) -> str:
    said = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return said + "<|im_start|>assistant\n"


def test_what_is_said_is_remembered_until_reset(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(opened(tiny_llama), monkeypatch, system="Be kind.")
    first = talk("one")
    assert first
    talk("two")
    talk("/system Be short.")
    talk("/reset")
    talk("three")
    talk("/system")
    talk(" /reset")
    kind, short = ("system", "Be kind."), ("system", "Be short.")
    assert talk.prompts[:3] == [
        chatml(kind, ("user", "one")),
        chatml(kind, ("user", "one"), ("assistant", first), ("user", "two")),
        chatml(short, ("user", "three")),
    ]
    assert talk.prompts[3].endswith(chatml(("user", "/reset")))
    assert "system" not in talk.prompts[3]
    assert talk.told == ["system prompt: Be short.", "forgotten", "system prompt: none"]


def test_the_last_question_goes_to_base_and_adapter_in_its_own_place(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After what was said before it, and what is said last is what the conversation goes on from."""
    talk = Talk(opened(adapter), monkeypatch)
    first, second = talk("one"), talk("two")
    by_base, back = talk("/base"), talk("/adapter")
    assert (talk.prompts[2], talk.prompts[3]) == (talk.prompts[1], talk.prompts[1])
    assert (back, by_base != second, first is not None) == (second, True, True)
    talk("/base")
    talk("three")
    assert f"assistant\n{by_base}<|im_end|>" in talk.prompts[5]


@pytest.mark.parametrize("command", ["/base", "/adapter"])
def test_a_model_without_an_adapter_says_that_it_has_none(
    command: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(opened(tiny_llama), monkeypatch)
    with pytest.raises(InputRefused, match=f"{command}: found a base or a merged model, need an adapter"):
        talk(command)


def test_an_adapter_that_replaces_what_it_cant_give_back_is_not_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_llama(tmp_path / "biased", attention_bias=True)
    talk = Talk(opened(make_adapter(tmp_path / "adapter", base, bias="all")), monkeypatch)
    with pytest.raises(InputRefused, match=r"replaces the base's model\.layers\.0\.self_attn"):
        talk("/base")


def test_the_oldest_turns_are_forgotten_in_pairs_where_the_context_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is a byte: each prompt leaves room for the longest answer, and begins with a question."""
    model = opened(make_llama(tmp_path / "short", max_position_embeddings=256))
    assert context_tokens(model) == 256
    talk = Talk(model, monkeypatch, system="Be kind.", new=20)
    for number in range(8):
        assert talk(f"question {number}") is not None
    assert len(talk.told) == 1
    assert talk.told[0].startswith("the model holds 256 tokens")
    sizes = [len(model.tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in talk.prompts]
    assert max(sizes) <= 256 - 20
    assert sizes[-1] > 256 - 20 - 100
    for number, prompt in enumerate(talk.prompts):
        assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nquestion ")
        assert prompt.endswith(f"question {number}<|im_end|>\n<|im_start|>assistant\n")


def test_a_long_question_gets_the_room_that_is_left_and_a_longer_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(opened(make_llama(tmp_path / "short", max_position_embeddings=64)), monkeypatch, new=50)
    overhead = len(prompt_ids(talk.conversation._opened, [{"role": "user", "content": ""}]))
    found = talk.conversation.ask("x" * (60 - overhead), lambda _: None)
    assert found.prompt_tokens == 60
    assert found.completion_tokens <= 4
    with pytest.raises(InputRefused, match="found a prompt of 64 tokens, need fewer than the model's 64"):
        talk("x" * (64 - overhead))
    assert talk("short") is not None


def test_without_a_chat_template_each_line_is_completed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = opened(make_llama(tmp_path / "plain", chat_template=None))
    talk = Talk(plain, monkeypatch)
    talk("Once upon")
    talk("a time")
    assert talk.prompts == ["Once upon", "a time"]
    assert talk.told == ["no chat template: what is asked is completed as plain text, each by itself"]
    with pytest.raises(InputRefused, match="found a system prompt and a tokenizer without a chat template"):
        talk("/system Be kind.")
    with pytest.raises(InputRefused, match="found a system prompt"):
        Talk(plain, monkeypatch, system="Be kind.")


def test_a_template_without_a_place_for_a_system_prompt_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    talk = Talk(opened(make_llama(tmp_path / "strict", chat_template=template)), monkeypatch, system="Be kind.")
    with pytest.raises(InputRefused, match="no system here"):
        talk("hello")


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = opened(make_llama(tmp_path / "broken", chat_template="{% for x in %}"))
    with pytest.raises(InputRefused, match="found messages that the chat template refuses"):
        prompt_ids(broken, HELLO)


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ("  why? ", "why?"),
        (" /base", "/base"),
        ("/etc/passwd holds what?", "/etc/passwd holds what?"),
        ("/exit", None),
        ("/exit now", None),
        ("/reset", ""),
        ("/help", ""),
        ("/base what?", "what?"),
        ("/base", ""),
    ],
)
def test_what_a_line_means(line: str, question: str | None, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Talk(opened(adapter), monkeypatch).conversation.understand(line) == question


@pytest.mark.parametrize("line", ["/bases", "/", "/quit now"])
def test_an_unknown_command_is_no_question(line: str, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "/base, /adapter, /system, /reset, /help, /exit"
    with pytest.raises(UsageError, match=f"found no such command, need one of {known}"):
        Talk(opened(adapter), monkeypatch).conversation.understand(line)


def test_rows_that_were_joined_plainly_are_asked_with_the_begin_token_that_they_were_trained_with(
    tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """The prompt of chat, and that of evaluate, are the first tokens of what was trained."""
    from tokenizers.processors import TemplateProcessing

    from lorakit.core.blocks import Blocks

    base = make_llama(tmp_path / "base", chat_template=None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.save_pretrained(base)
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text('{"prompt": "one ", "completion": "two"}\n')
    given = ("--model", base, "--dataset", rows, "--block-size", 16, "--max-steps", 1, "--output", run)
    assert cli("train", *given).code == 0
    blocks = Blocks(next((tmp_path / "cache" / "blocks").iterdir()))
    tokens, trained, _ = blocks.arrays(0)
    first = tokens[: int(trained.argmax())].tolist()
    assert first[0] == begin[1]
    assert prompt_ids(opened(run), [{"role": "user", "content": "one "}]) == first
    found = [
        cli("evaluate", model, "--dataset", rows, "--block-size", 16, "--json").json["tokens"] for model in (base, run)
    ]
    assert found[0] == found[1] == int(trained.sum())
    losses = cli("evaluate", run, "--dataset", rows, "--block-size", 16, "--json").json
    assert losses["base_loss"] == pytest.approx(
        cli("evaluate", base, "--dataset", rows, "--block-size", 16, "--json").json["loss"], rel=1e-6
    )
