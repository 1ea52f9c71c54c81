"""Which blocks each step sees, and what is random in it: functions of counters alone, so that nothing is replayed."""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """Which blocks each optimizer step takes, for a whole run. The last step may be short: a run that is extended after
    it goes on with the block behind its last, `blocks_done` blocks after `steps_done` steps."""

    num_blocks: int
    blocks_per_step: int
    total_blocks: int
    seed: int
    steps_done: int = 0
    blocks_done: int = 0

    @property
    def steps(self) -> int:
        return self.steps_done + math.ceil((self.total_blocks - self.blocks_done) / self.blocks_per_step)

    def blocks_of_step(self, step: int) -> list[int]:
        """The blocks of a step, counted from 0: every epoch is a permutation drawn from (seed, epoch)."""
        chosen = range(self._blocks_after(step), self._blocks_after(step + 1))
        epochs = {index // self.num_blocks for index in chosen}
        orders = {epoch: _order(self.seed, epoch, self.num_blocks) for epoch in epochs}
        return [int(orders[index // self.num_blocks][index % self.num_blocks]) for index in chosen]

    def epoch_after(self, step: int) -> float:
        """Passes over the blocks after so many steps."""
        return self._blocks_after(step) / self.num_blocks

    def _blocks_after(self, step: int) -> int:
        return min(self.blocks_done + (step - self.steps_done) * self.blocks_per_step, self.total_blocks)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_blocks: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Of an epoch; kept for its other steps, since a million blocks take 20 ms to shuffle."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_blocks)


def seed_of(*parts: int) -> int:
    """A seed for torch from counters: independent draws for neighbouring steps."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") % 2**63
