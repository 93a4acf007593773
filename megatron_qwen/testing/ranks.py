"""Runs a function on several real ranks (gloo or nccl processes) and brings back what each returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_qwen.errors import RankFailure


def run_ranks(
    function: Callable[..., Any], nproc: int, *args: Any, timeout: float = 120, fresh: bool = False
) -> list[Any]:
    """Call `function(*args)` in `nproc` processes of their own, in this one's environment and torchrun's.

    The ranks meet through a TCP store on a port the system picked; rank 0 serves it. Without CUDA they have imported
    Megatron already, on the CPU platform: see `warm_server`.

    Args:
        function: importable by name (top level of a module); arguments and result must pickle.
        nproc: number of ranks.
        args: given to every rank.
        timeout: seconds until every rank is killed.
        fresh: start ranks that have imported nothing, for what must happen before Megatron is imported.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailure: a rank died, or the time ran out.
        Exception: the one a rank raised first, with that rank's traceback as its cause.
    """
    # The driver of CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn") if fresh or _has_cuda() else warm_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = processes_of_ranks(context, function, args, nproc, folder)
        try:
            for process in ranks:
                process.start()
            _wait(ranks, Path(folder), time.monotonic() + timeout, timeout)
            return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(nproc)]  # noqa: S301
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()


def leave_layout() -> None:
    """End the groups of the layout that this rank runs, but not the process group: another layout may be entered.

    A gloo group is a thread that wakes up a hundred times a second, and a layout has some fifty of them: with those of
    eight layouts left behind an idle rank took a fifth of a core, and ranks that went through twenty-six hardly ran.
    """
    import torch.distributed as dist

    from megatron_qwen.parallel import groups

    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    dist.barrier()  # no rank is inside a collective of a group that its peer ends
    parallel_state.destroy_model_parallel()
    groups._active = None
    for group in [each for each in dist.distributed_c10d._world.pg_map if each is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    gc.collect()  # models hold groups, in cycles


def warm_server() -> Any:
    """Return the multiprocessing context whose processes are forked from a server that has imported Megatron.

    Importing it costs every process about 4 s of processor time, or 6 with what the first optimizer imports; a fork
    takes some 50 ms. The server lives as long as this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_qwen.testing.warm"])
    return context


def processes_of_ranks(
    context: Any, function: Callable[..., Any], args: tuple[Any, ...], nproc: int, folder: str
) -> list[Any]:
    """Return processes, not yet started, that leave a result or an error of each rank in `folder`."""
    environment = dict(os.environ)
    return [
        context.Process(target=_run_rank, args=(function, args, rank, nproc, folder, environment), name=f"rank {rank}")
        for rank in range(nproc)
    ]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait(ranks: list[Any], folder: Path, deadline: float, timeout: float) -> None:
    while True:
        for rank, process in enumerate(ranks):
            failure = folder / f"{rank}.error"
            if failure.exists():
                error, text = pickle.loads(failure.read_bytes())  # noqa: S301
                raise error from RankFailure(f"rank {rank} raised:\n{text}")
            if process.exitcode not in (None, 0):
                raise RankFailure(f"rank {rank} of {len(ranks)} ended with status {process.exitcode}")
        if all(process.exitcode == 0 for process in ranks):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
            raise RankFailure(f"ranks {alive} of {len(ranks)} were still running after {timeout:g} s")
        time.sleep(0.02)


def _run_rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, nproc: int, folder: str, environment: dict[str, str]
) -> None:
    os.environ.clear()  # of the server's, which started with another
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MEGATRON_QWEN_LAUNCHER"] = str(os.getppid())  # groups.initialize() ends a rank whose parent is gone
    os.environ["MASTER_PORT"] = _meet(rank, Path(folder))
    try:
        outcome, name = pickle.dumps(function(*args)), f"{rank}.result"
    except BaseException as error:  # carried to the parent, which raises it
        outcome, name = _pickled_error(error), f"{rank}.error"
    draft = Path(folder) / f"{name}.part"
    draft.write_bytes(outcome)
    draft.rename(Path(folder) / name)
    if name.endswith(".error"):
        os._exit(1)  # peers may be stuck in a collective: an orderly end could wait for them
    _leave()


_served: list[Any] = []


def _meet(rank: int, folder: Path) -> str:
    """Serve a TCP store on a free port (rank 0) or wait for its number (the others)."""
    port_file = folder / "port"
    if rank == 0:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        _served.append(store)  # serves for as long as it is referenced
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # init_process_group joins it instead of binding again
        draft = folder / "port.part"
        draft.write_text(str(store.port))
        draft.rename(port_file)
    while not port_file.exists():
        time.sleep(0.01)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return port_file.read_text()


def _leave() -> None:
    # Gloo's threads must not outlive the interpreter ("terminate called without an active exception").
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
    _served.clear()


def _pickled_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        outcome = pickle.dumps((error, text))
        pickle.loads(outcome)  # noqa: S301
    except Exception:  # an exception may refuse pickling in any way; its text then travels alone
        return pickle.dumps((RankFailure(text), text))
    return outcome
