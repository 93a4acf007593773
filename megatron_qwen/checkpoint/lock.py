"""One run per folder: an operating-system lock that dies with its holder, and a note that says who that is."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from megatron_qwen.checkpoint import agreement, atomic
from megatron_qwen.errors import StorageError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
HOLDER_NAME = ".lock.json"
# A killed run's data-loader workers hold its open files, and with them the lock, until they notice.
ORPHAN_SECONDS = 15.0


@contextmanager
def hold_lock(root: Path) -> Iterator[None]:
    """Hold the lock of `root` for the block; rank 0 takes it for all. Collective.

    Raises:
        StorageError: another run holds it; names its host and pid.
    """
    lock = FileLock(root / LOCK_NAME)
    agreement.on_rank_zero(lambda: _take(lock, root), f"{root} cannot be used")
    try:
        yield
    finally:
        if agreement.rank() == 0:
            (root / HOLDER_NAME).unlink(missing_ok=True)
            lock.release()


def _take(lock: FileLock, root: Path) -> None:
    with atomic.storage_errors(f"cannot lock {root}"):
        root.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while True:
            try:
                lock.acquire(timeout=0.2)
                break
            except Timeout:
                host, pid, since = _holder(root)
                if host == socket.gethostname() and not psutil.pid_exists(pid) and time.monotonic() < deadline:
                    continue
                raise StorageError(
                    f"{root}: another run writes here: pid {pid} on host {host} since {since}. "
                    "Wait for it, stop it, or choose another folder"
                ) from None
        if (root / HOLDER_NAME).exists():
            host, pid, since = _holder(root)
            logger.warning(
                "%s: the run with pid %d on host %s (since %s) ended without letting go", root, pid, host, since
            )
        note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        atomic.atomic_write_text(root / HOLDER_NAME, json.dumps(note))


def _holder(root: Path) -> tuple[str, int, str]:
    try:
        note = json.loads((root / HOLDER_NAME).read_text(encoding="utf-8"))
        return str(note["host"]), int(note["pid"]), str(note["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", -1, "an unknown time"
