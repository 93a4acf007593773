"""Opens the pickles of a Megatron `torch_dist` folder without running code from them.

torch's distributed checkpoint reads `.metadata` with plain pickle, and the objects inside the shards (random
states, Transformer Engine extra state) with `weights_only=False`: whoever can write the folder can run code in the
job. So before Megatron-Core opens a folder, each of its pickles is read here once under an allow-list.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, UnsafeInputError

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 2**29  # about 150 bytes for each chunk of a tensor
COMMON_NAME = "common.pt"
COMMON_KEY = "common_state/shard_0_1"  # where megatron-core 0.19 keeps what 0.16 puts into common.pt

_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


# What a damaged or hostile pickle can make the unpickler raise.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class StrictUnpickler(pickle._Unpickler):
    """An unpickler for hostile bytes; a subclass says in `find_class` what they may name. Give it a BytesIO.

    The one written in C fills as much memory as a memo number in the pickle asks for (64 GB for five bytes). This
    one, in Python, takes 1.7 times as long and holds no more than the bytes do. No pickle may write to a class in it.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def _load_build(self) -> None:
        if callable(self.stack[-2]):
            raise UnsafeInputError(f"a change of {getattr(self.stack[-2], '__qualname__', 'a function')}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = _load_build


class _MetadataUnpickler(StrictUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_torch_value = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if is_torch_value or (module, name) == ("torch", "Size") or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeInputError(f"{module}.{name}")


def read_metadata(folder: Path) -> Metadata:
    """Return the index of a `torch_dist` folder: what tensors and objects it holds, and in which files.

    Raises:
        IncompleteInputError: there is no `.metadata`.
        UnsafeInputError: it asks for more than the classes of a checkpoint index, or for a file outside the folder.
        CorruptInputError: it is not a checkpoint index.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        raise IncompleteInputError(
            f"{folder}: no {METADATA_NAME}; not a torch_dist checkpoint, or its save was interrupted"
        )
    check_inside(folder, METADATA_NAME, path)
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise CorruptInputError(f"{path}: {path.stat().st_size} bytes, the limit is {MAX_METADATA_BYTES}")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise CorruptInputError(f"{path}: holds a {type(metadata).__name__}, expected a torch checkpoint index")
        _check_index(metadata)
        names = {storage.relative_path for storage in metadata.storage_data.values()}
    except UnsafeInputError as error:
        raise UnsafeInputError(
            f"{path}: asks for {error}, which has no place in a checkpoint index; do not use this folder"
        ) from None
    except CorruptInputError:
        raise
    except UNPICKLING_ERRORS as error:
        raise CorruptInputError(f"{path}: not a checkpoint index: {type(error).__name__}: {error}") from None
    for name in sorted(names):
        if not name.isprintable() or any(sign in name for sign in "/\\:") or name in ("", ".", ".."):
            raise UnsafeInputError(f"{path}: names the file {name!r}, expected a plain name in this folder")
        check_inside(folder, name, folder / name)
    return metadata


def _check_index(metadata: Metadata) -> None:
    """Require the types that torch writes; raise one of UNPICKLING_ERRORS otherwise."""
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise TypeError(f"entry {key!r} of type {type(entry).__name__}")
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"{key}: dtype {entry.properties.dtype!r}")
            _check_sizes(key, entry.size)
            for chunk in entry.chunks:
                _check_chunk(key, chunk, len(entry.size))
    for index, storage in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(index.fqn, str):
            raise TypeError(f"place {index!r}")
        if index.offset is not None:
            _check_sizes(index.fqn, index.offset)
        if not isinstance(storage.relative_path, str):
            raise TypeError(f"{index.fqn}: file {storage.relative_path!r}")
        _check_sizes(index.fqn, (storage.offset, storage.length))


def _check_chunk(key: str, chunk: ChunkStorageMetadata, num_axes: int) -> None:
    for sizes in (chunk.offsets, chunk.sizes):
        _check_sizes(key, sizes)
        if len(sizes) != num_axes:
            raise ValueError(f"{key}: a chunk of {len(sizes)} axes, the tensor has {num_axes}")


def _check_sizes(key: str, sizes: Iterable[int]) -> None:
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"{key}: sizes or offsets {tuple(sizes)}")


def check_pickles(folder: Path, metadata: Metadata, object_keys: Iterable[str]) -> None:
    """Refuse a folder whose `common.pt`, common state or named objects need more than plain data to be opened.

    Args:
        folder: a `torch_dist` folder.
        metadata: from `read_metadata`.
        object_keys: unique keys of the sharded objects that will be loaded; those not in the folder are passed over.

    Raises:
        UnsafeInputError: naming the file and the object.
        CorruptInputError: the bytes are not what torch wrote.
    """
    common = folder / COMMON_NAME
    if common.is_file():
        _check_pickle(common.read_bytes(), str(common))
    wanted = {COMMON_KEY, *object_keys}
    for index, storage in metadata.storage_data.items():
        if index.fqn in wanted and isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / storage.relative_path).open("rb") as stream:
                stream.seek(storage.offset)
                raw = stream.read(storage.length)
            _check_pickle(raw, f"{folder / storage.relative_path}: object {index.fqn}")


def _check_pickle(raw: bytes, where: str) -> None:
    try:
        with _also_allowed(io.BytesIO, argparse.Namespace):
            torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UnsafeInputError(f"{where}: cannot be opened as plain data and may run code: {reason}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptInputError(f"{where}: damaged: {error}") from None


@contextmanager
def _also_allowed(*classes: type) -> Iterator[None]:
    """Let torch open `classes` too. Its own `safe_globals` would at the end forbid what Megatron-Core had allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(classes))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
