"""A parameter's rows in Hugging Face's tensors and in Megatron's: which lies where, so that any slice converts alone.

Every transform of `transforms.py` moves whole rows (axis 0). Applied to row numbers instead of weights, it says where
each row goes; neighbours form runs. So a slice of either side is read from a few byte ranges of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_qwen.conversion.plan import ConversionPlan, StoredTensor, plan_export
from megatron_qwen.conversion.transforms import TRANSFORMS, HeadSizes, pad_rows

if TYPE_CHECKING:
    from megatron_qwen.conversion.interfaces import WeightSource
    from megatron_qwen.conversion.parameters import Parameter, Shard
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


class MegatronRows:
    """For a source that stores Megatron's layout: its plan, and `hf_rows` made of its `rows`.

    Attributes:
        path: the folder, for messages.
        config: the model.
        stored: header of every weight tensor under its key in a torch_dist checkpoint.
    """

    path: Path
    config: QwenConfig
    stored: Mapping[str, StoredTensor]

    def plan(self, dtype: torch.dtype | None = None) -> ConversionPlan:
        """Prove from the headers that the folder holds its model, and plan the conversion to `dtype`.

        Raises:
            MismatchError: config.json and weights contradict each other; the message lists everything found.
        """
        return plan_export(self.config, self.stored, where=str(self.path), dtype=dtype)

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out."""
        raise TypeError(f"{type(self).__name__} has to define rows")

    def hf_rows(self, parameter: Parameter, index: int, begin: int, end: int) -> Tensor:
        """Return rows of the parameter's Hugging Face tensor number `index`."""

        def read(low: int, high: int) -> Tensor:
            return self.rows(parameter, low, high)

        return gather_hf_rows(parameter, self.config, index, begin, end, read)


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
