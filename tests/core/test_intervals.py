"""Intervals, each against what another way of computing it gives."""

import math
import random
import statistics

import pytest

from lorakit.core.intervals import ratio_interval, student_t, wilson_interval

Z = statistics.NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 20), (7, 20), (13, 17), (500, 1319), (1319, 1319)])
def test_wilsons_ends_are_the_shares_from_which_the_count_is_just_not_surprising(right: int, count: int) -> None:
    """Its definition: |share - p| = z · √(p (1 - p) / n), solved here by halving."""

    def surprise(p: float) -> float:
        return abs(right / count - p) - Z * math.sqrt(p * (1 - p) / count)

    def end(far: float, near: float) -> float:
        for _ in range(200):
            middle = (far + near) / 2
            far, near = (middle, near) if surprise(middle) > 0 else (far, middle)
        return near

    share = right / count
    low, high = wilson_interval(right, count)
    assert low == pytest.approx(end(0.0, share) if right else 0.0, abs=1e-9)
    assert high == pytest.approx(end(1.0, share) if right < count else 1.0, abs=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 500])
def test_students_t_leaves_95_per_cent_in_the_middle(freedom: int) -> None:
    """Its density, summed up by Simpson's rule."""

    def density(t: float) -> float:
        gammas = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        return math.exp(gammas) / math.sqrt(freedom * math.pi) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    edge, steps = student_t(freedom), 20_000
    width = edge / steps
    inner = sum((4 if step % 2 else 2) * density(step * width) for step in range(1, steps))
    middle = 2 * width / 3 * (density(0) + inner + density(edge))
    assert middle == pytest.approx(0.95, abs=2e-4)


def blocks(draw: random.Random, count: int) -> tuple[list[float], list[float]]:
    """Losses of blocks about 2 nats a token, and their trained tokens, which differ."""
    tokens = [float(draw.randrange(200, 900)) for _ in range(count)]
    return [size * draw.gauss(2.0, 0.3) for size in tokens], tokens


def test_a_ratios_interval_is_that_of_a_bootstrap() -> None:
    """Blocks drawn again with replacement, ten thousand times: the middle 95 % of the ratios."""
    draw = random.Random(0)
    losses, tokens = blocks(draw, 200)
    ratios = []
    for _ in range(10_000):
        chosen = draw.choices(range(200), k=200)
        ratios.append(sum(losses[index] for index in chosen) / sum(tokens[index] for index in chosen))
    ratios.sort()
    found = ratio_interval(losses, tokens)
    assert found is not None
    width = found[1] - found[0]
    assert found[0] == pytest.approx(ratios[250], abs=0.05 * width)
    assert found[1] == pytest.approx(ratios[9750], abs=0.05 * width)


@pytest.mark.parametrize("count", [4, 12, 60])
def test_a_ratios_interval_holds_the_truth_as_often_as_it_says(count: int) -> None:
    draw = random.Random(count)
    held = 0
    for _ in range(2000):
        found = ratio_interval(*blocks(draw, count))
        assert found is not None
        held += found[0] <= 2.0 <= found[1]
    assert 0.92 < held / 2000 < 0.975


def test_one_block_has_no_interval() -> None:
    assert ratio_interval([2.0], [1]) is None
    assert ratio_interval([0.0, 0.0], [0, 0]) is None
    found = ratio_interval([2.0, 4.0], [1, 2])
    assert found == pytest.approx((2.0, 2.0))
