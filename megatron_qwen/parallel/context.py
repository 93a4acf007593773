"""Context parallelism: how the tokens of a sequence are shared out over ranks.

Every sequence is cut into 2 cp equal pieces, and rank r has piece r and piece 2 cp - 1 - r ("zig-zag", Megatron-Core's
order): early rows see few keys and late rows many, so that all ranks have the same work. Packed sequences are cut one
by one. Keys and values come to the queries in one of two ways, by the names of Megatron's `cp_comm_type`:

* "all_gather": every rank gathers all keys and values (`model/gathered_attention.py`).
* "p2p": keys and values go around a ring while the ranks compute, and no rank ever holds them all
  (`model/ring_attention.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.layout import CP_COMM_TYPES

RING, ALL_GATHER = CP_COMM_TYPES


def require_comm_type(name: str, where: str) -> str:
    """Return the kind of communication.

    Raises:
        ConfigError: another one; names the field `where`.
    """
    if name not in CP_COMM_TYPES:
        raise ConfigError(
            f"{where}: got {name!r}, expected {RING!r} (a ring) or {ALL_GATHER!r}: the local attention has no other"
        )
    return name


def pieces_of_rank(rank: int, size: int) -> tuple[int, int]:
    """Return the two pieces of every sequence, of 2 * size, that context-parallel rank `rank` has, in their order."""
    return rank, 2 * size - 1 - rank


def packed_lengths(bounds: Sequence[int], *, size: int) -> tuple[int, ...]:
    """Return the lengths of packed sequences.

    Args:
        bounds: of the sequences on all ranks together, from 0, one more than there are sequences.
        size: number of context-parallel ranks.

    Raises:
        ConfigError: boundaries that do not ascend from 0, or a length that 2 * size does not divide.
    """
    lengths = tuple(end - begin for begin, end in itertools.pairwise(bounds))
    if not bounds or bounds[0] != 0 or any(length < 0 or length % (2 * size) for length in lengths):
        raise ConfigError(
            f"context parallelism: boundaries of packed sequences {list(bounds)}; expected ascending numbers from 0, "
            f"multiples of 2 * cp = {2 * size}"
        )
    return lengths


def tokens_of_rank(tensor: torch.Tensor, *, dim: int, rank: int, size: int) -> torch.Tensor:
    """Return the part of `tensor` that a context-parallel rank has; along `dim` it holds a whole sequence.

    Raises:
        ConfigError: 2 * size does not divide the sequence.
    """
    if size == 1:
        return tensor
    if tensor.shape[dim] % (2 * size):
        raise ConfigError(
            f"context parallelism: a sequence of {tensor.shape[dim]} tokens; expected a multiple of 2 * cp = {2 * size}"
        )
    pieces = tensor.chunk(2 * size, dim=dim)
    return torch.cat([pieces[number] for number in pieces_of_rank(rank, size)], dim=dim)
