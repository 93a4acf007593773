"""What a resume needs besides the weights, and the proof that it may resume.

How a training loop uses it, with `store = CheckpointStore(folder, keep_last=...)`:

    record = run_record(identity={"model": ..., "seed": ...}, layout=layout)           # once, at the start
    with store.lock():
        resumed = resume(store, record, chunks, optimizer, scheduler, seed=seed)       # None: nothing to resume from
        ...
        save(store, step, record, progress, chunks, optimizer, scheduler)              # progress: JSON, see below

`progress` is whatever the loop needs to go on, as JSON: consumed samples, skipped steps, loss-spike counters. The
order of the data is a function of the seed and the consumed samples, so it is the same at every layout.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
import logging
import platform
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_qwen.checkpoint import agreement
from megatron_qwen.checkpoint.optimizer_state import fit_to_optimizers
from megatron_qwen.checkpoint.store import CheckpointStore
from megatron_qwen.errors import ConfigError, CorruptInputError, MismatchError
from megatron_qwen.parallel.device import device_name
from megatron_qwen.parallel.groups import seed_ranks
from megatron_qwen.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

_PACKAGES = ("megatron-qwen", "megatron-core", "torch", "numpy")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        step: the step that was loaded.
        folder: its folder.
        progress: the JSON the loop gave to `save`.
        not_exact: why the coming steps are not bit for bit those of the uninterrupted run; empty if they are.
    """

    step: int
    folder: Path
    progress: dict[str, Any]
    not_exact: tuple[str, ...]


def run_record(*, identity: Mapping[str, Any], layout: ParallelLayout) -> dict[str, Any]:
    """Describe this run for `step.json`.

    Args:
        identity: what must not change between runs of one folder, by the names `--allow-changed` takes, for example
            model, tokenizer, data, batch, seed, optimizer, schedule. Values are JSON.
        layout: with dp filled in.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    record = {
        "identity": dict(identity),
        "layout": dataclasses.asdict(layout),
        "versions": versions,
        "device": device_name(),
    }
    # As it will come back from the file, tuples as lists, so that the two compare equal.
    normalized: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return normalized


def check_same_run(
    saved: Mapping[str, Any], present: Mapping[str, Any], allow_changed: Iterable[str] = ()
) -> list[str]:
    """Compare two run records and return why a resume would not be bit-exact; empty if it will be.

    Args:
        saved: the record in the checkpoint.
        present: the record of the run that wants to resume.
        allow_changed: parts of the identity that may differ.

    Raises:
        ConfigError: `allow_changed` names no part of the identity.
        MismatchError: another part differs; lists every difference.
    """
    allowed = set(allow_changed)
    known = set(present["identity"]) | set(saved["identity"])
    for name in sorted(allowed - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--allow-changed {name}: not one of {', '.join(sorted(known))}{hint}")
    refused: list[str] = []
    reasons: list[str] = []
    for part in sorted(known):
        changes = _differences(part, saved["identity"].get(part), present["identity"].get(part))
        (reasons if part in allowed else refused).extend(changes)
    if refused:
        parts = sorted({change.split(":")[0].split(".")[0] for change in refused})
        raise MismatchError(
            "the checkpoint is of another run:\n  " + "\n  ".join(refused) + "\n"
            f"Change the recipe back, use another folder, or accept it with --allow-changed {','.join(parts)}"
        )
    for part in ("layout", "versions", "device"):
        reasons += _differences(part, saved[part], present[part])
    return reasons


def save(
    store: CheckpointStore,
    step: int,
    record: Mapping[str, Any],
    progress: Mapping[str, Any],
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    *,
    files: Mapping[str, bytes | str] | None = None,
    optimizer_format: str = "fully_reshardable",
) -> Path:
    """Save everything a bit-exact resume needs as step `step`. Collective; returns the step's folder.

    Args:
        store: of the run's folder, locked by this run.
        step: number of optimizer steps done.
        record: from `run_record`.
        progress: JSON handed back by `resume`.
        chunks: model chunks of this rank without the DDP wrapper (it would prefix the names), one per virtual stage.
        optimizer: Megatron optimizer.
        scheduler: Megatron `OptimizerParamScheduler`.
        files: further files for the step's folder, plain name -> content.
        optimizer_format: "fully_reshardable" loads at any layout; "dp_reshardable" only at another DP size, without
            gathering the optimizer state of large models on one rank first.

    Raises:
        StorageError: see `CheckpointStore.save`.
    """
    state = _sharded_state(chunks, optimizer, scheduler, is_loading=False, optimizer_format=optimizer_format)
    state.update(iteration=step, checkpoint_version=3.0, rng_state=_sharded_rng(_gather_rng()))
    common = {**record, "progress": dict(progress), "optimizer_format": optimizer_format}
    return store.save(step, state, common=common, files=files)


def resume(
    store: CheckpointStore,
    record: Mapping[str, Any],
    chunks: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    *,
    seed: int,
    step: int | None = None,
    allow_changed: Iterable[str] = (),
) -> Resumed | None:
    """Load the newest verified step, or `step`, into model, optimizer, scheduler and random streams. Collective.

    At the layout that saved, random streams go on where they were. At another one they are re-seeded from `seed` and
    the step, and one warning lists what is not bit-exact.

    Returns:
        Where to go on, or None if the folder has no verified step (and none was asked for).

    Raises:
        MismatchError: the checkpoint is of another run (see `check_same_run`) or of another model.
        IncompleteInputError, CorruptInputError, UnsafeInputError: see `CheckpointStore.load`.
    """
    if step is None:
        latest = store.latest_valid()
        if latest is None:
            return None
        step, folder = latest
    else:
        folder = store.find(step)
    saved = agreement.from_rank_zero(lambda: store.common(step))
    if missing := {"identity", "layout", "versions", "device", "progress", "optimizer_format"} - set(saved):
        raise CorruptInputError(f"{folder}: step.json lacks {', '.join(sorted(missing))}")
    not_exact = check_same_run(saved, record, allow_changed)
    same_layout = saved["layout"] == record["layout"]
    if saved["optimizer_format"] == "dp_reshardable" and not _differ_in_dp_only(saved["layout"], record["layout"]):
        raise MismatchError(
            f"{folder}: its optimizer state was saved as dp_reshardable, which loads at another DP size only; "
            f"saved layout {saved['layout']}, now {record['layout']}. Resume at the saved layout"
        )
    state = _sharded_state(chunks, optimizer, scheduler, is_loading=True, optimizer_format=saved["optimizer_format"])
    if same_layout:
        state["rng_state"] = _sharded_rng(None)
    loaded = store.load(state, step=step)
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    optimizer.load_state_dict(fit_to_optimizers(loaded["optimizer"], optimizer))
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if same_layout:
        _restore_rng(loaded["rng_state"])
    else:
        seed_ranks(seed + step)
        not_exact.append("random streams (dropout): re-seeded, because their number differs between layouts")
    if not_exact and agreement.rank() == 0:
        logger.warning(
            "resuming from %s: weights, optimizer and data order are those of the checkpoint; the steps that follow "
            "are not bit for bit those of the uninterrupted run, because of:\n  %s",
            folder,
            "\n  ".join(not_exact),
        )
    return Resumed(step, folder, saved["progress"], tuple(not_exact))


def _sharded_state(
    chunks: Sequence[Any], optimizer: Any, scheduler: Any, *, is_loading: bool, optimizer_format: str
) -> dict[str, Any]:
    from megatron.core import parallel_state

    # Megatron-LM stores the same keys as content_metadata, and reads them to load what we save.
    content = {
        "distrib_optim_sharding_type": optimizer_format,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    metadata = {**content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if not is_loading:
        state["opt_param_scheduler"] = scheduler.state_dict()
        state["content_metadata"] = content
    return state


def _differ_in_dp_only(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    return not _differences("layout", {**saved, "dp": None}, {**present, "dp": None})


def _chunk_names(chunks: Sequence[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _gather_rng() -> dict[str, Any]:
    """Return every random state of this rank as plain data and tensors, which load without pickle's dangers."""
    from megatron.core import tensor_parallel

    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        # Trackers that are safe under CUDA graphs hold generators, the others their states.
        "tracker": {
            name: state.get_state() if isinstance(state, torch.Generator) else state.clone()
            for name, state in tracker.items()
        },
    }


def _restore_rng(states: Mapping[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    present = tracker.get_states()
    for name, state in states["tracker"].items():
        if isinstance(present.get(name), torch.Generator):
            present[name].set_state(state)
        else:
            present[name] = state
    tracker.set_states(present)


def _sharded_rng(states: dict[str, Any] | None) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("rng_state", states, (agreement.world_size(),), (agreement.rank(),))


def _differences(path: str, saved: Any, present: Any) -> list[str]:
    """Return one line per leaf in which two JSON values differ."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        names = [*saved, *(name for name in present if name not in saved)]
        return [line for name in names for line in _differences(f"{path}.{name}", saved.get(name), present.get(name))]
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        pairs = enumerate(zip(saved, present, strict=True))
        return [line for index, (old, new) in pairs for line in _differences(f"{path}[{index}]", old, new)]
    return [] if saved == present else [f"{path}: saved {saved!r}, now {present!r}"]
