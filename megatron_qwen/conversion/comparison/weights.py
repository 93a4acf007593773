"""Compares two checkpoints of any format on either side: the configuration, and every tensor to the last bit.

Tensors are read in blocks of rows by several threads, so two models of any size are compared in little memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.conversion.comparison.advance import Advance, Progress, silent
from megatron_qwen.conversion.comparison.stored_arguments import contradictions
from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.parameters import Parameter, parameters
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig

# Not part of the function that the model computes, or compared tensor by tensor.
_CONFIG_FIELDS_IGNORED = frozenset({"torch_dtype", "inert_fields"})
_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor, or one field of the configuration, that differs.

    Attributes:
        name: Hugging Face name of the tensor, `config.<field>`, or `A: args.<argument>` where the Megatron-LM arguments
            in a checkpoint contradict its own config.json.
        kind: "missing in A", "missing in B", "shape", "dtype", "values" or "config".
        detail: what was found on both sides.
        count: number of values whose bits differ; for two dtypes, after rounding to the coarser.
        max_abs: largest absolute difference of two finite values.
        first: index of the first value that differs.
    """

    name: str
    kind: str
    detail: str
    count: int = 0
    max_abs: float = 0.0
    first: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Outcome of a comparison: `tensors` compared, `weight_bytes` of them on side A, and what differs."""

    a: str
    b: str
    tensors: int
    weight_bytes: int
    differences: tuple[Difference, ...]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "is_equal": self.is_equal, "differences": [asdict(item) for item in self.differences]}


def verify(
    a: str | Path, b: str | Path, *, threads: int = 2, allow_pickle: bool = False, progress: Progress = silent
) -> VerifyReport:
    """Compare configuration and every tensor of two folders, bit for bit.

    Args:
        a: a Hugging Face or Megatron folder.
        b: likewise; the formats may differ.
        threads: that read and compare.
        allow_pickle: open weights that are pickles, as plain data.
        progress: of the tensors, and of A's bytes.

    Raises:
        InputError, ConfigError: a folder cannot be read; a difference is no error.
    """
    if threads < 1:
        raise ConfigError(f"threads: got {threads}, expected at least 1")
    left, right = (open_source(folder, allow_pickle=allow_pickle) for folder in (a, b))
    differences = [*_compare_configs(left.config, right.config), *_compare_arguments(left, right)]
    mine, theirs = _by_name(left.config), _by_name(right.config)
    blocks: list[_Block] = []
    for name in dict.fromkeys((*mine, *theirs)):
        if name not in mine or name not in theirs:
            differences.append(Difference(name=name, kind=f"missing in {'B' if name in mine else 'A'}", detail=""))
            continue
        shapes = [_shape(*side[name]) for side in (mine, theirs)]
        if shapes[0] != shapes[1]:
            differences.append(Difference(name=name, kind="shape", detail=f"{shapes[0]} and {shapes[1]}"))
        else:
            blocks += _blocks(name, mine[name], theirs[name], left.dtype_of(mine[name][0]).itemsize)
    tensors, num_bytes = sum(block.is_last for block in blocks), sum(block.num_bytes for block in blocks)
    with progress("tensors", tensors, num_bytes) as advance:
        differences += _compare_blocks(left, right, blocks, threads, advance)
    for source in (left, right):
        source.check_unchanged()
    return VerifyReport(a=str(a), b=str(b), tensors=tensors, weight_bytes=num_bytes, differences=tuple(differences))


def compare_tensors(name: str, a: Tensor, b: Tensor) -> list[Difference]:
    """Return how two tensors differ in shape, dtype or bits; an empty list if they do not."""
    if a.shape != b.shape:
        return [Difference(name=name, kind="shape", detail=f"{tuple(a.shape)} and {tuple(b.shape)}")]
    coarser = min((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    # Bits, not values: -0.0 differs from 0.0, and a NaN equals itself.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[coarser.itemsize]
    x, y = a.to(coarser).contiguous(), b.to(coarser).contiguous()
    if torch.equal(x.view(bits), y.view(bits)):
        rounded = f"{a.dtype} and {b.dtype}, equal when rounded"
        return [] if a.dtype == b.dtype else [Difference(name=name, kind="dtype", detail=rounded)]
    different = x.view(bits) != y.view(bits)
    gap = (a.double() - b.double()).abs()
    finite = gap[gap.isfinite()]
    first = tuple(int(i) for i in different.nonzero()[0])
    values = f"{a[first].item()} and {b[first].item()} at {first}"
    return [
        Difference(
            name=name,
            kind="values" if a.dtype == b.dtype else "dtype",
            detail=values if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}, also rounded: {values}",
            count=int(different.sum()),
            max_abs=float(finite.max()) if finite.numel() else 0.0,
            first=first,
        )
    ]


_Place = tuple[Parameter, int]
"""A Hugging Face tensor: its parameter and its number in it."""


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows `begin` to `end` of one tensor that both sides have in the same shape."""

    name: str
    a: _Place
    b: _Place
    begin: int
    end: int
    num_bytes: int
    is_last: bool


def _blocks(name: str, a: _Place, b: _Place, itemsize: int) -> Iterator[_Block]:
    rows, *rest = _shape(*a)
    row_bytes = math.prod(rest) * itemsize
    step = max(1, _BLOCK_BYTES // row_bytes)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield _Block(
            name=name, a=a, b=b, begin=begin, end=end, num_bytes=(end - begin) * row_bytes, is_last=end == rows
        )


def _compare_blocks(
    a: WeightSource, b: WeightSource, blocks: list[_Block], threads: int, advance: Advance
) -> list[Difference]:
    def compare(block: _Block) -> list[Difference]:
        x, y = a.hf_rows(*block.a, block.begin, block.end), b.hf_rows(*block.b, block.begin, block.end)
        return [_moved(item, block.begin) for item in compare_tensors(block.name, x, y)]

    merged: dict[str, Difference] = {}
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for block, found in zip(blocks, pool.map(compare, blocks), strict=True):
                for item in found:
                    merged[item.name] = _joined(merged[item.name], item) if item.name in merged else item
                advance(int(block.is_last), block.num_bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return list(merged.values())


def _moved(item: Difference, rows: int) -> Difference:
    """Return the difference of a block as one of the whole tensor."""
    if not item.first or rows == 0:
        return item
    first = (item.first[0] + rows, *item.first[1:])
    return replace(item, first=first, detail=item.detail.replace(f" at {item.first}", f" at {first}"))


def _joined(a: Difference, b: Difference) -> Difference:
    """Return the difference of a tensor, given that of two parts of it in order."""
    earlier = a if a.first or not b.first else b
    return replace(earlier, count=a.count + b.count, max_abs=max(a.max_abs, b.max_abs))


def _by_name(config: QwenConfig) -> Mapping[str, _Place]:
    return {name: (item, index) for item in parameters(config) for index, name in enumerate(item.hf_names)}


def _shape(parameter: Parameter, index: int) -> tuple[int, ...]:
    return parameter.hf_shapes[index]


def _compare_configs(a: QwenConfig, b: QwenConfig) -> Iterable[Difference]:
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name not in _CONFIG_FIELDS_IGNORED and x != y:
            yield Difference(name=f"config.{field.name}", kind="config", detail=f"{x} and {y}")


def _compare_arguments(a: WeightSource, b: WeightSource) -> Iterable[Difference]:
    """Yield where a Megatron checkpoint contradicts itself: its arguments describe another model than config.json."""
    for side, source in (("A", a), ("B", b)):
        for item in contradictions(source):
            yield Difference(name=f"{side}: args.{item.argument}", kind="config", detail=str(item))
