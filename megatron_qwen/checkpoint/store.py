"""The checkpoints of one run: a folder of steps, each plain Megatron `torch_dist`, each complete or not there.

    RUN/
      latest_checkpointed_iteration.txt     "20", Megatron-LM's tracker
      .lock, .lock.json                     one run per folder; who holds it
      iter_0000010/                         loadable by stock dist_checkpointing.load
        __0_0.distcp ... .metadata metadata.json [common.pt]
        step.json                           recipe, progress, layout, versions: what a resume compares
        manifest.json                       sizes and SHA-256 of all of the above, written last
      iter_0000020/

Methods marked collective are called by every rank, with the same arguments; if one rank fails, all raise.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint import agreement, atomic, manifest
from megatron_qwen.checkpoint.lock import hold_lock
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, StorageError
from megatron_qwen.strict_json import parse_strict_json
from megatron_qwen.testing import failpoints

logger = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RECORD_NAME = "step.json"
RELEASE = "release"

failpoints.register("save.staged", "the staging folder exists, nothing is in it")
failpoints.register("save.sharded", "Megatron's part is complete, our side files and the manifest are not there")
failpoints.register("save.hashed", "everything but the manifest is there")
failpoints.register("save.committed", "the step is complete, the tracker still names the one before")
failpoints.register("save.tracked", "the step is complete and tracked, old steps are not yet deleted")
failpoints.register("retention.renamed", "an old step lost its name and is about to be deleted")


class CheckpointStore:
    """Saves, finds and loads the steps of one run.

    Attributes:
        root: the run's folder; made by the first save.
        keep_last: how many steps a save leaves behind; None keeps all.
        level: how far a step is verified before it is used: "sizes", or "full" for SHA-256 too (ranks share the work).
    """

    def __init__(self, root: Path, *, keep_last: int | None = None, level: manifest.Level = "full") -> None:
        assert keep_last is None or keep_last >= 1, keep_last
        self.root = Path(root)
        self.keep_last = keep_last
        self.level = level
        self._verified: set[Path] = set()

    def step_folder(self, step: int) -> Path:
        """Return the folder of a step, there or not, under Megatron-LM's name."""
        return self.root / f"iter_{step:07d}"

    def lock(self) -> Any:
        """Context manager: this run is the only one in the folder; what interrupted saves left is deleted. Collective.

        Raises:
            StorageError: another run holds it; the message names host and pid.
        """
        return self._locked()

    def save(
        self,
        step: int,
        sharded_state: dict[str, Any],
        *,
        common: Mapping[str, Any],
        files: Mapping[str, bytes | str] | None = None,
        fully_parallel: bool = True,
    ) -> Path:
        """Write one step, atomically, and make it the latest. Collective.

        Args:
            step: iteration number; an existing step of that number is replaced.
            sharded_state: Megatron sharded state dict (model, optimizer, scheduler, `rng_state` ...).
            common: JSON-compatible record for `step.json`, read back by `common()`; rank 0's counts.
            files: further files for the step's folder, plain name -> content.
            fully_parallel: spread the writing over the data-parallel ranks.

        Returns:
            The step's folder.

        Raises:
            StorageError: disk full, folder unwritable, or another rank failed; nothing is left of the step.
        """
        from megatron_qwen.checkpoint.torch_dist import save_sharded

        target = self.step_folder(step)
        record = {"format": "megatron-qwen-step", "version": 1, "step": step, "common": dict(common)}
        staging = self._open_staging(target, sharded_state)
        try:
            with atomic.storage_errors(f"cannot save {target}"):
                failpoints.hit("save.staged")
                save_sharded(sharded_state, staging, fully_parallel=fully_parallel)
                failpoints.hit("save.sharded")
                agreement.on_rank_zero(lambda: self._write_side_files(staging, record, files or {}), "cannot save")
                records = self._hash_shares(staging)
                failpoints.hit("save.hashed")
                agreement.on_rank_zero(lambda: self._commit(staging, target, step, records), "cannot save")
        except BaseException:
            if agreement.rank() == 0:
                atomic.discard(staging)
            raise
        self._verified.add(target)
        agreement.on_rank_zero(lambda: self._delete_old(target), "cannot delete old steps")
        return target

    def latest_valid(self) -> tuple[int, Path] | None:
        """Return number and folder of the newest step that verifies, or None. Collective.

        Newest is the one saved last, also where a run went back to an earlier step. The tracker file is not trusted:
        steps are found by their folders. Each step passed over is logged with the reason.
        """
        for step, folder in agreement.from_rank_zero(self._candidates):
            problems = self.problems(folder)
            if not problems:
                self._compare_tracker(step)
                return step, folder
            if agreement.rank() == 0:
                logger.warning("%s is not used: %s", folder, "; ".join(problems[:5]))
        return None

    def problems(self, folder: Path) -> list[str]:
        """Verify a step to `level` and return what is wrong with it; ranks share the reading. Collective."""
        if folder in self._verified:
            return []
        if quick := agreement.from_rank_zero(lambda: _quick_problems(folder)):
            return quick
        if self.level == "full":

            def verify_share() -> list[str]:
                return manifest.verify(folder, "full", _share(list(manifest.read_manifest(folder))))

            found = agreement.gather(verify_share, f"cannot verify {folder}")
            if problems := [problem for part in found for problem in part]:
                return problems
        self._verified.add(folder)
        return []

    def load(
        self,
        sharded_state: dict[str, Any],
        *,
        step: int | None = None,
        fully_parallel: bool = False,
        partial: bool = False,
        allow_cast: bool = False,
    ) -> dict[str, Any]:
        """Load a step into `sharded_state` (any layout) and return the loaded state dict. Collective.

        Args:
            sharded_state: Megatron sharded state dict of the present model; its tensors are filled in place.
            step: this step and no other; None takes `latest_valid()`.
            fully_parallel: data-parallel ranks read a part each and exchange.
            partial: accept tensors in the step that are not asked for.
            allow_cast: accept tensors stored in another dtype.

        Raises:
            IncompleteInputError: no such step, or none that verifies.
            CorruptInputError: the step asked for does not verify.
            UnsafeInputError, MismatchError: see `torch_dist.load_sharded`.
        """
        from megatron_qwen.checkpoint.torch_dist import load_sharded

        folder = self.find(step)
        return load_sharded(
            sharded_state, folder, fully_parallel=fully_parallel, partial=partial, allow_cast=allow_cast
        )

    def find(self, step: int | None = None) -> Path:
        """Return the verified folder of `step`, or of the newest step that verifies. Collective; errors as `load`."""
        if step is None:
            latest = self.latest_valid()
            if latest is None:
                raise IncompleteInputError(f"{self.root}: no complete checkpoint to resume from")
            return latest[1]
        folder = self.step_folder(step)
        if not agreement.from_rank_zero(folder.is_dir):
            steps = ", ".join(str(number) for number, _ in agreement.from_rank_zero(self._candidates))
            raise IncompleteInputError(f"{self.root}: no step {step}; there are: {steps or 'none'}")
        if problems := self.problems(folder):
            raise CorruptInputError(f"{folder}: {'; '.join(problems[:5])}. Choose another step")
        return folder

    def common(self, step: int) -> dict[str, Any]:
        """Return the JSON record that `save` was given for `step`.

        Raises:
            IncompleteInputError, CorruptInputError: it is missing or damaged.
        """
        common: dict[str, Any] = _read_record(self.step_folder(step))["common"]
        return common

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with hold_lock(self.root):
            agreement.on_rank_zero(lambda: self._clean(), "cannot clean up")
            yield

    def _clean(self) -> None:
        for leftover in atomic.stale_staging(self.root):
            logger.warning("%s was left by an interrupted run; deleting it", leftover)
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def _open_staging(self, target: Path, sharded_state: dict[str, Any]) -> Path:
        from megatron_qwen.checkpoint.torch_dist import local_bytes

        needed = sum(agreement.gather(lambda: local_bytes(sharded_state), "cannot size the checkpoint"))

        def make() -> Path:
            with atomic.storage_errors(f"cannot write to {self.root}"):
                self.root.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.root).free
            if needed > free:
                raise StorageError(f"{target}: needs {needed / 1e9:.3f} GB, {self.root} has {free / 1e9:.3f} GB free")
            return atomic.make_staging(target)

        return agreement.on_rank_zero(make, f"cannot start {target}")

    def _write_side_files(self, staging: Path, record: dict[str, Any], files: Mapping[str, bytes | str]) -> None:
        text = json.dumps({**record, "serial": self._next_serial()}, indent=1, allow_nan=False)
        for name, content in {**files, RECORD_NAME: text}.items():
            assert Path(name).name == name, name
            (staging / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    def _hash_shares(self, staging: Path) -> dict[str, manifest.FileRecord]:
        share = _share(agreement.from_rank_zero(lambda: manifest.list_files(staging)))
        parts = agreement.gather(lambda: manifest.hash_files(staging, share), f"cannot read back {staging}")
        return {name: record for part in parts for name, record in part.items()}

    def _commit(self, staging: Path, target: Path, step: int, records: Mapping[str, manifest.FileRecord]) -> None:
        manifest.write_manifest(staging, records)
        atomic.commit(staging, target, overwrite=True)
        failpoints.hit("save.committed")
        atomic.atomic_write_text(self.root / TRACKER_NAME, str(step))
        failpoints.hit("save.tracked")

    def _candidates(self) -> list[tuple[int, Path]]:
        """Return the steps, last saved first; before them those without a readable record, which will not verify."""
        folders = [path for path in self.root.glob("iter_*") if path.name[5:].isdecimal() and path.is_dir()]
        steps = [(_serial(path), int(path.name[5:]), path) for path in folders]
        return [(step, path) for _, step, path in sorted(steps, reverse=True)]

    def _next_serial(self) -> int:
        serials = [_serial(path) for _, path in self._candidates()]
        return 1 + max((int(serial) for serial in serials if math.isfinite(serial)), default=0)

    def _compare_tracker(self, step: int) -> None:
        if agreement.rank() != 0:
            return
        tracker = self.root / TRACKER_NAME
        try:
            text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            text = str(error)
        if text != str(step):
            logger.warning("%s says %.40r; the newest step that verifies is %d", tracker, text, step)

    def _delete_old(self, newest: Path) -> None:
        if self.keep_last is None:
            return
        valid = [path for _, path in self._candidates() if path == newest or not _quick_problems(path)]
        assert newest in valid, (newest, valid)
        for path in valid[self.keep_last :]:
            if path == newest:
                continue
            doomed = atomic.staging_path(path)
            try:
                path.rename(doomed)  # first out of sight, so that no reader meets half a step
                failpoints.hit("retention.renamed")
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("cannot delete the old step %s: %s; going on", path, error)
            self._verified.discard(path)


def _share(names: list[str]) -> list[str]:
    """Return the files that this rank hashes: those it wrote, by Megatron's naming `__RANK_N.distcp`, in its cache."""
    ranks = agreement.world_size()

    def owner(name: str) -> int:
        rank = name[2:].split("_")[0] if name.startswith("__") else ""
        return int(rank) % ranks if rank.isdecimal() else 0

    return [name for name in names if owner(name) == agreement.rank()]


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_NAME
    if not path.is_file():
        raise IncompleteInputError(f"{folder}: no {RECORD_NAME}; not a training step of megatron-qwen")
    record = parse_strict_json(path.read_bytes(), path)
    if type(record.get("serial")) is not int or not isinstance(record.get("common"), dict):
        raise CorruptInputError(f"{path}: expected a 'serial' number and a 'common' object")
    return record


def _serial(folder: Path) -> float:
    try:
        serial: float = _read_record(folder)["serial"]
    except (IncompleteInputError, CorruptInputError, OSError):
        return math.inf
    return serial


def _quick_problems(folder: Path) -> list[str]:
    if problems := manifest.verify(folder, "sizes"):
        return problems
    try:
        _read_record(folder)
    except (IncompleteInputError, CorruptInputError, OSError) as error:
        return [str(error)]
    return []
