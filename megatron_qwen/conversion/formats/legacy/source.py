"""Per-rank checkpoints (`--ckpt-format torch`) as sources: the rank files of any layout as one model.

    DIR/iter_0000010/mp_rank_01_000/model_optim_rng.pt

The layout is found from what the files are called and hold, and compared with the arguments in them. A tensor that
several ranks hold (norms, the router, everything dense under expert parallelism, a tied output) is read from all of
them and must be the same in each. `output` writes the format; `layout` says what belongs where.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.checkpoint.torch_file import TensorPlace, span
from megatron_qwen.conversion.formats.byte_ranges import read_values
from megatron_qwen.conversion.formats.integrity import FileStamps, compare_manifest
from megatron_qwen.conversion.formats.legacy.files import (
    RankContent,
    check_contents,
    find_layout,
    open_rank_files,
    parallel_sizes,
    split_grouped_experts,
)
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE, RankFile, rank_files
from megatron_qwen.conversion.formats.megatron_folder import MegatronStep, find_step_folder
from megatron_qwen.conversion.formats.megatron_lm_args import find_config
from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard, stored_place
from megatron_qwen.conversion.plan import StoredTensor
from megatron_qwen.conversion.rows import read_shard
from megatron_qwen.conversion.transforms import TRANSFORMS, unpad_rows
from megatron_qwen.errors import ConfigError, IncompleteInputError, MismatchError, UnsafeInputError
from megatron_qwen.model.config import QwenConfig

logger = logging.getLogger(__name__)

_Copies = list[TensorPlace]


class LegacyFolder(MegatronStep):
    """The weights of a per-rank checkpoint as a source of Megatron and Hugging Face tensors.

    Attributes:
        path: the step's folder.
        config: the model.
        layout: the parallel layout in which it was saved.
        rank_files: what the files of that layout hold, those that are missing included.
        contents: what the rank files hold, by folder name; tensors are on device "meta".
        stored: header of every weight tensor, under the key of a torch_dist checkpoint that names layers one by one.
    """

    def __init__(
        self, path: Path, *, step: int | None = None, config: QwenConfig | None = None, allow_pickle: bool = False
    ) -> None:
        """Open a run's folder or one step's.

        Args:
            path: holds `latest_checkpointed_iteration.txt`, or the `mp_rank_*` folders themselves.
            step: the step to take instead of the one the tracker names.
            config: the model, for a checkpoint that has no `hf/config.json` beside it.
            allow_pickle: open the files, which are pickles; as plain data, so that no code in them runs.

        Raises:
            UnsafeInputError: `allow_pickle` is not set, or a file needs more than plain data.
            IncompleteInputError: rank files or tensors are missing; they are listed.
            MismatchError: files, arguments and configuration contradict each other; everything found is listed.
            CorruptInputError: a file is damaged.
        """
        self.path = find_step_folder(path, step)
        if not allow_pickle:
            raise UnsafeInputError(
                f"{self.path}: a per-rank checkpoint; its {RANK_FILE} files are pickles. They can be opened as plain "
                "data, without running code from them: give --allow-pickle if you trust where they come from"
            )
        compare_manifest(self.path)
        self.contents = open_rank_files(self.path)
        self.config = config or self._find_config()
        sizes = parallel_sizes(self.path, self.contents)
        experts = self.config.num_experts // sizes["ep"]
        self.contents = {name: split_grouped_experts(each, experts) for name, each in self.contents.items()}
        self.layout, naming, padded_rows = find_layout(self.path, self.contents, self.config, sizes)
        try:
            expected = self.rank_files = rank_files(self.config, self.layout, naming, padded_rows=padded_rows)
        except ConfigError as error:
            raise MismatchError(
                f"{self.path}: by their names and shapes the rank files are those of {self.layout}, which does not fit "
                f"the model. Files may be missing, or config.json may be another model's. {error}"
            ) from None
        check_contents(self.path, self.contents, expected)
        self._copies = _places(self.contents, expected)
        self._require_all_shards(expected)
        self.stored = dict(self._headers())
        self.stamps = FileStamps({content.file for content in self.contents.values()})

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        """Return the dtype in which the parameter is stored."""
        return self._shards(parameter)[0][0].dtype

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out, without vocabulary padding.

        Raises:
            MismatchError: ranks hold different values, or vocabulary padding is not zero.
        """
        shards = self._shards(parameter)
        if parameter.family.shard_axis == 1:
            return torch.cat([_read_copies(copies, begin, end, parameter) for copies in shards], dim=1)
        stored_rows = len(shards) * shards[0][0].shape[0] if parameter.family.shard_axis == 0 else parameter.shape[0]
        last = stored_rows if end == parameter.shape[0] else end
        pieces = TRANSFORMS[parameter.family.transform].num_pieces
        runs = shard_runs(begin, last, stored_rows, len(shards), pieces)
        parts = [_read_copies(shards[shard], low, high, parameter) for shard, low, high in runs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return unpad_rows(whole, end - begin, parameter.megatron_name, begin)

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it.

        Args:
            parameter: of this checkpoint's model.
            shard: which part along the family's shard axis.
            vocabulary_rows: rows of the whole matrix if Megatron pads the vocabulary; the rows added are zero.
        """
        return read_shard(self, parameter, shard, vocabulary_rows)

    def _find_config(self) -> QwenConfig:
        first = next(iter(self.contents.values()))
        return find_config(self.path, self.side_folders(), lambda: first.arguments)

    def _shards(self, parameter: Parameter) -> list[_Copies]:
        return self._copies[parameter]

    def _require_all_shards(self, expected: Sequence[RankFile]) -> None:
        """Check that the files that are there hold every shard of every parameter, and name those that do not."""
        there = self.contents.keys()
        absent = [file.folder for file in expected if file.folder not in there]
        lacking = [parameter for parameter, shards in self._copies.items() if not all(shards)]
        if lacking:
            names = sorted(parameter.megatron_name for parameter in lacking)
            raise IncompleteInputError(
                f"{self.path}: {len(names)} of {len(self._copies)} parameters are not complete, first {names[0]}. "
                f"Missing rank files ({len(absent)} of {len(expected)}): {', '.join(absent)}"
            )
        if absent:
            logger.info("%s: %s missing; other files hold all of their tensors", self.path, ", ".join(absent))

    def _headers(self) -> Iterator[tuple[str, StoredTensor]]:
        dtypes: dict[str, tuple[torch.dtype, str]] = {}
        for parameter, shards in self._copies.items():
            place = stored_place(parameter, self.config, stacked=False)
            shape, dtype = parameter.shape, shards[0][0].dtype
            if parameter.has_vocabulary_rows:
                shape = (len(shards) * shards[0][0].shape[0], *shape[1:])
            first, name = dtypes.setdefault(place.key, (dtype, parameter.megatron_name))
            if first != dtype:
                raise MismatchError(
                    f"{self.path}: {name} is {first}, {parameter.megatron_name} is {dtype}; expected one dtype in all "
                    "experts of a layer"
                )
            yield place.key, StoredTensor(shape=(*place.leading, *shape), dtype=dtype)


def shard_runs(begin: int, end: int, num_rows: int, shards: int, pieces: int) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, first row, end) of the shards' rows that make up rows `begin` to `end` of the whole, in order.

    Args:
        begin: first row of the whole.
        end: one past the last.
        num_rows: of the whole.
        shards: equal parts along the rows; 1 if every rank holds all of them.
        pieces: blocks of the whole that are cut separately (gate and up: 2); a shard holds its part of each in turn.
    """
    size = num_rows // (shards * pieces)
    while begin < end:
        piece, within = divmod(begin, size * shards)
        shard, row = divmod(within, size)
        count = min(end - begin, size - row)
        yield shard, piece * size + row, piece * size + row + count
        begin += count


def _places(contents: Mapping[str, RankContent], expected: Sequence[RankFile]) -> dict[Parameter, list[_Copies]]:
    """Return for every parameter, per shard, where its copies lie."""
    copies: dict[Parameter, list[_Copies]] = {}
    for file in expected:
        for chunk in file.chunks:
            for tensor in chunk.tensors:
                shards = copies.setdefault(tensor.parameter, [[] for _ in range(tensor.shard.size)])
                if file.folder in contents:
                    shards[tensor.shard.rank].append(contents[file.folder].place(chunk.key, tensor.name))
    return copies


def _read_copies(copies: _Copies, begin: int, end: int, parameter: Parameter) -> Tensor:
    first, *others = copies
    rows = read_rows(first, begin, end)
    for other in others:
        if not torch.equal(_bits(rows), _bits(read_rows(other, begin, end))):
            raise MismatchError(
                f"{parameter.megatron_name}: {first.file} and {other.file} hold different values (rows {begin} to "
                f"{end}), expected the same in both: these ranks keep copies of one tensor. Find out which is right; "
                "training that lets copies drift apart is at fault"
            )
    return rows


def read_rows(place: TensorPlace, begin: int, end: int) -> Tensor:
    """Return rows `begin` to `end` (axis 0) of a tensor in a file; only their bytes are read."""
    shape = (end - begin, *place.shape[1:])
    start = place.offset + begin * place.strides[0] * place.dtype.itemsize
    values = read_values(place.file, start, place.dtype, span(shape, place.strides))
    return values.as_strided(shape, place.strides)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
