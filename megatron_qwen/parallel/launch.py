"""`--nproc N`: runs the same command on N ranks of this machine through torch's elastic launcher.

Rank 0 writes to the terminal; the other ranks write to files that are shown only when a rank fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_qwen.errors import INTERRUPTED_EXIT_CODE, RankFailure

_JOB = "MEGATRON_QWEN_JOB"
_LAUNCHER = "MEGATRON_QWEN_LAUNCHER"
_SYMPTOM_CODES = (1, RankFailure.exit_code)
_SHOWN_LINES = 20


def is_rank_process() -> bool:
    """Whether torchrun (or `relaunch_on_local_ranks`) started this process as a rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_pid() -> int | None:
    """Return the process id of the launcher that must outlive this rank; None under somebody else's launcher."""
    pid = os.environ.get(_LAUNCHER)
    return int(pid) if pid else None


def relaunch_on_local_ranks(arguments: list[str], nproc: int) -> int:
    """Run `megatron-qwen ARGUMENTS` on `nproc` local ranks and wait for them.

    Args:
        arguments: what follows the command's name.
        nproc: number of ranks.

    Returns:
        The exit code, as `run_module_on_local_ranks` gives it.
    """
    return run_module_on_local_ranks("megatron_qwen", arguments, nproc)


def run_module_on_local_ranks(module: str, arguments: list[str], nproc: int) -> int:
    """Run `python -m MODULE ARGUMENTS` on `nproc` local ranks and wait for them.

    Sets OMP_NUM_THREADS to an equal share of the cores, unless the user has set it.

    Returns:
        0, or the exit code of the rank that failed first: our own codes survive, a rank that died of
        a signal gives RankFailure's, Ctrl-C gives 130. One line on stderr names that rank.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    job = uuid.uuid4().hex
    with (
        tempfile.TemporaryDirectory(prefix="megatron-qwen-ranks-") as folder,
        _job_environment(job, nproc),
        _quiet_torchelastic(),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=job,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, nproc), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            return _report(error.failures, nproc, Path(folder))
        except (SignalException, KeyboardInterrupt) as error:
            number = getattr(error, "sigval", signal.SIGINT)
            sys.stderr.write("megatron-qwen: interrupted\n")
            return INTERRUPTED_EXIT_CODE if number == signal.SIGINT else 128 + int(number)
        finally:
            _end_descendants(job)
    return 0


@contextlib.contextmanager
def _job_environment(job: str, nproc: int) -> Iterator[None]:
    """Set what the ranks inherit, and put the environment back."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {_JOB: job, _LAUNCHER: str(os.getpid())}
    for name, default in (("OMP_NUM_THREADS", max(1, cores // nproc)), ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 10)):
        wanted[name] = os.environ.get(name, str(default))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_torchelastic() -> Iterator[None]:
    """Keep torchelastic's own report out of the terminal; `_report` says it in one line."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.")]
    loggers = [logging.getLogger(name) for name in {*names, "torch.distributed.elastic"}]
    levels = [logger.level for logger in loggers]
    if os.environ.get("MEGATRON_QWEN_LOG", "").upper() not in ("DEBUG", "INFO"):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _root_cause(failures: dict[int, Any]) -> int:
    """Return the rank that failed first, where others failed because of it.

    `failures` comes in the order of discovery; ranks that the launcher ended by SIGTERM come last.
    """
    died = [rank for rank, failure in failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM]
    told = [
        rank for rank, failure in failures.items() if failure.exitcode > 0 and failure.exitcode not in _SYMPTOM_CODES
    ]
    return next(iter([*sorted(told), *died, *failures]))


def _report(failures: dict[int, Any], nproc: int, folder: Path) -> int:
    rank = _root_cause(failures)
    exit_code = int(failures[rank].exitcode)
    logs = [path for path in folder.rglob("stderr.log") if path.parent.name == str(rank)]
    last_words = logs[0].read_text(errors="replace").splitlines()[-_SHOWN_LINES:] if logs else []
    if exit_code < 0:
        cause = signal.Signals(-exit_code).name
        last_words.append(f"megatron-qwen: rank {rank} of {nproc} died or stopped answering ({cause})")
        exit_code = RankFailure.exit_code
    elif rank > 0 or exit_code in _SYMPTOM_CODES:
        last_words.append(f"megatron-qwen: rank {rank} of {nproc} failed with status {exit_code}")
    sys.stderr.write("".join(f"{line}\n" for line in last_words))
    return exit_code


def _end_descendants(job: str) -> None:
    """End what the ranks left behind, such as the manager process of a checkpoint cut short."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(_JOB) == job:
                process.kill()
