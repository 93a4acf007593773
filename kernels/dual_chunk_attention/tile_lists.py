"""The list of tiles of a launch, on the host and in plain torch: what Triton's and CUDA's kernels share; see tiles.py.

Shapes: B sequences, T tokens of packed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .request import AttentionRequest

# Positions of plain attention, so that a chunk before position 0 and twice that are 32-bit numbers.
LONGEST = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The programs of a launch.

    Attributes:
        slots: tiles, or room for those of packed sequences.
        list_of_tiles: int32 [slots, 2], sequence and tile, or -1; None where all sequences have the same.
        first_tile: the one with most work, where all have the same.
        per_chunk: tiles of a chunk.
    """

    slots: int
    list_of_tiles: torch.Tensor | None
    first_tile: int
    per_chunk: int


def stride_of(request: AttentionRequest) -> int:
    """Return L, or what stands for it in plain attention."""
    return LONGEST if request.chunks is None else request.chunks.stride


def tiles_of_queries(request: AttentionRequest, q: torch.Tensor, block: int) -> Tiles:
    """Return tiles of the rows of q; the last rows have most keys."""
    stride = stride_of(request)
    per_chunk = _ceil_divide(stride, block)
    if request.cu_seqlens is not None:
        of_q, of_k = (each.diff() for each in request.cu_seqlens)
        starts = of_k - of_q
        return _packed_tiles(starts, of_q, starts + of_q, q.shape[0], stride, block, is_descending=True)
    batch, rows = q.shape[:2]
    first, last = (_tile(request.query_start + row, stride, block) for row in (0, rows - 1))
    return Tiles(slots=batch * (last - first + 1), list_of_tiles=None, first_tile=last, per_chunk=per_chunk)


def tiles_of_keys(request: AttentionRequest, k: torch.Tensor, block: int) -> Tiles:
    """Return tiles of the rows of k; the first keys have most queries."""
    stride = stride_of(request)
    per_chunk = _ceil_divide(stride, block)
    if request.cu_seqlens is not None:
        lengths = request.cu_seqlens[1].diff()
        return _packed_tiles(
            torch.zeros_like(lengths), lengths, lengths, k.shape[0], stride, block, is_descending=False
        )
    batch, rows = k.shape[:2]
    first, last = (_tile(request.key_start + row, stride, block) for row in (0, rows - 1))
    return Tiles(slots=batch * (last - first + 1), list_of_tiles=None, first_tile=first, per_chunk=per_chunk)


def _tile(position: int, stride: int, block: int) -> int:
    """Return the tile of a position."""
    return position // stride * _ceil_divide(stride, block) + position % stride // block


def _packed_tiles(
    starts: torch.Tensor, lengths: torch.Tensor, ends: torch.Tensor, rows: int, stride: int, block: int,
    is_descending: bool,
) -> Tiles:  # fmt: skip
    """List the tiles of sequences [B] of positions start ... start + length - 1; work is what lies before or behind."""
    per_chunk = _ceil_divide(stride, block)

    def tile(position: torch.Tensor) -> torch.Tensor:
        return position.div(stride, rounding_mode="floor") * per_chunk + position.remainder(stride) // block

    first = tile(starts)
    counts = torch.where(lengths > 0, tile(starts + lengths - 1) - first + 1, 0)
    # Whole tiles, ends of chunks, and a beginning and an end of each sequence.
    slots = rows // block + rows // stride + 3 * lengths.shape[0]
    behind = counts.cumsum(0)
    slot = torch.arange(slots, device=lengths.device)
    sequence = torch.searchsorted(behind, slot, right=True)
    is_tile = sequence < lengths.shape[0]
    sequence = sequence.clamp(max=lengths.shape[0] - 1)
    number = first[sequence] + slot - (behind - counts)[sequence]
    begin = number.div(per_chunk, rounding_mode="floor") * stride + number.remainder(per_chunk) * block
    work = begin if is_descending else ends[sequence] - begin
    order = torch.where(is_tile, work, -LONGEST).argsort(descending=True, stable=True)
    listed = torch.stack([torch.where(is_tile, sequence, -1), number], 1)[order].to(torch.int32)
    return Tiles(slots=slots, list_of_tiles=listed.contiguous(), first_tile=0, per_chunk=per_chunk)


def _ceil_divide(value: int, divisor: int) -> int:
    return -(-value // divisor)


def strides(heads: torch.Tensor) -> tuple[int, int, int]:
    """Return those of batch, row and head; packed sequences are one batch."""
    return (0, *heads.stride()[:2]) if heads.dim() == 3 else heads.stride()[:3]  # type: ignore[return-value]


def positions_of_keys(request: AttentionRequest, k: torch.Tensor) -> torch.Tensor | None:
    """Return the position of each packed row of k; None where all sequences have the same."""
    return None if request.cu_seqlens is None else _packed_positions(request.cu_seqlens[1], k.shape[0], 0)


def positions_of_queries(request: AttentionRequest, q: torch.Tensor) -> torch.Tensor | None:
    """Return the position of each packed row of q; None where all sequences have the same."""
    if request.cu_seqlens is None:
        return None
    of_q, of_k = request.cu_seqlens
    return _packed_positions(of_q, q.shape[0], of_k.diff() - of_q.diff())


def _packed_positions(cu_seqlens: torch.Tensor, rows: int, starts: torch.Tensor | int) -> torch.Tensor:
    """Return the position of each row of packed sequences, whose first rows are at `starts`."""
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=cu_seqlens.shape[0] - 2)
    return row - (cu_seqlens[:-1] - starts)[sequence]
