"""Saving, finding and loading steps on real gloo ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.store import RECORD_NAME, TRACKER_NAME, CheckpointStore
from megatron_qwen.errors import (
    CorruptInputError,
    IncompleteInputError,
    MismatchError,
    StorageError,
)
from megatron_qwen.testing.forked import Outcome, run_forked

pytestmark = pytest.mark.multirank


def start() -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank()


def toy_state(fill: float | None, *, columns: int = 6, dtype: str = "float32", extra: bool = False) -> dict[str, Any]:
    """One tensor split by columns over the ranks, one held by all, one object per rank, and common data."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    rank, ranks = dist.get_rank(), dist.get_world_size()
    kind = getattr(torch, dtype)
    whole = torch.arange(5.0 * columns).reshape(5, columns).to(kind) * (fill or 0)
    replica = torch.full((7,), fill or 0.0)
    state = {
        "split": ShardedTensor.from_rank_offsets("split", whole.chunk(ranks, 1)[rank].contiguous(), (1, rank, ranks)),
        "replica": ShardedTensor.from_rank_offsets("replica", replica, replica_id=rank),
        "rng_state": ShardedObject("rng_state", {"rank": rank, "fill": fill}, (ranks,), (rank,)),
    }
    if fill is not None:
        state["lr"] = [fill, 2.0]
    if extra:
        state["extra"] = ShardedTensor.from_rank_offsets("extra", torch.ones(2), replica_id=rank)
    return state


def save_steps(root: Path, fills: dict[int, float], keep_last: int | None = None) -> None:
    start()
    store = CheckpointStore(root, keep_last=keep_last)
    for step, fill in fills.items():
        store.save(step, toy_state(fill), common={"fill": fill}, files={"note.txt": f"{fill}"})


def load_split(root: Path, step: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, ...]:
    import torch

    start()
    store = CheckpointStore(root)
    state = toy_state(None, **(options or {}))
    del state["rng_state"]  # of the layout that saved
    loaded = store.load(state, step=step)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, loaded["split"])
    return torch.cat(parts, 1).numpy(), loaded["replica"].numpy(), loaded["lr"]


def results(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes
    return [outcome.result for outcome in outcomes]


def expect(fill: float) -> Any:
    import numpy as np

    return np.arange(30, dtype=np.float32).reshape(5, 6) * np.float32(fill)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two_steps") / "run"
    results(run_forked(save_steps, 2, root, {10: 1.5, 20: 2.5}))
    return root


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_step_saved_on_two_ranks_loads_on_any_number(two_steps: Path, nproc: int) -> None:
    for split, replica, lr in results(run_forked(load_split, nproc, two_steps)):
        assert (split == expect(2.5)).all()
        assert (replica == 2.5).all()
        assert lr == [2.5, 2.0]


def test_folder_follows_megatrons_conventions_and_is_complete(two_steps: Path) -> None:
    assert (two_steps / TRACKER_NAME).read_text() == "20"
    assert sorted(path.name for path in two_steps.iterdir()) == ["iter_0000010", "iter_0000020", TRACKER_NAME]
    step = two_steps / "iter_0000020"
    assert manifest.verify(step, "full") == []
    assert (step / "note.txt").read_text() == "2.5"
    assert json.loads((step / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert set(manifest.read_manifest(step)) >= {".metadata", "metadata.json", RECORD_NAME, "note.txt", "__1_0.distcp"}


def load_as_stock_megatron(folder: Path) -> Any:
    from megatron.core import dist_checkpointing

    rank = start()
    state = toy_state(None)
    loaded = dist_checkpointing.load(state, str(folder))
    assert loaded["rng_state"] == {"rank": rank, "fill": 2.5}
    return loaded["split"].numpy()


def test_stock_dist_checkpointing_loads_a_step(two_steps: Path) -> None:
    left, right = results(run_forked(load_as_stock_megatron, 2, two_steps / "iter_0000020"))
    assert (left == expect(2.5)[:, :3]).all()
    assert (right == expect(2.5)[:, 3:]).all()


def load_without_common_file(step: Path) -> Any:
    from megatron_qwen import compat

    (step / "common.pt").unlink(missing_ok=True)
    manifest.write_manifest(step)
    return compat.reads_common_state_from_shards(), load_split(step.parent)


def test_step_of_a_newer_megatron_is_read_or_refused_by_name(run: Path) -> None:
    (outcome,) = run_forked(load_without_common_file, 1, run / "iter_0000020")
    if outcome.status == 0:
        assert outcome.result[0]
        assert (outcome.result[1][0] == expect(2.5)).all()
    else:
        assert isinstance(outcome.error, MismatchError), outcome
        assert "use megatron-core 0.19" in str(outcome.error)


def save_and_look_for_children(root: Path) -> list[str]:
    import psutil

    start()
    store = CheckpointStore(root)
    store.save(1, toy_state(1.0), common={})
    return [child.name() for child in psutil.Process().children(recursive=True)]


def test_save_leaves_no_processes_behind(tmp_path: Path) -> None:
    assert results(run_forked(save_and_look_for_children, 2, tmp_path / "run")) == [[], []]


def latest(root: Path) -> tuple[tuple[int, Path] | None, list[str]]:
    start()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_qwen").addHandler(handler)
    return CheckpointStore(root).latest_valid(), lines


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "never completed"),
    "shard missing": (lambda step: (step / "__1_0.distcp").unlink(), "__1_0.distcp: missing"),
    "shard truncated": (lambda step: os.truncate(step / "__0_0.distcp", 100), "__0_0.distcp: 100 bytes"),
    "bit flip on rank 1": (lambda step: flip_a_bit(step / "__1_0.distcp"), "__1_0.distcp: SHA-256"),
    "record garbled": (lambda step: (step / RECORD_NAME).write_text("{"), f"{RECORD_NAME}: 1 bytes"),
    "manifest garbled": (lambda step: (step / "manifest.json").write_text("{"), "not valid JSON"),
    "folder emptied": (lambda step: [path.unlink() for path in step.iterdir()], "never completed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_verified_step_is_taken_and_the_skipped_one_is_logged(run: Path, damage: str) -> None:
    do_damage, reason = DAMAGES[damage]
    do_damage(run / "iter_0000020")
    (found, lines), (other, other_lines) = results(run_forked(latest, 2, run))
    assert found == other == (10, run / "iter_0000010")
    assert any("iter_0000020 is not used" in line and reason in line for line in lines), lines
    assert other_lines == []  # said once, not by every rank


@pytest.mark.parametrize("tracker", ["", "garbage", "30", "10", None])
def test_tracker_is_not_trusted(run: Path, tracker: str | None) -> None:
    (run / TRACKER_NAME).unlink()
    if tracker is not None:
        (run / TRACKER_NAME).write_text(tracker)
    (found, lines), (other, _) = results(run_forked(latest, 2, run))
    assert found == other == (20, run / "iter_0000020")
    assert any(TRACKER_NAME in line for line in lines), lines


def test_leftovers_of_interrupted_saves_are_no_steps(run: Path) -> None:
    (run / "iter_0000020").rename(run / "iter_0000020.incomplete-0123abcd")
    (found, _), _ = results(run_forked(latest, 2, run))
    assert found == (10, run / "iter_0000010")


def test_explicit_step_never_falls_back(run: Path) -> None:
    with pytest.raises(IncompleteInputError, match=r"no step 15; there are: 20, 10"):
        results(run_forked(load_split, 2, run, 15))
    flip_a_bit(run / "iter_0000020" / "__0_0.distcp")
    with pytest.raises(CorruptInputError, match=r"__0_0\.distcp: SHA-256"):
        results(run_forked(load_split, 2, run, 20))
    shutil.rmtree(run / "iter_0000010")
    with pytest.raises(IncompleteInputError, match="no complete checkpoint"):
        results(run_forked(load_split, 2, run))


def test_step_saved_last_is_the_newest_also_after_going_back(run: Path) -> None:
    results(run_forked(save_steps, 2, run, {15: 9.0}))
    (found, _), _ = results(run_forked(latest, 2, run))
    assert found == (15, run / "iter_0000015")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"split is stored as torch\.float32, expected torch\.bfloat16"),
        ({"columns": 8}, r"split has shape \(5, 6\), expected \(5, 8\)"),
        ({"extra": True}, "Not in the checkpoint: extra"),
    ],
)
def test_other_model_is_refused_on_every_rank(two_steps: Path, options: dict[str, Any], message: str) -> None:
    for outcome in run_forked(load_split, 2, two_steps, None, options):
        assert isinstance(outcome.error, MismatchError), outcome
        with pytest.raises(MismatchError, match=message):
            raise outcome.error


def load_part(root: Path, partial: bool) -> Any:
    start()
    state = toy_state(None)
    return CheckpointStore(root).load({"replica": state["replica"]}, partial=partial)["replica"].numpy()


def test_tensors_left_over_are_an_error_unless_a_part_is_asked_for(two_steps: Path) -> None:
    with pytest.raises(MismatchError, match="In the checkpoint only: split"):
        results(run_forked(load_part, 2, two_steps, False))
    assert (results(run_forked(load_part, 2, two_steps, True))[0] == 2.5).all()


def test_retention_keeps_the_last_steps_and_never_deletes_the_one_just_saved(tmp_path: Path) -> None:
    root = tmp_path / "run"
    results(run_forked(save_steps, 2, root, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, 2))
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    (root / "iter_0000004" / "manifest.json").unlink()
    results(run_forked(save_steps, 2, root, {2: 9.0}, 1))  # went back: the new step 2 is younger than 3
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    (found, _), _ = results(run_forked(latest, 2, root))
    assert found == (2, root / "iter_0000002")


def save_beside_a_stuck_old_step(root: Path) -> list[str]:
    rank = start()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_qwen").addHandler(handler)
    if rank == 0:
        import megatron_qwen.checkpoint.store as store_module

        def refuse(path: Path, **_: Any) -> None:
            raise OSError(16, "Device or resource busy", str(path))

        store_module.shutil.rmtree = refuse  # type: ignore[assignment]
    CheckpointStore(root, keep_last=1).save(30, toy_state(3.5), common={})
    return lines


def test_failed_deletion_is_logged_and_training_goes_on(run: Path) -> None:
    lines, _ = results(run_forked(save_beside_a_stuck_old_step, 2, run))
    assert any("cannot delete the old step" in line for line in lines)
    (found, _), _ = results(run_forked(latest, 2, run))
    assert found == (30, run / "iter_0000030")


def test_saving_into_an_unusable_place_is_a_storage_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for outcome in run_forked(save_steps, 2, tmp_path / "file" / "run", {1: 1.0}):
        assert isinstance(outcome.error, StorageError), outcome
