"""Which blocks each step sees."""

from collections import Counter
from itertools import chain

import pytest

from lorakit.core.training.schedule import Schedule, seed_of


def test_an_epoch_sees_every_block_once_in_an_order_of_its_own() -> None:
    schedule = Schedule(num_blocks=7, blocks_per_step=3, total_blocks=21, seed=5)
    seen = [block for step in range(schedule.steps) for block in schedule.blocks_of_step(step)]
    epochs = [seen[at : at + 7] for at in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Schedule(num_blocks=7, blocks_per_step=3, total_blocks=21, seed=6)
    assert [other.blocks_of_step(step) for step in range(7)] != [schedule.blocks_of_step(step) for step in range(7)]


@pytest.mark.parametrize(
    ("num_blocks", "per_step", "total"), [(7, 3, 21), (7, 3, 10), (5, 8, 13), (10, 4, 33), (3, 3, 3)]
)
def test_a_run_takes_its_blocks_however_steps_cut_epochs(num_blocks: int, per_step: int, total: int) -> None:
    """Each block as often as epochs are whole, and once more for some: counted over all steps."""
    schedule = Schedule(num_blocks, per_step, total, seed=1)
    taken = [schedule.blocks_of_step(step) for step in range(schedule.steps)]
    assert [len(blocks) for blocks in taken[:-1]] == [per_step] * (schedule.steps - 1)
    assert 0 < len(taken[-1]) <= per_step
    counts = Counter(block for blocks in taken for block in blocks)
    assert sum(counts.values()) == total
    assert set(counts.values()) <= {total // num_blocks, -(-total // num_blocks)}
    assert schedule.epoch_after(schedule.steps) == total / num_blocks
    assert schedule.epoch_after(1) == min(per_step, total) / num_blocks


def test_a_step_is_a_function_of_its_number() -> None:
    """Asked in any order, and whatever is to come after it."""
    schedule, longer = Schedule(11, 4, 40, seed=2), Schedule(11, 4, 400, seed=2)
    forwards = [schedule.blocks_of_step(step) for step in range(10)]
    assert [schedule.blocks_of_step(step) for step in reversed(range(10))] == forwards[::-1]
    assert [longer.blocks_of_step(step) for step in range(10)] == forwards


@pytest.mark.parametrize(("num_blocks", "per_step", "first", "then"), [(10, 4, 10, 20), (7, 3, 10, 28), (3, 8, 3, 9)])
def test_after_a_short_step_come_the_blocks_behind_its_last(
    num_blocks: int, per_step: int, first: int, then: int
) -> None:
    """Together they take what one run would, in the same order."""
    begun = Schedule(num_blocks, per_step, first, seed=4)
    extended = Schedule(num_blocks, per_step, then, 4, begun.steps, first)
    whole = Schedule(num_blocks, per_step, then, seed=4)
    parts = [begun.blocks_of_step(step) for step in range(begun.steps)]
    parts += [extended.blocks_of_step(step) for step in range(begun.steps, extended.steps)]
    assert list(chain(*parts)) == list(chain(*map(whole.blocks_of_step, range(whole.steps))))
    assert len(parts[begun.steps]) == min(per_step, then - first)
    assert extended.epoch_after(extended.steps) == then / num_blocks
    middle = Schedule(num_blocks, per_step, then, 4, begun.steps + 1, first + len(parts[begun.steps]))
    assert middle.steps == extended.steps


def test_a_step_takes_the_same_blocks_for_every_way_of_sharing_it() -> None:
    """Two steps of four blocks are the four steps of two."""
    fours, twos = Schedule(9, 4, 36, seed=3), Schedule(9, 2, 36, seed=3)
    for step in range(9):
        assert fours.blocks_of_step(step) == twos.blocks_of_step(2 * step) + twos.blocks_of_step(2 * step + 1)


def test_seeds_of_neighbours_have_nothing_in_common() -> None:
    seeds = [seed_of(seed, step, micro_step) for seed in range(10) for step in range(30) for micro_step in range(10)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = [bin(seed).count("1") for seed in seeds]
    assert 30 < sum(bits) / len(bits) < 33  # of 63
    assert seed_of(1, 23) != seed_of(12, 3)
    assert seed_of(5, 6, 7) == seed_of(5, 6, 7)
