"""Megatron `torch_dist` checkpoints as sources, read without a model, a process group or megatron-core.

The format is torch's distributed checkpoint plus `metadata.json` and `common.pt`; `output` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_qwen.checkpoint.common_state import read_common
from megatron_qwen.checkpoint.pickles import METADATA_NAME, read_metadata
from megatron_qwen.conversion.formats.integrity import FileStamps, compare_manifest
from megatron_qwen.conversion.formats.megatron_folder import MegatronStep, find_step_folder
from megatron_qwen.conversion.formats.megatron_lm_args import find_config
from megatron_qwen.conversion.formats.torch_dist.chunks import ChunkReader
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard, StoredPlace
from megatron_qwen.conversion.plan import StoredTensor, find_places
from megatron_qwen.conversion.rows import read_shard
from megatron_qwen.conversion.transforms import TRANSFORMS, unpad_rows
from megatron_qwen.errors import ConfigError, IncompleteInputError
from megatron_qwen.model.config import QwenConfig

logger = logging.getLogger(__name__)

WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.")


class MegatronFolder(MegatronStep):
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
        compare_manifest(self.path)
        metadata = read_metadata(self.path)
        self.config = config or find_config(self.path, self.side_folders(), lambda: _arguments(self.path, metadata))
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
        self.stamps = FileStamps({self.path / METADATA_NAME, *self._chunks.files()})

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        """Return the dtype in which the parameter is stored."""
        return self.stored[self._place(parameter).key].dtype

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out, without vocabulary padding.

        Raises:
            MismatchError: the last row is asked for, and padding beyond it is not zero.
        """
        place = self._place(parameter)
        size, rest = parameter.shape[0], parameter.shape[1:]
        stored_rows = self.stored[place.key].shape[len(place.index)]
        last = stored_rows if end == size else end
        box = self._chunks.read(
            place.key, (*place.index, begin, *(0 for _ in rest)), (*(1 for _ in place.index), last - begin, *rest)
        )
        return unpad_rows(box.reshape(last - begin, *rest), end - begin, place.key, begin)

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it.

        Args:
            parameter: of this checkpoint's model.
            shard: which part along the family's shard axis.
            vocabulary_rows: rows of the whole matrix if Megatron pads the vocabulary; the rows added are zero.
        """
        if parameter.has_vocabulary_rows:
            return read_shard(self, parameter, shard, vocabulary_rows)
        place = self._place(parameter)
        family = parameter.family
        pieces = TRANSFORMS[family.transform].num_pieces if shard.size > 1 else 1
        boxes = [
            self._chunks.read(place.key, (*place.index, *offset), (*(1 for _ in place.index), *size))
            for offset, size in shard_boxes(parameter.shape, family.shard_axis, shard, pieces)
        ]
        tensors = [box.reshape(box.shape[len(place.index) :]) for box in boxes]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

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


def _is_weight(key: str) -> bool:
    return key.startswith(WEIGHT_PREFIXES) and not _is_extra_state(key)


def _is_extra_state(key: str) -> bool:
    return "._extra_state" in key


def _arguments(path: Path, metadata: Metadata) -> object:
    try:
        return read_common(path, metadata).get("args")
    except IncompleteInputError:
        return None
