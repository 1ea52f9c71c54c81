"""The base and its LoRA: what is trained, what is kept, what a layer holds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.core.config import LoraSection
from lorakit.core.model import add_lora, checkpoint_activations, load_base
from lorakit.core.weights import open_weights
from tests.conftest import Ran
from tests.live import LiveBytes

Cli = Callable[..., Ran]


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_checkpointing_leaves_each_layers_input_alone(quantize: str, tiny_llama: Path) -> None:
    """Counted from outside: what is alive after a forward pass grows by one hidden state a layer, with LLM.int8 too."""
    base = load_base(open_weights(tiny_llama), torch.float32, torch.device("cpu"), quantize)
    model = add_lora(base, LoraSection(), 0, "tiny")
    checkpoint_activations(model)
    model.train()
    ids, all_layers = torch.zeros(2, 64, dtype=torch.int64), base.model.layers
    alive = []
    for layers in (1, 2):
        base.model.layers = all_layers[:layers]
        with LiveBytes() as counted:
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
            alive.append(counted.live)
        del hidden
    assert alive[1] - alive[0] == ids.numel() * base.config.hidden_size * 4
