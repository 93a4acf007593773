"""A parameter's rows in Hugging Face's tensors and in Megatron's: which lies where, so that any slice converts alone.

Every transform of `transforms.py` moves whole rows (axis 0). Applied to row numbers instead of weights, it says where
each row goes; neighbours form runs. So a slice of either side is read from a few byte ranges of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard
from megatron_qwen.conversion.transforms import TRANSFORMS, HeadSizes, pad_rows
from megatron_qwen.errors import MismatchError

if TYPE_CHECKING:
    from megatron_qwen.conversion.interfaces import WeightSource
    from megatron_qwen.model.config import QwenConfig


@dataclass(frozen=True)
class Run:
    """Rows that are neighbours on both sides: `num_rows` from `hf_row` of tensor `index` are Megatron's from `row`."""

    row: int
    index: int
    hf_row: int
    num_rows: int


def row_runs(parameter: Parameter, config: QwenConfig) -> tuple[Run, ...]:
    """Return the runs of a whole parameter in the order of Megatron's rows."""
    counts = tuple(shape[0] for shape in parameter.hf_shapes)
    return _runs(parameter.family.transform, counts, config.num_key_value_heads, config.head_dim)


@functools.lru_cache(maxsize=256)
def _runs(kind: str, counts: tuple[int, ...], num_groups: int, head_dim: int) -> tuple[Run, ...]:
    if len(counts) == 1:
        return (Run(0, 0, 0, counts[0]),)
    numbers = torch.arange(sum(counts))
    merged = TRANSFORMS[kind].hf_to_megatron(
        torch.split(numbers, list(counts)), HeadSizes(num_groups=num_groups, head_dim=head_dim)
    )
    ends = torch.tensor(counts).cumsum(0)
    index = torch.searchsorted(ends, merged, right=True)
    starts = torch.ones_like(merged, dtype=torch.bool)
    starts[1:] = (merged[1:] != merged[:-1] + 1) | (index[1:] != index[:-1])
    first = starts.nonzero().flatten().tolist()
    runs = []
    for row, after in zip(first, [*first[1:], len(merged)], strict=True):
        tensor = int(index[row])
        runs.append(Run(row, tensor, int(merged[row]) - sum(counts[:tensor]), after - row))
    return tuple(runs)


def gather_rows(
    parameter: Parameter, config: QwenConfig, begin: int, end: int, read: Callable[[int, int, int], Tensor]
) -> Tensor:
    """Return rows `begin` to `end` of Megatron's tensor; `read(index, begin, end)` gives Hugging Face rows."""
    parts = []
    for run in row_runs(parameter, config):
        low, high = max(begin, run.row), min(end, run.row + run.num_rows)
        if low < high:
            shift = run.hf_row - run.row
            parts.append((run.index, low + shift, high + shift))
    return _join([read(*part) for part in parts or [(0, 0, 0)]])


def gather_hf_rows(
    parameter: Parameter, config: QwenConfig, index: int, begin: int, end: int, read: Callable[[int, int], Tensor]
) -> Tensor:
    """Return rows of Hugging Face tensor `index`; `read(begin, end)` gives rows of Megatron's tensor."""
    parts = []
    for run in sorted(row_runs(parameter, config), key=lambda run: run.hf_row):
        low, high = max(begin, run.hf_row), min(end, run.hf_row + run.num_rows)
        if run.index == index and low < high:
            shift = run.row - run.hf_row
            parts.append((low + shift, high + shift))
    return _join([read(*part) for part in parts or [(0, 0)]])


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def read_shard(source: WeightSource, parameter: Parameter, shard: Shard, vocabulary_rows: int | None = None) -> Tensor:
    """Return one tensor-parallel shard made of a source's rows; see `WeightSource.read`."""
    axis, num_rows = parameter.family.shard_axis, parameter.shape[0]
    if axis is None or (shard.size == 1 and not vocabulary_rows):
        return source.rows(parameter, 0, num_rows)
    if axis == 1:
        columns = parameter.shape[1] // shard.size
        return source.rows(parameter, 0, num_rows)[:, shard.rank * columns : (shard.rank + 1) * columns]
    if parameter.has_vocabulary_rows:
        count = (vocabulary_rows or num_rows) // shard.size
        begin, end = (min(i * count, num_rows) for i in (shard.rank, shard.rank + 1))
        return pad_rows(source.rows(parameter, begin, end), count)
    pieces = TRANSFORMS[parameter.family.transform].num_pieces
    count = num_rows // (pieces * shard.size)
    begins = [(piece * shard.size + shard.rank) * count for piece in range(pieces)]
    parts = [source.rows(parameter, begin, begin + count) for begin in begins]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def head_sizes(config: QwenConfig, shard: Shard = WHOLE) -> HeadSizes:
    """Return the sizes that the QKV rearrangement needs for one shard.

    Raises:
        MismatchError: the query groups cannot be cut into so many shards.
    """
    if config.num_key_value_heads % shard.size:
        raise MismatchError(f"num_key_value_heads {config.num_key_value_heads} is not a multiple of TP {shard.size}")
    return HeadSizes(num_groups=config.num_key_value_heads // shard.size, head_dim=config.head_dim)
