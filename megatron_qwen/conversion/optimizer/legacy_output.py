"""Optimizer state as part of per-rank checkpoints that Megatron-LM loads: what `legacy` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_qwen import compat
from megatron_qwen.checkpoint.torch_layout import lay_out
from megatron_qwen.conversion.engine.pieces import BLOCK_BYTES
from megatron_qwen.conversion.formats.legacy.layout import LOCAL, LocalTensor, Naming, RankFile, rank_files
from megatron_qwen.conversion.formats.legacy.output import local_pieces, write_fixed
from megatron_qwen.conversion.interfaces import OutputFile, Piece
from megatron_qwen.conversion.optimizer.layout import (
    Buffer,
    Group,
    Member,
    holds_dense_state,
    holds_expert_state,
    members,
)
from megatron_qwen.conversion.optimizer.legacy import DISTRIBUTED_FILE
from megatron_qwen.conversion.optimizer.state import ROLES, WITHOUT_OPTIMIZER, OptimizerReader, Role
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter
from megatron_qwen.errors import MismatchError
from megatron_qwen.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class StateTensor:
    """One shard's tensor of the optimizer in a file.

    Attributes:
        tensor: the shard.
        role: master weight or moment.
        begin: where it begins in the tensor that the file has, in elements.
        flat: number of that tensor's optimizer and buffer, and its role, if it holds several shards.
    """

    tensor: LocalTensor
    role: Role
    begin: int = 0
    flat: tuple[int, int, str] | None = None


@dataclass(frozen=True)
class RankState:
    """What a run adds to a rank's model_optim_rng.pt.

    Attributes:
        entries: by key, tensors on device "meta".
        tensors: those of `entries`, in order.
    """

    entries: Mapping[str, Any]
    tensors: Sequence[StateTensor]


class LegacyOptimizerOutput:
    """The optimizer of a run as files of a per-rank checkpoint."""

    def __init__(
        self,
        reader: OptimizerReader,
        plan: ConversionPlan,
        layout: ParallelLayout,
        *,
        naming: Naming = LOCAL,
        block: int = BLOCK_BYTES,
    ) -> None:
        """Find out what belongs where.

        Args:
            reader: gives the tensors.
            plan: of the weights.
            layout: of the target.
            naming: of the target's parameters, which decides their order.
            block: bytes of a piece.

        Raises:
            MismatchError: the state is not float32, which is all that per-rank files keep.
        """
        self._reader, self._layout, self._block = reader, layout, block
        self._items = {item.parameter: item for item in plan.parameters}
        self._dtype: torch.dtype = getattr(torch, plan.config.torch_dtype)
        self._require_float32()
        splits = plan.config.is_moe and compat.experts_have_own_optimizer(
            tp=layout.tp, ep=layout.ep, etp=layout.expert_tensor_parallel_size
        )
        self._files = {file.folder: file for file in rank_files(plan.config, layout, naming)}
        self._chains = {
            folder: members(file, layout, is_tied=plan.config.tie_word_embeddings, splits_experts=splits)
            for folder, file in self._files.items()
        }

    def rank_state(self, folder: str) -> RankState:
        """Return what belongs into the model_optim_rng.pt of a rank folder."""
        tensors: list[StateTensor] = []
        parts = [self._part(member, tensors) for member in self._chains[folder]]
        state = self._reader.source.state
        entries: dict[str, Any] = {"optimizer": parts if len(parts) > 1 else parts[0]}
        if state.scheduler is not None:
            entries["opt_param_scheduler"] = dict(state.scheduler)
        return RankState(entries, tensors)

    def distributed_files(self, folder: str) -> list[OutputFile]:
        """Return the `distrib_optim.pt` of every rank that is first among its data-parallel peers.

        Args:
            folder: of the step, with a trailing slash.
        """
        if self._reader.kind != "distributed":
            return []
        files = (self._distributed_file(folder, file) for file in self._files.values())
        return [file for file in files if file is not None]

    def pieces(self, state: StateTensor, offset: int) -> Sequence[Piece]:
        """Return the pieces that write a tensor which begins `offset` bytes into a file."""
        parameter, role = state.tensor.parameter, state.role
        item = replace(self._items[parameter], source_dtype=torch.float32, target_dtype=torch.float32)
        pieces = local_pieces(
            state.tensor,
            item,
            partial(_read, self._reader, role),
            offset + state.begin * torch.float32.itemsize,
            0,
            self._block,
        )
        return [replace(piece, label=f"{role} of {piece.label}") for piece in pieces]

    def _part(self, member: Member, tensors: list[StateTensor]) -> dict[str, Any]:
        """Return one optimizer's state dict; the tensors in it are appended to `tensors`."""
        reader, groups = self._reader, [self._group(group) for group in member.groups]
        part: dict[str, Any]
        if reader.kind == "distributed":
            part = {"optimizer": {"param_groups": groups}}
        else:
            numbered = [tensor for group in member.groups for tensor in group.tensors]
            state = {
                number: {role: _meta(tensor, role, tensors) for role in ROLES[1:]}
                for number, tensor in enumerate(numbered)
            }
            numbers = iter(range(len(numbered)))
            for group, plain in zip(member.groups, groups, strict=True):
                plain["params"] = [next(numbers) for _ in group.tensors]
            part = {"state": state, "param_groups": groups}
            if reader.kind == "mixed":
                masters = [[_meta(tensor, "param", tensors) for tensor in group.tensors] for group in member.groups]
                part = {"optimizer": part, "fp32_from_fp16_params": masters}
        if reader.source.state.grad_scaler is not None and reader.kind != "float32":
            part["grad_scaler"] = dict(reader.source.state.grad_scaler)
        return part

    def _group(self, group: Group) -> dict[str, Any]:
        return self._reader.source.state.group(decays=group.decays, is_expert=group.is_expert)

    def _distributed_file(self, folder: str, file: RankFile) -> OutputFile | None:
        tensors: list[StateTensor] = []
        holds = {False: holds_dense_state(file, self._layout), True: holds_expert_state(file, self._layout)}
        parts = [
            self._buffers(member.buffers(), tensors, number) if holds[member.is_expert] else None
            for number, member in enumerate(self._chains[file.folder])
        ]
        if not any(part is not None for part in parts):
            return None
        layout = lay_out(parts if len(parts) > 1 else parts[0])
        # One flat tensor per buffer and role, in which each shard has its place; what lies between stays zero.
        offsets = dict(zip(dict.fromkeys(each.flat for each in tensors), layout.offsets, strict=True))
        return OutputFile(
            name=f"{folder}{file.folder}/{DISTRIBUTED_FILE}",
            num_bytes=layout.num_bytes,
            skeleton=partial(write_fixed, layout),
            pieces=tuple(piece for each in tensors for piece in self.pieces(each, offsets[each.flat])),
        )

    def _buffers(self, buffers: Sequence[Buffer], tensors: list[StateTensor], part: int) -> dict[Any, Any]:
        """Return one optimizer's part of the file; the shards in its flat tensors are appended to `tensors`."""
        content: dict[Any, Any] = {"buckets_coalesced": True}
        for number, buffer in enumerate(buffers):
            flat: dict[str, Any] = {}
            for role in ROLES:
                flat[role] = torch.empty(buffer.num_elements, dtype=torch.float32, device="meta")
                tensors += [
                    StateTensor(place.tensor, role, place.begin, flat=(part, number, role)) for place in buffer.places
                ]
            # The distributed optimizer looks its buffers up by the dtypes of parameters and reduced gradients.
            content[number] = {(self._dtype, torch.float32): flat | {"numel_unpadded": buffer.num_elements}}
        return content

    def _require_float32(self) -> None:
        for parameter in self._items:
            for role in self._reader.roles:
                if (dtype := self._reader.dtype_of(parameter, role)) != torch.float32:
                    raise MismatchError(
                        f"{self._reader.source.place_name(parameter)}: {role} is {dtype}, expected torch.float32: "
                        f"per-rank files keep no state of the precision-aware optimizer; {WITHOUT_OPTIMIZER}"
                    )


def _read(reader: OptimizerReader, role: Role, item: PlannedParameter, begin: int, end: int) -> Tensor:
    return reader.rows(item.parameter, role, begin, end)


def _meta(tensor: LocalTensor, role: Role, tensors: list[StateTensor]) -> Tensor:
    tensors.append(StateTensor(tensor, role))
    return torch.empty(tensor.shape, dtype=torch.float32, device="meta")
