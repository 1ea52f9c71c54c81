"""A machine with a GPU, as far as torch says."""

import pytest


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA that sees one GPU."""
    import torch

    from lorakit.core.doctor import bitsandbytes, cuda

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "has_gpu", lambda: True)
    for room in (cuda, bitsandbytes):
        monkeypatch.setattr(room, "driver_cuda", lambda: 13)
