"""Model + conversation → text, piece by piece; and many prompts → their completions at once.

Shapes by suffix: B rows, T tokens of a row.
"""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TextStreamer

from lorakit.core.config import SamplingSection
from lorakit.core.errors import InputRefused, UsageError
from lorakit.core.events import Notice, Report
from lorakit.core.model import Opened
from lorakit.core.tokenization import quiet_libraries

Message = Mapping[str, str]
OnText = Callable[[str], None]
Asked = Callable[[], bool]
FinishReason = Literal["stop", "length", "interrupted"]
Speaker = Literal["adapter", "base", "model"]
HELP = """\
/base     switch the adapter off, and ask the last question again
/adapter  switch it on, and ask again; behind either may stand another question
/system   set the system prompt to what follows; nothing removes it
/reset    forget what was said
/help     these lines
/exit     leave, as Ctrl-D does; Ctrl-C ends an answer
a space in front makes a question of anything"""
"""What a line of a conversation can be besides a question."""
_GREEDY: Mapping[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Answer:
    """What a model said, and why it ended: by a token that ends a turn, at the longest, or because it was asked to."""

    answer: str
    answered_by: Speaker
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason


def answer(
    opened: Opened,
    messages: Sequence[Message],
    sampling: SamplingSection,
    on_text: OnText,
    stopped: Asked = lambda: False,
) -> Answer:
    """The model's next turn after `messages`; `on_text` gets its pieces as they come, and `stopped` is asked after each
    token whether to end here.

    A tokenizer without a chat template gets the contents joined by line breaks. Raises InputRefused where the chat
    template refuses the messages, or the model's context doesn't hold them.
    """
    speaker: Speaker = "model" if opened.adapter is None else "adapter"
    return _answered(opened, speaker, prompt_ids(opened, messages), sampling, on_text, stopped)


def prompt_ids(opened: Opened, messages: Sequence[Message]) -> list[int]:
    """The token ids after which the model says its next turn. Raises InputRefused where the template refuses."""
    try:
        template = opened.codec.template
        joined = "\n".join(message["content"] for message in messages)
        text = template.chat(messages, open_turn=True).text if template is not None else joined
    except ValueError as error:
        raise InputRefused(
            f"found messages that the chat template refuses ({error}), need ones that it can render",
            "leave out --system if the template has none",
        ) from None
    return list(opened.tokenizer(text, add_special_tokens=template is None).input_ids)


def context_tokens(opened: Opened) -> int | None:
    """The most tokens that the model was made for; None where its config doesn't say."""
    found = getattr(opened.whole.config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def end_ids(opened: Opened) -> list[int]:
    """Every token that ends an answer: those that generation_config names, and the tokenizer's own."""
    named = opened.whole.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({int(token) for token in (*named, opened.tokenizer.eos_token_id) if token is not None})


def complete(opened: Opened, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """The likeliest continuation of each prompt (token ids), computed together: shorter ones are padded on the left."""
    pad_id, ends = opened.codec.spec.pad_id, set(end_ids(opened))
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts])
    seen_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    new_BT = _generated(opened, ids_BT, seen_BT, max_new_tokens, _GREEDY)[:, longest:]
    found = []
    for new_ids in new_BT.tolist():
        end = next((place for place, token in enumerate(new_ids) if token in ends), len(new_ids))
        found.append(str(opened.tokenizer.decode(new_ids[:end], skip_special_tokens=True)))
    return found


def _answered(
    opened: Opened, speaker: Speaker, ids: Sequence[int], sampling: SamplingSection, on_text: OnText, stopped: Asked
) -> Answer:
    """With an adapter that is switched off where the base speaks."""
    context, limit = context_tokens(opened), sampling.max_new_tokens
    if context is not None and len(ids) >= context:
        raise InputRefused(
            f"found a prompt of {len(ids)} tokens, need fewer than the model's {context}",
            "shorten what is asked, or the system prompt",
        )
    limit = min(limit, context - len(ids)) if context is not None else limit
    sampled = _GREEDY
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        sampled = {
            **{"do_sample": True, "temperature": sampling.temperature},
            **{"top_p": sampling.top_p, "top_k": sampling.top_k},
        }
    stopping = _Stopping(stopped)
    more = {"streamer": _Pieces(opened.tokenizer, on_text), "stopping_criteria": [stopping]}
    ids_1T = torch.tensor([list(ids)])
    with opened.model.disable_adapter() if speaker == "base" else contextlib.nullcontext():
        generated_1T = _generated(opened, ids_1T, torch.ones_like(ids_1T), limit, {**sampled, **more})
    new_ids = generated_1T[0, len(ids) :].tolist()
    reason: FinishReason = "interrupted" if stopping.asked else "length" if len(new_ids) == limit else "stop"
    reason = "stop" if new_ids[-1] in end_ids(opened) else reason
    text = str(opened.tokenizer.decode(new_ids, skip_special_tokens=True))
    return Answer(text, speaker, len(ids), len(new_ids), reason)


def _generated(opened: Opened, ids_BT: Tensor, seen_BT: Tensor, max_new_tokens: int, how: Mapping[str, Any]) -> Tensor:
    device = opened.model.device
    with quiet_libraries(), torch.inference_mode():
        return opened.model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=seen_BT.to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids(opened) or None,
            pad_token_id=opened.codec.spec.pad_id,
            tokenizer=opened.tokenizer,  # for stop_strings, where generation_config has some
            use_cache=True,
            **how,
        )


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a callback instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class _Stopping:
    """Ends every row as soon as it is asked to, as transformers' stopping criteria do."""

    def __init__(self, stopped: Asked) -> None:
        self._stopped, self.asked = stopped, False

    def __call__(self, ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        self.asked = self.asked or self._stopped()
        return torch.full((len(ids_BT),), self.asked, dtype=torch.bool, device=ids_BT.device)


class Conversation:
    """Questions to a model, each asked after those before it and their answers.

    What doesn't fit into the model's context any more is forgotten, the oldest question and answer first. A tokenizer
    without a chat template knows no turns: each question is completed as plain text by itself.
    """

    def __init__(self, opened: Opened, system: str | None, sampling: SamplingSection, report: Report) -> None:
        """Raises InputRefused: a system prompt without a chat template."""
        self._opened, self._sampling, self._report = opened, sampling, report
        self._plain = not opened.tokenizer.chat_template
        self._turns: list[tuple[str, str]] = []
        self._told = False
        self._speaker: Speaker = "model" if opened.adapter is None else "adapter"
        self._system: str | None = None
        if self._plain:
            report(Notice("no chat template: what is asked is completed as plain text, each by itself"))
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """What the model is told before the first question, from now on. Raises InputRefused without a template."""
        if text and self._plain:
            raise InputRefused(
                "found a system prompt and a tokenizer without a chat template, need one that has a place for it",
                "write it into the prompt itself",
            )
        self._system = text or None

    def use(self, which: Literal["adapter", "base"]) -> None:
        """Who answers from now on: base + adapter, or the base alone. Raises InputRefused where that can't be."""
        if self._opened.adapter is None:
            raise InputRefused(
                f"/{which}: found a base or a merged model, need an adapter to switch on or off",
                "lorakit chat ADAPTER, or talk on with this one",
            )
        kept_on = self._opened.kept_on
        if which == "base" and kept_on is not None:
            raise InputRefused(
                f"/base: found an adapter that replaces the base's {kept_on}, need one that can be switched off",
                "lorakit chat BASE",
            )
        self._speaker = which

    def reset(self) -> None:
        """Forget all questions and answers."""
        self._turns, self._told = [], False

    def ask(self, question: str, on_text: OnText, stopped: Asked = lambda: False) -> Answer:
        """The answer to a question, as `answer` gives one; what was said of an interrupted one is remembered too."""
        found = _answered(self._opened, self._speaker, self._fitting(question), self._sampling, on_text, stopped)
        if found.answer:
            self._turns.append((question, found.answer))
        return found

    def understand(self, line: str) -> str | None:
        """The question in a line, after doing what it commands (HELP); "" where it asks nothing, None where it leaves.

        Raises UsageError (no such command) and what the command raises.
        """
        found = re.fullmatch(r"/(\w*)(?:\s+(.*))?", line.rstrip())
        if found is None:
            return line.strip()
        name, text = found[1], (found[2] or "").strip()
        if name == "exit":
            return None
        if name in ("base", "adapter"):
            self.use("base" if name == "base" else "adapter")
            return text or self._forgotten_question()
        if name == "system":
            self.set_system(text)
        elif name == "reset":
            self.reset()
        elif name != "help":
            raise UsageError(
                f"/{name}: found no such command, need one of {', '.join(re.findall('^/[a-z]+', HELP, re.MULTILINE))}",
                "put a space in front where this is a question",
            )
        says = {"system": f"system prompt: {text or 'none'}", "reset": "forgotten", "help": HELP}
        self._report(Notice(says[name]))
        return ""

    def _forgotten_question(self) -> str:
        """The last question, to be asked anew: what was answered to it is forgotten."""
        return self._turns.pop()[0] if self._turns else ""

    def _fitting(self, question: str) -> list[int]:
        """The prompt's token ids, with as much of what was said as leaves room for the longest answer."""
        context = context_tokens(self._opened)
        while True:
            ids = prompt_ids(self._opened, self._messages(question))
            too_long = context is not None and len(ids) + self._sampling.max_new_tokens > context
            if not too_long or not self._turns or self._plain:
                return ids
            del self._turns[0]
            if not self._told:
                self._told = True
                self._report(Notice(f"the model holds {context} tokens: the oldest turns are forgotten from here on"))

    def _messages(self, question: str) -> list[Message]:
        said = [] if self._plain else self._turns
        turns = [pair for asked, told in said for pair in (("user", asked), ("assistant", told))]
        system = [("system", self._system)] if self._system else []
        return [{"role": role, "content": content} for role, content in (*system, *turns, ("user", question))]
