"""Hugging Face folders as sources: safetensors read range by range; `output` writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.checkpoint.safetensors_header import SAFETENSORS, TensorEntry, WeightFiles, read_folder
from megatron_qwen.checkpoint.torch_bin import PICKLED
from megatron_qwen.conversion.formats.byte_ranges import read_values
from megatron_qwen.conversion.formats.integrity import FileStamps, compare_manifest
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard
from megatron_qwen.conversion.plan import ConversionPlan, plan_import
from megatron_qwen.conversion.rows import gather_rows, head_sizes, read_shard
from megatron_qwen.conversion.transforms import TRANSFORMS
from megatron_qwen.errors import MismatchError
from megatron_qwen.model.config import QwenConfig

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_READ_BYTES = 8 * 2**20


class HfFolder:
    """The weights of a Hugging Face folder as a source of Megatron parameters.

    Attributes:
        path: the folder.
        config: its model.
        entries: every tensor by name, from the headers; experts fused by transformers 5 appear one by one.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        """Open the folder.

        Args:
            path: holds config.json and safetensors.
            allow_pickle: where there are none, open `pytorch_model.bin`, as plain data.
        """
        self.path = path
        check_inside(path, "config.json", path / "config.json")
        self.config = QwenConfig.from_hf(path)
        self.entries = split_fused_experts(_read_entries(path, allow_pickle))
        self._stamps = FileStamps({entry.file for entry in self.entries.values()})
        compare_manifest(path, ".safetensors")

    def plan(self, dtype: torch.dtype | None = None) -> ConversionPlan:
        """Prove from the headers that the folder holds its model, and plan the conversion to `dtype`.

        Raises:
            MismatchError: config.json and weights contradict each other; the message lists everything found.
        """
        return plan_import(self.config, self.entries, where=str(self.path), dtype=dtype)

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        """Return the dtype in which the parameter is stored."""
        return TORCH_DTYPES[self.entries[parameter.hf_names[0]].dtype]

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        shape = self.entries[name].shape
        return self.tensor_rows(name, 0, shape[0]) if shape else self._values(name, 0, 1).view(())

    def tensor_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Return rows (axis 0) of one tensor; only their bytes are read."""
        shape = self.entries[name].shape
        per_row = math.prod(shape[1:])
        return self._values(name, begin * per_row, (end - begin) * per_row).view(end - begin, *shape[1:])

    def hf_tensors(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors."""
        return tuple(self.tensor(name) for name in parameter.hf_names)

    def hf_rows(self, parameter: Parameter, index: int, begin: int, end: int) -> Tensor:
        """Return rows of the parameter's Hugging Face tensor number `index`."""
        return self.tensor_rows(parameter.hf_names[index], begin, end)

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out."""

        def read(index: int, low: int, high: int) -> Tensor:
            return self.hf_rows(parameter, index, low, high)

        return gather_rows(parameter, self.config, begin, end, read)

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it.

        Args:
            parameter: of this folder's model.
            shard: which part along the family's shard axis; only its bytes are kept.
            vocabulary_rows: rows of the whole matrix if Megatron pads the vocabulary; the rows added are zero.
        """
        axis, kind = parameter.family.shard_axis, parameter.family.transform
        # With more ranks than groups, Megatron cuts the rows of the merged tensor, through the groups.
        is_cut_through = kind == "qkv" and self.config.num_key_value_heads % shard.size
        if parameter.has_vocabulary_rows or is_cut_through:
            return read_shard(self, parameter, shard, vocabulary_rows)
        sources = [self._shard(name, axis, shard) for name in parameter.hf_names]
        sizes = head_sizes(self.config, shard if kind == "qkv" else WHOLE)
        return TRANSFORMS[kind].hf_to_megatron(sources, sizes)

    def side_folders(self) -> tuple[Path, ...]:
        """Return where config.json, tokenizer and generation files lie."""
        return (self.path,)

    def check_unchanged(self) -> None:
        """Raise CorruptInputError if a file was replaced or written to since it was opened."""
        self._stamps.check(self.path)

    def _shard(self, name: str, axis: int | None, shard: Shard) -> Tensor:
        shape = self.entries[name].shape
        if axis is None or shard.size == 1:
            return self.tensor(name)
        if shape[axis] % shard.size:
            raise MismatchError(f"axis {axis} of shape {shape} cannot be cut into {shard.size} equal parts")
        size = shape[axis] // shard.size
        if axis == 0:
            return self.tensor_rows(name, shard.rank * size, (shard.rank + 1) * size)
        result = torch.empty((shape[0], size), dtype=TORCH_DTYPES[self.entries[name].dtype])
        step = max(1, _READ_BYTES * shape[0] // max(1, self.entries[name].num_bytes))
        for begin in range(0, shape[0], step):
            end = min(begin + step, shape[0])
            result[begin:end] = self.tensor_rows(name, begin, end)[:, shard.rank * size : (shard.rank + 1) * size]
        return result

    def _values(self, name: str, first: int, count: int) -> Tensor:
        entry = self.entries[name]
        dtype = TORCH_DTYPES[entry.dtype]
        return read_values(entry.file, entry.begin + first * dtype.itemsize, dtype, count)


def has_hf_weights(path: Path) -> bool:
    """Whether a folder holds weights as Hugging Face names them, of either kind."""
    return _has(path, SAFETENSORS) or _has(path, PICKLED)


def _read_entries(path: Path, allow_pickle: bool) -> dict[str, TensorEntry]:
    is_pickled = allow_pickle and _has(path, PICKLED) and not _has(path, SAFETENSORS)
    return read_folder(path, PICKLED if is_pickled else SAFETENSORS)


def _has(path: Path, files: WeightFiles) -> bool:
    return (path / files.single).is_file() or (path / files.index).is_file()


_FUSED = re.compile(r"^(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def split_fused_experts(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Replace `experts.gate_up_proj` [E, 2F, H] and `experts.down_proj` [E, H, F] by entries of single experts.

    This is the layout that transformers 5 keeps in memory. Its parts are contiguous, so each is only an entry.
    """
    result: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        match = _FUSED.match(name)
        if match is None or len(entry.shape) != 3 or entry.shape[0] == 0:
            result[name] = entry
            continue
        prefix, leaf = match.groups()
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        experts, rows, columns = entry.shape
        part_bytes = entry.num_bytes // (experts * len(parts))
        for position in range(experts * len(parts)):
            expert, part = divmod(position, len(parts))
            single = f"{prefix}.{expert}.{parts[part]}.weight"
            begin = entry.begin + position * part_bytes
            shape = (rows // len(parts), columns)
            result[single] = replace(entry, name=single, shape=shape, begin=begin, end=begin + part_bytes)
    return result
