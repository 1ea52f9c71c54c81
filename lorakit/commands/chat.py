"""`lorakit chat`: talk with an adapter, a base or a merged model."""

from typing import TYPE_CHECKING

from lorakit.core.errors import LorakitError, Stopped

if TYPE_CHECKING:
    from lorakit.console import Console
    from lorakit.core.config import ChatConfig
    from lorakit.core.generation import Conversation


def run(config: "ChatConfig", console: "Console") -> None:
    """Talk with a base, an adapter or a merged model; --prompt asks and exits. A pipe is a conversation too.

    Example: lorakit chat runs/mine --prompt "Why is the sky blue?"
    """
    from lorakit.core.adapters import require_adapter_or_model

    require_adapter_or_model(config.model.model)  # before what takes seconds to import
    from lorakit.core.generation import HELP, Conversation
    from lorakit.core.model import open_model

    model, prompts, longest = config.model, config.chat.prompt, config.sampling.max_new_tokens
    opened = open_model(model.model, model.base, model.dtype, console.report, model.quantize)
    talk = Conversation(opened, config.chat.system, config.sampling, console.report)
    for prompt in prompts:
        talk.reset()
        _ask(prompt, talk, model.model, longest, console)
    if console.is_terminal and not prompts:
        console.note(HELP)
    for line in console.lines() if not prompts else ():
        try:
            question = talk.understand(line)
            if question is None:
                break
            if question:
                _ask(question, talk, model.model, longest, console)
        except LorakitError as error:
            if isinstance(error, Stopped) or not console.is_terminal:
                raise
            console.error(error)


def _ask(question: str, talk: "Conversation", model: str, longest: int, console: "Console") -> None:
    """Say the answer as it comes, until Ctrl-C; with --json an object a turn."""
    answer = None
    with console.answering() as stopped:
        answer = talk.ask(question, lambda piece: console.say(piece, end=""), stopped)
    console.say("")
    if answer is not None:
        if answer.finish_reason == "length" and not console.json:  # which says it itself
            more = (
                "--max-new-tokens allows more" if answer.completion_tokens >= longest else "the model's context is full"
            )
            console.note(f"(cut at {answer.completion_tokens} tokens; {more})")
        console.result({"model": model, "prompt": question, **vars(answer)})
