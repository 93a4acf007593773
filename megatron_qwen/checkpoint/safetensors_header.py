"""Strict reader of safetensors headers and Hugging Face shard indexes; no torch, no weight bytes.

Everything a conversion has to know before it touches data (names, shapes, dtypes, byte ranges) is read
and proved here. Stricter than the `safetensors` package where that accepts a fault in silence: a name
given twice, an index that points out of its folder, a tensor missing from its shard or held by two.

    entries = read_folder(Path("Qwen2.5-7B"))          # name -> TensorEntry, sharded or not
    entries["model.norm.weight"].shape                 # (3584,)

Format: https://github.com/huggingface/safetensors#format. 8 bytes little-endian header length, a JSON
object, then the tensors' bytes without gap or overlap up to the end of the file.
"""

from __future__ import annotations

import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError, UnsafeInputError
from megatron_qwen.strict_json import kind, listing, parse_strict_json, read_strict_json, shown

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the cap of the safetensors package
MAX_INDEX_BYTES = 32 * 2**20  # the index of the largest public models is about 10 MB
_MAX_INTEGER = 2**63 - 1

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: tensor name in the file.
        file: the safetensors file that holds it.
        dtype: safetensors dtype string, a key of `DTYPE_BITS` (for example "BF16").
        shape: sizes; () for a scalar.
        begin: byte offset of the first byte, counted from the start of the file.
        end: byte offset one past the last byte, counted from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file in the order of their bytes.

    Args:
        path: the file; only its header is read.

    Raises:
        IncompleteInputError: there is no such file.
        CorruptInputError: the file breaks the format; the message names the file and the tensor.
    """
    if not path.is_file():
        raise IncompleteInputError(f"{path}: no such file; expected a safetensors file")
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CorruptInputError(
                f"{path}: {file_bytes} bytes, a safetensors file has at least 10. The file is truncated; fetch it again"
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise CorruptInputError(
                f"{path}: header length {header_bytes} is above the limit of {MAX_HEADER_BYTES} bytes"
            )
        if 8 + header_bytes > file_bytes:
            raise CorruptInputError(
                f"{path}: header of {header_bytes} bytes needs a file of at least {8 + header_bytes} bytes, "
                f"found {file_bytes}. The file is truncated or not safetensors; fetch it again"
            )
        raw = stream.read(header_bytes)
    if not raw.startswith(b"{"):
        raise CorruptInputError(f"{path}: the header starts with {raw[:1]!r}, expected a JSON object ('{{')")
    header = parse_strict_json(raw, path)
    _check_metadata(path, header.pop("__metadata__", None))
    data_begin = 8 + header_bytes
    entries = [_parse_entry(path, name, info, data_begin) for name, info in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(path, entries, data_begin, file_bytes)
    return {entry.name: entry for entry in entries}


@dataclass(frozen=True)
class WeightFiles:
    """How the weight files of a Hugging Face folder are called and read.

    Attributes:
        single: name of the file of a model that is not sharded.
        index: name of the index of one that is.
        read_header: gives the tensors of one file.
    """

    single: str
    index: str
    read_header: Callable[[Path], dict[str, TensorEntry]]


SAFETENSORS = WeightFiles(SINGLE_NAME, INDEX_NAME, read_header)


def read_folder(folder: Path, files: WeightFiles = SAFETENSORS) -> dict[str, TensorEntry]:
    """Return every tensor of a Hugging Face folder, sharded (with an index) or not.

    For a sharded folder all shards exist and index and shards agree on the place of every tensor.

    Args:
        folder: holds `model.safetensors` or `model.safetensors.index.json` with its shards, or what `files` says.
        files: which kind of files to read.

    Raises:
        IncompleteInputError: no weights, or shards missing (all are listed), or a tensor missing from its shard.
        UnsafeInputError: the index leaves the folder, or only pickle weights are there.
        CorruptInputError: a header or the index is damaged.
        MismatchError: index and shards disagree, a tensor is in two shards, or two sets of weights are there.
    """
    if not folder.is_dir():
        raise IncompleteInputError(f"{folder}: no such folder; expected a Hugging Face checkpoint")
    index_path, single_path = folder / files.index, folder / files.single
    if not index_path.is_file():
        if not single_path.is_file():
            _refuse_folder_without_weights(folder)
        check_inside(folder, files.single, single_path)
        return files.read_header(single_path)
    check_inside(folder, files.index, index_path)
    weight_map = read_index(index_path, Path(files.single).suffix)
    if single_path.is_file() and files.single not in weight_map.values():
        raise MismatchError(
            f"{folder}: holds both {files.single} and an index that does not name it; remove the one that is not wanted"
        )
    shards: dict[str, list[str]] = defaultdict(list)
    for name, shard in weight_map.items():
        shards[shard].append(name)
    missing = {shard: len(names) for shard, names in shards.items() if not (folder / shard).is_file()}
    if missing:
        listing = ", ".join(f"{shard} ({count} tensors)" for shard, count in sorted(missing.items()))
        raise IncompleteInputError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {listing}. Fetch them"
        )
    for shard in sorted(shards):
        check_inside(folder, shard, folder / shard)
    headers = {shard: files.read_header(folder / shard) for shard in sorted(shards)}
    _log_unlisted(folder, set(shards), Path(files.single).suffix)
    return _join_shards(index_path, weight_map, headers)


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Return the `weight_map` of a shard index: tensor name -> shard file name, every name checked.

    Raises:
        CorruptInputError: not JSON, too large, too deep, names twice, wrong types, or no `weight_map`.
        UnsafeInputError: a shard name that is not a plain file name with that suffix.
    """
    index = read_strict_json(path, max_bytes=MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptInputError(
            f"{path}: 'weight_map' is {kind(weight_map)}, expected an object of tensor name -> shard file name"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CorruptInputError(f"{path}: tensor {name!r}: shard is {kind(shard)}, expected a file name")
        _check_shard_name(path, name, shard, suffix)
    return weight_map


def _parse_entry(path: Path, name: str, info: Any, data_begin: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        found = shown(sorted(info)) if isinstance(info, dict) else kind(info)
        raise CorruptInputError(f"{where}: fields {found}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptInputError(f"{where}: unknown dtype {shown(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise CorruptInputError(f"{where}: shape {shown(shape)}, expected a list of integers from 0 to 2^63-1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CorruptInputError(f"{where}: data_offsets {shown(offsets)}, expected two integers from 0 to 2^63-1")
    num_bytes = DTYPE_BITS[dtype] // 8
    for size in shape:
        num_bytes *= size
        if num_bytes > _MAX_INTEGER:
            raise CorruptInputError(f"{where}: shape {shown(shape)} of {dtype} is more than 2^63-1 bytes")
    begin, end = offsets
    if end - begin != num_bytes:
        raise CorruptInputError(
            f"{where}: data_offsets {offsets} span {end - begin} bytes, "
            f"shape {shown(shape)} of {dtype} needs {num_bytes}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _check_cover(path: Path, entries: list[TensorEntry], data_begin: int, file_bytes: int) -> None:
    """Require that the tensors, sorted by place, cover the data section exactly."""
    cursor, previous = data_begin, "the header"
    for entry in entries:
        if entry.begin != cursor:
            fault = "overlaps" if entry.begin < cursor else f"leaves a gap of {entry.begin - cursor} bytes after"
            raise CorruptInputError(
                f"{path}: tensor {entry.name!r} at byte {entry.begin} {fault} {previous!r}, expected {cursor}"
            )
        cursor, previous = entry.end, entry.name
    if cursor != file_bytes:
        fault = (
            "truncated" if file_bytes < cursor else f"followed by {file_bytes - cursor} bytes that belong to no tensor"
        )
        raise CorruptInputError(
            f"{path}: {file_bytes} bytes, the header describes {cursor}: the file is {fault}. Fetch it again"
        )


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptInputError(f"{path}: __metadata__ is {kind(metadata)}, expected an object of strings")


def _check_shard_name(path: Path, name: str, shard: str, suffix: str) -> None:
    """Accept a plain file name only, under the rules of POSIX and of Windows."""
    if any(sign in shard for sign in "/\\:") or shard.startswith("."):
        raise UnsafeInputError(f"{path}: tensor {name!r}: shard {shown(shard)} is not a plain file name of this folder")
    if not shard.isprintable() or not shard.endswith(suffix):
        raise UnsafeInputError(f"{path}: tensor {name!r}: shard {shown(shard)} is not the name of a {suffix} file")


def _join_shards(
    index_path: Path, weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorEntry]]
) -> dict[str, TensorEntry]:
    holders: dict[str, list[str]] = defaultdict(list)
    for shard, header in headers.items():
        for name in header:
            holders[name].append(shard)
    absent = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in holders]
    conflicts = [f"{name} is in {' and '.join(shards)}" for name, shards in holders.items() if len(shards) > 1]
    conflicts += [
        f"{name} is in {shards[0]}, the index says {weight_map.get(name, 'nothing about it')}"
        for name, shards in holders.items()
        if len(shards) == 1 and weight_map.get(name) != shards[0]
    ]
    if absent:
        raise IncompleteInputError(
            f"{index_path}: {len(absent)} tensors are missing from the shard the index names: {listing(absent)}"
        )
    if conflicts:
        raise MismatchError(
            f"{index_path}: index and shards disagree on {len(conflicts)} tensors: {listing(conflicts)}"
        )
    return {name: entry for header in headers.values() for name, entry in header.items()}


def _refuse_folder_without_weights(folder: Path) -> NoReturn:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if shards:
        raise IncompleteInputError(f"{folder}: no {INDEX_NAME} for the shards {listing(shards)}; fetch the index")
    if pickles:
        raise UnsafeInputError(
            f"{folder}: only pickle weights ({listing(pickles)}), which can run code when opened. Save the model as "
            "safetensors, or give --allow-pickle: they are opened as plain data then, and no code in them runs"
        )
    raise IncompleteInputError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} found")


def _log_unlisted(folder: Path, listed: set[str], suffix: str) -> None:
    unlisted = sorted(path.name for path in folder.glob(f"*{suffix}") if path.name not in listed)
    if unlisted:
        logger.warning("%s: not named by the index and not read: %s", folder, listing(unlisted))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER
