"""The folder in which an output is built, and the journal by which a later run goes on with it.

    OUT.incomplete-1f2e3d4c/            locked by the process that writes it
        progress.json                   what is being made, and which files are finished with which SHA-256
        output/                         renamed to OUT at the end, in one step

The journal outlives the rename, so there is no moment at which a killed conversion loses its finished files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.atomic import (
    STAGING_MARK,
    atomic_write_text,
    commit,
    discard,
    make_staging,
    storage_errors,
)
from megatron_qwen.checkpoint.manifest import FileRecord
from megatron_qwen.errors import Interrupted, StorageError
from megatron_qwen.testing import failpoints

logger = logging.getLogger(__name__)

JOURNAL_NAME, OUTPUT_NAME = "progress.json", "output"
FORMAT, VERSION = "megatron-qwen-conversion", 1

failpoints.register("convert.planned", "the plan is proved and the staging folder exists, with a journal and no file")
failpoints.register("convert.written", "every file is whole; there is no manifest")
failpoints.register("convert.manifest", "the manifest is durable; the output has not its name yet")
failpoints.register("convert.renamed", "the output has its name; the journal is still aside")

Fingerprint = Mapping[str, Any]


class Journal:
    """What a staging folder is for and how far it has come; every change is durable before it counts.

    Attributes:
        path: of `progress.json`.
        fingerprint: JSON values that decide every byte of the output.
        finished: files that were whole when they were entered.
        num_reused: how many of them another run had finished, and their hashes still fit.
        manifest_sha256: of the finished manifest; empty before.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.finished: dict[str, FileRecord] = {}
        self.num_reused = 0
        self.manifest_sha256 = ""

    def add(self, name: str, record: FileRecord, *, is_saved: bool = True) -> None:
        """Enter a finished file; on the disk now, or with the next that is."""
        self.finished[name] = record
        if is_saved:
            self.save()

    def save(self) -> None:
        """Replace the file on disk."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "finished": {name: asdict(record) for name, record in self.finished.items()},
            "manifest_sha256": self.manifest_sha256,
        }
        atomic_write_text(self.path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """Read a journal; None if it is not one of this version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                return None
            journal = cls(path, content["fingerprint"])
            journal.finished = {name: FileRecord(**record) for name, record in content["finished"].items()}
            journal.manifest_sha256 = content["manifest_sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return journal


class Staging:
    """A staging folder that this process holds.

    Attributes:
        path: the folder.
        output: in it; becomes the target.
        journal: of the files in `output`.
        is_resumed: whether another run began it.
    """

    def __init__(self, path: Path, journal: Journal, *, is_resumed: bool) -> None:
        self.path, self.output = path, path / OUTPUT_NAME
        self.journal = journal
        self.is_resumed = is_resumed


@contextmanager
def staged(target: Path, fingerprint: Fingerprint, *, resume: bool = False) -> Iterator[Staging]:
    """Give a staging folder of `target`, kept if the block is interrupted and deleted if it fails.

    The block ends with `finish`, or leaves without: then nothing is renamed.

    Args:
        target: the folder to be made.
        fingerprint: of the conversion.
        resume: go on with the newest folder that a killed conversion of this fingerprint left, and delete those of
            conversions that were killed before they had a journal; logs what it does.

    Raises:
        StorageError: the folder cannot be made.
    """
    staging, lock = (_find(target, fingerprint) if resume else None) or _create(target, fingerprint)
    try:
        with storage_errors(f"cannot write {target}"):
            yield staging
    except (KeyboardInterrupt, Interrupted):
        raise
    except BaseException:
        discard(staging.path)
        raise
    finally:
        os.close(lock)


def finish(staging: Staging, target: Path, manifest_name: str, *, overwrite: bool = False) -> None:
    """Write the manifest, last of all files, and give the output its name.

    Args:
        staging: its journal knows every file of the output.
        target: final name.
        manifest_name: relative to the target; it lists the files beside and below it.
        overwrite: replace an existing target.
    """
    failpoints.hit("convert.written")
    folder = (staging.output / manifest_name).parent
    prefix = folder.relative_to(staging.output).as_posix()
    prefix = "" if prefix == "." else prefix + "/"
    finished = staging.journal.finished.items()
    manifest.write_manifest(
        folder, {name.removeprefix(prefix): record for name, record in finished if name.startswith(prefix)}
    )
    staging.journal.manifest_sha256 = _digest(staging.output / manifest_name)
    staging.journal.save()
    failpoints.hit("convert.manifest")
    commit(staging.output, target, overwrite=overwrite)
    failpoints.hit("convert.renamed")
    discard(staging.path)


def is_finished(target: Path, fingerprint: Fingerprint, manifest_name: str) -> bool:
    """Whether `target` is the whole output of a conversion that was killed right after the rename.

    Its staging folder is then deleted.
    """
    if not (target / manifest_name).is_file():
        return False
    digest = _digest(target / manifest_name)
    for path in _candidates(target):
        journal = Journal.load(path / JOURNAL_NAME)
        if journal is None or journal.fingerprint != fingerprint or journal.manifest_sha256 != digest:
            continue
        sizes = {name: record.bytes for name, record in journal.finished.items()}
        if all((target / name).is_file() and (target / name).stat().st_size == sizes[name] for name in sizes):
            discard(path)
            return True
    return False


def usable_bytes(target: Path, fingerprint: Fingerprint) -> int:
    """Return the disk space that staging folders of this conversion hold already."""
    folders = [
        path
        for path in _candidates(target)
        if (journal := Journal.load(path / JOURNAL_NAME)) is not None and journal.fingerprint == fingerprint
    ]
    files = [file for folder in folders[:1] for file in (folder / OUTPUT_NAME).rglob("*") if file.is_file()]
    return sum(file.stat().st_blocks * 512 for file in files)


def _candidates(target: Path) -> list[Path]:
    """Return the staging folders of `target`, the newest first."""
    if not target.parent.is_dir():
        return []
    mark = f"{target.name}{STAGING_MARK}"
    paths = [path for path in target.parent.iterdir() if path.name.startswith(mark) and path.is_dir()]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _create(target: Path, fingerprint: Fingerprint) -> tuple[Staging, int]:
    path = make_staging(target)
    lock = _lock(path)
    if lock is None:
        raise StorageError(f"{path}: the file system lets another process lock a folder of a fresh name")
    try:
        with storage_errors(f"cannot write {path}"):
            (path / OUTPUT_NAME).mkdir()
            journal = Journal(path / JOURNAL_NAME, fingerprint)
            journal.save()
            failpoints.hit("convert.planned")
    except BaseException:
        os.close(lock)
        discard(path)
        raise
    return Staging(path, journal, is_resumed=False), lock


def _find(target: Path, fingerprint: Fingerprint) -> tuple[Staging, int] | None:
    others = []
    found: tuple[Staging, int] | None = None
    for path in _candidates(target):
        journal = Journal.load(path / JOURNAL_NAME)
        if journal is None and _is_barely_begun(path):
            others.append(
                f"{path.name} (killed before it began; deleted)" if _delete(path) else f"{path.name} (in use)"
            )
        elif journal is None or not (path / OUTPUT_NAME).is_dir():
            others.append(f"{path.name} (no journal)")
        elif journal.fingerprint != fingerprint:
            keys = sorted(journal.fingerprint.keys() | fingerprint.keys())
            differing = [key for key in keys if journal.fingerprint.get(key) != fingerprint.get(key)]
            others.append(f"{path.name} (differs in {', '.join(differing)})")
        elif found is not None:
            others.append(f"{path.name} (older)")
        elif (lock := _lock(path)) is None:
            others.append(f"{path.name} (another process is writing it)")
        else:
            found = Staging(path, journal, is_resumed=True), lock
    listed = f"; also there: {', '.join(others)}" if others else ""
    if found is None:
        logger.warning("%s: nothing to resume, so the conversion starts anew%s", target, listed)
    else:
        logger.warning(
            "%s: resuming %s with %d finished files%s",
            target,
            found[0].path.name,
            len(found[0].journal.finished),
            listed,
        )
    return found


def _is_barely_begun(path: Path) -> bool:
    """Whether a folder holds what a conversion makes before its journal, and nothing else: there is nothing to lose."""
    names = {entry.name for entry in path.iterdir()}
    drafts = {name for name in names if name.startswith(f"{JOURNAL_NAME}{STAGING_MARK}")}
    output = path / OUTPUT_NAME
    return names - drafts == {OUTPUT_NAME} and output.is_dir() and not any(output.iterdir())


def _delete(path: Path) -> bool:
    """Delete a folder unless a process holds it: a conversion locks its folder before it puts anything in it."""
    lock = _lock(path)
    if lock is None:
        return False
    discard(path)
    os.close(lock)
    return True


def _lock(path: Path) -> int | None:
    """Lock a folder for this process; None if another holds it. Closing the descriptor lets go."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
