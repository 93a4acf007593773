"""Opens the pickles of a Megatron `torch_dist` folder without running code from them.

torch's distributed checkpoint reads `.metadata` with plain pickle, and the objects inside the shards (random
states, Transformer Engine extra state) with `weights_only=False`: whoever can write the folder can run code in the
job. So before Megatron-Core opens a folder, each of its pickles is read here once under an allow-list.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_qwen.errors import CorruptInputError, IncompleteInputError, UnsafeInputError

METADATA_NAME = ".metadata"
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


class _MetadataUnpickler(pickle.Unpickler):
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
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except UnsafeInputError as error:
        raise UnsafeInputError(
            f"{path}: asks for {error}, which has no place in a checkpoint index; do not use this folder"
        ) from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CorruptInputError(f"{path}: not a checkpoint index: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CorruptInputError(f"{path}: holds a {type(metadata).__name__}, expected a torch checkpoint index")
    for storage in metadata.storage_data.values():
        name = storage.relative_path
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise UnsafeInputError(f"{path}: names the file {name!r}, expected a plain name in this folder")
    return metadata


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
        with torch.serialization.safe_globals([io.BytesIO]):
            torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UnsafeInputError(f"{where}: cannot be opened as plain data and may run code: {reason}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CorruptInputError(f"{where}: damaged: {error}") from None
