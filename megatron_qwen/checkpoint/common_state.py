"""What a `torch_dist` step holds beside its sharded tensors: arguments, iteration, rates; opened as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_qwen.checkpoint.pickles import COMMON_KEY, COMMON_NAME
from megatron_qwen.checkpoint.torch_file import open_torch_bytes
from megatron_qwen.errors import CorruptInputError, IncompleteInputError


def read_common(path: Path, metadata: Metadata) -> dict[str, Any]:
    """Return a step's common state: common.pt, or the object that megatron-core 0.19 keeps in its place.

    Raises:
        IncompleteInputError: there is neither.
        UnsafeInputError: it needs more than plain data to be opened.
        CorruptInputError: it is damaged.
    """
    if (path / COMMON_NAME).is_file():
        return _plain(
            open_torch_bytes((path / COMMON_NAME).read_bytes(), f"{path / COMMON_NAME}"), f"{path / COMMON_NAME}"
        )
    for index, storage in metadata.storage_data.items():
        if index.fqn == COMMON_KEY:
            where = f"{path / storage.relative_path}: object {COMMON_KEY}"
            with (path / storage.relative_path).open("rb") as stream:
                stream.seek(storage.offset)
                found = open_torch_bytes(stream.read(storage.length), where)
            return _plain(found[0] if isinstance(found, list) and len(found) == 1 else found, where)
    raise IncompleteInputError(f"{path}: neither {COMMON_NAME} nor {COMMON_KEY}, which hold what is not sharded")


def _plain(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CorruptInputError(f"{where}: holds a {type(found).__name__}, expected a dictionary")
    return found
