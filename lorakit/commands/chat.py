"""`lorakit chat`: talk with an adapter, a base or a merged model."""

from typing import TYPE_CHECKING

from lorakit.console import Console

if TYPE_CHECKING:
    from lorakit.core.config import ChatConfig


def run(config: "ChatConfig", console: Console) -> None:
    """Talk with a base, an adapter or a merged model; without --prompt, a conversation.

    Example: lorakit chat runs/mine --prompt "Why is the sky blue?"
    """
    from lorakit.core.generation import answer
    from lorakit.core.model import open_model

    opened = open_model(config.model.model, config.model.base, config.model.dtype, console.report)
    system = [{"role": "system", "content": config.chat.system}] if config.chat.system else []
    answers = []
    history = list(system)
    if not config.chat.prompt:
        console.note("a conversation: an empty line or Ctrl-D ends it")
    for prompt in config.chat.prompt or console.questions():
        before = list(system) if config.chat.prompt else history
        messages = [*before, {"role": "user", "content": prompt}]
        text = answer(opened, messages, config.sampling, lambda piece: console.say(piece, end=""))
        console.say("")
        history = [*messages, {"role": "assistant", "content": text}]
        answers.append({"prompt": prompt, "answer": text})
    console.result({"model": config.model.model, "answers": answers})
