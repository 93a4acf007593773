"""Writing Megatron's `.bin/.idx`, byte for byte what IndexedDatasetBuilder writes, from whole arrays of ids.

PREFIX.bin         token ids of all documents, one after the other
PREFIX.idx         lengths, byte offsets and document boundaries; the last file to appear, so its presence is the commit
PREFIX.json        what it was made of: tokenizer fingerprint, counts, SHA-256
PREFIX.range.json  smallest and largest id, so that opening need not scan a file that was checked
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_qwen.checkpoint.atomic import fsync_folder, staging_path, storage_errors
from megatron_qwen.data.index_format import index_bytes, storage_dtype
from megatron_qwen.data.indexed import range_record
from megatron_qwen.errors import CorruptInputError, StorageError
from megatron_qwen.testing import failpoints

SUFFIXES = (".bin", ".json", ".range.json", ".idx")
"""In the order in which they take their final names."""

failpoints.register("data.staged", "all four files of a data set are durable under staging names")
failpoints.register("data.bin_renamed", "the .bin has its final name, the .idx has not")


class DatasetWriter:
    """Collects documents in staging files; `commit` checks them and gives them their names.

    Use as a context manager: leaving without `commit` removes the staging files.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int, overwrite: bool = False) -> None:
        """Open the staging files.

        Args:
            prefix: final path without `.bin`; its folder is created.
            vocab_size: ids must lie in [0, vocab_size); below 65,500 they are stored as uint16, else as int32.
            overwrite: replace an existing data set at `commit`.

        Raises:
            StorageError: files of this prefix exist and `overwrite` is off, or the folder cannot be written.
        """
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = storage_dtype(vocab_size)
        in_the_way = [str(path) for path in map(self._final, SUFFIXES) if path.exists()]
        if in_the_way and not overwrite:
            raise StorageError(f"{', '.join(in_the_way)} exist already; remove them, or give --overwrite")
        self._staging = staging_path(self.prefix)
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._digest = hashlib.sha256()
        self.num_documents = 0
        self.num_tokens = 0
        self.smallest, self.largest = vocab_size, -1
        with storage_errors(f"cannot create {self._staged('.bin')}"):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._staged(".bin").open("wb")

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        for suffix in SUFFIXES:
            self._staged(suffix).unlink(missing_ok=True)

    def add(self, ids: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append documents.

        Args:
            ids: [tokens] of any integer dtype, documents one after the other.
            lengths: [documents], sum = tokens.

        Raises:
            CorruptInputError: an id outside [0, vocab_size), with its document and position.
            StorageError: the disk is full, or another refusal.
        """
        assert int(lengths.sum()) == ids.size, (ids.shape, int(lengths.sum()))
        if ids.size:
            smallest, largest = int(ids.min()), int(ids.max())
            if smallest < 0 or largest >= self.vocab_size:
                raise CorruptInputError(self._describe_bad_id(ids, lengths))
            self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)
        data = ids.astype(self.dtype, copy=False).tobytes()
        with storage_errors(f"cannot write {self._staged('.bin')}"):
            self._stream.write(data)
        self._digest.update(data)
        self._lengths.append(lengths.astype(np.int64))
        self.num_documents += len(lengths)
        self.num_tokens += ids.size

    def commit(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Write the index and the side files, make all durable, take the final names; return the side record.

        Args:
            description: goes into `PREFIX.json` next to counts and digests.

        Raises:
            StorageError: the file system refuses; the old data set, if any, is whole unless renaming had begun.
        """
        index = index_bytes(np.concatenate([np.empty(0, np.int64), *self._lengths]), self.dtype)
        record = {
            "format": "megatron-indexed-dataset",
            **description,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
            "sha256": {".bin": self._digest.hexdigest(), ".idx": hashlib.sha256(index).hexdigest()},
        }
        with storage_errors(f"cannot write {self.prefix}.bin/.idx"):
            self._stream.flush()
            self._stream.close()
            self._staged(".idx").write_bytes(index)
            self._staged(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            checked = range_record(self._staged(".bin").stat(), self.smallest, self.largest)
            self._staged(".range.json").write_text(json.dumps(checked) + "\n", encoding="utf-8")
            for suffix in SUFFIXES:
                with self._staged(suffix).open("rb") as stream:
                    os.fsync(stream.fileno())
            failpoints.hit("data.staged")
            # Without its index the old data set is refused as incomplete, never read with the new tokens.
            self._final(".idx").unlink(missing_ok=True)
            for suffix in SUFFIXES:
                self._staged(suffix).replace(self._final(suffix))
                if suffix == ".bin":
                    failpoints.hit("data.bin_renamed")
            fsync_folder(self.prefix.parent)
        return record

    def _describe_bad_id(self, ids: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> str:
        first = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
        ends = np.cumsum(lengths)
        document = int(np.searchsorted(ends, first, side="right"))
        position = first - int(ends[document] - lengths[document])
        return (
            f"{self.prefix}: document {self.num_documents + document}, position {position}: "
            f"token id {int(ids[first])}, expected 0 to {self.vocab_size - 1}; "
            "the ids come from another tokenizer, or its vocabulary size is wrong"
        )

    def _staged(self, suffix: str) -> Path:
        return self._staging.with_name(self._staging.name + suffix)

    def _final(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)
