"""Which columns and diagonals to keep, from the attention of the last rows (MInference, arXiv 2407.02490, algorithm 2).

The probabilities of the last 64 rows over all keys are summed by column and by distance; the largest sums of each are
kept, as many as the head's budget says. Dual Chunk Attention breaks diagonals where positions are clamped, so here, and
here only, queries are rotated without the clamp (Qwen2.5-1M, arXiv 2501.15383, section 5.2; positions as in vLLM):

    same chunk a      previous chunk a + L      older chunks a + c

Shapes: S, K tokens of q and k, R last rows, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...errors import ConfigError
from ..dual_chunk_attention import ChunkLayout
from ..dual_chunk_attention.request import AttentionRequest, Sequences
from ..dual_chunk_attention.rotation import Rotation
from ..qkv_rope.reference import rotate
from .arguments import OP, checked_sequence
from .configuration import HeadBudget
from .index import SparseIndex, intervals

LAST_ROWS = 64
"""Rows that are scored: `sparse_attention_last_q`."""
FORCED_COLUMNS = 30
"""The first so many keys are always kept."""
FORCED_DISTANCES = 100
"""The nearest so many keys of every row are always kept, as far as the budget of slashes goes."""
FEWEST_SLASHES = 50
TILE = 16
"""Rows whose logits are held: 64 MiB for a head over a million keys."""


def estimate_index(
    q: torch.Tensor,
    k: torch.Tensor,
    budgets: Sequence[HeadBudget],
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool = False,
    softmax_scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
    last_rows: int = LAST_ROWS,
    merge_gap: int = 0,
) -> SparseIndex:
    """Return what to keep for some rows of one sequence, from the last of them; no gradient.

    Memory beside the index: rotated keys (unless keys_rotated), 2 K numbers of fp32 and TILE rows of logits.

    Args:
        q: [S, H, D], as `sparse_prefill_attention` takes it.
        k: [K, G, D].
        budgets: one per query head.
        chunks: as there.
        tables: as there, but with more rows: `2 * chunks.chunk_size - chunks.local_size` always do.
        keys_rotated: as there.
        softmax_scale: as there.
        logit_scale: as there.
        last_rows: how many are scored.
        merge_gap: see `intervals`.

    Raises:
        ConfigError: an argument does not fit.
    """
    request = checked_sequence(
        q,
        k,
        k,
        chunks=chunks,
        tables=tables,
        keys_rotated=keys_rotated,
        softmax_scale=softmax_scale,
        logit_scale=logit_scale,
    )
    if len(budgets) != q.shape[1]:
        raise ConfigError(f"{OP}: {len(budgets)} budgets; expected {q.shape[1]}, one per query head")
    chosen = [
        select(*sums, budget, merge_gap)
        for sums, budget in zip(attention_sums(q, k, request, last_rows), budgets, strict=True)
    ]
    return SparseIndex.of_heads(k.shape[0], [each[0] for each in chosen], [each[1] for each in chosen])


def attention_sums(
    q_SHD: torch.Tensor, k_KGD: torch.Tensor, request: AttentionRequest, last_rows: int = LAST_ROWS
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each query head the last rows' probabilities summed by column and by distance, [K] and [K], wide.

    Raises:
        ConfigError: last_rows is not positive, or the tables lack an unclamped position.
    """
    if last_rows < 1:
        raise ConfigError(f"{OP}: last_rows is {last_rows}; expected 1 or more")
    rows, length = q_SHD.shape[0], k_KGD.shape[0]
    first = max(rows - last_rows, 0)
    _check_tables(request, first, rows)
    each = Sequences(slice(0, rows), slice(0, length), request.query_start, 0)
    keys_KGD = Rotation(request, each, q_SHD.device).keys(k_KGD.unsqueeze(0))[0]
    shared = q_SHD.shape[1] // k_KGD.shape[1]
    for head in range(q_SHD.shape[1]):
        sums = keys_KGD.new_zeros((2, length), dtype=torch.promote_types(q_SHD.dtype, torch.float32))
        for start in range(first, rows, TILE):
            end = min(start + TILE, rows)
            _add_rows(q_SHD[start:end, head], keys_KGD[:, head // shared], request, start, sums)
        yield sums[0], sums[1]


def _add_rows(
    q_RD: torch.Tensor, keys_KD: torch.Tensor, request: AttentionRequest, start: int, sums: torch.Tensor
) -> None:
    """Add the probabilities of some rows to the sums by column and by distance; `start` is the first row's number."""
    first = start + request.query_start
    last = first + q_RD.shape[0]
    logits_RK = sums.new_full((last - first, last), -torch.inf)
    for group in _groups(request.chunks, first, last):
        rows = slice(group.start - first, group.stop - first)
        for keys, shift in _segments(request.chunks, group):
            query = _turned(q_RD[rows], slice(group.start + shift, group.stop + shift), request, start + rows.start)
            logits_RK[rows, keys] = (query @ keys_KD[keys].t()).to(sums.dtype) * request.scale
    positions = torch.arange(last, device=q_RD.device)
    probabilities = logits_RK.masked_fill_(positions > positions[first:, None], -torch.inf).softmax(-1)
    sums[0, :last] += probabilities.sum(0)
    for row in range(last - first):
        visible = first + row + 1
        sums[1, :visible] += probabilities[row, :visible].flip(0)


def _groups(chunks: ChunkLayout | None, first: int, last: int) -> Iterator[slice]:
    """Yield positions first to last by chunks."""
    while first < last:
        end = last if chunks is None else min((first // chunks.stride + 1) * chunks.stride, last)
        yield slice(first, end)
        first = end


def _segments(chunks: ChunkLayout | None, rows: slice) -> list[tuple[slice, int]]:
    """Keys that rows of one chunk meet, with what makes a row's position the unclamped one towards them."""
    if chunks is None:
        return [(slice(0, rows.stop), 0)]
    own = rows.start // chunks.stride * chunks.stride
    previous = max(own - chunks.stride, 0)
    spans = (
        (slice(0, previous), chunks.chunk_size - own),
        (slice(previous, own), chunks.stride - own),
        (slice(own, rows.stop), -own),
    )
    return [(keys, shift) for keys, shift in spans if keys.start < keys.stop]


def _turned(query_RD: torch.Tensor, positions: slice, request: AttentionRequest, row: int) -> torch.Tensor:
    """Rows of one query head at neighbouring positions, times their logit_scale; computed wide, rounded once."""
    dtype = query_RD.dtype
    if request.tables is not None:
        cos, sin = (table[positions] for table in request.tables)
        query_RD = rotate(query_RD.to(cos.dtype), cos, sin)
    if request.logit_scale is not None:
        query_RD = query_RD * request.logit_scale[row : row + len(query_RD), None]
    return query_RD.to(dtype)


def _check_tables(request: AttentionRequest, first: int, rows: int) -> None:
    """The tables hold every unclamped position of rows `first` to `rows`."""
    if request.tables is None:
        return
    groups = _groups(request.chunks, first + request.query_start, rows + request.query_start)
    positions = [group.stop + shift for group in groups for _, shift in _segments(request.chunks, group)]
    if request.tables[0].shape[0] < max(positions, default=0):
        raise ConfigError(
            f"{OP}: tables have {request.tables[0].shape[0]} positions; expected {max(positions)} or more: columns and "
            "diagonals are scored at positions without a clamp, below 2 * chunk_size - local_size"
        )


def select(
    columns: torch.Tensor, distances: torch.Tensor, budget: HeadBudget, merge_gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns [V], ascending, and intervals of distances [N, 2] with the largest sums.

    The first columns and the nearest distances come before all others, equal sums in their order.

    Args:
        columns: sums by column [K].
        distances: sums by distance [K].
        budget: of the head. At least 30 columns and 50 distances are kept; of exactly 30 columns vLLM makes 130.
        merge_gap: see `intervals`.
    """
    verticals = budget.verticals + 100 if budget.verticals == FORCED_COLUMNS else max(budget.verticals, FORCED_COLUMNS)
    kept = _largest(columns, verticals, FORCED_COLUMNS)
    near = _largest(distances, max(budget.slashes, FEWEST_SLASHES), FORCED_DISTANCES)
    return kept, intervals(near, len(distances), merge_gap)


def _largest(sums: torch.Tensor, count: int, forced: int) -> torch.Tensor:
    """Return the numbers of the largest sums, ascending; the first `forced` of them come before any other."""
    forced = min(forced, count, len(sums))
    order = sums[forced:].sort(descending=True, stable=True).indices[: count - forced] + forced
    return torch.cat([torch.arange(forced, device=sums.device), order]).sort().values
