"""The folder that a conversion makes: may it be made, is there room, and what decides every byte of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron_qwen
from megatron_qwen.checkpoint.atomic import STAGING_MARK, storage_errors
from megatron_qwen.conversion.engine.staging import usable_bytes
from megatron_qwen.conversion.interfaces import OutputFile, WeightSource
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.plan import ConversionPlan
from megatron_qwen.errors import StorageError

# Folders, the manifest and the journal, generously.
_OVERHEAD_BYTES = 8 * 2**20
_BYTES_DO_NOT_DEPEND_ON = frozenset(
    {"overwrite", "allow_pickle", "verify", "resume", "progress", "threads", "max_memory"}
)


def fingerprint_of(
    direction: str,
    source: WeightSource,
    target: Path,
    plan: ConversionPlan,
    files: list[OutputFile],
    options: ConversionOptions,
) -> Mapping[str, Any]:
    """Return what decides the bytes of an output, as JSON gives it back."""
    content = {
        "version": megatron_qwen.__version__,
        "direction": direction,
        "source": str(source.path.resolve()),
        "source_files": _stamps(source.path, target),
        "config": plan.config.to_hf(),
        "options": {name: str(value) for name, value in vars(options).items() if name not in _BYTES_DO_NOT_DEPEND_ON},
        "files": {file.name: file.num_bytes for file in files},
    }
    parsed: Mapping[str, Any] = json.loads(json.dumps(content))
    return parsed


def _stamps(folder: Path, target: Path) -> dict[str, list[int]]:
    """Return size and time of every file below `folder`, the target's own excepted."""
    stamps = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and STAGING_MARK not in name and Path(root, name).resolve() != target.resolve()
        ]
        for name in names:
            path = Path(root, name)
            status = path.stat() if path.exists() else path.lstat()  # a link may lead nowhere
            stamps[Path(root, name).relative_to(folder).as_posix()] = [status.st_size, status.st_mtime_ns]
    return dict(sorted(stamps.items()))


def check_disk(target: Path, files: Sequence[OutputFile], fingerprint: Mapping[str, Any], *, resume: bool) -> None:
    """Check that the disk has room for the files; what an interrupted run holds of them counts as room.

    Raises:
        StorageError: with the bytes needed and free.
    """
    with storage_errors(f"cannot use {target}"):
        free = shutil.disk_usage(existing_parent(target)).free
        free += usable_bytes(target, fingerprint) if resume else 0
    needed = sum(file.num_bytes for file in files) + _OVERHEAD_BYTES
    if free < needed:
        raise StorageError(f"{target}: needs {needed:,} bytes, {free:,} are free on that disk; free some space")


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def follow(target: Path) -> Path:
    """Return where a target lies that is a link to a folder: that folder is made, and the link stays.

    Raises:
        StorageError: the name cannot be looked up.
    """
    with storage_errors(f"cannot use {target}"):
        return target.resolve() if target.is_symlink() and target.is_dir() else target


def check_target(target: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check that the target can be made, or may be replaced.

    Args:
        target: the folder to be made.
        overwrite: whether one with something in it may be replaced.
        inputs: folders that are read, and so may not.

    Raises:
        StorageError: it is a file, is not empty, holds training steps, or is or holds or lies in an input.
    """
    with storage_errors(f"cannot use {target}"):
        if not target.exists():
            return
        if not target.is_dir():
            raise StorageError(f"{target}: is a file, expected a folder to be made; choose another name")
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise StorageError(f"{target}: exists and is not empty; choose another folder, or give --overwrite")
        steps = sorted(path.name for path in target.glob("iter_*"))
        if steps:
            raise StorageError(f"{target}: holds training steps ({steps[0]} ...), which --overwrite does not delete")
        here = target.resolve()
        for path in inputs:
            there = path.resolve()
            if here == there or here in there.parents or there in here.parents:
                raise StorageError(f"{target}: overlaps the input {path}, which is not deleted; choose another folder")
