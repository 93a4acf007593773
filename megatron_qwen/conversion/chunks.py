"""Reads boxes of global tensors out of the chunks in which a `torch_dist` checkpoint keeps them.

Each chunk is a torch zip inside a `.distcp` file; `.metadata` says where. Opened weights-only, never as plain pickle.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_qwen.errors import CorruptInputError, IncompleteInputError

Index = tuple[int, ...]


class ChunkReader:
    """Random access to the tensors of one checkpoint folder; safe to use from several threads."""

    def __init__(self, folder: Path, metadata: Metadata, tensors: Mapping[str, TensorStorageMetadata]) -> None:
        """Index the chunks.

        Args:
            folder: holds the `.distcp` files.
            metadata: its checked `.metadata`.
            tensors: the entries of `metadata` that will be read.
        """
        self._folder = folder
        self._dtypes = {key: tensor.properties.dtype for key, tensor in tensors.items()}
        self._extents: dict[str, dict[Index, Index]] = {
            key: {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in sorted(tensor.chunks, key=lambda c: c.offsets)}
            for key, tensor in tensors.items()
        }
        self._starts = {key: list(extents) for key, extents in self._extents.items()}
        self._storage: dict[tuple[str, Index], Any] = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()
            if index.fqn in tensors
        }
        self._last = threading.local()

    def read(self, key: str, offset: Index, size: Index) -> Tensor:
        """Return the box of `size` at `offset` of tensor `key`; do not write to it.

        Raises:
            IncompleteInputError: the chunks do not cover the box, or a file is missing.
            CorruptInputError: a file is truncated, or holds something else than `.metadata` says.
        """
        if self._extents[key].get(offset) == size:
            return self._load(key, offset)
        result = torch.empty(size, dtype=self._dtypes[key])
        covered = 0
        end = bisect_left(self._starts[key], (offset[0] + size[0],))
        for start in self._starts[key][:end]:
            extent = self._extents[key][start]
            low = [max(a, b) for a, b in zip(offset, start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, start, extent, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._load(key, start)[_slices(low, high, start)]
            if tuple(part.shape) == size:
                return part
            result[_slices(low, high, offset)] = part
            covered += part.numel()
        if covered != result.numel():
            raise IncompleteInputError(f"{self._folder}: {key}: the chunks do not cover the box {size} at {offset}")
        return result

    def _load(self, key: str, start: Index) -> Tensor:
        if getattr(self._last, "chunk", None) == (key, start):
            kept: Tensor = self._last.tensor
            return kept
        info = self._storage.get((key, start))
        if info is None or getattr(info, "transform_descriptors", None):
            raise CorruptInputError(f"{self._folder}: {key}: the chunk at {start} has no plain place in a file")
        # The chunk kept from the last call is let go before the next is read: one in memory, not two.
        self._last.chunk = self._last.tensor = None
        path = self._folder / info.relative_path
        with _window(path, info.offset, info.length) as stream:
            tensor = torch.load(stream, map_location="cpu", weights_only=True)
        expected = (self._extents[key][start], self._dtypes[key])
        found = (tuple(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or found != expected:
            raise CorruptInputError(f"{path}: {key}: the chunk at {start} is {found}, .metadata says {expected}")
        self._last.chunk, self._last.tensor = (key, start), tensor
        return tensor


def _slices(low: list[int], high: list[int], origin: Index) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: io.FileIO, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._position = stream, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence] + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._stream.seek(self._offset + self._position)
        count = self._stream.readinto(view)
        self._position += count
        return count


@contextmanager
def _window(path: Path, offset: int, length: int) -> Iterator[Any]:
    if not path.is_file():
        raise IncompleteInputError(f"{path}: missing; .metadata names it")
    if path.stat().st_size < offset + length:
        raise CorruptInputError(f"{path}: {path.stat().st_size} bytes, .metadata needs {offset + length}: truncated")
    with path.open("rb", buffering=0) as stream:
        yield _Window(stream, offset, length)
