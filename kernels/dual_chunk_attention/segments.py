"""Causal attention over chunks as a list of rectangles of logits, each with one position rule and a simple mask.

Rows and columns are those of one sequence's q and k. Every visible pair of a row and a key is in exactly one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .layout import ChunkLayout

INTRA, SUCC, INTER = range(3)
"""Which of `layout.query_positions` a row takes: towards its own chunk, the previous one, older ones."""


@dataclass(frozen=True)
class Piece:
    """The rows of a run against some keys.

    Attributes:
        first_key: of k.
        last_key: the one behind the last.
        variant: INTRA, SUCC or INTER.
        is_causal: row t of the run sees the keys up to first_key + t; otherwise each row sees all of them.
    """

    first_key: int
    last_key: int
    variant: int
    is_causal: bool


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one chunk with all their keys.

    Attributes:
        first_row: of q.
        last_row: the one behind the last.
        pieces: older keys first.
    """

    first_row: int
    last_row: int
    pieces: tuple[Piece, ...]


def runs(
    chunks: ChunkLayout | None, query_start: int, rows: int, key_start: int, columns: int, longest: int
) -> Iterator[Run]:
    """Yield the rows that see any key, in order, at most `longest` at once.

    Args:
        chunks: None for one chunk without end.
        query_start: position of row 0.
        rows: number of rows.
        key_start: position of key 0.
        columns: number of keys.
        longest: rows of a run.
    """
    first, end = max(query_start, key_start), query_start + rows
    while first < end:
        chunk_end = end if chunks is None else (first // chunks.stride + 1) * chunks.stride
        last = min(first + longest, chunk_end, end)
        pieces = tuple(_pieces(chunks, (first, last), (key_start, key_start + columns)))
        if pieces:
            yield Run(first - query_start, last - query_start, pieces)
        first = last


def _pieces(chunks: ChunkLayout | None, rows: tuple[int, int], keys: tuple[int, int]) -> Iterator[Piece]:
    """Those of positions rows[0] to rows[1], of one chunk and none before the first key, with keys[0] to keys[1]."""
    first, last = rows
    own = 0 if chunks is None else first // chunks.stride * chunks.stride
    previous = 0 if chunks is None else max(own - chunks.stride, 0)
    spans = (
        (0, previous, INTER, False),
        (previous, own, SUCC, False),
        (own, first, INTRA, False),
        (first, last, INTRA, True),
    )
    for start, end, variant, is_causal in spans:
        start, end = max(start, keys[0]), min(end, keys[1])
        if start < end:
            yield Piece(start - keys[0], end - keys[0], variant, is_causal)
