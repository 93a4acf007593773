"""Hugging Face folders: safetensors read through memory maps, written tensor by tensor as `save_pretrained` does."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import re
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.safetensors_header import (
    DTYPE_BITS,
    INDEX_NAME,
    SINGLE_NAME,
    TensorEntry,
    check_inside,
    read_folder,
)
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard
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
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CONFIG_NAME = "config.json"
# Files that travel with the weights, copied byte for byte.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class HfFolder:
    """The weights of a Hugging Face folder as a source of Megatron parameters.

    Attributes:
        path: the folder.
        config: its model.
        entries: every tensor by name, from the headers; experts fused by transformers 5 appear one by one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_inside(path, CONFIG_NAME, path / CONFIG_NAME)
        self.config = QwenConfig.from_hf(path)
        self.entries = split_fused_experts(read_folder(path))
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._stamps = {file: _stamp(file) for file in {entry.file for entry in self.entries.values()}}
        _compare_manifest(path)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as a view of the mapped file; do not write to it."""
        entry = self.entries[name]
        count = entry.num_bytes * 8 // DTYPE_BITS[entry.dtype]
        if count == 0:
            return torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        flat = torch.frombuffer(self._map(entry.file), dtype=TORCH_DTYPES[entry.dtype], count=count, offset=entry.begin)
        return flat.view(entry.shape)

    def hf_tensors(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors."""
        return tuple(self.tensor(name) for name in parameter.hf_names)

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it.

        Args:
            parameter: of this folder's model.
            shard: which part along the family's shard axis; only its bytes are read.
            vocabulary_rows: rows of the whole matrix if Megatron pads the vocabulary; the rows added are zero.
        """
        sources = self.hf_tensors(parameter)
        if parameter.has_vocabulary_rows:
            return cut_vocabulary(sources[0], vocabulary_rows or parameter.shape[0], shard)
        return self.assemble(parameter, [cut(source, parameter.family.shard_axis, shard) for source in sources], shard)

    def assemble(self, parameter: Parameter, sources: Sequence[Tensor], shard: Shard = WHOLE) -> Tensor:
        """Return Megatron's tensor made of a parameter's Hugging Face tensors, or of their shards."""
        kind = parameter.family.transform
        sizes = head_sizes(self.config, shard if kind == "qkv" else WHOLE)
        return TRANSFORMS[kind].hf_to_megatron(sources, sizes)

    def check_unchanged(self) -> None:
        """Raise CorruptInputError if a file was replaced or written to since it was opened."""
        changed = sorted(file.name for file, stamp in self._stamps.items() if _stamp(file) != stamp)
        if changed:
            raise CorruptInputError(f"{self.path}: changed while it was read: {', '.join(changed)}; run again")

    def _map(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                with file.open("rb") as stream:
                    # A private mapping: torch wants writable memory, and nothing reaches the file.
                    self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            return self._maps[file]


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


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and generation files byte for byte; return their names.

    Raises:
        UnsafeInputError: one is a link out of the folder.
    """
    names = [name for name in COMPANION_FILES if (source / name).is_file()]
    for name in names:
        check_inside(source, name, source / name)
        shutil.copyfile(source / name, target / name)
    return names


def write_config(folder: Path, config: QwenConfig) -> None:
    """Write config.json."""
    (folder / CONFIG_NAME).write_text(json.dumps(config.to_hf(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Slot:
    shard: int
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class HfWriter:
    """Writes the tensors of one model in any order, from any thread, into safetensors files of a known layout.

    Shards, names, index and the order within a file are those of `save_pretrained`; so is the metadata.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        dtypes: Mapping[str, torch.dtype],
        limit: int,
    ) -> None:
        """Lay out the files.

        Args:
            folder: exists.
            tensors: (name, shape) in the model's order.
            dtypes: of every tensor.
            limit: largest number of tensor bytes in one file.
        """
        shapes = dict(tensors)
        self._slots: dict[str, _Slot] = {}
        self._written: set[str] = set()
        shards = _fill_shards([(name, _num_bytes(shape, dtypes[name])) for name, shape in tensors], limit)
        suffixes = [f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else "" for i in range(len(shards))]
        self._names = [SINGLE_NAME.replace(".safetensors", f"{suffix}.safetensors") for suffix in suffixes]
        self._files: list[int] = []
        for number, (file_name, names) in enumerate(zip(self._names, shards, strict=True)):
            order = sorted(names, key=lambda name: (-_RANK[dtypes[name]], name))
            header, end = _header(order, shapes, dtypes)
            self._files.append(os.open(folder / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            os.pwrite(self._files[-1], header, 0)
            os.truncate(self._files[-1], len(header) + end)
            begin = len(header)
            for name in order:
                self._slots[name] = _Slot(number, begin, shapes[name], dtypes[name])
                begin += _num_bytes(shapes[name], dtypes[name])
        self._index = None
        if len(shards) > 1:
            self._index = folder / INDEX_NAME
            total = sum(_num_bytes(shape, dtypes[name]) for name, shape in tensors)
            self._metadata = {"total_parameters": sum(_count(shape) for _, shape in tensors), "total_size": total}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        slot = self._slots[name]
        assert (tuple(tensor.shape), tensor.dtype) == (slot.shape, slot.dtype), (name, tensor.shape, tensor.dtype, slot)
        assert name not in self._written, name
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._files[slot.shard], data[done:], slot.begin + done)
        self._written.add(name)

    def finish(self) -> None:
        """Write the index, if any, and close the files; every tensor must have been written."""
        missing = sorted(self._slots.keys() - self._written)
        assert not missing, missing
        self.close()
        if self._index is not None:
            weight_map = {name: self._names[slot.shard] for name, slot in self._slots.items()}
            content = {"metadata": self._metadata, "weight_map": weight_map}
            self._index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files, complete or not."""
        while self._files:
            os.close(self._files.pop())


@contextlib.contextmanager
def hf_writer(
    folder: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], dtypes: Mapping[str, torch.dtype], limit: int
) -> Iterator[HfWriter]:
    """Open a `HfWriter` that is finished when the block ends well and closed in any case."""
    writer = HfWriter(folder, tensors, dtypes, limit)
    try:
        yield writer
        writer.finish()
    finally:
        writer.close()


# The order of safetensors' dtype enumeration; a file holds the largest first.
_RANK = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def _header(
    order: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> tuple[bytes, int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + _num_bytes(shapes[name], dtypes[name])
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, end


def _fill_shards(tensors: Sequence[tuple[str, int]], limit: int) -> list[list[str]]:
    """Distribute (name, bytes) as huggingface_hub does: in order, a tensor above the limit in a file of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, num_bytes in tensors:
        if num_bytes > limit:
            shards.append([name])
            continue
        if used + num_bytes > limit:
            shards.append(current)
            current, used = [], 0
        current.append(name)
        used += num_bytes
    return [*shards, current] if current else shards


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


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return _count(shape) * dtype.itemsize
