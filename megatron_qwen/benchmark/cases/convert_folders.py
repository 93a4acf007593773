"""Checkpoint folders to convert: shaped like a preset, real in every header, with random values or holes as data."""

from __future__ import annotations

import dataclasses
import os
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_qwen.checkpoint.safetensors_header import read_folder
from megatron_qwen.conversion.engine.pieces import TensorRows
from megatron_qwen.conversion.formats.hf.output import config_file, hf_output
from megatron_qwen.errors import MismatchError, StorageError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.testing.tiny import tensor_shapes

SHARD_BYTES = 4 * 10**9  # as the released checkpoints are cut
_BUFFER_BYTES = 8 * 2**20


def write_shaped_hf(folder: Path, config: QwenConfig, *, is_sparse: bool = False, limit: int = SHARD_BYTES) -> Path:
    """Write a Hugging Face folder of `config` in bfloat16, in files of at most `limit` tensor bytes.

    Args:
        folder: created if needed.
        config: the model.
        is_sparse: leave the data as holes in the files, which read as zeros and take no room on the disk; otherwise
            values are random bits, each between 2^-7 and 2 in size, the same at every call.
        limit: largest number of tensor bytes in one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, torch_dtype="bfloat16")
    tensors = [
        TensorRows(
            label=name,
            shape=shape,
            dtype=torch.bfloat16,
            source_dtype=torch.bfloat16,
            num_tensors=1,
            read=partial(_random_rows, name, shape),
        )
        for name, shape in tensor_shapes(config)
    ]
    for file in [*hf_output(tensors, limit), config_file(config)]:
        with (folder / file.name).open("wb", buffering=0) as stream:
            file.skeleton(stream.fileno())
            for piece in () if is_sparse else file.pieces:
                piece.write(stream.fileno())
    return folder


def _random_rows(name: str, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
    count = (end - begin) * int(np.prod(shape[1:], dtype=np.int64))
    random = np.random.default_rng([zlib.crc32(name.encode()), begin])
    bits = random.integers(0, 2**64, -(-count // 4), dtype=np.uint64).view(np.uint16)[:count]
    bits &= 0x83FF  # sign, the low bits of the exponent, mantissa; the high bits of the exponent are fixed
    bits |= 0x3C00
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(end - begin, *shape[1:])


def files_of(folder: Path) -> list[Path]:
    """Return every file below `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def folder_bytes(folder: Path) -> int:
    """Return the bytes of every file below `folder`, holes included."""
    return sum(path.stat().st_size for path in files_of(folder))


def largest_tensor_bytes(folder: Path) -> int:
    """Return the bytes of the largest tensor of a Hugging Face folder."""
    return max(entry.num_bytes for entry in read_folder(folder).values())


def settle(folder: Path) -> None:
    """Bring the disk and the page cache to the state in which every contestant starts.

    What others wrote is on the disk, and every byte of `folder` has just been read.
    """
    os.sync()
    buffer = bytearray(_BUFFER_BYTES)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def require_equal_tensors(source: Path, copy: Path, who: str) -> None:
    """Check that two Hugging Face folders hold the same tensors, bit for bit.

    Headers and raw bytes only: nothing of the conversion takes part.

    Raises:
        MismatchError: naming the contestant that made `copy` and the first tensor that differs.
    """
    expected, found = read_folder(source), read_folder(copy)
    if expected.keys() != found.keys():
        raise MismatchError(f"{who}: lost or added tensors: {sorted(expected.keys() ^ found.keys())[:5]}")
    for name, entry in expected.items():
        other = found[name]
        is_equal = (entry.dtype, entry.shape) == (other.dtype, other.shape)
        with entry.file.open("rb") as a, other.file.open("rb") as b:
            a.seek(entry.begin)
            b.seek(other.begin)
            for done in range(0, entry.num_bytes if is_equal else 0, _BUFFER_BYTES):
                count = min(_BUFFER_BYTES, entry.num_bytes - done)
                is_equal = is_equal and a.read(count) == b.read(count)
        if not is_equal:
            raise MismatchError(f"{who}: {name} is not the source's, bit for bit; its speed is not reported")


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether the disk of `folder` has room for `num_bytes` and a little to spare."""
    return shutil.disk_usage(folder).free >= num_bytes + 64 * 2**20


def require_room(folder: Path, num_bytes: int, what: str) -> None:
    """Raise StorageError if the disk of `folder` lacks room for `num_bytes`."""
    if not has_room(folder, num_bytes):
        free = shutil.disk_usage(folder).free
        raise StorageError(
            f"{folder}: {what} needs {num_bytes:,} bytes, {free:,} are free on that disk; free some space, or choose "
            "another disk with --scratch"
        )
