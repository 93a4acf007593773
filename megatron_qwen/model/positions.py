"""Where the tokens of this rank are in their sequences: packed ones or not, cut by context parallelism or not.

What packed sequences are made of is read once per batch, by the first layer: on a GPU a later layer would wait for it.

Shapes: T tokens of packed sequences.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from megatron_qwen import ops
from megatron_qwen.parallel.per_tensor import PerTensor

if TYPE_CHECKING:
    import torch.distributed as dist
    from megatron.core.packed_seq_params import PackedSeqParams


def packed_bounds(packed: PackedSeqParams, *, of_keys: bool = False) -> torch.Tensor:
    """Return the boundaries of packed sequences in memory, with their padding where they have some."""
    padded: torch.Tensor | None = packed.cu_seqlens_kv_padded if of_keys else packed.cu_seqlens_q_padded
    bounds: torch.Tensor = packed.cu_seqlens_kv if of_keys else packed.cu_seqlens_q
    return bounds if padded is None else padded


def bounds_on_host(bounds: torch.Tensor) -> list[int]:
    """Return boundaries as numbers."""
    return _NUMBERS.get(bounds, bounds.tolist)  # type: ignore[no-any-return]


def sequence_length(keys: int, packed: PackedSeqParams | None, cp_size: int) -> int:
    """Return the length of the longest sequence, of which this rank has `keys` keys (packed: of all of them)."""
    if packed is None:
        return keys * cp_size
    longest = packed.max_seqlen_kv
    if isinstance(longest, torch.Tensor):
        return _LENGTHS.get(longest, lambda: int(longest))  # type: ignore[no-any-return]
    if longest is not None:
        return int(longest)
    bounds = packed_bounds(packed)
    return _LENGTHS.get(bounds, lambda: int(bounds.diff().max()) if bounds.numel() > 1 else 0)  # type: ignore[no-any-return]


def rank_positions(
    tokens: int,
    packed: PackedSeqParams | None,
    device: torch.device,
    *,
    offset: int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the position of each token of this rank within its sequence, int32.

    Args:
        tokens: of this rank; of packed sequences, all of them together.
        packed: boundaries of packed sequences, or None.
        device: where the positions are wanted.
        offset: tokens that a key-value cache holds already.
        group: context-parallel ranks; None for one.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    if packed is not None:
        bounds = packed_bounds(packed)
        return _POSITIONS.get(  # type: ignore[no-any-return]
            bounds, lambda: ops.packed_positions(bounds, cp_size=size, cp_rank=rank)
        )
    return _positions_of(tokens * size, size, rank, device) + offset


@functools.lru_cache(maxsize=8)
def _positions_of(length: int, size: int, rank: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # so that what was made while generating text serves a training step, too
        return ops.context_parallel_positions(length, cp_size=size, cp_rank=rank).to(device)


_NUMBERS, _LENGTHS, _POSITIONS = PerTensor(), PerTensor(), PerTensor()
