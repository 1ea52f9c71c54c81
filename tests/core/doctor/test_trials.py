"""What a kernel gave beside what it should have given: how a check judges it."""

import pytest
import torch

from lorakit.core.doctor.trials import Trial, judged


def test_what_is_wrong_on_the_cpu_costs_nothing_beside_a_gpu() -> None:
    one = torch.ones(3)
    right, wrong = Trial("a", one, one), Trial("a", one * 1.01, one)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert judged("a is", [(gpu, [right]), (cpu, [wrong])], "fix").status == "warn"
    assert judged("a is", [(gpu, [wrong]), (cpu, [right])], "fix").status == "fail"
    assert judged("a is", [(cpu, [wrong])], "fix").status == "fail"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_wrong(value: float) -> None:
    assert "NaN or infinity" in str(Trial("a", torch.tensor([value]), torch.ones(1)).wrong)
