"""Documents → blocks: which go together, and how a long one is cut."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from lorakit.core.tokenization import Document

_TOKENS_AT_ONCE = 2**21
_BLOCKS_AT_ONCE = 256
"""Documents are packed in groups of this many tokens, or of this many blocks where those hold more: so that memory is
bounded (5 bytes a token) and packing goes on beside tokenizing, while the last block of a group, which has room, is one
of many."""
_TRIPLES_TRIED = 64


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of documents for each block of `size` tokens.

    Every block takes the longest document that is left, then one, two or three more that fill its room exactly; where
    there are none, the longest that fits, and so on. On texts whose lengths are about a quarter of a block this leaves
    0.03 % of the room empty, where best-fit decreasing (each document into the fullest block that holds it; Johnson
    1973) leaves 2.4 % (GSM8K in blocks of 1,024).
    """
    shelf = _Shelf(lengths, size)
    blocks = []
    while shelf.there:
        block: list[int] = []
        room = size
        while longest := shelf.longest_within(room):
            for length in (block and shelf.exactly(room)) or (longest,):
                block.append(shelf.take(length))
                room -= length
        blocks.append(block)
    return blocks


class _Shelf:
    """Documents by their length. Which lengths there are is a set of bits, so that a search is a few operations."""

    def __init__(self, lengths: Sequence[int], size: int) -> None:
        self._size = size
        self._indices: dict[int, list[int]] = {}
        for index in range(len(lengths) - 1, -1, -1):
            self._indices.setdefault(lengths[index], []).append(index)
        self.there = sum(1 << length for length in self._indices)
        """Bit `length` for every length that there is."""
        self._mirrored = sum(1 << (size - length) for length in self._indices)
        """Bit `size - length` for every length that there is."""

    def take(self, length: int) -> int:
        """The first document of this length."""
        indices = self._indices[length]
        if len(indices) == 1:
            self.there ^= 1 << length
            self._mirrored ^= 1 << (self._size - length)
        return indices.pop()

    def longest_within(self, room: int) -> int:
        """The longest length up to `room`, or 0."""
        return max((self.there & ((2 << room) - 1)).bit_length() - 1, 0)

    def exactly(self, room: int) -> tuple[int, ...]:
        """The lengths of one, two or three documents that fill `room` together, the longest first; or none."""
        if self.there >> room & 1:
            return (room,)
        below = self.there & ((1 << room) - 1)
        pair = self._pair(room)
        for _ in range(_TRIPLES_TRIED):
            if pair or not below:
                break
            first = below.bit_length() - 1
            below ^= 1 << first
            rest = self._pair(room - first)
            if rest and len(self._indices[first]) > rest.count(first):
                return (first, *rest)
        return pair

    def _pair(self, room: int) -> tuple[int, ...]:
        both = self.there & (self._mirrored >> (self._size - room))  # lengths whose complement is there too
        while both:
            short = (both & -both).bit_length() - 1
            if 2 * short > room:
                break
            if 2 * short < room or len(self._indices[short]) > 1:
                return (room - short, short)
            both &= both - 1
        return ()


class Packer:
    """Takes documents one by one and gives the documents of each block as soon as they are decided.

    best-fit and none take documents of at most `size` tokens; concat makes one stream of all documents and cuts it.
    """

    def __init__(self, size: int, how: Literal["best-fit", "concat", "none"]) -> None:
        self._size, self._how = size, how
        self._waiting: list[Document] = []
        self._tokens = 0

    def add(self, document: Document) -> Iterator[list[Document]]:
        self._waiting.append(document)
        self._tokens += len(document.tokens)
        at_once = max(_TOKENS_AT_ONCE, _BLOCKS_AT_ONCE * self._size)
        enough = {"best-fit": at_once, "concat": self._size, "none": 0}[self._how]
        if self._tokens >= enough:
            yield from self._decided()

    def rest(self) -> Iterator[list[Document]]:
        """The blocks of what is left, the last of which may have room."""
        if self._waiting:
            yield from self._decided()
        yield from ([document] for document in self._waiting)

    def _decided(self) -> Iterator[list[Document]]:
        waiting, self._waiting, self._tokens = self._waiting, [], 0
        if self._how == "best-fit":
            bins = best_fit([len(document.tokens) for document in waiting], self._size)
            yield from ([waiting[index] for index in chosen] for chosen in bins)
            return
        for piece in cut(_joined(waiting), self._size):
            if len(piece.tokens) < self._size and self._how == "concat":
                self._waiting, self._tokens = [piece], len(piece.tokens)
            else:
                yield [piece]


def _joined(documents: Sequence[Document]) -> Document:
    if len(documents) == 1:
        return documents[0]
    return Document(
        np.concatenate([document.tokens for document in documents]),
        np.concatenate([document.trained for document in documents]),
    )


def cut(document: Document, size: int) -> list[Document]:
    """A document in pieces of at most `size` tokens, none lost; the first token of a piece is never trained."""
    pieces = []
    for at in range(0, len(document.tokens), size):
        trained = document.trained[at : at + size].copy()
        trained[:1] = False
        pieces.append(Document(document.tokens[at : at + size], trained))
    return pieces
