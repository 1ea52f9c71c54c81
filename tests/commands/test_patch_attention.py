"""`lorakit patch-attention` from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorakit.core import environment
from tests.conftest import Ran, make_llama

Cli = Callable[..., Ran]

ROW = {"case", "backend", "kernel", "max_difference", "rms_ratio", "seconds", "peak_bytes", "ok"}


def test_a_models_attention_is_shown_row_by_row(cli: Cli, tiny_llama: Path) -> None:
    ran = cli("patch-attention", tiny_llama, "--block-size", 128)
    assert ran.code == 0
    assert "LlamaAttention: 4 heads of 16, 2 key heads; float32 on" in ran.out
    lines = ran.out.splitlines()
    assert any(line.startswith("packed ") and " varlen " in line and line.endswith(" ok") for line in lines)
    assert "lorakit refuses it" in ran.out
    assert "skipped: flex_attention in 8 cases: no GPU here" in ran.out
    assert "can't be known on this machine" in ran.out
    assert "--apply" in ran.err


def test_json_is_one_object_with_every_row(cli: Cli, tiny_llama: Path) -> None:
    ran = cli("patch-attention", tiny_llama, "--block-size", 128, "--batch-size", 2, "--dtype", "bf16", "--json")
    found = ran.json
    assert found["implementation"] in ("varlen", "sdpa", "eager")
    assert found["dtype"] == "bfloat16"
    assert all(set(row) >= ROW for row in found["rows"])
    assert all(set(one) == {"case", "backend", "reason"} for one in found["skipped"])


def test_only_the_config_is_needed(cli: Cli, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert cli("patch-attention", folder, "--block-size", 128).code == 0


def test_a_choice_goes_into_a_model_and_out_again(cli: Cli, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    before = (folder / "config.json").read_bytes()
    ran = cli("patch-attention", "--apply-to", folder, "--block-size", 128)
    assert ran.code == 0
    assert str(folder / "config.json") in ran.out
    assert (folder / "config.json").read_bytes() != before
    assert cli("patch-attention", "--revert", folder, "--json").json["path"] == str(folder / "config.json")
    assert (folder / "config.json").read_bytes() == before
    assert cli("patch-attention", "--revert", folder).code == 3


def test_one_models_choice_isnt_written_into_another(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", num_key_value_heads=1)
    before = (other / "config.json").read_bytes()
    ran = cli("patch-attention", tiny_llama, "--apply-to", other)
    assert ran.code == 3
    assert "1 key heads, need the attention of MODEL" in ran.err
    assert (other / "config.json").read_bytes() == before


def test_forced_to_math_the_command_fails_with_the_reason(cli: Cli, tiny_llama: Path) -> None:
    with sdpa_kernel([SDPBackend.MATH]):
        ran = cli("patch-attention", tiny_llama, "--block-size", 128, "--json")
    assert ran.code == 11
    assert not all(row["ok"] for row in ran.json["rows"])
    assert "fell back to math: every other kernel is turned off" in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "found no MODEL"),
        (["MODEL", "--dtype", "fp64"], 2, "--dtype: found 'fp64', need one of auto, bf16, fp16, fp32"),
        (["MODEL", "--implementation", "sdpa"], 2, "found --implementation alone"),
        (["MODEL", "--implementation", "flash", "--apply"], 2, "need one of auto, varlen"),
        (["MODEL", "--revert", "MODEL"], 2, "found --revert beside a MODEL"),
        (["--revert", "MODEL", "--batch-size", "3"], 2, "found --revert beside a MODEL or other options"),
        (["MODEL", "--block-size", "1"], 2, "need a whole number ≥ 128"),
        (["MODEL", "--implementation", "flash_attention_2", "--apply"], 11, "the package flash-attn isn't installed"),
        (["MODEL", "--implementation", "flex_attention", "--apply"], 3, "no GPU here"),
        (["--apply-to", "MODEL", "--implementation", "varlen"], 3, "transformers knows through lorakit only"),
        (["MODEL", "--apply-to", "nowhere"], 3, "nowhere: found no config.json, need one"),
        (["nowhere"], 12, "no answer of the Hub"),
    ],
)
def test_bad_input_says_what_is_needed(arguments: list[str], code: int, words: str, cli: Cli, tiny_llama: Path) -> None:
    size = [] if "--block-size" in arguments or not arguments else ["--block-size", 128]
    if "--revert" in arguments:
        size = []
    ran = cli("patch-attention", *(tiny_llama if word == "MODEL" else word for word in arguments), *size)
    assert ran.code == code
    assert words in " ".join(ran.err.split())


@pytest.mark.parametrize(
    "content", ["{}", '{"model_type": "none such"}', '{"model_type": "llama", "hidden_size": 30}', "["]
)
def test_a_config_of_no_model_is_refused(content: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    ran = cli("patch-attention", tmp_path / "model")
    assert ran.code == 3
    assert "found" in ran.err


def test_a_source_that_was_edited_by_hand_is_named(cli: Cli, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "patched_transformers", lambda: "modeling_llama.py isn't the file")
    assert "modeling_llama.py isn't the file" in cli("patch-attention", tiny_llama, "--block-size", 128).err
