"""Megatron `torch_dist` checkpoints as outputs: every chunk at a place known beforehand, so that many threads write.

A `.distcp` file is a row of chunks, each a zip that `torch.save` would write. torch itself makes the bytes around
the values, once per shape and dtype and without the values (`torch.serialization.skip_data`); the values are written
between them. As `skip_data` does, the CRC-32 in the zip is left at zero: torch reads none, the manifest has SHA-256.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, cast

import torch

from megatron_qwen.conversion.engine.pieces import BLOCK_BYTES, TensorRows, row_pieces
from megatron_qwen.conversion.interfaces import OutputFile, Piece, bytes_file, pwrite_all
from megatron_qwen.errors import ConfigError

METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Several threads write several files; a killed conversion goes on with those that are whole.
FILE_BYTES = 2**30
MIN_FILES = 2


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """One chunk of a global tensor.

    Attributes:
        key: of the global tensor.
        global_shape: its shape.
        offset: where the chunk begins in it.
        rows: the values, and the chunk's shape without leading axes of size 1.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    rows: TensorRows

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the chunk with as many axes as the global tensor."""
        return (*(1 for _ in range(len(self.global_shape) - len(self.rows.shape))), *self.rows.shape)


def torch_dist_output(
    chunks: Sequence[ChunkRows],
    objects: Mapping[str, bytes],
    common: Mapping[str, Any],
    *,
    folder: str = "",
    block: int = BLOCK_BYTES,
) -> list[OutputFile]:
    """Return the files of a checkpoint that stock `dist_checkpointing` loads.

    Args:
        chunks: cover each global tensor exactly; a tensor's chunks agree in global shape.
        objects: what `torch.save` made of each object that is no tensor, by key.
        common: what is not sharded; plain data.
        folder: of the step, with a trailing slash.
        block: bytes that a piece may hold at once.

    Raises:
        ConfigError: chunks of one tensor differ in dtype.
    """
    _check_dtypes(chunks)
    groups = _distribute(chunks)
    storage: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    files = []
    for number, group in enumerate(groups):
        name = f"__{number}_0.distcp"
        files.append(_chunk_file(folder, name, group, objects if number == 0 else {}, storage, block))
    stream = io.BytesIO()
    torch.save(dict(common), stream)
    return [
        *files,
        bytes_file(folder + ".metadata", _metadata(chunks, objects, storage)),
        bytes_file(folder + "common.pt", stream.getvalue()),
        bytes_file(folder + "metadata.json", json.dumps(METADATA_JSON).encode()),
    ]


def _check_dtypes(chunks: Sequence[ChunkRows]) -> None:
    first: dict[str, TensorRows] = {}
    for chunk in chunks:
        rows = first.setdefault(chunk.key, chunk.rows)
        if rows.dtype != chunk.rows.dtype:
            raise ConfigError(
                f"{rows.label} is {rows.dtype}, {chunk.rows.label} is {chunk.rows.dtype}, and a torch_dist checkpoint "
                f"keeps both in one tensor, {chunk.key}; give --dtype"
            )


def _distribute(chunks: Sequence[ChunkRows]) -> list[list[ChunkRows]]:
    """Return the chunks in files of about equal bytes; within a file they stay in the model's order."""
    total = sum(chunk.rows.num_bytes for chunk in chunks)
    filled = [0] * max(MIN_FILES, -(-total // FILE_BYTES))
    place: dict[int, int] = {}
    for position in sorted(range(len(chunks)), key=lambda i: -chunks[i].rows.num_bytes):
        place[position] = filled.index(min(filled))
        filled[place[position]] += chunks[position].rows.num_bytes
    return [[chunk for i, chunk in enumerate(chunks) if place[i] == file] for file in range(len(filled))]


def _chunk_file(
    folder: str,
    name: str,
    chunks: Sequence[ChunkRows],
    objects: Mapping[str, bytes],
    storage: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]],
    block: int,
) -> OutputFile:
    fixed: list[tuple[int, bytes]] = []
    pieces: list[Piece] = []
    end = 0
    for key, content in objects.items():
        fixed.append((end, content))
        storage[key, None] = (name, end, len(content))
        end += len(content)
    for chunk in chunks:
        head, tail = _framing(chunk.shape, chunk.rows.dtype)
        values = end + len(head)
        after = values + chunk.rows.num_bytes
        fixed += [(end, head), (after, tail)]
        pieces += row_pieces(chunk.rows, values, block)
        storage[chunk.key, chunk.offset] = (name, end, after + len(tail) - end)
        end = after + len(tail)
    return OutputFile(
        name=folder + name, num_bytes=end, skeleton=partial(_write_fixed, fixed, end), pieces=tuple(pieces)
    )


def _write_fixed(fixed: Sequence[tuple[int, bytes]], num_bytes: int, descriptor: int) -> None:
    os.ftruncate(descriptor, num_bytes)
    for offset, content in fixed:
        pwrite_all(descriptor, content, offset)


@functools.lru_cache(maxsize=1024)
def _framing(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return what `torch.save` writes before and after the values of a tensor."""
    recorder = _Framing()
    with torch.serialization.skip_data():
        # The memory is only reserved: nothing touches it.
        torch.save(torch.empty(shape, dtype=dtype), cast("IO[bytes]", recorder))
    head, tail = recorder.parts if len(recorder.parts) == 2 else (recorder.parts[0], b"")
    assert recorder.skipped == torch.Size(shape).numel() * dtype.itemsize, (shape, dtype, recorder.skipped)
    return bytes(head), bytes(tail)


class _Framing(io.RawIOBase):
    """Takes what torch writes, and notes how many bytes of values it steps over instead of writing."""

    def __init__(self) -> None:
        self.parts = [bytearray()]
        self.skipped = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_CUR, whence
        self.skipped += position
        self.parts.append(bytearray())
        return position


def _metadata(
    chunks: Sequence[ChunkRows],
    objects: Mapping[str, bytes],
    storage: Mapping[tuple[str, tuple[int, ...] | None], tuple[str, int, int]],
) -> bytes:
    """Return the `.metadata` that torch's own planner and writer make; it names no folder and no machine."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    for chunk in chunks:
        header = TensorStorageMetadata(TensorProperties(dtype=chunk.rows.dtype), torch.Size(chunk.global_shape), [])
        described.setdefault(chunk.key, header).chunks.append(
            ChunkStorageMetadata(offsets=torch.Size(chunk.offset), sizes=torch.Size(chunk.shape))
        )
    places = {
        MetadataIndex(key, None if offset is None else torch.Size(offset)): filesystem._StorageInfo(*place)
        for (key, offset), place in storage.items()
    }
    metadata = Metadata(described, storage_data=places, storage_meta=StorageMeta())
    if hasattr(filesystem, "CURRENT_DCP_VERSION"):
        metadata.version = filesystem.CURRENT_DCP_VERSION
    return pickle.dumps(metadata)
