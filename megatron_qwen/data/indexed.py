"""The checked door in front of Megatron's IndexedDataset: a damaged file is an error here, not garbage tokens later."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_qwen.checkpoint.atomic import atomic_write_text
from megatron_qwen.data.index_format import Index, bin_path, read_index
from megatron_qwen.errors import CorruptInputError, StorageError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

logger = logging.getLogger(__name__)

SCAN_TOKENS = 1 << 23


def open_indexed(prefix: str | Path, *, vocab_size: int | None = None, mmap: bool = True) -> IndexedDataset:
    """Open `PREFIX.bin/.idx` with Megatron's reader after checking them whole.

    Args:
        prefix: path without `.bin`.
        vocab_size: also check that every token id lies in [0, vocab_size). The first time this reads the whole
            `.bin`; the range found is kept in `PREFIX.range.json` and trusted while size and time of the file stay.
        mmap: map the `.bin` (Megatron's default) or read it with file calls.

    Raises:
        IncompleteInputError: a file is missing.
        CorruptInputError: the index is damaged, does not fit the `.bin`, or an id is out of range.
    """
    check_indexed(prefix, vocab_size=vocab_size)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix), mmap=mmap)


def check_indexed(prefix: str | Path, *, vocab_size: int | None = None) -> Index:
    """Do the checks of `open_indexed` and return the index, without importing megatron."""
    index = read_index(prefix)
    if vocab_size is not None:
        smallest, largest = token_range(prefix, index)
        if smallest < 0 or largest >= vocab_size:
            raise CorruptInputError(_describe_bad_id(prefix, index, vocab_size))
    return index


def map_tokens(prefix: str | Path, index: Index) -> npt.NDArray[np.integer[Any]]:
    """Return all token ids of a checked data set as one read-only mapped array [tokens]."""
    tokens: npt.NDArray[np.integer[Any]] = np.memmap(bin_path(prefix), mode="r", dtype=index.dtype)
    return tokens


def token_range(prefix: str | Path, index: Index) -> tuple[int, int]:
    """Return the smallest and largest id, from `PREFIX.range.json` or, if that does not fit, by a scan."""
    status = bin_path(prefix).stat()
    path = Path(f"{prefix}.range.json")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known == range_record(status, known["smallest"], known["largest"]):
            return int(known["smallest"]), int(known["largest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        logger.info("%s: absent or unreadable; scanning the tokens", path)
    tokens = map_tokens(prefix, index)
    parts = [tokens[begin : begin + SCAN_TOKENS] for begin in range(0, len(tokens), SCAN_TOKENS)]
    smallest, largest = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
    try:
        atomic_write_text(path, json.dumps(range_record(status, smallest, largest)) + "\n")
    except StorageError as error:
        logger.info("the token range is not kept: %s", error)
    return smallest, largest


def range_record(status: os.stat_result, smallest: int, largest: int) -> dict[str, int]:
    """Return the content of `PREFIX.range.json` for a `.bin` of this size and time."""
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "smallest": smallest, "largest": largest}


def _describe_bad_id(prefix: str | Path, index: Index, vocab_size: int) -> str:
    tokens = map_tokens(prefix, index)
    for begin in range(0, len(tokens), SCAN_TOKENS):
        part = tokens[begin : begin + SCAN_TOKENS]
        bad = np.flatnonzero((part < 0) | (part >= vocab_size))
        if bad.size:
            position = begin + int(bad[0])
            break
    else:
        return f"{prefix}.range.json: says that ids leave 0 to {vocab_size - 1}, but none does; delete it"
    ends = np.cumsum(index.lengths, dtype=np.int64)
    sequence = int(np.searchsorted(ends, position, side="right"))
    document = int(np.searchsorted(index.document_indices, sequence, side="right")) - 1
    first = int(ends[int(index.document_indices[document])] - index.lengths[int(index.document_indices[document])])
    return (
        f"{bin_path(prefix)}: document {document}, position {position - first}: token id {int(tokens[position])}, "
        f"expected 0 to {vocab_size - 1}; the data was made with another tokenizer, or the file is damaged"
    )
