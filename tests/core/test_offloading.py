"""Layers in CPU memory: the same numbers as without, gradients for all of LoRA, and one layer of copies at a time.

The device that computes is the CPU here, which copies to itself.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.config import LoraSection
from lorakit.core.model import DTYPES, add_lora, autocast, load_base, make_ready, trained_parameters
from lorakit.core.offloading import lora_to_devices, offloaded
from lorakit.core.weights import open_weights
from tests.conftest import make_llama
from tests.live import LiveBytes

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "three", num_hidden_layers=LAYERS, dtype=torch.bfloat16)


@pytest.fixture
def model(folder: Path) -> Callable[..., Any]:
    """A model as train makes it: model(number of offloaded layers, …). B isn't zero, so that A gets gradients too."""

    def made(count: int, quantize: str = "none", dtype: str = "fp32", dropout: float = 0.0) -> Any:
        layers = [f"model.layers.{number}" for number in range(LAYERS)]
        modules = ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]
        places = dict.fromkeys(modules, "cpu"), dict.fromkeys(layers[:count], "cpu")
        base = load_base(open_weights(folder), DTYPES[dtype], CPU, quantize, *places)
        found = add_lora(base, LoraSection(rank=4, lora_dropout=dropout), 0, "three")
        for number, (name, parameter) in enumerate(trained_parameters(found).items()):
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(number))
        make_ready(found, DTYPES[dtype], checkpointing=True)
        return found

    return made


def step(model: Any, dtype: str = "fp32") -> float:
    """One forward and backward pass; returns the loss."""
    ids = torch.arange(128)[None] % 300
    torch.manual_seed(0)
    with autocast(CPU, DTYPES[dtype]):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("quantize", "dropout"), [("none", 0.0), ("none", 0.2), ("nf4", 0.0), ("fp4", 0.1)])
@pytest.mark.parametrize("count", [1, LAYERS])
def test_losses_and_gradients_are_exactly_those_of_the_plain_model(
    count: int, quantize: str, dropout: float, dtype: str, model: Callable[..., Any]
) -> None:
    plain, other = model(0, quantize, dtype, dropout), model(count, quantize, dtype, dropout)
    assert len(offloaded(other)) == 9 * count
    for _ in range(2):  # the second one adds to the first one's gradients
        assert step(other, dtype) == step(plain, dtype)
    expected, found = trained_parameters(plain), trained_parameters(other)
    assert list(found) == list(expected)
    assert len(found) == 2 * 7 * LAYERS
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert torch.equal(parameter.grad, expected[name].grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_no_copy_outlives_its_layer(quantize: str, model: Callable[..., Any]) -> None:
    """Counted from outside: after a forward pass there is what is there without offload, and after both nothing."""
    alive, after = [], []
    for count in (0, LAYERS):
        made = model(count, quantize)
        step(made)  # so that gradients are there
        ids = torch.zeros(1, 128, dtype=torch.int64)
        with LiveBytes() as counted:
            hidden = made.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
            alive.append(counted.live)
            hidden.sum().backward()
            del hidden
            after.append(counted.live)
    assert alive[0] == alive[1]
    assert after == [0, 0]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_frozen_weights_of_a_layer_lie_in_one_piece(quantize: str, model: Callable[..., Any]) -> None:
    made, plain = model(2, quantize), model(0, quantize)
    layers, expected = (found.get_base_model().model.layers for found in (made, plain))
    for number, (layer, other) in enumerate(zip(layers, expected, strict=True)):
        frozen = [weight for weight in layer.parameters() if not weight.requires_grad]
        pieces = {weight.untyped_storage().data_ptr() for weight in frozen}
        assert (len(pieces) == 1) is (number < 2)
        wanted = [weight for weight in other.parameters() if not weight.requires_grad]
        # as bytes: codes of four bits are stored as numbers, and some of them read as NaN
        pairs = [(a.data.view(torch.uint8), b.data.view(torch.uint8)) for a, b in zip(frozen, wanted, strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_of_the_model_is_that_of_the_plain_one(model: Callable[..., Any]) -> None:
    """Names and values; and PEFT's own switch, which evaluation uses, still works."""
    made, plain = model(2), model(0)
    found, expected = made.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    ids = torch.arange(16)[None]
    for switched in (True, False):
        with torch.no_grad():
            logits = []
            for each in (made, plain):
                with each.disable_adapter() if switched else nullcontext():
                    logits.append(each.eval()(input_ids=ids).logits)
        assert torch.equal(*logits)


def test_lora_belongs_where_its_layer_is_computed(model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And that of other layers stays where it is; a machine with a GPU shows that it trains there."""
    placed: list[Any] = []
    monkeypatch.setattr("lorakit.core.model.lora_to_devices", placed.append)
    made = model(2)
    assert placed == [made]
    names = {parameter.data_ptr(): name for name, parameter in trained_parameters(made).items()}
    moved: list[str] = []

    def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device == CPU
        moved.append(names[tensor.data_ptr()])
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    lora_to_devices(made)
    assert moved == [name for name in names.values() if ".layers.0." in name or ".layers.1." in name]
