"""Lays a `torch.save` file out before its tensors exist, so that they are written into place one by one, in any order.

    layout = lay_out({"model": {name: torch.empty(shape, dtype=dtype, device="meta")}})
    layout.num_bytes                    # size of the file
    layout.fixed                        # (offset, bytes): framing, pickle, and tensors that were given with data
    layout.offsets                      # where the bytes of each meta tensor go, in the order in which they appear

The file is a zip of uncompressed records, tensor data at multiples of 64 bytes as torch writes it; `torch.load` opens
it with and without `mmap`. Checksums of the meta tensors' records are zero: torch does not look at them (its own
`set_crc32_options(False)` leaves them out too), `unzip -t` would.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
_MAX_32 = 0xFFFFFFFF
_MAX_16 = 0xFFFF
_DATE = 1 << 5 | 1  # 1 January 1980: the same input gives the same bytes
_PADDING_ID = 0x4246  # "FB", the extra field with which torch pads
_ROOT = "archive"
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True, kw_only=True)
class TorchFileLayout:
    """A file without its tensors.

    Attributes:
        num_bytes: its size.
        fixed: (offset, bytes) of all that is not a meta tensor.
        offsets: of the meta tensors, in the order of the pickle: dicts and lists by position, depth first.
    """

    num_bytes: int
    fixed: tuple[tuple[int, bytes], ...]
    offsets: tuple[int, ...]


def lay_out(content: Any) -> TorchFileLayout:
    """Lay out `torch.save(content)`.

    Args:
        content: plain data. Tensors on device "meta" stand for those to be written later, contiguous; others are
            small and written with the rest.
    """
    raw = io.BytesIO()
    pickler = _Pickler(raw)
    pickler.dump(content)
    archive = _Archive()
    archive.add("data.pkl", raw.getvalue())
    archive.add("byteorder", sys.byteorder.encode())
    offsets = []
    for key, tensor in enumerate(pickler.tensors):
        if tensor.device.type == "meta":
            offsets.append(archive.add(f"data/{key}", num_bytes=math.prod(tensor.shape) * tensor.dtype.itemsize))
        else:
            archive.add(f"data/{key}", tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    archive.add("version", b"3\n")
    num_bytes = archive.finish()
    return TorchFileLayout(num_bytes=num_bytes, fixed=tuple(archive.fixed), offsets=tuple(offsets))


class _StoragePlace:
    """Stands for a tensor's storage in the pickle."""

    def __init__(self, key: int, tensor: Tensor) -> None:
        self.key, self.tensor = key, tensor


class _Pickler(pickle.Pickler):
    """Pickles tensors as torch does: a call of its rebuilding function, the storage named by a persistent id."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[Tensor] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        place = _StoragePlace(len(self.tensors), value)
        self.tensors.append(value)
        strides = torch.empty(value.shape, device="meta").stride()
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (place, 0, tuple(value.shape), strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _StoragePlace):
            return None
        tensor = value.tensor
        return "storage", _STORAGES[tensor.dtype], str(value.key), "cpu", math.prod(tensor.shape)


class _Archive:
    """A zip of uncompressed records whose sizes are known and whose content need not be."""

    def __init__(self) -> None:
        self.fixed: list[tuple[int, bytes]] = []
        self._end = 0
        self._directory: list[bytes] = []

    def add(self, name: str, content: bytes | None = None, *, num_bytes: int = 0) -> int:
        """Add a record; return the offset of its content. Without `content`, leave `num_bytes` bytes for it."""
        size, crc = (num_bytes, 0) if content is None else (len(content), zlib.crc32(content))
        path = f"{_ROOT}/{name}".encode()
        header = self._end
        is_large = size >= _MAX_32
        zip64 = struct.pack("<HHQQ", 1, 16, size, size) if is_large else b""
        short = _MAX_32 if is_large else size
        unpadded = header + 30 + len(path) + len(zip64) + 4
        padding = -unpadded % _ALIGNMENT
        extra = zip64 + struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
        common = struct.pack("<HHHHHIIIHH", 45, 0, 0, 0, _DATE, crc, short, short, len(path), len(extra))
        begin = unpadded + padding
        self.fixed.append((header, b"PK\x03\x04" + common + path + extra))
        if content is not None:
            self.fixed.append((begin, content))
        self._end = begin + size
        self._directory.append(_directory_entry(path, crc, size, header))
        return begin

    def finish(self) -> int:
        """Add the directory; return the size of the file."""
        begin, count = self._end, len(self._directory)
        directory = b"".join(self._directory)
        locator = begin + len(directory)
        where = (count, count, len(directory), begin)
        # Always with the 64-bit records: readers take them where they are, and no size needs a case of its own.
        end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *where)
        end += b"PK\x06\x07" + struct.pack("<IQI", 0, locator, 1)
        short = (min(count, _MAX_16), min(count, _MAX_16), min(len(directory), _MAX_32), min(begin, _MAX_32))
        end += b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *short, 0)
        self.fixed.append((begin, directory + end))
        return locator + len(end)


def _directory_entry(path: bytes, crc: int, size: int, header: int) -> bytes:
    long: list[int] = [size, size] if size >= _MAX_32 else []
    if header >= _MAX_32:
        long.append(header)
    extra = struct.pack(f"<HH{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    sizes: Sequence[int] = (min(size, _MAX_32),) * 2
    fields = (45, 45, 0, 0, 0, _DATE, crc, *sizes, len(path), len(extra), 0, 0, 0, 0, min(header, _MAX_32))
    return b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", *fields) + path + extra
