"""Megatron-Core's `torch_dist` format: its own planner, writer and reader, without the child processes.

Import it only after `install_cpu_platform()`: it imports megatron.core.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_qwen import compat
from megatron_qwen.checkpoint import agreement
from megatron_qwen.checkpoint.pickles import COMMON_NAME, check_pickles, read_metadata
from megatron_qwen.errors import CorruptInputError, MismatchError, StorageError
from megatron_qwen.strict_json import listing
from megatron_qwen.testing import failpoints

failpoints.register("save.planned", "the ranks agreed who writes what; this rank has written nothing")
failpoints.register("save.shards_written", "this rank's shards are durable, there is no .metadata")

# Written by other layouts for themselves: their absence from what is asked for is not a mismatch.
PER_RANK_PREFIXES = ("rng_state/", "common_state/")
EXTRA_STATE = "_extra_state"


class InProcessSaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's synchronous save with threads instead of processes.

    Megatron's own starts a multiprocessing manager (1.5 to 3 s, and it outlives a killed rank) and, in 0.16, forks
    a writer per file. Planning, staging to the host, file format, fsync and finalization are Megatron's.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's part into `checkpoint_dir`; collective, rank 0 writes `.metadata` last."""
        with _results_in_this_process():
            request = self.async_save(sharded_state_dict, checkpoint_dir, **compat.async_save_arguments())
        failpoints.hit("save.planned")
        if request.async_fn is not None:
            transforms = request.async_fn.args[0]
            results = request.async_fn_args[2]
            buckets = request.preload_fn()
            with ThreadPoolExecutor(max_workers=len(buckets)) as pool:
                outcomes = list(pool.map(lambda item: _write_bucket(transforms, *item), enumerate(buckets)))
            failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            results.put(failures[0] if failures else dict(enumerate(outcomes)))
        failpoints.hit("save.shards_written")
        dist.barrier()
        for finalize in request.finalize_fns:
            finalize()


def save_sharded(sharded_state: dict[str, Any], folder: Path, *, fully_parallel: bool) -> None:
    """Write `sharded_state` into the existing, empty `folder`; collective.

    Args:
        sharded_state: Megatron sharded state dict; what is not sharded goes to the common state.
        folder: seen by all ranks.
        fully_parallel: spread the writing of what data-parallel ranks hold in common over those ranks.

    Raises:
        StorageError: a rank could not write; raised on every rank.
    """
    strategy = InProcessSaveStrategy(backend="torch_dist", version=1, thread_count=2)
    if fully_parallel:
        strategy = FullyParallelSaveStrategyWrapper(strategy, _replica_group())
    try:
        dist_checkpointing.save(sharded_state, str(folder), strategy)
    except CheckpointException as error:
        causes = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        raise StorageError(f"{folder}: writing failed: {'; '.join(causes) or 'on another rank'}") from error


def load_sharded(
    sharded_state: dict[str, Any],
    folder: Path,
    *,
    fully_parallel: bool = False,
    partial: bool = False,
    allow_cast: bool = False,
) -> dict[str, Any]:
    """Read a `torch_dist` folder into the tensors of `sharded_state`; collective.

    Before a weight byte is read: the folder's pickles are opened under an allow-list, and names and dtypes of what
    is asked for are compared with what is there.

    Args:
        sharded_state: Megatron sharded state dict of the present model, in any layout.
        folder: the step's folder.
        fully_parallel: data-parallel ranks read a part each and exchange.
        partial: accept tensors in the folder that are not asked for (weights out of a training checkpoint).
        allow_cast: accept tensors stored in another dtype, which are cast on load.

    Returns:
        The loaded state dict, common state merged in.

    Raises:
        UnsafeInputError: opening the folder could run code.
        MismatchError: a tensor or object is missing, left over, or of another dtype or shape.
        IncompleteInputError, CorruptInputError: the folder is not a complete checkpoint.
    """
    wanted = _flatten(sharded_state)

    def inspect() -> tuple[set[str], set[str]]:
        metadata = read_metadata(folder)
        if not (folder / COMMON_NAME).is_file() and not compat.reads_common_state_from_shards():
            raise MismatchError(
                f"{folder}: no {COMMON_NAME}: written by a newer megatron-core than the {compat.megatron_version()} "
                "installed here, which cannot open it; use megatron-core 0.19 (Python 3.12 or newer)"
            )
        check_pickles(folder, metadata, [item.unique_key for item in wanted if isinstance(item, ShardedObject)])
        _compare_tensors(wanted, metadata, folder, allow_cast)
        return {_stored_name(item) for item in wanted}, set(metadata.state_dict_metadata)

    answers = agreement.gather(inspect, f"cannot load {folder}")
    lacks_extra_state = _compare_names(set().union(*(asked for asked, _ in answers)), answers[0][1], folder, partial)
    strategy = TorchDistLoadShardedStrategy()
    if fully_parallel:
        strategy = FullyParallelLoadStrategyWrapper(strategy, _replica_group())
    strict = StrictHandling.IGNORE_ALL if lacks_extra_state else StrictHandling.ASSUME_OK_UNEXPECTED
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(sharded_state, str(folder), strategy, strict=strict)
    except CheckpointingException as error:
        raise MismatchError(f"{folder}: {error}") from error
    except CheckpointException as error:
        causes = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        raise CorruptInputError(f"{folder}: reading failed: {'; '.join(causes)}") from error
    return loaded


def local_bytes(sharded_state: dict[str, Any]) -> int:
    """Return how many bytes of tensors this rank will write, to compare with the free space."""
    tensors = [item for item in _flatten(sharded_state) if isinstance(item, ShardedTensor)]
    owned = [tensor.data for tensor in tensors if is_main_replica(tensor.replica_id) and tensor.data is not None]
    return sum(data.numel() * data.element_size() for data in owned)


def _write_bucket(transforms: Any, index: int, bucket: Any) -> Any:
    """Write one file with Megatron's worker function; return its results or the exception it met."""
    done: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[Any] = queue.Queue()
    count.put(index)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, done, count, True)
    return done.get_nowait()[1]


@contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Let Megatron's writer hand its results over in a plain queue instead of starting a manager process for one."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def _replica_group() -> dist.ProcessGroup | None:
    if not parallel_state.is_initialized():
        return None
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _flatten(sharded_state: dict[str, Any]) -> list[Any]:
    """Return the sharded tensors and objects, factories applied, without changing `sharded_state`."""
    copy, _ = extract_matching_values(sharded_state, lambda _: True)
    apply_factories(copy)
    return [item for item in nested_values(copy) if isinstance(item, (ShardedTensor, ShardedObject))]


def _compare_names(asked: set[str], stored: set[str], folder: Path, partial: bool) -> bool:
    """Compare what all ranks ask for with the index; return whether Transformer Engine's extra states are absent."""
    absent = sorted(asked - stored)
    left = [] if partial else sorted(name for name in stored - asked if not name.startswith(PER_RANK_PREFIXES))
    # A folder written without Transformer Engine has no extra states, one written with it has some we do not need.
    missing = [name for name in absent if EXTRA_STATE not in name]
    left = [name for name in left if EXTRA_STATE not in name]
    if missing or left:
        raise MismatchError(
            f"{folder}: the checkpoint and the model differ. Not in the checkpoint: {listing(missing) or 'none'}. "
            f"In the checkpoint only: {listing(left) or 'none'}. Check the model configuration and the optimizer"
        )
    return bool(absent)


def _compare_tensors(wanted: list[Any], metadata: Metadata, folder: Path, allow_cast: bool) -> None:
    """Compare shapes and dtypes of this rank's tensors with the index; reading would cast without a word."""
    for item in wanted:
        entry = metadata.state_dict_metadata.get(_stored_name(item))
        if not isinstance(item, ShardedTensor) or not isinstance(entry, TensorStorageMetadata):
            continue
        found: torch.dtype = entry.properties.dtype
        if found != item.dtype and not allow_cast:
            raise MismatchError(f"{folder}: {item.key} is stored as {found}, expected {item.dtype}; use that precision")
        if tuple(entry.size) != tuple(item.global_shape) and not item.allow_shape_mismatch:
            raise MismatchError(
                f"{folder}: {item.key} has shape {tuple(entry.size)}, expected {tuple(item.global_shape)} from the "
                "model configuration; the two are of different models"
            )


def _stored_name(item: Any) -> str:
    name: str = item.unique_key if isinstance(item, ShardedObject) else item.key
    return name
