"""Reads boxes of global tensors out of the chunks in which a `torch_dist` checkpoint keeps them.

Each chunk is a torch zip inside a `.distcp` file; `.metadata` says where. Of a zip only the framing and a pickle of
some hundred bytes are opened, under an allow-list; the values that a box needs are read straight from their place.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import threading
import zipfile
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_qwen.checkpoint.pickles import UNPICKLING_ERRORS, StrictUnpickler
from megatron_qwen.conversion.formats.byte_ranges import read_values
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError, UnsafeInputError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

Index = tuple[int, ...]
_MAX_PICKLE_BYTES = 2**20
_DAMAGE = (*UNPICKLING_ERRORS, zipfile.BadZipFile, zlib.error, RuntimeError)
_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class _Place:
    """Where the values of a chunk lie: byte offset in the file of the first, and strides in values."""

    offset: int
    strides: Index


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
        for key, tensor in tensors.items():
            _check_tiling(folder, metadata, key, tensor)
        self._starts = {key: list(extents) for key, extents in self._extents.items()}
        self._storage: dict[tuple[str, Index], Any] = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()
            if index.fqn in tensors
        }
        self._places: dict[tuple[str, Index], _Place] = {}
        self._lock = threading.Lock()

    def files(self) -> set[Path]:
        """Return the files that hold the tensors."""
        return {self._folder / info.relative_path for info in self._storage.values()}

    def read(self, key: str, offset: Index, size: Index) -> Tensor:
        """Return the box of `size` at `offset` of tensor `key`; only its bytes are read.

        Raises:
            IncompleteInputError: the chunks do not cover the box, or a file is missing.
            CorruptInputError: a file is truncated, or holds something else than `.metadata` says.
        """
        result: Tensor | None = None
        covered = 0
        end = bisect_left(self._starts[key], (offset[0] + size[0],)) if offset else None
        for start in self._starts[key][:end]:
            extent = self._extents[key][start]
            low = [max(a, b) for a, b in zip(offset, start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, start, extent, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            part = self._read_chunk(key, start, low, high)
            if tuple(part.shape) == size:
                return part
            result = torch.empty(size, dtype=self._dtypes[key]) if result is None else result
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))] = part
            covered += part.numel()
        if result is None:
            result = torch.empty(size, dtype=self._dtypes[key])
        if covered != result.numel():
            raise IncompleteInputError(f"{self._folder}: {key}: the chunks do not cover the box {size} at {offset}")
        return result

    def _read_chunk(self, key: str, start: Index, low: list[int], high: list[int]) -> Tensor:
        """Return the box between `low` and `high`, which lies in the chunk that begins at `start`."""
        place = self._place(key, start)
        path = self._folder / self._storage[key, start].relative_path
        first = sum((a - o) * stride for a, o, stride in zip(low, start, place.strides, strict=True))
        size = [b - a for a, b in zip(low, high, strict=True)]
        return _read_box(path, place, self._dtypes[key], first, size)

    def _place(self, key: str, start: Index) -> _Place:
        with self._lock:
            place = self._places.get((key, start))
        if place is not None:
            return place
        info = self._storage.get((key, start))
        if info is None or getattr(info, "transform_descriptors", None):
            raise CorruptInputError(f"{self._folder}: {key}: the chunk at {start} has no plain place in a file")
        expected = (self._extents[key][start], self._dtypes[key])
        place = _open_chunk(self._folder / info.relative_path, info.offset, info.length, expected, f"{key} at {start}")
        with self._lock:
            self._places[key, start] = place
        return place


def _check_tiling(folder: Path, metadata: Metadata, key: str, tensor: TensorStorageMetadata) -> None:
    """Require that the chunks of a tensor cover it exactly: each value lies in one file, and in no second.

    Raises:
        MismatchError: two chunks overlap; both files are named.
        IncompleteInputError: they leave a gap, or reach beyond the tensor.
    """
    chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks)
    for number, (begin, size) in enumerate(chunks):
        for other, extent in itertools.islice(chunks, number + 1, None):
            if other and other[0] >= begin[0] + size[0]:
                break
            if all(b < a + n and a < b + m for a, n, b, m in zip(begin, size, other, extent, strict=True)):
                files = [
                    str(info.relative_path)
                    for index, info in metadata.storage_data.items()
                    if index.fqn == key and tuple(index.offset or ()) in (begin, other)
                ]
                raise MismatchError(
                    f"{folder}: {key}: the chunks at {begin} and {other} overlap, in {' and '.join(files)}: two owners "
                    "of the same values. Save the checkpoint again"
                )
    covered = sum(math.prod(size) for _, size in chunks)
    is_inside = all(a + n <= total for chunk in chunks for a, n, total in zip(*chunk, tensor.size, strict=True))
    if covered != math.prod(tensor.size) or not is_inside:
        raise IncompleteInputError(
            f"{folder}: {key}: its {len(chunks)} chunks hold {covered:,} values, the tensor {tuple(tensor.size)} has "
            f"{math.prod(tensor.size):,}"
        )


def _read_box(path: Path, place: _Place, dtype: torch.dtype, first: int, size: list[int]) -> Tensor:
    """Return a box whose first value is number `first` of the chunk; one with gaps is read in several goes."""
    count = 1 + sum((n - 1) * stride for n, stride in zip(size, place.strides, strict=True))
    has_gaps = count > math.prod(size)
    if not has_gaps or count * dtype.itemsize <= _READ_BYTES:
        return read_values(path, place.offset + first * dtype.itemsize, dtype, count).as_strided(size, place.strides)
    axis = next(i for i, n in enumerate(size) if n > 1)
    step = max(1, min(_READ_BYTES // (max(1, place.strides[axis]) * dtype.itemsize), size[axis] // 2))
    result = torch.empty(size, dtype=dtype)
    for begin in range(0, size[axis], step):
        part = [*size[:axis], min(step, size[axis] - begin), *size[axis + 1 :]]
        values = _read_box(path, place, dtype, first + begin * place.strides[axis], part)
        result.narrow(axis, begin, part[axis]).copy_(values)
    return result


def _open_chunk(path: Path, offset: int, length: int, expected: tuple[Index, torch.dtype], what: str) -> _Place:
    try:
        # Opened before it is looked at: a file may go away between two looks.
        stream = path.open("rb", buffering=0)
    except (FileNotFoundError, IsADirectoryError):
        raise IncompleteInputError(f"{path}: missing; .metadata names it") from None
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size < offset + length:
            raise CorruptInputError(f"{path}: {size} bytes, .metadata needs {offset + length}: truncated")
        window = _Window(stream, offset, length)
        try:
            with zipfile.ZipFile(window) as archive:
                (pickled,) = (item for item in archive.infolist() if item.filename.endswith("/data.pkl"))
                if pickled.file_size > _MAX_PICKLE_BYTES:
                    raise CorruptInputError(f"{path}: {what}: a pickle of {pickled.file_size:,} bytes")
                found = _TensorUnpickler(io.BytesIO(archive.read(pickled))).load()
                if not isinstance(found, _PickledTensor) or (found.shape, found.dtype) != expected:
                    raise CorruptInputError(f"{path}: {what} is {found}, .metadata says {expected}")
                record = archive.getinfo(f"{pickled.filename.removesuffix('data.pkl')}data/{found.storage}")
            begin = _data_offset(window, record) + found.first * found.dtype.itemsize
        except UnsafeInputError as error:
            raise UnsafeInputError(
                f"{path}: {what}: asks for {error}, no part of a tensor; do not use this folder"
            ) from None
        except CorruptInputError:
            raise
        except _DAMAGE as error:
            raise CorruptInputError(f"{path}: {what}: not a tensor that torch wrote: {error}") from None
    reach = 1 + sum((size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True))
    is_inside = found.first >= 0 and (found.first + reach) * found.dtype.itemsize <= record.file_size
    if record.compress_type != zipfile.ZIP_STORED or not is_inside:
        raise CorruptInputError(f"{path}: {what}: {record.file_size:,} bytes stored, which do not hold it")
    return _Place(offset + begin, found.strides)


def _data_offset(window: _Window, record: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin: behind its local header, whose extra field is its own."""
    window.seek(record.header_offset)
    header = window.read(30) or b""
    name_bytes, extra_bytes = struct.unpack("<26xHH", header)
    return record.header_offset + 30 + int(name_bytes) + int(extra_bytes)


@dataclass(frozen=True)
class _PickledTensor:
    """A tensor as its pickle describes it; `first` and `strides` in values."""

    storage: str
    dtype: torch.dtype
    first: int
    shape: Index
    strides: Index


class _TensorUnpickler(StrictUnpickler):
    """Opens the pickle of one plain tensor and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise UnsafeInputError(f"{module}.{name}")

    def persistent_load(self, key: Any) -> tuple[str, torch.dtype]:
        _, dtype, storage, _, _ = key
        return str(storage), dtype


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild(storage: tuple[str, torch.dtype], first: int, shape: Index, strides: Index, *_: Any) -> _PickledTensor:
    return _PickledTensor(storage[0], storage[1], first, tuple(shape), tuple(strides))


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
