"""Ranks that may die, each in its own way: `run_ranks` raises where one fails, `run_forked` says how each ended."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.testing.ranks import processes_of_ranks, warm_server


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        status: 0 returned, 1 raised, -9 killed by SIGKILL, None still running when the time was up (then killed).
        result: what the function returned.
        error: what it raised.
    """

    status: int | None
    result: Any = None
    error: BaseException | None = None


def run_forked(
    function: Callable[..., Any], nproc: int, *args: Any, timeout: float = 180, until: int | None = None
) -> list[Outcome]:
    """Call `function(*args)` on `nproc` ranks and return how each ended, by rank.

    The ranks find this process's environment and torchrun's, and Megatron imported on the CPU platform.

    Args:
        function: importable by name (top level of a module); arguments and result must pickle.
        nproc: number of ranks.
        args: given to every rank.
        timeout: seconds until ranks that still run are killed.
        until: kill the others when this rank has ended, for tests in which one of them is stuck.
    """
    with tempfile.TemporaryDirectory(prefix="forked-") as folder:
        ranks = processes_of_ranks(warm_server(), function, args, nproc, folder)
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        for process in ranks if until is None else [ranks[until]]:
            process.join(max(0.0, deadline - time.monotonic()))
        outcomes = [_outcome(Path(folder), rank, process.exitcode) for rank, process in enumerate(ranks)]
        for process in ranks:
            process.kill()
            process.join()
            process.close()
        return outcomes


def _outcome(folder: Path, rank: int, status: int | None) -> Outcome:
    if status == 0:
        return Outcome(0, result=pickle.loads((folder / f"{rank}.result").read_bytes()))  # noqa: S301
    error_file = folder / f"{rank}.error"
    error = pickle.loads(error_file.read_bytes())[0] if error_file.exists() else None  # noqa: S301
    return Outcome(status, error=error)
