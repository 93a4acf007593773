"""Megatron `torch_dist` checkpoints read and written without a model, a process group or megatron-core.

The format is torch's distributed checkpoint plus `metadata.json` and `common.pt`. Writing goes through torch's own
planner and file writer, one parameter at a time; what is written loads in a stock GPTModel with strict checking.
Folder of a run or an import:

    DIR/latest_checkpointed_iteration.txt    "release" or a step
    DIR/hf/                                  config.json, tokenizer and generation files
    DIR/release/ or DIR/iter_0000010/        the torch_dist files
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.pickles import read_metadata
from megatron_qwen.checkpoint.strict_json import listing
from megatron_qwen.conversion.chunks import ChunkReader
from megatron_qwen.conversion.hf import cut_vocabulary, head_sizes
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard, StoredPlace, extra_state_keys
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter, StoredTensor, find_places
from megatron_qwen.conversion.side_files import megatron_lm_args
from megatron_qwen.conversion.transforms import TRANSFORMS, unpad_rows
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError
from megatron_qwen.model.config import QwenConfig

logger = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_FOLDER = "hf"
METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_WRITER_THREADS = 2


class MegatronFolder:
    """The weights of a `torch_dist` checkpoint as a source of Megatron and Hugging Face tensors.

    Attributes:
        path: the folder that holds `.metadata`.
        config: the model.
        stored: header of every weight tensor by key.
        ignored: number of tensors and objects that are not weights (optimizer, random states).
    """

    def __init__(self, path: Path, *, step: int | None = None, config: QwenConfig | None = None) -> None:
        """Open a run's folder or one step's.

        Args:
            path: holds `latest_checkpointed_iteration.txt`, or `.metadata` itself.
            step: the step to take instead of the one the tracker names.
            config: the model, for a checkpoint that has no `hf/config.json` beside it.
        """
        self.path = find_step_folder(path, step)
        self.config = config or _read_config(self.path)
        _compare_manifest(self.path)
        metadata = read_metadata(self.path)
        tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and _is_weight(key)
        }
        self.stored = {
            key: StoredTensor(shape=tuple(value.size), dtype=value.properties.dtype) for key, value in tensors.items()
        }
        self.ignored = sum(not _is_extra_state(key) for key in metadata.state_dict_metadata.keys() - tensors.keys())
        if self.ignored:
            logger.info("%s: %d tensors and objects that are not weights are not read", self.path, self.ignored)
        self._chunks = ChunkReader(self.path, metadata, tensors)
        self._places = find_places(self.config, self.stored)

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it.

        Args:
            parameter: of this checkpoint's model.
            shard: which part along the family's shard axis.
            vocabulary_rows: rows of the whole matrix if Megatron pads the vocabulary; the rows added are zero.
        """
        place = self._place(parameter)
        if parameter.has_vocabulary_rows:
            whole = self._chunks.read(place.key, (0, 0), parameter.shape)
            return cut_vocabulary(whole, vocabulary_rows or parameter.shape[0], shard)
        family = parameter.family
        pieces = TRANSFORMS[family.transform].num_pieces if shard.size > 1 else 1
        boxes = [
            self._chunks.read(place.key, (*place.index, *offset), (*(1 for _ in place.index), *size))
            for offset, size in shard_boxes(parameter.shape, family.shard_axis, shard, pieces)
        ]
        tensors = [box.reshape(box.shape[len(place.index) :]) for box in boxes]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def hf_tensors(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors; vocabulary padding is removed.

        Raises:
            MismatchError: the padding is not zero.
        """
        place = self._place(parameter)
        if parameter.has_vocabulary_rows:
            whole = self._chunks.read(place.key, (0, 0), self.stored[place.key].shape)
            return (unpad_rows(whole, parameter.shape[0], place.key),)
        transform = TRANSFORMS[parameter.family.transform]
        return transform.megatron_to_hf(self.read(parameter), head_sizes(self.config))

    def side_folders(self) -> tuple[Path, Path]:
        """Return where config and tokenizer of the checkpoint may lie."""
        return self.path.parent / HF_FOLDER, self.path / HF_FOLDER

    def _place(self, parameter: Parameter) -> StoredPlace:
        place = self._places.get(parameter) or StoredPlace(parameter.megatron_name, (), ())
        if place.key not in self.stored:
            raise IncompleteInputError(f"{self.path}: no tensor for {parameter.megatron_name}")
        return place


def shard_boxes(
    shape: Sequence[int], axis: int | None, shard: Shard, pieces: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (offset, size) of the boxes of a tensor that make up one shard, in order.

    Args:
        shape: of the whole tensor.
        axis: that is cut; None for a tensor that every rank holds whole.
        shard: which part.
        pieces: blocks along `axis` that are cut separately (2 for gate and up in linear_fc1).
    """
    if axis is None or shard.size == 1:
        return [((0,) * len(shape), tuple(shape))]
    rows, rest = divmod(shape[axis], pieces * shard.size)
    if rest:
        raise ConfigError(f"axis {axis} of shape {tuple(shape)} cannot be cut into {pieces} x {shard.size} equal parts")
    boxes = []
    for piece in range(pieces):
        offset, size = [0] * len(shape), list(shape)
        offset[axis], size[axis] = (piece * shard.size + shard.rank) * rows, rows
        boxes.append((tuple(offset), tuple(size)))
    return boxes


def find_step_folder(path: Path, step: int | None = None) -> Path:
    """Return the folder of the step asked for, or of the one that the tracker names.

    Raises:
        IncompleteInputError: there is none; what is there is listed.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    there = (
        sorted(folder.name for folder in path.iterdir() if (folder / ".metadata").is_file()) if path.is_dir() else []
    )
    choices = f"complete checkpoints in it: {listing(there) or 'none'}"
    if step is not None:
        name = f"iter_{step:07d}"
    else:
        tracker = path / TRACKER_NAME
        if not tracker.is_file():
            raise IncompleteInputError(f"{path}: no {TRACKER_NAME}, so not a Megatron checkpoint folder; {choices}")
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        name = RELEASE if text == RELEASE else f"iter_{int(text):07d}" if text.isdecimal() else ""
        if not name:
            raise CorruptInputError(
                f"{tracker}: holds {text[:40]!r}, expected a step or {RELEASE!r}; {choices}; use --step"
            )
    if name not in there:
        raise IncompleteInputError(f"{path}: no complete checkpoint {name}; {choices}")
    return path / name


def write_torch_dist(
    folder: Path, plan: ConversionPlan, read: Callable[[PlannedParameter], Tensor], *, iteration: int = 0
) -> None:
    """Write the parameters of `plan` as a torch_dist checkpoint into the existing, empty `folder`.

    Args:
        folder: the step's folder.
        plan: what to write and where.
        read: returns a parameter in its target dtype; called once for each, from several threads.
        iteration: for the common state.
    """
    planner = _StreamingPlanner(plan, read)
    # One plan and one file per thread, as if each were a rank: torch's own writer threads lose their exceptions.
    writer = _Writer(folder, single_file_per_rank=True, thread_count=1, sync_files=False)
    writer.set_up_storage_writer(True)
    plans = [writer.prepare_local_plan(plan) for plan in planner.create_local_plans(_WRITER_THREADS)]
    plans, metadata = planner.create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    with ThreadPoolExecutor(max_workers=_WRITER_THREADS) as pool:
        results = list(pool.map(lambda each: writer.write_data(each, planner).wait(), plans))
    writer.finish(metadata, results)
    common = {"args": megatron_lm_args(plan.config), "checkpoint_version": 3.0, "iteration": iteration}
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(METADATA_JSON), encoding="utf-8")


class _Writer(FileSystemWriter):
    """Torch's writer; its `.metadata` does not name the folder, which is about to be renamed and may be private."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _StreamingPlanner(SavePlanner):
    """Hands torch's writer one parameter at a time."""

    def __init__(self, plan: ConversionPlan, read: Callable[[PlannedParameter], Tensor]) -> None:
        self._read = read
        self._items = {_index(item): item for item in plan.parameters}
        self._objects = extra_state_keys(plan.config)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        assert not state_dict

    def create_local_plan(self) -> SavePlan:
        (plan,) = self.create_local_plans(1)
        return plan

    def create_local_plans(self, parts: int) -> list[SavePlan]:
        """Return what to write in parts of about equal bytes."""
        lists: list[list[WriteItem]] = [[] for _ in range(parts)]
        lists[0] += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects]
        filled = [0] * parts
        for index, item in sorted(self._items.items(), key=lambda pair: -pair[1].target_bytes):
            part = filled.index(min(filled))
            lists[part].append(_write_item(index, item))
            filled[part] += item.target_bytes
        return [SavePlan(items) for items in lists]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        described: dict[str, Any] = {}
        for item in (item for plan in all_plans for item in plan.items):
            if item.tensor_data is None:
                described[item.index.fqn] = BytesStorageMetadata()
                continue
            header = TensorStorageMetadata(item.tensor_data.properties, item.tensor_data.size, [])
            described.setdefault(item.index.fqn, header).chunks.append(item.tensor_data.chunk)
        return all_plans, Metadata(described)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)
            return content
        item = self._items[write_item.index]
        return self._read(item).reshape(*(1 for _ in item.place.index), *item.parameter.shape).contiguous()


def _index(item: PlannedParameter) -> MetadataIndex:
    return MetadataIndex(item.place.key, torch.Size((*item.place.index, *(0 for _ in item.parameter.shape))))


def _write_item(index: MetadataIndex, item: PlannedParameter) -> WriteItem:
    place, shape = item.place, item.parameter.shape
    assert index.offset is not None, index
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(
            offsets=index.offset,
            sizes=torch.Size((*(1 for _ in place.index), *shape)),
        ),
        properties=TensorProperties(dtype=item.target_dtype),
        size=torch.Size((*place.leading, *shape)),
    )
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


def _is_weight(key: str) -> bool:
    return key.startswith(WEIGHT_PREFIXES) and not _is_extra_state(key)


def _is_extra_state(key: str) -> bool:
    return "._extra_state" in key


def _read_config(step_folder: Path) -> QwenConfig:
    for folder in (step_folder.parent / HF_FOLDER, step_folder / HF_FOLDER):
        if (folder / "config.json").is_file():
            return QwenConfig.from_hf(folder)
    raise IncompleteInputError(
        f"{step_folder}: no {HF_FOLDER}/config.json in it or beside it, so the model is not known; put the model's "
        f"config.json into {step_folder.parent / HF_FOLDER}, or give it with --config"
    )


def _compare_manifest(path: Path) -> None:
    if not (path / manifest.MANIFEST_NAME).is_file():
        logger.info("%s: no %s, so the content is not verified against digests", path, manifest.MANIFEST_NAME)
        return
    problems = manifest.verify(path, "sizes")
    if problems:
        raise CorruptInputError(f"{path}: not as its {manifest.MANIFEST_NAME} says: {'; '.join(problems)}")
