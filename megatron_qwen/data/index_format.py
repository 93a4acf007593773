"""The bytes of Megatron's `.idx`, written and checked without importing megatron or torch.

Little endian: 9 bytes magic, uint64 version 1, uint8 dtype code, uint64 sequences S, uint64 D = documents + 1,
int32 lengths [S] in tokens, int64 pointers [S] in bytes, int64 document boundaries [D] in sequences.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_qwen.errors import CorruptInputError, IncompleteInputError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's codes of the integer types; 6 and 7 are float64 and float32, which cannot hold token ids."""
UINT16_VOCAB_LIMIT = 65500
CHUNK = 1 << 24
MAX_LENGTH = (1 << 31) - 1


@dataclass(frozen=True)
class Index:
    """A checked index; arrays are views of the mapped file.

    Attributes:
        dtype: of the token ids in the `.bin`.
        lengths: int32 [sequences].
        document_indices: int64 [documents + 1], the first sequence of each document, then the number of sequences.
        num_tokens: sum of lengths.
    """

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    document_indices: npt.NDArray[np.int64]
    num_tokens: int


def bin_path(prefix: str | Path) -> Path:
    """Path of the tokens of `prefix`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index of `prefix`."""
    return Path(f"{prefix}.idx")


def storage_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return Megatron's choice for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def index_bytes(lengths: npt.NDArray[np.integer[Any]], dtype: np.dtype[Any]) -> bytes:
    """Return the index of documents of one sequence each.

    Args:
        lengths: [documents] tokens.
        dtype: of the ids in the `.bin`.

    Raises:
        CorruptInputError: a document longer than the format's int32 length can say.
    """
    lengths = lengths.astype(np.int64)
    if lengths.size and int(lengths.max()) > MAX_LENGTH:
        document = int(lengths.argmax())
        raise CorruptInputError(
            f"document {document} has {int(lengths[document])} tokens, the format holds {MAX_LENGTH}"
        )
    code = {name: code for code, name in DTYPES.items()}[dtype.name]
    pointers = np.zeros(lengths.size, np.int64)
    np.cumsum(lengths[:-1] * dtype.itemsize, out=pointers[1:])
    return b"".join(
        (
            HEADER.pack(MAGIC, VERSION, code, lengths.size, lengths.size + 1),
            lengths.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.arange(lengths.size + 1, dtype="<i8").tobytes(),
        )
    )


def read_index(prefix: str | Path) -> Index:
    """Map and check `PREFIX.idx` against itself and the size of `PREFIX.bin`.

    Raises:
        IncompleteInputError: one of the files is missing.
        CorruptInputError: magic, version, dtype code, size, lengths, pointers or boundaries are wrong.
    """
    index_file, tokens_file = idx_path(prefix), bin_path(prefix)
    for path in (index_file, tokens_file):
        if not path.is_file():
            raise IncompleteInputError(f"{path}: no such file; a data set is a .bin and an .idx of one prefix")
    dtype, num_sequences, num_boundaries = _read_header(index_file)
    data = np.memmap(index_file, mode="r", dtype=np.uint8)
    ends = np.cumsum([HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_boundaries]).tolist()
    lengths: npt.NDArray[np.int32] = data[ends[0] : ends[1]].view("<i4")
    pointers: npt.NDArray[np.int64] = data[ends[1] : ends[2]].view("<i8")
    boundaries: npt.NDArray[np.int64] = data[ends[2] : ends[3]].view("<i8")
    num_tokens = _check_sequences(index_file, lengths, pointers, dtype.itemsize)
    _check_boundaries(index_file, boundaries, num_sequences)
    got, expected = tokens_file.stat().st_size, num_tokens * dtype.itemsize
    if got != expected:
        raise CorruptInputError(
            f"{tokens_file}: {got} bytes, expected {expected} ({num_tokens} tokens of {dtype.name} "
            f"by {index_file.name}); it is truncated, or of another data set"
        )
    return Index(dtype, lengths, boundaries, num_tokens)


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise CorruptInputError(f"{path}: {size} bytes, expected at least {HEADER.size} for the header")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC:
        raise CorruptInputError(f"{path}: starts with {magic!r}, expected {MAGIC!r}; not a Megatron index")
    if version != VERSION:
        raise CorruptInputError(f"{path}: version {version}, expected {VERSION}")
    if code not in DTYPES:
        known = ", ".join(f"{key} {name}" for key, name in DTYPES.items())
        raise CorruptInputError(f"{path}: dtype code {code}, expected an integer type ({known})")
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size != expected:
        extra = (
            "; sequence modes of a multimodal data set are not supported" if size == expected + num_sequences else ""
        )
        raise CorruptInputError(
            f"{path}: {size} bytes, expected {expected} for {num_sequences} sequences and {num_boundaries} "
            f"boundaries{extra}"
        )
    if num_sequences == 0:
        raise CorruptInputError(f"{path}: holds no document")
    return np.dtype(DTYPES[code]), num_sequences, num_boundaries


def _check_sequences(path: Path, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64], itemsize: int) -> int:
    """Check that each sequence begins where the one before ends; return the number of tokens."""
    total = 0
    for begin, end in _chunks(len(lengths)):
        part = lengths[begin:end].astype(np.int64)
        if int(part.min()) < 0:
            bad = begin + int(part.argmin())
            raise CorruptInputError(f"{path}: sequence {bad} has length {int(lengths[bad])}")
        ends = total + np.cumsum(part)
        wrong = np.flatnonzero(pointers[begin:end] != (ends - part) * itemsize)
        if wrong.size:
            bad = int(wrong[0])
            raise CorruptInputError(
                f"{path}: sequence {begin + bad} points to byte {int(pointers[begin + bad])}, expected "
                f"{int(ends[bad] - part[bad]) * itemsize}, where the one before it ends"
            )
        total = int(ends[-1])
    if total == 0:
        raise CorruptInputError(f"{path}: all {len(lengths)} sequences are empty")
    return total


def _check_boundaries(path: Path, boundaries: npt.NDArray[np.int64], num_sequences: int) -> None:
    if len(boundaries) < 2 or int(boundaries[0]) != 0 or int(boundaries[-1]) != num_sequences:
        found = f"{int(boundaries[0])} to {int(boundaries[-1])}" if len(boundaries) else "nothing"
        raise CorruptInputError(f"{path}: document boundaries run from {found}, expected 0 to {num_sequences}")
    for begin, end in _chunks(len(boundaries) - 1):
        falling = np.flatnonzero(boundaries[begin + 1 : end + 1] < boundaries[begin:end])
        if falling.size:
            bad = begin + int(falling[0])
            raise CorruptInputError(
                f"{path}: document boundary {bad + 1} is {int(boundaries[bad + 1])}, below "
                f"the {int(boundaries[bad])} before it"
            )


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, CHUNK):
        yield begin, min(begin + CHUNK, total)
