"""All or nothing on disk: build aside, make durable, take the final name in one rename.

    staging = make_staging(target)        # <target>.incomplete-<id>, next to the target
    ...write into staging...
    commit(staging, target)               # fsync of every file and folder, one rename, fsync of the parent

A process killed at any moment leaves the old target or none, never half of one; what it leaves aside is
found by `stale_staging`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_qwen.errors import IncompleteInputError, StorageError
from megatron_qwen.testing import failpoints

STAGING_MARK = ".incomplete-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2

failpoints.register("commit.synced", "everything is durable under the staging name")
failpoints.register("commit.renamed", "the final name is taken; for an overwrite the old folder is still aside")
failpoints.register("text.drafted", "the new content of a small file is durable under another name")


def staging_path(target: Path) -> Path:
    """Return a fresh name next to `target` that no reader takes for a result."""
    return target.with_name(f"{target.name}{STAGING_MARK}{uuid.uuid4().hex[:8]}")


def make_staging(target: Path, staging: Path | None = None) -> Path:
    """Create the staging folder of `target`, parents included, and return it.

    Args:
        target: the folder that `commit` will make.
        staging: a name from `staging_path`, where several ranks have to agree on it; a fresh one if None.

    Raises:
        StorageError: the folder cannot be made (a file in the way, read-only, name too long).
    """
    staging = staging or staging_path(target)
    with storage_errors(f"cannot create {staging}"):
        staging.mkdir(parents=True)
    return staging


def commit(staging: Path, target: Path, *, overwrite: bool = False) -> None:
    """Make everything in `staging` durable and give it the name `target`.

    Args:
        staging: a complete folder on the same file system as `target`.
        target: final name.
        overwrite: swap with an existing target (atomically where the kernel can), then delete the old one.

    Raises:
        StorageError: `target` is more than an empty folder and `overwrite` is off, or the file system refuses.
    """
    with storage_errors(f"cannot complete {target}"):
        fsync_tree(staging)
        failpoints.hit("commit.synced")
        if not overwrite and target.exists() and not _is_empty_folder(target):
            raise StorageError(f"{target} exists already; remove it, or ask for it to be overwritten")
        if overwrite and target.exists():
            _exchange(staging, target)
            failpoints.hit("commit.renamed")
            shutil.rmtree(staging)
        else:
            staging.rename(target)  # replaces an empty folder, and fails if another process filled it by now
            failpoints.hit("commit.renamed")
        fsync_folder(target.parent)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def discard(staging: Path) -> None:
    """Delete a staging folder that will not be committed; silent if it is gone."""
    shutil.rmtree(staging, ignore_errors=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by `text` (UTF-8) so that a reader sees the old or the new, whole.

    Raises:
        StorageError: the file system refuses; the old content is untouched.
    """
    draft = staging_path(path)
    with storage_errors(f"cannot write {path}"):
        try:
            with draft.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            failpoints.hit("text.drafted")
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def stale_staging(parent: Path) -> list[Path]:
    """Return what interrupted runs left in `parent`, by name."""
    return sorted(parent.glob(f"*{STAGING_MARK}*")) if parent.is_dir() else []


def refuse_unfinished(path: Path) -> None:
    """Refuse to read from a folder that is still being made, or whose making was interrupted.

    Raises:
        IncompleteInputError: `path` is a staging folder or lies in one.
    """
    unfinished = next((part for part in path.resolve().parts if STAGING_MARK in part), None)
    if unfinished is not None:
        raise IncompleteInputError(
            f"{path}: {unfinished} is the half-made output of a command that was interrupted, or is at work; run that "
            "command again with --resume, or delete the folder"
        )


def fsync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, itself included, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(Path(root) / name, os.O_RDONLY)
        fsync_folder(Path(root))


def fsync_folder(folder: Path) -> None:
    """Force the entries of `folder` (names, not contents) to the disk."""
    _fsync(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def begin_writeback(descriptor: int, offset: int, num_bytes: int) -> None:
    """Have the kernel start to write a range to the disk, so that a later fsync has less to wait for; a mere hint."""
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that starts with `what`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        hint = "; free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"{what}: {error}{hint}") from error


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(staging: Path, target: Path) -> None:
    """Swap two folders; on return `staging` is the old target."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        status = renameat2(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
        if status == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    # The file system cannot swap: for one moment the target has no name, and `old` keeps it recoverable.
    old = staging_path(target)
    target.rename(old)
    staging.rename(target)
    old.rename(staging)
