"""Memory doesn't grow with the model: a merge into tensors of a 70B model, and into small ones, in processes of their
own. The bases are sparse files."""

import sys
from pathlib import Path

import pytest

from tests.bench import merge as bench

MIB = 1 / 1024


def peak_gib(folder: Path, config: dict[str, object]) -> float:
    folder.mkdir()
    base = bench.make_base(folder / "base", config, 2, sparse=True)
    adapter = bench.make_adapter(folder / "adapter", base, config, 16)
    command = [sys.executable, "-m", "lorakit", "merge", adapter, "--output", folder / "merged", "--quiet"]
    return bench.measured(command)[2]


@pytest.mark.skipif(sys.platform != "linux", reason="measured as Linux counts")
def test_a_large_model_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    """Half a layer of a 70B model: its largest tensors are 470 MB each."""
    small = {**bench.TINYLLAMA, "vocab_size": 1000, "num_hidden_layers": 1}
    large = {**bench.LLAMA_70B, "vocab_size": 1000, "num_hidden_layers": 1, "num_attention_heads": 64}
    peaks = [peak_gib(tmp_path / name, config) for name, config in (("small", small), ("large", large))]
    assert peaks[1] < 0.25
    assert peaks[1] - peaks[0] < 100 * MIB


def test_the_default_path_loads_no_model_library(tmp_path: Path) -> None:
    """transformers and peft alone would cost 300 MB, and seconds."""
    import subprocess

    config = {**bench.TINYLLAMA, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    base = bench.make_base(tmp_path / "base", config, 1)
    adapter = bench.make_adapter(tmp_path / "adapter", base, config, 2)
    code = (
        "import sys; from lorakit.cli import main; code = main(sys.argv[1:]); heavy = "
        "{'torch', 'transformers', 'peft', 'accelerate', 'bitsandbytes', 'tokenizers', 'huggingface_hub'}"
        " & set(sys.modules); print(heavy or '', file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "merge", str(adapter), "--output", str(tmp_path / "merged"), "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.strip()) == (0, "")
