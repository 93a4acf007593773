"""Half-written outputs (`*.incomplete-*`) of interrupted commands: how old, how large, and what to do with them."""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint.atomic import STAGING_MARK
from megatron_qwen.errors import InputError
from megatron_qwen.strict_json import read_strict_json

_JOURNAL = "progress.json"
_MAX_JOURNAL_BYTES = 64 * 2**20
_VERBS = {
    "hf -> megatron": "import",
    "megatron -> hf": "export",
    "megatron -> megatron": "reshard",
    "dense hf -> moe hf": "upcycle",
}


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One half-written output.

    Attributes:
        path: of the file or folder.
        num_bytes: that it takes on the disk.
        age_seconds: since something in it was last written.
        is_in_use: a process is writing it now.
        advice: the command that goes on with it, or how to be rid of it.
    """

    path: str
    num_bytes: int
    age_seconds: float
    is_in_use: bool
    advice: str


def find_leftovers(folders: Iterable[Path]) -> list[Leftover]:
    """Return the half-written outputs under the folders, not following links, each once and sorted by path."""
    found: set[Path] = set()
    for folder in folders:
        for parent, names, files in os.walk(folder):
            marked = [name for name in (*names, *files) if STAGING_MARK in name]
            found |= {Path(parent, name) for name in marked}
            names[:] = [name for name in names if name not in marked]
    unique = {path.resolve(): path for path in sorted(found, reverse=True)}
    return sorted((_describe(path) for path in unique.values()), key=lambda leftover: leftover.path)


def _describe(path: Path) -> Leftover:
    below = [Path(parent, name) for parent, folders, files in os.walk(path) for name in (*folders, *files)]
    states = [each.lstat() for each in (path, *below)]
    in_use = path.is_dir() and _is_locked(path)
    return Leftover(
        path=str(path),
        num_bytes=sum(state.st_blocks * 512 for state in states),
        age_seconds=max(0.0, time.time() - max(state.st_mtime for state in states)),
        is_in_use=in_use,
        advice="being written: leave it alone" if in_use else _advice(path),
    )


def _is_locked(folder: Path) -> bool:
    """Whether a conversion at work holds the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _advice(path: Path) -> str:
    delete = f"rm -r {shlex.quote(str(path))}"
    target = path.with_name(path.name.partition(STAGING_MARK)[0])
    if target.name.startswith("iter_"):
        return f"the next run in {shlex.quote(str(path.parent))} deletes it; or {delete}"
    try:
        journal = read_strict_json(path / _JOURNAL, max_bytes=_MAX_JOURNAL_BYTES)
        command = _resume_command(journal["fingerprint"], target)
    except (InputError, LookupError, TypeError):
        return delete
    return f"{command}; or {delete}"


def _resume_command(fingerprint: Mapping[str, Any], target: Path) -> str:
    """Return how to go on with a conversion; what it was given besides is in the words of its options."""
    words = ["megatron-qwen", "convert", _VERBS[fingerprint["direction"]], fingerprint["source"], str(target)]
    options = {**(fingerprint["recipe"] or {}), **fingerprint["options"]}
    given = [f"{name}={value}" for name, value in options.items()]
    return f"{shlex.join([*words, '--resume'])} (with its other options again: {', '.join(given)})"
