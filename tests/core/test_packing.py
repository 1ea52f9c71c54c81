"""Packing: every document once, no block overflows, best fit by its definition, a stream cut without loss."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core import packing
from lorakit.core.packing import Packer, best_fit, cut
from lorakit.core.tokenization import Document

PROPERTY = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def first_fit_decreasing(lengths: Sequence[int], size: int) -> int:
    """How many bins the textbook's first-fit decreasing opens."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for number, room in enumerate(rooms):
            if length <= room:
                rooms[number] -= length
                break
        else:
            rooms.append(size - length)
    return len(rooms)


def fewest(lengths: Sequence[int], size: int) -> int:
    """How many bins there must be, by trying every way."""

    def place(at: int, rooms: tuple[int, ...]) -> int:
        if at == len(lengths):
            return len(rooms)
        ways = [place(at + 1, (*rooms, size - lengths[at]))]
        for number in {room: number for number, room in enumerate(rooms) if room >= lengths[at]}.values():
            ways.append(place(at + 1, (*rooms[:number], rooms[number] - lengths[at], *rooms[number + 1 :])))
        return min(ways)

    return place(0, ())


def lengths_up_to(size: int, smallest: int = 1, most: int = 60) -> st.SearchStrategy[tuple[list[int], int]]:
    return st.tuples(st.lists(st.integers(smallest, size), max_size=most), st.just(size))


sized = st.integers(1, 200).flatmap(lengths_up_to)


@settings(PROPERTY, max_examples=300)
@given(case=sized)
def test_every_document_is_packed_once_and_no_block_overflows(case: tuple[list[int], int]) -> None:
    lengths, size = case
    bins = best_fit(lengths, size)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= size for members in bins)
    assert bins == best_fit(list(lengths), size)


@settings(PROPERTY, max_examples=300)
@given(case=sized)
def test_a_block_begins_with_the_longest_that_is_left_and_closes_when_nothing_fits(case: tuple[list[int], int]) -> None:
    lengths, size = case
    left = dict(enumerate(lengths))
    for members in best_fit(lengths, size):
        assert lengths[members[0]] == max(left.values())
        for index in members:
            del left[index]
        room = size - sum(lengths[index] for index in members)
        assert all(length > room for length in left.values())


@settings(PROPERTY, max_examples=300)
@given(size=st.integers(10, 200), seed=st.integers(0, 1000))
def test_room_that_two_or_three_documents_fill_exactly_is_filled(size: int, seed: int) -> None:
    """Blocks cut into up to four documents and shuffled: as many blocks again, or one more."""
    rng = np.random.default_rng(seed)
    cuts = [np.sort(rng.choice(np.arange(1, size), size=int(rng.integers(0, 3)), replace=False)) for _ in range(12)]
    lengths = [int(n) for at in cuts for n in np.diff([0, *at, size])]
    rng.shuffle(lengths)
    assert 12 <= len(best_fit(lengths, size)) <= 13


@pytest.mark.parametrize("seed", range(20))
def test_no_more_blocks_than_first_fit_on_documents_of_real_lengths(seed: int) -> None:
    """Log-normal lengths, as texts have: both where most are short, and where they are about a quarter of a block."""
    for mean, fill in ((4.5, 0.95), (5.4, 0.985)):
        drawn = np.random.default_rng(seed).lognormal(mean, 0.4 if mean > 5 else 1.0, size=1000)
        lengths = np.clip(drawn, 1, 1024).astype(int).tolist()
        packed = best_fit(lengths, 1024)
        assert len(packed) <= first_fit_decreasing(lengths, 1024)
        assert sum(lengths) / (len(packed) * 1024) > fill


@settings(PROPERTY, max_examples=100)
@given(case=st.integers(2, 30).flatmap(lambda size: lengths_up_to(size, most=7)))
def test_packing_is_close_to_the_best_that_there_is(case: tuple[list[int], int]) -> None:
    assert len(best_fit(*case)) <= fewest(*case) + 1


def documents_of(lengths: Sequence[int]) -> list[Document]:
    """Documents whose tokens are numbered through all of them, each token trained but the first."""
    ends = np.cumsum(lengths).tolist()
    return [
        Document(np.arange(end - length, end, dtype=np.uint32), np.arange(length) > 0)
        for end, length in zip(ends, lengths, strict=True)
    ]


def packed(lengths: Sequence[int], size: int, how: str) -> list[list[Document]]:
    packer = Packer(size, how)  # type: ignore[arg-type]
    ready = [block for document in documents_of(lengths) for block in packer.add(document)]
    return ready + list(packer.rest())


def tokens_in(blocks: Sequence[Sequence[Document]]) -> list[int]:
    return [token for block in blocks for document in block for token in document.tokens.tolist()]


@PROPERTY
@given(case=st.integers(1, 60).flatmap(lambda size: lengths_up_to(size)), at_once=st.integers(1, 500))
def test_packing_in_groups_loses_nothing(case: tuple[list[int], int], at_once: int) -> None:
    lengths, size = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_TOKENS_AT_ONCE", at_once)
        patch.setattr(packing, "_BLOCKS_AT_ONCE", 0)
        blocks = packed(lengths, size, "best-fit")
    assert sorted(tokens_in(blocks)) == list(range(sum(lengths)))
    assert all(0 < sum(len(document.tokens) for document in block) <= size for block in blocks)
    assert sorted(len(document.tokens) for block in blocks for document in block) == sorted(lengths)


@PROPERTY
@given(lengths=st.lists(st.integers(1, 100), max_size=30), size=st.integers(1, 40))
def test_a_joined_stream_is_cut_into_full_blocks_in_order(lengths: list[int], size: int) -> None:
    blocks = packed(lengths, size, "concat")
    assert tokens_in(blocks) == list(range(sum(lengths)))
    assert all(len(block) == 1 for block in blocks)
    assert all(len(block[0].tokens) == size for block in blocks[:-1])
    starts = set(itertools.accumulate(lengths[:-1], initial=0)) if lengths else set()
    for block in blocks:
        for place, (token, trained) in enumerate(zip(block[0].tokens.tolist(), block[0].trained, strict=True)):
            assert trained == (place > 0 and token not in starts)


def test_without_sharing_each_document_has_a_block() -> None:
    assert [[len(one.tokens) for one in block] for block in packed([3, 5, 1], 8, "none")] == [[3], [5], [1]]


def test_a_cut_document_keeps_every_token_and_never_trains_a_first_one() -> None:
    [document] = documents_of([10])
    pieces = cut(document, 4)
    assert [piece.tokens.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [piece.trained.tolist() for piece in pieces] == [[False, True, True, True]] * 2 + [[False, True]]
    assert document.trained.tolist() == [False] + [True] * 9
