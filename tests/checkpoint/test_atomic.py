"""A folder or a file takes its final name whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qwen.checkpoint import atomic
from megatron_qwen.errors import StorageError

JOB = """
import sys
from pathlib import Path
from megatron_qwen.checkpoint import atomic
target = Path(sys.argv[1])
if sys.argv[2] == "text":
    atomic.atomic_write_text(target, "new")
else:
    staging = atomic.make_staging(target)
    (staging / "content").write_text("new")
    atomic.commit(staging, target, overwrite=True)
"""


def run_armed(target: Path, kind: str, failpoint: str) -> int:
    environment = {**os.environ, "MEGATRON_QWEN_FAILPOINT": failpoint}
    return subprocess.run([sys.executable, "-c", JOB, str(target), kind], env=environment, timeout=60).returncode


def test_commit_gives_the_folder_its_name_and_leaves_nothing_aside(tmp_path: Path) -> None:
    staging = atomic.make_staging(tmp_path / "deep" / "out")
    (staging / "content").write_text("1")
    atomic.commit(staging, tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "content").read_text() == "1"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_existing_target_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    for content, overwrite in (("1", False), ("2", True)):
        staging = atomic.make_staging(tmp_path / "out")
        (staging / content).touch()
        atomic.commit(staging, tmp_path / "out", overwrite=overwrite)
    assert os.listdir(tmp_path / "out") == ["2"]
    staging = atomic.make_staging(tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        atomic.commit(staging, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["2"]
    assert atomic.stale_staging(tmp_path) == [staging]
    atomic.discard(staging)
    assert atomic.stale_staging(tmp_path) == []


def test_empty_target_is_replaced_and_one_filled_meanwhile_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    staging = atomic.make_staging(target)
    (staging / "ours").touch()
    atomic.commit(staging, target)
    assert os.listdir(target) == ["ours"]
    staging = atomic.make_staging(target)
    (staging / "later").touch()
    with pytest.raises(StorageError, match="exists already"):
        atomic.commit(staging, target)
    assert os.listdir(target) == ["ours"]


def test_overwrite_works_where_the_kernel_cannot_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    for content in ("1", "2"):
        staging = atomic.make_staging(tmp_path / "out")
        (staging / content).touch()
        atomic.commit(staging, tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["2"]


@pytest.mark.parametrize(("failpoint", "survivor"), [("commit.synced", "old"), ("commit.renamed", "new")])
def test_kill_during_commit_leaves_the_old_or_the_new_folder_whole(
    tmp_path: Path, failpoint: str, survivor: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "content").write_text("old")
    assert run_armed(target, "folder", f"{failpoint}:1:kill") == -9
    assert (target / "content").read_text() == survivor
    assert len(atomic.stale_staging(tmp_path)) == 1


@pytest.mark.parametrize("action", ["kill", "enospc"])
def test_interrupted_text_leaves_the_old_content(tmp_path: Path, action: str) -> None:
    target = tmp_path / "tracker.txt"
    target.write_text("old")
    assert run_armed(target, "text", f"text.drafted:1:{action}") != 0
    assert target.read_text() == "old"
    assert len(atomic.stale_staging(tmp_path)) == (1 if action == "kill" else 0)
    assert run_armed(target, "text", "") == 0
    assert target.read_text() == "new"


def test_stopped_process_continues_where_it_was(tmp_path: Path) -> None:
    target = tmp_path / "tracker.txt"
    environment = {**os.environ, "MEGATRON_QWEN_FAILPOINT": "text.drafted:1:stop"}
    process = subprocess.Popen([sys.executable, "-c", JOB, str(target), "text"], env=environment)
    try:
        deadline = time.monotonic() + 30
        while not atomic.stale_staging(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert process.poll() is None
        assert not target.exists()
        process.send_signal(18)  # SIGCONT
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert target.read_text() == "new"


def test_file_in_the_way_of_the_parent_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot create"):
        atomic.make_staging(tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="cannot create"):
        atomic.make_staging(tmp_path / ("x" * 300))
