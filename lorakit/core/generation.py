"""Model + conversation → text, piece by piece."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from lorakit.core.config import SamplingSection
from lorakit.core.errors import InputRefused
from lorakit.core.model import Opened
from lorakit.core.tokenization import Codec, quiet_libraries, spec_of


def answer(
    opened: Opened,
    messages: Sequence[Mapping[str, str]],
    sampling: SamplingSection,
    on_text: Callable[[str], None],
) -> str:
    """The model's next turn after `messages`; `on_text` gets its pieces as they come.

    A tokenizer without a chat template gets the contents joined by line breaks. Raises InputRefused where the chat
    template refuses the messages.
    """
    codec = Codec(spec_of(opened.tokenizer))
    template = codec.template
    if template is None:
        text = "\n".join(message["content"] for message in messages)
    else:
        try:
            text = template.chat(messages, open_turn=True).text
        except ValueError as error:
            raise InputRefused(
                f"found messages that the chat template refuses ({error}), need ones that it can render",
                "leave out --system if the template has none",
            ) from None
    ids = opened.tokenizer(text, add_special_tokens=template is None, return_tensors="pt").input_ids
    ids_1T = ids.to(opened.model.device)
    sampled: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    with quiet_libraries(), torch.inference_mode():
        generated = opened.model.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=codec.spec.pad_id,
            streamer=_Pieces(opened.tokenizer, on_text),
            use_cache=True,
            **sampled,
        )
    return str(opened.tokenizer.decode(generated[0, ids_1T.shape[1] :], skip_special_tokens=True))


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a callback instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
