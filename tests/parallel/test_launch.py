"""`--nproc`: exit codes, the line that names the rank, threads, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.multirank
ROOT = Path(__file__).parents[2]

PROGRAM = """
import multiprocessing, os, signal, sys, time
from megatron_qwen.errors import ConfigError, QwenError

def main(mode, rank):
    if mode == "threads":
        open(f"threads-{rank}", "w").write(os.environ["OMP_NUM_THREADS"])
    if mode == "config":
        raise ConfigError("no such recipe")
    if mode == "kill" and rank == 1:
        manager = multiprocessing.get_context("spawn").Manager()
        open("manager", "w").write(str(manager._process.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "crash" and rank == 1:
        raise KeyError("a bug")
    if mode in ("kill", "crash", "sleep"):
        open(f"pid-{rank}", "w").write(str(os.getpid()))
        time.sleep(100)

if __name__ == "__main__":
    try:
        main(sys.argv[1], int(os.environ["RANK"]))
    except QwenError as error:
        sys.stderr.write(f"megatron-qwen: {error}\\n")
        raise SystemExit(error.exit_code)
"""


def launch(folder: Path, mode: str, **environment: str) -> subprocess.Popen[str]:
    (folder / "rank_program.py").write_text(PROGRAM)
    code = (
        "import sys; from megatron_qwen.parallel.launch import run_module_on_local_ranks as run; "
        f"sys.exit(run('rank_program', ['{mode}'], 2))"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**inherited, "PYTHONPATH": f"{ROOT}:{folder}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_success_is_quiet_and_cores_are_shared_out(tmp_path: Path) -> None:
    assert finish(launch(tmp_path, "threads")) == (0, "")
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)] == [str(share)] * 2


def test_the_users_thread_count_stays(tmp_path: Path) -> None:
    assert finish(launch(tmp_path, "threads", OMP_NUM_THREADS="3"))[0] == 0
    assert (tmp_path / "threads-1").read_text() == "3"


def test_our_exit_code_survives(tmp_path: Path) -> None:
    code, err = finish(launch(tmp_path, "config"))
    assert code == 2
    assert "megatron-qwen: no such recipe" in err
    assert "Traceback" not in err
    assert "torch" not in err


def test_a_killed_rank_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    code, err = finish(launch(tmp_path, "kill"))
    assert code == 6
    assert err.splitlines()[-1] == "megatron-qwen: rank 1 of 2 died or stopped answering (SIGKILL)"
    assert not is_running(int((tmp_path / "manager").read_text()))


def test_a_crash_shows_that_ranks_traceback(tmp_path: Path) -> None:
    code, err = finish(launch(tmp_path, "crash"))
    assert code == 1
    assert "KeyError: 'a bug'" in err
    assert err.splitlines()[-1] == "megatron-qwen: rank 1 of 2 failed with status 1"


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_every_rank(tmp_path: Path, sent: signal.Signals, expected: int) -> None:
    process = launch(tmp_path, "sleep")
    pids = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    wait_for(*pids)
    process.send_signal(sent)
    assert finish(process)[0] == expected
    assert not any(is_running(int(path.read_text())) for path in pids)
