"""Files of `torch.save`: opened as plain data, with every tensor left on disk.

    content = open_torch_file(path)                 # tensors in it are on device "meta": a shape, no memory
    place = locate(path, content["model"][name])    # where its bytes are

Pickle can run code, so it is opened under an allow-list of plain classes, `weights_only`, and never in any other way.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError, UnsafeInputError
from megatron_qwen.strict_json import listing

# Modules of which a checkpoint may name classes and functions; none is imported, `Inert` stands for all of them.
_INERT_MODULES = ("megatron", "numpy", "signal", "pathlib")
_REAL: Mapping[str, type] = {"argparse.Namespace": argparse.Namespace, "_io.BytesIO": io.BytesIO}
# What torch's reader and unpickler raise on bytes that torch.save did not write.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
_MAX_PICKLE_BYTES = 2**30
_LOCK = threading.Lock()


class Inert:
    """Stands for an object of a class that is not opened, such as an enumeration of Megatron's or a random state.

    Attributes:
        arguments: what it would be made of; an enumeration's value.
        state: what it would be filled with, or None.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def open_torch_file(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, with its tensors on device "meta"; see `locate`.

    Raises:
        IncompleteInputError: there is no such file.
        UnsafeInputError: it asks for more than plain data and tensors.
        CorruptInputError: it is not what torch.save writes.
        ConfigError: this torch cannot open a file without reading its tensors.
    """
    _check_zip(path)
    return _open(str(path), str(path), "meta")


def open_torch_bytes(raw: bytes, where: str) -> Any:
    """Return what torch.save made of `raw`, as `open_torch_file` does, with its tensors in memory.

    Args:
        raw: a few kilobytes: what a checkpoint holds beside its large tensors.
        where: file and object, for messages.

    Raises:
        UnsafeInputError, CorruptInputError: as `open_torch_file`.
    """
    return _open(io.BytesIO(raw), where, "cpu")


def _open(source: str | io.BytesIO, where: str, device: str) -> Any:
    try:
        with _no_other_globals():
            needed = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            refused = [name for name in needed if name not in _REAL and name.split(".")[0] not in _INERT_MODULES]
            if refused:
                raise UnsafeInputError(
                    f"{where}: asks for {listing(sorted(refused))}, no plain data; do not use this file"
                )
            torch.serialization.add_safe_globals([(_REAL.get(name, Inert), name) for name in needed])
            if isinstance(source, io.BytesIO):
                source.seek(0)
            return torch.load(source, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        raise UnsafeInputError(f"{where}: cannot be opened as plain data: {reason.splitlines()[0]}") from None
    except UnsafeInputError:
        raise
    except _DAMAGE as error:
        raise CorruptInputError(f"{where}: damaged: {type(error).__name__}: {error}") from None


@contextmanager
def _no_other_globals() -> Iterator[None]:
    """Put aside what others allow torch to open: megatron-core allows its own classes and numpy's, process-wide."""
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def _check_zip(path: Path) -> None:
    if not path.is_file():
        raise IncompleteInputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise CorruptInputError(
            f"{path}: not a file that torch.save wrote (torch 1.6 or newer): {error}; it may be truncated"
        ) from None
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CorruptInputError(f"{path}: {packed[0]} is compressed, which torch.save does not do")
    for record in records:
        if record.filename.endswith("/data.pkl") and record.file_size > _MAX_PICKLE_BYTES:
            raise CorruptInputError(
                f"{path}: its pickle is {record.file_size:,} bytes, expected < {_MAX_PICKLE_BYTES:,}"
            )


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in a file.

    Attributes:
        file: the file.
        offset: of its first value, in bytes.
        shape, strides: in values.
        dtype: of the values.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def locate(path: Path, tensor: Tensor, name: str) -> TensorPlace:
    """Return where the file has a tensor that `open_torch_file` returned.

    Args:
        path: the file.
        tensor: on device "meta".
        name: for messages.

    Raises:
        CorruptInputError: it is sparse or quantized, or reaches beyond its storage or the file.
        ConfigError: this torch does not say where a tensor is.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CorruptInputError(f"{path}: {name}: {tensor.layout}, expected a plain dense tensor")
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None:
        raise ConfigError(
            f"torch {torch.__version__} cannot open {path.name} without reading all of it; install torch 2.11 or newer"
        )
    shape, strides, size = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    inner = tensor.storage_offset() * size
    reach = inner + span(shape, strides) * size
    length = path.stat().st_size
    if reach > storage.nbytes() or begin < 0 or begin + reach > length:
        raise CorruptInputError(
            f"{path}: {name}: needs bytes up to {begin + reach:,}, the file has {length:,}: truncated"
        )
    return TensorPlace(file=path, offset=begin + inner, shape=shape, strides=strides, dtype=tensor.dtype)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of values from a tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
