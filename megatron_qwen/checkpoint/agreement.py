"""Steps that all ranks take together: if one fails, all raise, and each knows whose fault it was.

Without a process group each function is its plain local self.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_qwen.errors import QwenError, StorageError

T = TypeVar("T")


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(action: Callable[[], T], what: str) -> list[T]:
    """Run `action` on every rank and return all results by rank, on every rank. Collective.

    Args:
        action: must not communicate.
        what: start of the message that the other ranks raise.

    Raises:
        QwenError: of the first rank that failed, in its class if it is one of ours, else StorageError.
    """
    result: T | None = None
    mine: Exception | None = None
    try:
        result = action()
    except Exception as error:  # told to the other ranks first, then raised below
        mine = error
    failure = None if mine is None else (type(mine) if isinstance(mine, QwenError) else StorageError, str(mine))
    outcomes: list[tuple[T | None, tuple[type[QwenError], str] | None]] = [(result, failure)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(outcomes, (result, failure))
    if mine is not None:
        raise mine
    for number, (_, failed) in enumerate(outcomes):
        if failed is not None:
            kind, message = failed
            raise kind(f"{what}: rank {number}: {message}")
    return [outcome for outcome, _ in outcomes]  # type: ignore[misc]


def on_rank_zero(action: Callable[[], T], what: str) -> T:
    """Run `action` on rank 0 and return its result on every rank. Collective; raises as `gather`."""
    results = gather(lambda: action() if rank() == 0 else None, what)
    return results[0]  # type: ignore[return-value]


def from_rank_zero(question: Callable[[], T]) -> T:
    """Ask rank 0's view of the disk, so that ranks on different hosts decide alike. Collective."""
    return on_rank_zero(question, "cannot read the checkpoint folder")
