"""Starts and ends a rank's part of the job: process group, Megatron's parallel groups, random streams."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError, RankFailure
from megatron_qwen.parallel.device import communication_backend, current_device, install_cpu_platform
from megatron_qwen.parallel.launch import launcher_pid
from megatron_qwen.parallel.layout import ParallelLayout

# What gloo's plain RuntimeErrors say when a peer is gone; NCCL's are DistErrors.
_PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "gloo/transport",
)

_active: ParallelLayout | None = None


def initialize(layout: ParallelLayout, *, seed: int = 1234, timeout_seconds: float = 600) -> ParallelLayout:
    """Make this process a rank of `layout`.

    Takes rank and world size from torchrun's environment; without one it forms a group of one rank
    that needs no network. Installs the CPU platform where there is no GPU.

    Args:
        layout: the parallel sizes.
        seed: of Python, numpy, torch and Megatron's model-parallel streams (pipeline rank r adds 100 r).
        timeout_seconds: after which a collective whose peer is gone or stuck fails.

    Returns:
        The layout with dp filled in.

    Raises:
        ConfigError: the layout does not fit the world size, or this process already runs another one.
    """
    global _active
    resolved = layout.resolve(int(os.environ.get("WORLD_SIZE", "1")))
    if _active is not None:
        if resolved != _active:
            raise ConfigError(f"this process already runs {_active}; call shutdown() before {resolved}")
        return resolved
    install_cpu_platform()
    compat.repair_megatron_core()
    _start_process_group(datetime.timedelta(seconds=timeout_seconds))
    _start_model_parallel(resolved, timeout_seconds)
    seed_ranks(seed)
    _active = resolved
    return resolved


def _start_process_group(timeout: datetime.timedelta) -> None:
    # Ranks start minutes apart on a busy machine or file system; that is no sign of a dead peer.
    patience = max(timeout, datetime.timedelta(minutes=5))
    if dist.is_initialized():
        return
    _follow_launcher()
    atexit.register(shutdown)  # the backend's threads must end before the interpreter does
    if torch.cuda.is_available():
        torch.cuda.set_device(current_device())
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(communication_backend(), timeout=patience)
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(timeout)
    else:
        dist.init_process_group(communication_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]


def _follow_launcher() -> None:
    """End this rank when the launcher that started it is gone: nobody could stop it any more."""
    launcher = launcher_pid()
    if launcher is None or os.getppid() != launcher:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="follow launcher").start()


@contextlib.contextmanager
def collectives() -> Iterator[None]:
    """Turn the failure of a collective (a peer died, hangs, or left) into RankFailure.

    Raises:
        RankFailure: whatever torch.distributed or gloo raised inside says that a peer is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _PEER_GONE):
            raise
        said = re.sub(r"^\[[^]]*\] |\. This is typically.*", "", str(error).splitlines()[0])
        raise RankFailure(
            f"rank {rank()} of {world_size()} lost a peer in a collective: {said}. "
            "Look for the rank that died or hangs, and resume from the last checkpoint."
        ) from error


def _start_model_parallel(layout: ParallelLayout, timeout_seconds: float) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=timeout_seconds / 60,
    )


def seed_ranks(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's model-parallel streams of this rank; pipeline rank r adds 100 r."""
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave Megatron's groups and the process group; does nothing if none was started."""
    global _active
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _active = None


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this is the rank that prints and writes the files of which there is one."""
    return rank() == 0


def is_last_stage() -> bool:
    """Whether this rank holds the last pipeline stage, and with it the loss."""
    if _active is None or _active.pp == 1:
        return True
    from megatron.core import parallel_state

    return bool(parallel_state.get_pipeline_model_parallel_rank() == _active.pp - 1)
