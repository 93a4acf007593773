"""Faults 12, 22, 23, 25, 33 and 34 on the checkpoint store: whatever happens, the last verified step survives.

Ranks are real gloo processes; the sharded state is a toy, because what matters is when they die.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.store import TRACKER_NAME, CheckpointStore
from megatron_qwen.errors import StorageError, UnsafeInputError
from megatron_qwen.testing import failpoints
from megatron_qwen.testing.forked import Outcome, run_forked

pytestmark = pytest.mark.multirank

# Registered at import by atomic.py, store.py and torch_dist.py; the last needs megatron, so it is asked in a rank.
POINTS = {
    "save.staged",
    "save.planned",
    "save.shards_written",
    "save.sharded",
    "save.hashed",
    "commit.synced",
    "commit.renamed",
    "save.committed",
    "text.drafted",
    "save.tracked",
    "retention.renamed",
}
COMPLETE_FROM = {"commit.renamed", "save.committed", "text.drafted", "save.tracked", "retention.renamed"}
RANK_ZERO_ONLY = POINTS - {"save.staged", "save.planned", "save.shards_written", "save.sharded", "save.hashed"}


def state(fill: float | None) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = torch.full((3, 4), fill or 0.0) * (rank + 1)
    return {"split": ShardedTensor.from_rank_offsets("split", part, (1, rank, ranks)), **({"lr": fill} if fill else {})}


def start(timeout: float = 120) -> int:
    import datetime

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    return dist.get_rank()


def save(root: Path, step: int, armed: str | None = None, timeout: float = 120) -> None:
    start(timeout)
    store = CheckpointStore(root, keep_last=1)
    with store.lock():
        failpoints.arm(armed)
        store.save(step, state(float(step)), common={"step": step})


def load_latest(store: CheckpointStore) -> tuple[int, float]:
    import torch.distributed as dist

    latest = store.latest_valid()
    assert latest is not None
    split = store.load(state(None))["split"]
    assert (split == split[0, 0]).all()
    assert store.common(latest[0]) == {"step": latest[0]}
    return latest[0], float(split[0, 0]) / (dist.get_rank() + 1)


def load(root: Path) -> tuple[int, float]:
    start()
    return load_latest(CheckpointStore(root))


def recover(root: Path) -> tuple[Any, ...]:
    """What the next run does: take over, load, save."""
    start()
    store = CheckpointStore(root, keep_last=1)
    tracked = (root / TRACKER_NAME).read_text()
    with store.lock():
        left = [path.name for path in root.glob("*.incomplete-*")]
        found = load_latest(store)
        store.save(3, state(3.0), common={"step": 3})
    return found, tracked, left, load_latest(store)


def fill_the_disk_at_each_point(first: Path, folder: Path) -> dict[str, Any]:
    """Save with ENOSPC at each point in turn; return by point what was raised, and what was left and loads."""
    rank = start()
    seen = {}
    for point in sorted(POINTS):
        root = folder / point
        if rank == 0:
            shutil.copytree(first, root)
        dist_barrier()
        store = CheckpointStore(root, keep_last=1)
        failpoints.arm(f"{point}:1:enospc")
        error: Exception | None = None
        try:
            store.save(2, state(2.0), common={"step": 2})
        except OSError as caught:
            error = caught
        failpoints.arm(None)
        dist_barrier()
        left = [path.name for path in root.glob("iter_*.incomplete-*")]
        dist_barrier()
        seen[point] = error, left, load_latest(store)
    return seen


def dist_barrier() -> None:
    import torch.distributed as dist

    dist.barrier()


def registered() -> list[str]:
    for name in ("atomic", "store", "torch_dist"):
        importlib.import_module(f"megatron_qwen.checkpoint.{name}")
    return sorted(failpoints.REGISTERED)


def results(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes
    return [outcome.result for outcome in outcomes]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first") / "run"
    results(run_forked(save, 2, root, 1))
    return root


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "run"))


def check_survivor(run: Path, complete: bool) -> None:
    """The run has step 1 or a whole step 2, no half-step counts, and the next run cleans up and goes on."""
    expected = (2, 2.0) if complete else (1, 1.0)
    for found, tracked, left, after in results(run_forked(recover, 2, run)):
        assert found == expected
        assert tracked in (("1", "2") if complete else ("1",))
        assert left == []
        assert after == (3, 3.0)


def test_no_registered_point_is_left_untested() -> None:
    (names,) = results(run_forked(registered, 1))
    families = {point.split(".")[0] for point in POINTS}
    assert {name for name in names if name.split(".")[0] in families} == POINTS


KILLS = [(point, 0) for point in sorted(POINTS)] + [(point, 1) for point in sorted(POINTS - RANK_ZERO_ONLY)]


@pytest.mark.parametrize(("point", "rank"), KILLS)
def test_rank_killed_during_a_save_leaves_a_whole_step(run: Path, point: str, rank: int) -> None:
    outcomes = run_forked(save, 2, run, 2, f"{point}:1:kill:{rank}")
    assert outcomes[rank].status == -signal.SIGKILL
    assert outcomes[1 - rank].status == 1, "the other rank neither hung nor carried on"
    # After hashing, rank 1 has no part left in the step, which rank 0 completes.
    check_survivor(run, point in COMPLETE_FROM or (point, rank) == ("save.hashed", 1))


def test_disk_full_at_any_point_is_a_storage_error_and_leaves_a_whole_step(first: Path, tmp_path: Path) -> None:
    for seen in results(run_forked(fill_the_disk_at_each_point, 2, first, tmp_path)):
        for point, (error, left, found) in seen.items():
            assert found == ((2, 2.0) if point in COMPLETE_FROM else (1, 1.0)), point
            if point == "retention.renamed":  # the step is safe: a failed clean-up is logged and training goes on
                assert error is None
                continue
            assert isinstance(error, StorageError), (point, error)
            assert "No space left" in str(error), point
            assert not [name for name in left if "0000002" in name], point


def test_rank_that_raises_between_collectives_fails_all_ranks(run: Path) -> None:
    outcomes = run_forked(save, 2, run, 2, "save.hashed:1:raise")
    assert [outcome.status for outcome in outcomes] == [1, 1]
    check_survivor(run, complete=False)


def test_stuck_rank_fails_the_others_within_the_timeout(run: Path) -> None:
    outcomes = run_forked(save, 2, run, 2, "save.staged:1:stop:1", 5.0, until=0)
    assert outcomes[1].status is None
    assert outcomes[0].status == 1
    check_survivor(run, complete=False)


def save_much(root: Path, megabytes: int) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    rank = start()
    part = torch.ones(megabytes, 2**18)
    entry = ShardedTensor.from_rank_offsets("split", part, (0, rank, dist.get_world_size()))
    CheckpointStore(root).save(2, {"split": entry}, common={})


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_checkpoint_larger_than_the_disk_is_refused_before_writing(small_disk: Path) -> None:
    results(run_forked(save, 2, small_disk / "run", 1))
    for outcome in run_forked(save_much, 2, small_disk / "run", 2):
        assert isinstance(outcome.error, StorageError)
        assert "needs 0.004 GB" in str(outcome.error)
    assert results(run_forked(load, 2, small_disk / "run"))[0] == (1, 1.0)


def save_on_filling_disk(root: Path) -> None:
    import megatron_qwen.checkpoint.store as store_module

    plenty = shutil.disk_usage("/")
    store_module.shutil.disk_usage = lambda _: plenty._replace(free=2**50)  # type: ignore[assignment]
    save_much(root, 2)


def test_disk_that_fills_up_while_writing_leaves_the_old_step(small_disk: Path) -> None:
    run = small_disk / "run"
    results(run_forked(save, 2, run, 1))
    for outcome in run_forked(save_on_filling_disk, 2, run):
        assert isinstance(outcome.error, StorageError), outcome
    assert not list(run.glob("*.incomplete-*"))
    assert results(run_forked(load, 2, run))[0] == (1, 1.0)


class Payload:
    """A pickle that runs code when it is opened."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


def poison(step: Path, where: str, sentinel: Path) -> None:
    import torch

    if where == "metadata":
        (step / ".metadata").write_bytes(pickle.dumps(Payload(sentinel)))
    elif where == "metadata within":
        metadata = pickle.loads((step / ".metadata").read_bytes())
        metadata.planner_data = {"x": Payload(sentinel)}
        (step / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where == "path":
        metadata = pickle.loads((step / ".metadata").read_bytes())
        for storage in metadata.storage_data.values():
            storage.relative_path = f"../{storage.relative_path}"
        (step / ".metadata").write_bytes(pickle.dumps(metadata))
    elif where == "common.pt":
        torch.save({"x": Payload(sentinel)}, step / "common.pt")
    else:
        # The object's bytes inside a shard, replaced in place by a pickle of the same length.
        metadata = pickle.loads((step / ".metadata").read_bytes())
        (storage,) = (each for index, each in metadata.storage_data.items() if index.fqn.startswith("rng_state"))
        buffer = io.BytesIO()
        torch.save(Payload(sentinel), buffer)
        raw = bytearray((step / storage.relative_path).read_bytes())
        storage.offset, storage.length = len(raw), len(buffer.getvalue())
        (step / storage.relative_path).write_bytes(raw + buffer.getvalue())
        (step / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest.write_manifest(step)  # an attacker can write a manifest as well as we can


def save_with_object(root: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    start()
    CheckpointStore(root).save(1, {**state(1.0), "o": ShardedObject("rng_state", [1], (1,), (0,))}, common={})


def load_with_object(root: Path) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    start()
    return CheckpointStore(root).load({**state(None), "o": ShardedObject("rng_state", None, (1,), (0,))})["o"]


@pytest.mark.parametrize("where", ["metadata", "metadata within", "path", "common.pt", "object"])
def test_malicious_pickle_is_refused_and_never_runs(tmp_path: Path, where: str) -> None:
    root, sentinel = tmp_path / "run", tmp_path / "sentinel"
    results(run_forked(save_with_object, 1, root))
    assert results(run_forked(load_with_object, 1, root)) == [[1]]
    poison(root / "iter_0000001", where, sentinel)
    sentinel.unlink(missing_ok=True)
    (outcome,) = run_forked(load_with_object, 1, root)
    assert isinstance(outcome.error, UnsafeInputError), outcome
    assert "iter_0000001" in str(outcome.error)
    assert not sentinel.exists()


def hold(root: Path, release: Path) -> None:
    start()
    with CheckpointStore(root).lock():
        (root / "held").touch()
        while not release.exists():
            time.sleep(0.02)


def test_second_run_in_a_folder_is_refused_naming_host_and_pid(tmp_path: Path) -> None:
    import threading

    root, release = tmp_path / "run", tmp_path / "release"
    first_run = threading.Thread(target=run_forked, args=(hold, 2, root, release))
    first_run.start()
    try:
        while not (root / "held").exists():
            time.sleep(0.02)
        for outcome in run_forked(save, 2, root, 1):
            assert isinstance(outcome.error, StorageError), outcome
            assert f"on host {socket.gethostname()}" in str(outcome.error)
            assert "pid " in str(outcome.error)
    finally:
        release.touch()
        first_run.join()
    results(run_forked(save, 2, root, 1))


def die_holding(root: Path) -> None:
    start()
    with CheckpointStore(root).lock():
        os.kill(os.getpid(), signal.SIGKILL)


def test_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (outcome,) = run_forked(die_holding, 1, root)
    assert outcome.status == -signal.SIGKILL
    assert (root / ".lock.json").exists()
    results(run_forked(save, 1, root, 1))
    assert not (root / ".lock.json").exists()
