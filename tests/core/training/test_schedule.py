"""Which blocks each step sees."""

from collections.abc import Callable

from lorakit.core.training.schedule import Schedule
from tests.conftest import Ran

Cli = Callable[..., Ran]


def test_an_epoch_sees_every_block_once_in_an_order_of_its_own() -> None:
    schedule = Schedule(num_blocks=7, blocks_per_step=3, total_blocks=21, seed=5)
    seen = [block for step in range(schedule.steps) for block in schedule.blocks_of_step(step)]
    epochs = [seen[at : at + 7] for at in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Schedule(num_blocks=7, blocks_per_step=3, total_blocks=21, seed=6)
    assert [other.blocks_of_step(step) for step in range(7)] != [schedule.blocks_of_step(step) for step in range(7)]
