"""Megatron `torch_dist` checkpoints as sources, read without a model, a process group or megatron-core.

The format is torch's distributed checkpoint plus `metadata.json` and `common.pt`; `output` writes it.
Folder of a run or an import:

    DIR/latest_checkpointed_iteration.txt    "release" or a step
    DIR/hf/                                  config.json, tokenizer and generation files
    DIR/release/ or DIR/iter_0000010/        the torch_dist files
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.common_state import read_common
from megatron_qwen.checkpoint.pickles import METADATA_NAME, read_metadata
from megatron_qwen.conversion.formats.hf.source import FileStamps, head_sizes
from megatron_qwen.conversion.formats.legacy.files import is_legacy_step
from megatron_qwen.conversion.formats.megatron_lm_args import find_config
from megatron_qwen.conversion.formats.torch_dist.chunks import ChunkReader
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard, StoredPlace
from megatron_qwen.conversion.plan import StoredTensor, find_places
from megatron_qwen.conversion.rows import MegatronRows
from megatron_qwen.conversion.transforms import TRANSFORMS, pad_rows, unpad_rows
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.strict_json import listing

logger = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_FOLDER = "hf"
WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.")


class MegatronFolder(MegatronRows):
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
        _compare_manifest(self.path)
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
        self._stamps = FileStamps({self.path / METADATA_NAME, *self._chunks.files()})

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
        place = self._place(parameter)
        if parameter.has_vocabulary_rows:
            count = (vocabulary_rows or parameter.shape[0]) // shard.size
            begin, end = (min(i * count, parameter.shape[0]) for i in (shard.rank, shard.rank + 1))
            return pad_rows(self.rows(parameter, begin, end), count)
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
        transform = TRANSFORMS[parameter.family.transform]
        return transform.megatron_to_hf(self.rows(parameter, 0, parameter.shape[0]), head_sizes(self.config))

    def side_folders(self) -> tuple[Path, ...]:
        """Return where config and tokenizer of the checkpoint may lie."""
        return self.path.parent / HF_FOLDER, self.path / HF_FOLDER

    def check_unchanged(self) -> None:
        """Raise CorruptInputError if a file was replaced or written to since it was opened."""
        self._stamps.check(self.path)

    def watch(self, files: Iterable[Path]) -> None:
        """Let `check_unchanged` look at further files too."""
        self._stamps.add(files)

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
    if is_step(path):
        return path
    there = sorted(folder.name for folder in path.iterdir() if is_step(folder)) if path.is_dir() else []
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


def is_step(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, `torch_dist` or per-rank."""
    return (folder / METADATA_NAME).is_file() or is_legacy_step(folder)


def _is_weight(key: str) -> bool:
    return key.startswith(WEIGHT_PREFIXES) and not _is_extra_state(key)


def _is_extra_state(key: str) -> bool:
    return "._extra_state" in key


def _arguments(path: Path, metadata: Metadata) -> object:
    try:
        return read_common(path, metadata).get("args")
    except IncompleteInputError:
        return None


def _compare_manifest(path: Path) -> None:
    if not (path / manifest.MANIFEST_NAME).is_file():
        logger.info("%s: no %s, so the content is not verified against digests", path, manifest.MANIFEST_NAME)
        return
    problems = manifest.verify(path, "sizes")
    if problems:
        raise CorruptInputError(f"{path}: not as its {manifest.MANIFEST_NAME} says: {'; '.join(problems)}")
