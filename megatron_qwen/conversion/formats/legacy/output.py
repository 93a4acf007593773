"""Per-rank checkpoints (`--ckpt-format torch`) as outputs: every rank file laid out first, then filled in any order."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_qwen.checkpoint.torch_layout import TorchFileLayout, lay_out
from megatron_qwen.conversion.engine.pieces import BLOCK_BYTES, TensorRows, row_pieces
from megatron_qwen.conversion.formats.legacy.layout import (
    LOCAL,
    RANK_FILE,
    LocalTensor,
    ModelChunk,
    Naming,
    RankFile,
    check_legacy_layout,
    rank_files,
)
from megatron_qwen.conversion.formats.megatron_lm_args import megatron_lm_args
from megatron_qwen.conversion.interfaces import OutputFile, Piece, pwrite_all
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter
from megatron_qwen.conversion.transforms import TRANSFORMS, pad_rows
from megatron_qwen.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron_qwen.conversion.optimizer.legacy_output import LegacyOptimizerOutput

# Returns rows of a whole parameter as Megatron lays it out, in the dtype planned for the target.
ReadRows = Callable[[PlannedParameter, int, int], Tensor]


def legacy_output(
    plan: ConversionPlan,
    layout: ParallelLayout,
    read: ReadRows,
    *,
    folder: str = "",
    iteration: int = 0,
    naming: Naming = LOCAL,
    arguments: argparse.Namespace | None = None,
    optimizer: LegacyOptimizerOutput | None = None,
    block: int = BLOCK_BYTES,
) -> list[OutputFile]:
    """Return the rank files of a checkpoint that Megatron-LM and stock GPTModel load.

    Args:
        plan: what to write; its config describes the target.
        layout: checked here.
        read: called from several threads.
        folder: of the step, with a trailing slash: "release/".
        iteration: of the step.
        naming: of the local spec or of Transformer Engine's.
        arguments: Megatron-LM's, as `args`; made from plan and layout if None.
        optimizer: whose state goes into the same files; None writes weights alone.
        block: bytes that a piece may hold at once.

    Raises:
        ConfigError: the layout does not fit the model, or per-rank files cannot hold it.
    """
    check_legacy_layout(plan.config, layout)
    items = {item.parameter: item for item in plan.parameters}
    impl = "transformer_engine" if naming.fused_norms else "local"
    arguments = arguments or megatron_lm_args(plan.config, layout, ckpt_format="torch", transformer_impl=impl)
    head = {"args": arguments, "checkpoint_version": 3.0, "iteration": iteration}
    counted: set[str] = set()
    files = [
        _rank_output(file, items, read, folder, head, counted, block, optimizer)
        for file in rank_files(plan.config, layout, naming)
    ]
    return files + (optimizer.distributed_files(folder) if optimizer else [])


def _rank_output(
    file: RankFile,
    items: dict[Any, PlannedParameter],
    read: ReadRows,
    folder: str,
    head: dict[str, Any],
    counted: set[str],
    block: int,
    optimizer: LegacyOptimizerOutput | None,
) -> OutputFile:
    content = head | {chunk.key: _state_dict(chunk, items) for chunk in file.chunks}
    state = optimizer.rank_state(file.folder) if optimizer else None
    layout = lay_out({**content, **(state.entries if state else {})})
    tensors = [tensor for chunk in file.chunks for tensor in chunk.tensors]
    pieces: list[Piece] = []
    for tensor, offset in zip(tensors, layout.offsets, strict=state is None):
        item = items[tensor.parameter]
        name = tensor.parameter.megatron_name
        # A Hugging Face tensor counts once: with the first of its shards.
        num_tensors = 0 if name in counted else len(tensor.parameter.hf_names)
        counted.add(name)
        pieces += local_pieces(tensor, item, read, offset, num_tensors, block)
    if optimizer and state:
        for held, offset in zip(state.tensors, layout.offsets[len(tensors) :], strict=True):
            pieces += optimizer.pieces(held, offset)
    return OutputFile(
        name=f"{folder}{file.folder}/{RANK_FILE}",
        num_bytes=layout.num_bytes,
        skeleton=partial(write_fixed, layout),
        pieces=tuple(pieces),
    )


def _state_dict(chunk: ModelChunk, items: dict[Any, PlannedParameter]) -> dict[str, Tensor | None]:
    """Return a chunk's state dict with meta tensors."""
    weights: dict[str, Tensor | None] = {
        tensor.name: torch.empty(tensor.shape, dtype=items[tensor.parameter].target_dtype, device="meta")
        for tensor in chunk.tensors
    }
    return weights | dict.fromkeys(chunk.extra_states)


def write_fixed(layout: TorchFileLayout, descriptor: int) -> None:
    """Give a new file its size and all that is not a tensor."""
    os.ftruncate(descriptor, layout.num_bytes)
    for offset, content in layout.fixed:
        pwrite_all(descriptor, content, offset)


def local_pieces(
    tensor: LocalTensor, item: PlannedParameter, read: ReadRows, offset: int, num_tensors: int, block: int
) -> Sequence[Piece]:
    """Return the pieces that write one rank's shard of a parameter at `offset` of its file."""
    rows = TensorRows(
        label=tensor.parameter.megatron_name,
        shape=tensor.shape,
        dtype=item.target_dtype,
        source_dtype=item.source_dtype,
        num_tensors=num_tensors,
        read=partial(_local_rows, tensor, item, read),
    )
    if tensor.parameter.family.shard_axis != 1 or tensor.shard.size == 1:
        return tuple(row_pieces(rows, offset, block))
    # Whole rows are read and cut: so many times the memory of what is written.
    width = tensor.shard.size
    return tuple(
        replace(piece, peak_bytes=piece.peak_bytes * width)
        for piece in row_pieces(rows, offset, max(1, block // width))
    )


def _local_rows(tensor: LocalTensor, item: PlannedParameter, read: ReadRows, begin: int, end: int) -> Tensor:
    """Return rows of a shard; `begin` and `end` count the shard's rows."""
    parameter, shard = tensor.parameter, tensor.shard
    axis = parameter.family.shard_axis
    if axis is None or (shard.size == 1 and tensor.vocabulary_rows is None):
        return read(item, begin, end)
    if axis == 1:
        columns = tensor.shape[1]
        return read(item, begin, end)[:, shard.rank * columns : (shard.rank + 1) * columns]
    if tensor.vocabulary_rows is not None:
        first = shard.rank * tensor.shape[0]
        low, high = (min(first + row, parameter.shape[0]) for row in (begin, end))
        return pad_rows(read(item, low, high), end - begin)
    pieces = TRANSFORMS[parameter.family.transform].num_pieces
    size = tensor.shape[0] // pieces
    # In the whole, each block is `shard.size` times as long, and this shard's part of it lies behind those before.
    parts = []
    for piece in range(begin // size, -(-end // size)):
        low, high = max(begin, piece * size), min(end, (piece + 1) * size)
        shift = piece * size * (shard.size - 1) + shard.rank * size
        parts.append(read(item, low + shift, high + shift))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
