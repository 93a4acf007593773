"""The list of a folder's files with sizes and SHA-256, written last: its presence says the folder is complete.

    {"format": "megatron-qwen-manifest", "version": 1,
     "files": {"__0_0.distcp": {"bytes": 8192, "sha256": "9f86..."}, ...}}

Several ranks can share the hashing: each calls `hash_files` on its part, one writes the union.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from megatron_qwen.errors import CorruptInputError
from megatron_qwen.strict_json import read_strict_json

MANIFEST_NAME = "manifest.json"
FORMAT, VERSION = "megatron-qwen-manifest", 1
MAX_MANIFEST_BYTES = 32 * 2**20
_CHUNK_BYTES = 4 * 2**20

Level = Literal["sizes", "full"]


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str


def list_files(folder: Path) -> list[str]:
    """Return the names of all files below `folder` but the manifest: relative, with '/', sorted."""
    paths = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST_NAME)


def hash_files(folder: Path, names: Iterable[str], *, threads: int = 4) -> dict[str, FileRecord]:
    """Read the named files of `folder` and return their records; hashing runs in `threads` threads.

    Raises:
        OSError: a file cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(max_workers=max(1, min(threads, len(names)))) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(folder / name), names), strict=True))


def write_manifest(folder: Path, files: Mapping[str, FileRecord] | None = None) -> None:
    """Write the manifest of `folder` and force it to the disk; hash every file if `files` is None."""
    files = hash_files(folder, list_files(folder)) if files is None else files
    records = {name: {"bytes": files[name].bytes, "sha256": files[name].sha256} for name in sorted(files)}
    text = json.dumps({"format": FORMAT, "version": VERSION, "files": records}, indent=1) + "\n"
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Return the records of the manifest in `folder`.

    Raises:
        FileNotFoundError: there is none.
        CorruptInputError: it is damaged, or names a file outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(path)
    manifest = read_strict_json(path, max_bytes=MAX_MANIFEST_BYTES)
    kind = (manifest.get("format"), manifest.get("version"))
    if kind != (FORMAT, VERSION):
        raise CorruptInputError(f"{path}: format and version are {kind}, expected {(FORMAT, VERSION)}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CorruptInputError(f"{path}: 'files' is not an object")
    return {name: _parse_record(path, name, record) for name, record in files.items()}


def verify(folder: Path, level: Level = "sizes", names: Iterable[str] | None = None) -> list[str]:
    """Compare `folder` with its manifest and return the problems found, one line each; none means good.

    Args:
        folder: holds `manifest.json`.
        level: "sizes" checks that each file is there with its size; "full" reads them and compares SHA-256 too.
        names: check only these entries of the manifest; all of them if None.
    """
    try:
        records = read_manifest(folder)
    except FileNotFoundError:
        return [f"no {MANIFEST_NAME}: the folder was never completed, or was not written by megatron-qwen"]
    except (CorruptInputError, OSError) as error:
        return [str(error)]
    chosen = {name: records[name] for name in (records if names is None else names)}
    problems = []
    present = []
    for name, record in chosen.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {record.bytes}")
        else:
            present.append(name)
    if level == "full":
        for name, found in hash_files(folder, present).items():
            if found.sha256 != chosen[name].sha256:
                problems.append(f"{name}: SHA-256 {found.sha256}, the manifest says {chosen[name].sha256}")
    return problems


def _hash_file(path: Path) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def _parse_record(path: Path, name: str, record: object) -> FileRecord:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise CorruptInputError(f"{path}: {name!r} is not the name of a file in this folder")
    if not isinstance(record, dict):
        raise CorruptInputError(f"{path}: {name}: expected bytes and sha256")
    size, digest = record.get("bytes"), record.get("sha256")
    if type(size) is not int or size < 0 or not isinstance(digest, str) or len(digest) != 64:
        raise CorruptInputError(f"{path}: {name}: bytes {size!r} and sha256 {digest!r} are not a size and a digest")
    return FileRecord(size, digest)
