"""Two processes that add up a tensor: a right sum is found right, a wrong one is caught."""

import pytest
import torch

from lorakit.core.doctor.finding import Need
from lorakit.core.doctor.processes import gloo


def test_a_sum_that_is_right_is_found_right() -> None:
    found = gloo(Need())
    assert found.status == "ok", found


def test_a_sum_over_processes_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    real = dist.all_reduce

    def wrong(tensor: torch.Tensor) -> None:
        real(tensor)
        tensor *= 1.01

    monkeypatch.setattr(dist, "all_reduce", wrong)  # in this process, which is the first of two
    found = gloo(Need())
    assert (found.status, "gloo's sum is off by 1.00%" in found.detail) == ("fail", True)
