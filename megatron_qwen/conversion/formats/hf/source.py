"""Hugging Face folders as sources: safetensors read range by range; `output` writes them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.checkpoint.safetensors_header import SAFETENSORS, TensorEntry, WeightFiles, read_folder
from megatron_qwen.checkpoint.torch_bin import PICKLED
from megatron_qwen.conversion.formats.byte_ranges import read_values
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard
from megatron_qwen.conversion.plan import ConversionPlan, plan_import
from megatron_qwen.conversion.rows import gather_rows, read_shard
from megatron_qwen.conversion.transforms import TRANSFORMS, HeadSizes, pad_rows
from megatron_qwen.errors import CorruptInputError, MismatchError
from megatron_qwen.model.config import QwenConfig

logger = logging.getLogger(__name__)

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
        _compare_manifest(path)

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
        if parameter.has_vocabulary_rows:
            rows = (vocabulary_rows or parameter.shape[0]) // shard.size
            begin, end = (min(i * rows, parameter.shape[0]) for i in (shard.rank, shard.rank + 1))
            return pad_rows(self.hf_rows(parameter, 0, begin, end), rows)
        axis, kind = parameter.family.shard_axis, parameter.family.transform
        if kind == "qkv" and self.config.num_key_value_heads % shard.size:
            # More ranks than groups: Megatron cuts the rows of the merged tensor, through the groups.
            return read_shard(self, parameter, shard)
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


class FileStamps:
    """Sizes and times of files, to see later that nobody wrote to them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {file: _stamp(file) for file in files}

    def add(self, files: Iterable[Path]) -> None:
        """Watch further files too."""
        self._stamps |= {file: _stamp(file) for file in files if file not in self._stamps}

    def check(self, where: Path) -> None:
        """Raise CorruptInputError if a file was replaced, deleted or written to."""
        changed = sorted(
            file.name for file, stamp in self._stamps.items() if not file.is_file() or _stamp(file) != stamp
        )
        if changed:
            raise CorruptInputError(f"{where}: changed while it was read: {', '.join(changed)}; run again")


def head_sizes(config: QwenConfig, shard: Shard = WHOLE) -> HeadSizes:
    """Return the sizes that the QKV rearrangement needs for one shard.

    Raises:
        MismatchError: the query groups cannot be cut into so many shards.
    """
    if config.num_key_value_heads % shard.size:
        raise MismatchError(f"num_key_value_heads {config.num_key_value_heads} is not a multiple of TP {shard.size}")
    return HeadSizes(num_groups=config.num_key_value_heads // shard.size, head_dim=config.head_dim)


def cut(tensor: Tensor, axis: int | None, shard: Shard) -> Tensor:
    """Return the shard of `tensor` along `axis`; all of it if axis is None."""
    if axis is None or shard.size == 1:
        return tensor
    if tensor.shape[axis] % shard.size:
        raise MismatchError(f"axis {axis} of shape {tuple(tensor.shape)} cannot be cut into {shard.size} equal parts")
    return tensor.chunk(shard.size, dim=axis)[shard.rank]


def cut_vocabulary(tensor: Tensor, rows: int, shard: Shard) -> Tensor:
    """Return the shard of a vocabulary matrix padded with zero rows to `rows`."""
    per_shard = rows // shard.size
    return pad_rows(tensor[shard.rank * per_shard : (shard.rank + 1) * per_shard], per_shard)


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


def _compare_manifest(path: Path) -> None:
    if not (path / manifest.MANIFEST_NAME).is_file():
        logger.info("%s: no %s, so the content is not verified against digests", path, manifest.MANIFEST_NAME)
        return
    weights = [name for name in manifest.read_manifest(path) if name.endswith(".safetensors")]
    problems = manifest.verify(path, "sizes", weights)
    if problems:
        raise CorruptInputError(f"{path}: not as its {manifest.MANIFEST_NAME} says: {'; '.join(problems)}")


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
