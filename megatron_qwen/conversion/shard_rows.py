"""Rows of one tensor-parallel shard out of rows of the whole parameter, without holding either.

A parameter is cut along axis 0, each of its pieces (gate and up) by itself, or along axis 1, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_qwen.conversion.parameters import Parameter, Shard
from megatron_qwen.conversion.pieces import BLOCK_BYTES
from megatron_qwen.conversion.transforms import TRANSFORMS


def rows_of_shard(
    parameter: Parameter, shard: Shard, begin: int, end: int, num_rows: int, read: Callable[[int, int], Tensor]
) -> Tensor:
    """Return rows `begin` to `end` of a shard.

    Args:
        parameter: whose shard.
        shard: which part along the family's shard axis.
        begin: first row, counted within the shard.
        end: one past the last.
        num_rows: of the whole parameter, with padding.
        read: given the first row and one past the last, returns rows of the whole parameter.
    """
    axis = parameter.family.shard_axis
    if axis is None or shard.size == 1:
        return read(begin, end)
    if axis == 0:
        parts = []
        for own, whole, count in _runs(parameter, shard, num_rows):
            low, high = max(begin, own), min(end, own + count)
            if low < high:
                parts.append(read(low - own + whole, high - own + whole))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return _columns(parameter, shard, begin, end, read)


def _runs(parameter: Parameter, shard: Shard, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row of the shard, row of the whole, count) of rows that are neighbours in both."""
    pieces = TRANSFORMS[parameter.family.transform].num_pieces
    count = num_rows // (pieces * shard.size)
    for piece in range(pieces):
        yield piece * count, (piece * shard.size + shard.rank) * count, count


def _columns(parameter: Parameter, shard: Shard, begin: int, end: int, read: Callable[[int, int], Tensor]) -> Tensor:
    """Return the shard's columns of whole rows, a few rows at a time: the others are not kept."""
    width = parameter.shape[1] // shard.size
    columns = slice(shard.rank * width, (shard.rank + 1) * width)
    step = max(1, BLOCK_BYTES // (4 * parameter.shape[1]))
    parts = [read(low, min(low + step, end))[:, columns].clone() for low in range(begin, end, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
