"""How a comparison says how far it is; the command line shows it as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int, int], None]
"""Told (items, bytes) done since the last call, from one thread at a time."""

Progress = Callable[[str, int, int], AbstractContextManager[Advance]]
"""Told what is counted ("tensors"), how many there are, and how many bytes; gives the `Advance`."""


@contextmanager
def silent(what: str, items: int, num_bytes: int) -> Iterator[Advance]:
    """Say nothing."""
    yield lambda items, num_bytes: None
