"""95 % confidence intervals of what `evaluate` measures."""

import math
from collections.abc import Sequence

Interval = tuple[float, float]

_Z = 1.959963984540054
"""Half of a normal distribution's middle 95 %, in standard deviations."""


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval | None:
    """The interval of Σ numerators / Σ denominators, where each pair is one sample: a block's loss and its trained
    tokens, which are no samples of their own, for neighbours tell much the same. None of fewer than two samples.

    The ratio estimator of Cochran, Sampling Techniques (1977), § 2.11 and 6.4: with r the ratio and n samples, its
    variance is Σ (y - r·x)² · n / (n - 1) / (Σ x)²; with Student's t for n - 1.
    """
    count, total = len(numerators), sum(denominators)
    if count < 2 or total <= 0:
        return None
    ratio = sum(numerators) / total
    squares = sum((y - ratio * x) ** 2 for y, x in zip(numerators, denominators, strict=True))
    half = student_t(count - 1) * math.sqrt(squares * count / (count - 1)) / total
    return ratio - half, ratio + half


def wilson_interval(successes: int, count: int) -> Interval:
    """The interval of a share of `count` > 0 that was counted: Wilson, Probable inference, the law of succession, and
    statistical inference (1927)."""
    share, spread = successes / count, _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def student_t(freedom: int) -> float:
    """Half of the middle 95 % of Student's t with so many degrees of freedom.

    Exact for one and two; from three on the expansion of Abramowitz & Stegun (1964), 26.7.5, which is 0.12 % off there.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
