"""What rotary embedding looks up: tables of cos and sin, and the position of each token.

Shapes: P positions, R rotated dimensions of a head, T tokens of this rank.
"""

from __future__ import annotations

import itertools

import torch

from ...errors import ConfigError
from .. import checks


def rope_tables(inv_freq: torch.Tensor, length: int, *, mscale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mscale * cos and mscale * sin of position * inv_freq, both fp32 [length, R / 2].

    Angles are computed in fp64: at position 1e6 an fp32 angle is off by up to 0.03.

    Args:
        inv_freq: radians per position, [R / 2]; those of YaRN where it is used.
        length: positions 0 to length - 1.
        mscale: YaRN's attention factor on both tables (arXiv 2309.00071, equation 22).

    Raises:
        ConfigError: inv_freq is no vector, or the length is negative.
    """
    if inv_freq.dim() != 1 or length < 0:
        raise ConfigError(
            f"rope_tables: got inv_freq {tuple(inv_freq.shape)}, length {length}; expected a vector, >= 0"
        )
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=inv_freq.device), inv_freq.double())
    return (angles.cos() * mscale).float(), (angles.sin() * mscale).float()


def packed_positions(cu_seqlens: torch.Tensor, *, cp_size: int = 1, cp_rank: int = 0) -> torch.Tensor:
    """Return the position of each token of this rank in packed sequences, int32 [T / cp_size].

    With context parallelism every sequence is cut into 2 cp_size equal pieces, of which a rank has piece cp_rank and
    piece 2 cp_size - 1 - cp_rank, as in Megatron-Core. Reads cu_seqlens on the host: call it once per batch.

    Args:
        cu_seqlens: boundaries of the sequences on all ranks together, integers [sequences + 1], from 0 to T.
        cp_size: context-parallel ranks.
        cp_rank: this one.

    Raises:
        ConfigError: not integers, not ascending from 0, or a length that 2 cp_size does not divide.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or not cu_seqlens.numel():
        raise ConfigError(
            f"packed_positions: cu_seqlens has shape {tuple(cu_seqlens.shape)}, dtype {cu_seqlens.dtype}; "
            "expected a vector of int32 or int64 that starts with 0"
        )
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    if bounds[0] != 0 or any(length < 0 for length in lengths):
        raise ConfigError(f"packed_positions: cu_seqlens is {bounds}; expected 0 and ascending numbers")
    pieces = [context_parallel_positions(length, cp_size=cp_size, cp_rank=cp_rank) for length in lengths]
    return torch.cat(pieces or [torch.empty(0, dtype=torch.int32)]).to(cu_seqlens.device)


def context_parallel_positions(length: int, *, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions of one sequence that a context-parallel rank has, int32 [length / cp_size], on the CPU.

    Raises:
        ConfigError: no such rank, or a length that 2 cp_size does not divide.
    """
    if not 0 <= cp_rank < cp_size:
        raise ConfigError(f"rope: cp_rank is {cp_rank}; expected 0 to cp_size - 1 = {cp_size - 1}")
    if cp_size == 1:
        return torch.arange(length, dtype=torch.int32)
    if length % (2 * cp_size):
        raise ConfigError(f"rope: a sequence of {length} tokens; expected a multiple of 2 * cp_size = {2 * cp_size}")
    piece = length // (2 * cp_size)
    first, second = cp_rank * piece, (2 * cp_size - 1 - cp_rank) * piece
    starts = torch.tensor([[first], [second]], dtype=torch.int32)
    return (starts + torch.arange(piece, dtype=torch.int32)).flatten()


def check_tables(op: str, name: str, like: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> None:
    """Raise ConfigError unless both tables fit heads of `head_dim` numbers of tensor `like`, which is called `name`."""
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape or not 0 < 2 * table.shape[1] <= head_dim:
            raise ConfigError(
                f"{op}: {table_name} has shape {tuple(table.shape)}; expected [positions, R / 2] with R at most "
                f"{head_dim}, the same for cos and sin"
            )
        checks.require_dtype(op, table_name, table, torch.promote_types(like.dtype, torch.float32))
        checks.require_device(op, table_name, table, like, name)
        if not table.is_contiguous():
            raise ConfigError(f"{op}: {table_name} has strides {table.stride()}; expected a contiguous table")


def check_positions(
    op: str, name: str, like: torch.Tensor, lead: torch.Size, cos: torch.Tensor, positions: torch.Tensor | None
) -> None:
    """Raise ConfigError unless positions fit tokens [S, B] or [T]: the axes `lead` of `like`, called `name`."""
    if positions is None:
        if lead[0] > cos.shape[0]:
            raise ConfigError(f"{op}: {name} has {lead[0]} positions; expected at most {cos.shape[0]}, the rows of cos")
        return
    if positions.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"{op}: positions has dtype {positions.dtype}; expected torch.int32 or torch.int64")
    allowed = [tuple(lead), tuple(lead[:1])]
    if tuple(positions.shape) not in allowed or not positions.is_contiguous():
        raise ConfigError(
            f"{op}: positions has shape {tuple(positions.shape)}, strides {positions.stride()}; "
            f"expected {' or '.join(map(str, dict.fromkeys(allowed)))}, contiguous"
        )
    checks.require_device(op, "positions", positions, like, name)
