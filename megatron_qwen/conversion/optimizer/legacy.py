"""Optimizer state in per-rank checkpoints: `optimizer` in model_optim_rng.pt, and `distrib_optim.pt` beside it.

A plain optimizer's state dict numbers the rank's parameters; the distributed optimizer's has hyper-parameters only, and
`distrib_optim.pt` one flat tensor per model chunk, master weights and moments each, of the rank that is first among its
data-parallel peers. With experts that have an optimizer of their own, both are lists. `layout` says which
number or offset is whose; Megatron-LM's save_checkpoint (megatron/training/checkpointing.py) says which file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.checkpoint.torch_file import TensorPlace, locate, open_torch_file
from megatron_qwen.conversion.formats.byte_ranges import read_values
from megatron_qwen.conversion.formats.legacy.files import RankContent
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE, LocalTensor, RankFile
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder, read_rows, shard_runs
from megatron_qwen.conversion.optimizer.layout import Buffer, Group, Member, default_bucket_size, members
from megatron_qwen.conversion.optimizer.state import (
    ROLES,
    WITHOUT_OPTIMIZER,
    Kind,
    OptimizerState,
    Role,
    iteration_of,
    parse_groups,
    require_plain,
    require_tensor,
    with_step,
)
from megatron_qwen.conversion.parameters import Parameter
from megatron_qwen.conversion.transforms import TRANSFORMS, unpad_rows
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError
from megatron_qwen.strict_json import listing

DISTRIBUTED_FILE = "distrib_optim.pt"


@dataclass(frozen=True)
class _Copy:
    """One rank's state of one shard."""

    name: str
    places: Mapping[Role, TensorPlace]


class LegacyOptimizer:
    """The optimizer of a per-rank checkpoint; see `OptimizerSource`."""

    def __init__(self, folder: LegacyFolder) -> None:
        """Find every parameter's state in the rank files.

        Args:
            folder: the weights; one of its files holds an optimizer.

        Raises:
            IncompleteInputError: a rank file has no optimizer, no `distrib_optim.pt`, or lacks a parameter's state.
            MismatchError: rank files disagree, or the state does not fit the layout.
            CorruptInputError: a file is damaged.
        """
        self.path = folder.path
        present = [each for each in folder.rank_files if each.folder in folder.contents]
        files = [_OptimizerFile(folder.contents[each.folder], each) for each in present]
        self.state = _agree([(file.name, file.state) for file in files])
        self._copies: dict[Parameter, list[list[_Copy]]] = {}
        self._files: set[Path] = set()
        for file in files:
            chain = members(
                file.rank_file,
                folder.layout,
                is_tied=folder.config.tie_word_embeddings,
                splits_experts=self.state.is_chained,
            )
            for tensor, copy in file.copies(chain):
                shards = self._copies.setdefault(tensor.parameter, [[] for _ in range(tensor.shard.size)])
                shards[tensor.shard.rank].append(copy)
                self._files |= {place.file for place in copy.places.values()}
        self._require_all(folder)

    def dtype_of(self, parameter: Parameter, role: Role) -> torch.dtype:
        """Return the dtype in which it is stored."""
        return self._copies[parameter][0][0].places[role].dtype

    def rows(self, parameter: Parameter, role: Role, begin: int, end: int) -> Tensor:
        """Return rows of the whole tensor; with the last, vocabulary padding is proved to be zero.

        Raises:
            MismatchError: ranks that hold copies of one tensor hold different values, or the padding is not zero.
        """
        shards = self._copies[parameter]
        if parameter.family.shard_axis == 1:
            return torch.cat([_read_equal(copies, role, begin, end) for copies in shards], dim=1)
        first = shards[0][0].places[role]
        stored_rows = len(shards) * first.shape[0] if parameter.family.shard_axis == 0 else parameter.shape[0]
        last = stored_rows if end == parameter.shape[0] else end
        pieces = TRANSFORMS[parameter.family.transform].num_pieces
        runs = shard_runs(begin, last, stored_rows, len(shards), pieces)
        parts = [_read_equal(shards[shard], role, low, high) for shard, low, high in runs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return unpad_rows(whole, end - begin, self.place_name(parameter), begin)

    def place_name(self, parameter: Parameter, index: Sequence[int] = ()) -> str:
        """Return the first rank file that holds the value at `index`, and the parameter's name there."""
        shards, axis = self._copies[parameter], parameter.family.shard_axis
        number = 0
        if index and axis == 1:
            number = index[1] // shards[0][0].places["exp_avg"].shape[1]
        elif index and axis == 0:
            rows = len(shards) * shards[0][0].places["exp_avg"].shape[0]
            pieces = TRANSFORMS[parameter.family.transform].num_pieces
            number, _, _ = next(shard_runs(index[0], index[0] + 1, rows, len(shards), pieces))
        return shards[number][0].name

    def files(self) -> set[Path]:
        """Return the files that hold the tensors."""
        return set(self._files)

    def _require_all(self, folder: LegacyFolder) -> None:
        expected = folder.rank_files
        lacking = [each for file in expected for chunk in file.chunks for each in chunk.tensors if not self._has(each)]
        if lacking:
            names = sorted({tensor.parameter.megatron_name for tensor in lacking})
            file_name = DISTRIBUTED_FILE if self.state.kind == "distributed" else RANK_FILE
            absent = [file.folder for file in expected if not (self.path / file.folder / file_name).is_file()]
            raise IncompleteInputError(
                f"{self.path}: no optimizer state for a part of {len(names)} parameters, first {names[0]}. Rank "
                f"folders without {file_name}: {listing(absent) or 'none'}. Copy what is missing, {WITHOUT_OPTIMIZER}"
            )

    def _has(self, tensor: LocalTensor) -> bool:
        shards = self._copies.get(tensor.parameter)
        return shards is not None and bool(shards[tensor.shard.rank])


def open_legacy_optimizer(folder: LegacyFolder) -> LegacyOptimizer | None:
    """Return the optimizer of a per-rank checkpoint, or None if no rank file holds one.

    Raises:
        InputError: see `LegacyOptimizer`.
    """
    if any(content.content.get("optimizer") is not None for content in folder.contents.values()):
        return LegacyOptimizer(folder)
    return None


class _OptimizerFile:
    """The optimizer in one rank file.

    Attributes:
        name: of the file, for messages.
        rank_file: what the rank holds.
        state: its hyper-parameters.
    """

    def __init__(self, content: RankContent, rank_file: RankFile) -> None:
        self.name, self.rank_file, self._content = str(content.file), rank_file, content
        optimizer = content.content.get("optimizer")
        if optimizer is None:
            raise IncompleteInputError(
                f"{self.name}: no `optimizer`, but other rank files have one; {WITHOUT_OPTIMIZER}"
            )
        self._parts: list[Any] = list(optimizer) if isinstance(optimizer, list) else [optimizer]
        if not 1 <= len(self._parts) <= 2 or not all(isinstance(part, dict) for part in self._parts):
            raise CorruptInputError(
                f"{self.name}: `optimizer` holds {len(self._parts)} parts, expected the state of Megatron's optimizer, "
                "or of two that are chained for dense parameters and experts"
            )
        self._inner = [self._dict(part, "optimizer") if "optimizer" in part else part for part in self._parts]
        groups = [group for inner in self._inner for group in self._groups(inner)]
        decay, no_decay = parse_groups(groups, self.name)
        self.state = OptimizerState(
            kind=self._kind(),
            decay=with_step(decay, self._tensor_step(), self.name),
            no_decay=with_step(no_decay, self._tensor_step(), self.name),
            scheduler=require_plain(content.content.get("opt_param_scheduler"), f"{self.name}: opt_param_scheduler"),
            grad_scaler=require_plain(self._read(self._parts[0].get("grad_scaler")), f"{self.name}: grad_scaler"),
            is_chained=len(self._parts) > 1,
            iteration=iteration_of(content.content, self.name),
        )

    def copies(self, chain: Sequence[Member]) -> Iterator[tuple[LocalTensor, _Copy]]:
        """Yield the state of each of the rank's tensors that is in its files."""
        if self.state.kind == "distributed":
            yield from self._distributed(chain)
            return
        for member, part, inner in zip(chain, self._parts, self._inner, strict=True):
            masters = part.get("fp32_from_fp16_params", part.get("fp32_from_fp16")) if inner is not part else None
            for group, number in self._match_groups(member, self._groups(inner)):
                numbers = self._groups(inner)[number].get("params")
                if not isinstance(numbers, list) or len(numbers) != len(group.tensors):
                    raise MismatchError(
                        f"{self.name}: the optimizer has {len(numbers or ())} parameters with wd_mult "
                        f"{float(group.decays)}, expected {len(group.tensors)} of this model"
                    )
                for position, tensor in enumerate(group.tensors):
                    values = self._dict(inner, "state").get(numbers[position], {})
                    found = {role: values.get(role) for role in ROLES[1:]}
                    if masters is not None:
                        found["param"] = self._master(masters, number, position, tensor)
                    yield tensor, self._copy(tensor, found)

    def _kind(self) -> Kind:
        if "fp32_from_fp16_params" in self._parts[0] or "fp32_from_fp16" in self._parts[0]:
            return "mixed"
        return "float32" if "state" in self._inner[0] else "distributed"

    def _tensor_step(self) -> object:
        """Return the step that plain torch optimizers keep with each parameter, or None."""
        for inner in self._inner:
            for values in inner.get("state", {}).values():
                step = values.get("step")
                return self._read(step)
        return None

    def _read(self, value: Any) -> Any:
        """Return plain data with the small tensors in it read into memory."""
        if isinstance(value, dict):
            return {key: self._read(each) for key, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        place = locate(self._content.file, value, "a value of the optimizer")
        return read_values(place.file, place.offset, place.dtype, value.numel()).reshape(value.shape)

    def _groups(self, inner: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        groups = inner.get("param_groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise CorruptInputError(
                f"{self.name}: `optimizer` has no param_groups; expected a Megatron optimizer's state"
            )
        return groups

    def _match_groups(self, member: Member, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Group, int]]:
        """Pair groups by weight decay: older versions order them otherwise."""
        for number, group in enumerate(groups):
            decays = bool(group.get("wd_mult", group.get("pre_wd_mult")))
            match = next((each for each in member.groups if each.decays == decays), None)
            if match is None:
                if group.get("params"):
                    raise MismatchError(f"{self.name}: the experts' optimizer has parameters without weight decay")
                continue
            yield match, number

    def _master(self, masters: Any, number: int, position: int, tensor: LocalTensor) -> Any:
        try:
            return masters[number][position]
        except (LookupError, TypeError):
            raise IncompleteInputError(
                f"{self.name}: {tensor.name}: no master weight in fp32_from_fp16_params; use another checkpoint, "
                f"{WITHOUT_OPTIMIZER}"
            ) from None

    def _copy(self, tensor: LocalTensor, found: Mapping[Role, Any]) -> _Copy:
        places = {}
        for role, value in found.items():
            what = f"{self.name}: {tensor.name}: {role}"
            places[role] = locate(
                self._content.file, require_tensor(value, tensor.shape, what), f"{tensor.name} {role}"
            )
        return _Copy(f"{self.name}: {tensor.name}", places)

    def _distributed(self, chain: Sequence[Member]) -> Iterator[tuple[LocalTensor, _Copy]]:
        file = self._content.file.parent / DISTRIBUTED_FILE
        if not file.is_file():
            return  # of a rank that is not first among its peers; what nobody has is found in the end
        content = open_torch_file(file)
        parts = content if isinstance(content, list) else [content]
        if len(parts) != len(chain):
            raise MismatchError(f"{file}: the state of {len(parts)} optimizers, {self.name} says {len(chain)}")
        for member, part in zip(chain, parts, strict=True):
            if part is not None:
                yield from _BufferFile(file, part).copies(member, self._bucket_size())

    def _bucket_size(self) -> int | None:
        """Return the bucket size of the run, by its arguments; only the first pipeline stage has several buckets."""
        arguments = self._content.arguments
        if arguments is None or self.rank_file.pipeline_rank or not getattr(arguments, "overlap_grad_reduce", False):
            return None
        size = getattr(arguments, "ddp_bucket_size", None)
        return size or default_bucket_size(getattr(arguments, "data_parallel_size", 1))

    def _dict(self, parent: Mapping[str, Any], key: str) -> dict[Any, Any]:
        value = parent.get(key)
        if not isinstance(value, dict):
            raise CorruptInputError(
                f"{self.name}: `{key}` of the optimizer is a {type(value).__name__}, expected a dict"
            )
        return value


@dataclass(frozen=True)
class _BufferFile:
    """One optimizer's part of a `distrib_optim.pt`."""

    file: Path
    part: Any

    def copies(self, member: Member, bucket_size: int | None) -> Iterator[tuple[LocalTensor, _Copy]]:
        """Yield the state of every tensor of the member."""
        buffers = self._flat_tensors()
        wanted = member.buffers(bucket_size)
        if len(buffers) != len(wanted):
            raise MismatchError(f"{self.file}: {len(buffers)} buffers, expected {len(wanted)}, one per model chunk")
        for number, (flat, buffer) in enumerate(zip(buffers, wanted, strict=True)):
            tensors = {
                role: require_tensor(
                    flat.get(role), (self._size(flat, buffer, number),), f"{self.file}: buffer {number} {role}"
                )
                for role in ROLES
            }
            places = {role: locate(self.file, tensor, f"buffer {number} {role}") for role, tensor in tensors.items()}
            for each in buffer.places:
                shape = each.tensor.shape
                yield (
                    each.tensor,
                    _Copy(
                        f"{self.file}: {each.tensor.name}",
                        {role: _part(place, each.begin, shape) for role, place in places.items()},
                    ),
                )

    def _flat_tensors(self) -> list[Mapping[str, Any]]:
        if not isinstance(self.part, dict):
            raise CorruptInputError(
                f"{self.file}: holds a {type(self.part).__name__}, expected the distributed optimizer's dict"
            )
        if not self.part.get("buckets_coalesced"):
            raise MismatchError(
                f"{self.file}: one tensor per bucket, a format from before February 2024; load and save it with "
                f"Megatron-LM under --ckpt-convert-update-legacy-dist-opt-format, {WITHOUT_OPTIMIZER}"
            )
        buffers = []
        for key in sorted(key for key in self.part if isinstance(key, int)):
            by_dtype = self.part[key]
            if not isinstance(by_dtype, dict) or len(by_dtype) != 1:
                raise CorruptInputError(f"{self.file}: buffer {key} is not of one pair of dtypes")
            buffers.append(next(iter(by_dtype.values())))
        return buffers

    def _size(self, flat: Mapping[str, Any], buffer: Buffer, number: int) -> int:
        found = flat.get("numel_unpadded")
        if found != buffer.num_elements:
            raise MismatchError(
                f"{self.file}: buffer {number} has {found} elements, expected {buffer.num_elements} for this model, "
                f"layout and bucket size: saved by another run, or with another --ddp-bucket-size; {WITHOUT_OPTIMIZER}"
            )
        return buffer.num_elements


def _part(flat: TensorPlace, begin: int, shape: tuple[int, ...]) -> TensorPlace:
    """Return a part of a flat tensor as a tensor of `shape`."""
    return TensorPlace(
        file=flat.file,
        offset=flat.offset + begin * flat.dtype.itemsize,
        shape=shape,
        strides=torch.empty(shape, device="meta").stride(),
        dtype=flat.dtype,
    )


def _read_equal(copies: Sequence[_Copy], role: Role, begin: int, end: int) -> Tensor:
    first, *others = copies
    rows = read_rows(first.places[role], begin, end)
    for other in others:
        if not torch.equal(_bits(rows), _bits(read_rows(other.places[role], begin, end))):
            raise MismatchError(
                f"{first.name} and {other.name}: {role} differs (rows {begin} to {end}), expected the same in both: "
                f"these ranks keep copies of one tensor. Use another checkpoint, {WITHOUT_OPTIMIZER}"
            )
    return rows


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _agree(states: Sequence[tuple[str, OptimizerState]]) -> OptimizerState:
    """Return the state that all rank files have in common.

    Raises:
        MismatchError: two disagree.
    """
    (name, first), *others = states
    for other_name, other in others:
        for field in ("kind", "is_chained", "iteration", "decay", "no_decay", "scheduler"):
            one, two = getattr(first, field), getattr(other, field)
            if one != two:
                raise MismatchError(
                    f"{other_name}: {field} of the optimizer is {two}, in {name} it is {one}; the rank files are not "
                    f"of one save. Use another checkpoint, {WITHOUT_OPTIMIZER}"
                )
    return first
