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
from .index import SparseIndex, on_device

LAST_ROWS = 64
"""Rows that are scored: `sparse_attention_last_q`."""
FORCED_COLUMNS = 30
"""The first so many keys are always kept."""
FORCED_DISTANCES = 100
"""The nearest so many keys of every row are always kept, as far as the budget of slashes goes."""
FEWEST_SLASHES = 50
TILE = 16
"""Rows whose logits are held for as many heads as LOGITS allows, and at least one: 64 MiB over a million keys."""
LOGITS = 1 << 25
"""128 MiB, so two groups of heads for 28 over 131,072 keys."""


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

    On a GPU nothing waits for the device, and the number of launches does not depend on that of rows or of keys, and on
    that of heads only where LOGITS makes several groups of them. Memory beside the index: rotated keys (unless
    keys_rotated), and of a group 2 K numbers of fp32 per head and some copies of TILE rows of logits.

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
    wanted = [[_columns(each) for each in budgets], [max(each.slashes, FEWEST_SLASHES) for each in budgets]]
    counts = [[min(each, k.shape[0]) for each in numbers] for numbers in wanted]
    chosen: list[list[torch.Tensor]] = [[], []]
    for heads, sums in _sums_of_heads(q, k, request, last_rows):
        for kind, forced in enumerate((FORCED_COLUMNS, FORCED_DISTANCES)):
            chosen[kind].append(_largest(sums[kind], counts[kind][heads], forced))
    columns, distances = (torch.cat(each) for each in chosen)
    return SparseIndex.of_numbers(k.shape[0], columns, distances, counts[0], counts[1], merge_gap)


def attention_sums(
    q_SHD: torch.Tensor, k_KGD: torch.Tensor, request: AttentionRequest, last_rows: int = LAST_ROWS
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each query head the last rows' probabilities summed by column and by distance, [K] and [K], wide.

    Raises:
        ConfigError: last_rows is not positive, or the tables lack an unclamped position.
    """
    for _, sums in _sums_of_heads(q_SHD, k_KGD, request, last_rows):
        yield from zip(*sums, strict=True)


def _sums_of_heads(
    q_SHD: torch.Tensor, k_KGD: torch.Tensor, request: AttentionRequest, last_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield groups of query heads with their sums by column and by distance, [2, heads, K]."""
    if last_rows < 1:
        raise ConfigError(f"{OP}: last_rows is {last_rows}; expected 1 or more")
    rows, length = q_SHD.shape[0], k_KGD.shape[0]
    first = max(rows - last_rows, 0)
    _check_tables(request, first, rows)
    each = Sequences(slice(0, rows), slice(0, length), request.query_start, 0)
    keys_GKD = Rotation(request, each, q_SHD.device).keys(k_KGD.unsqueeze(0))[0].transpose(0, 1)
    most = max(LOGITS // (TILE * max(length, 1)), 1)
    for heads, groups in _groups_of_heads(q_SHD.shape[1], k_KGD.shape[1], most):
        wide = torch.promote_types(q_SHD.dtype, torch.float32)
        sums = keys_GKD.new_zeros((2, heads.stop - heads.start, length), dtype=wide)
        for start in range(first, rows, TILE):
            end = min(start + TILE, rows)
            _add_rows(q_SHD[start:end, heads], keys_GKD[groups], request, start, sums)
        yield heads, sums


def _groups_of_heads(heads: int, groups: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield query heads, at most so many at once, with their key heads: all of several, or some of one."""
    shared = heads // groups
    several = max(most // shared, 1)
    for first in range(0, groups, several):
        last = min(first + several, groups)
        step = (last - first) * shared if most >= shared else most
        for head in range(first * shared, last * shared, step):
            yield slice(head, min(head + step, last * shared)), slice(first, last)


def _add_rows(
    q_RHD: torch.Tensor, keys_GKD: torch.Tensor, request: AttentionRequest, start: int, sums_2HK: torch.Tensor
) -> None:
    """Add the probabilities of some rows to the sums by column and by distance; `start` is the first row's number."""
    rows, heads = q_RHD.shape[:2]
    first = start + request.query_start
    last, width = first + rows, first + 2 * rows - 1
    # As many columns before the keys as make a diagonal of every distance.
    padded_HRW = sums_2HK.new_full((heads, rows, width), -torch.inf)
    logits_HRK = padded_HRW[:, :, rows - 1 :]
    for group in _groups(request.chunks, first, last):
        of_group = slice(group.start - first, group.stop - first)
        for keys, shift in _segments(request.chunks, group):
            positions = slice(group.start + shift, group.stop + shift)
            queries_RHD = _turned(q_RHD[of_group], positions, request, start + of_group.start)
            queries = queries_RHD.transpose(0, 1).reshape(len(keys_GKD), -1, q_RHD.shape[2])
            products = queries @ keys_GKD[:, keys].transpose(1, 2)
            logits = products.view(heads, -1, products.shape[-1]).to(sums_2HK.dtype)
            logits_HRK[:, of_group, keys] = logits.mul_(request.scale)
    row = torch.arange(rows, device=q_RHD.device)
    logits_HRK[:, :, first:].masked_fill_(row > row[:, None], -torch.inf)
    padded_HRW = padded_HRW.softmax(-1)
    sums_2HK[0, :, :last] += padded_HRW[:, :, rows - 1 :].sum(1)
    # Row r has distance d in column last - 1 - d + r: one number and one row on is the next of the diagonal.
    diagonals_HRK = padded_HRW.as_strided((heads, rows, last), (rows * width, width + 1, 1))
    sums_2HK[1, :, :last] += diagonals_HRK.sum(1).flip(-1)


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


def _turned(query_RHD: torch.Tensor, positions: slice, request: AttentionRequest, row: int) -> torch.Tensor:
    """Rows of queries at neighbouring positions, times their logit_scale; computed wide, rounded once."""
    dtype = query_RHD.dtype
    if request.tables is not None:
        cos, sin = (table[positions].unsqueeze(1) for table in request.tables)
        query_RHD = rotate(query_RHD.to(cos.dtype), cos, sin)
    if request.logit_scale is not None:
        query_RHD = query_RHD * request.logit_scale[row : row + len(query_RHD), None, None]
    return query_RHD.to(dtype)


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
    length = len(distances)
    counts = [min(each, length) for each in (_columns(budget), max(budget.slashes, FEWEST_SLASHES))]
    kept = _largest(columns.unsqueeze(0), counts[:1], FORCED_COLUMNS)
    near = _largest(distances.unsqueeze(0), counts[1:], FORCED_DISTANCES)
    return kept, SparseIndex.of_numbers(length, kept, near, counts[:1], counts[1:], merge_gap).of_head(0)[1]


def _columns(budget: HeadBudget) -> int:
    return budget.verticals + 100 if budget.verticals == FORCED_COLUMNS else max(budget.verticals, FORCED_COLUMNS)


def _largest(sums_HK: torch.Tensor, counts: Sequence[int], forced: int) -> torch.Tensor:
    """Return the numbers of so many largest sums of each head, ascending, one head after the other.

    The first `forced` come before any other, equal sums in their order. By a threshold instead of a sort, which of 28
    heads and 131,072 keys would take more than all the rest of the index.
    """
    heads, length = sums_HK.shape
    total = sum(counts)
    if not total:
        return torch.zeros(0, dtype=torch.int64, device=sums_HK.device)
    sums_HK = sums_HK.clone()
    sums_HK[:, :forced] = torch.inf
    best = sums_HK.topk(max(counts), -1).values
    threshold = torch.stack([of_head[count - 1] for of_head, count in zip(best, counts, strict=True)]).unsqueeze(1)
    is_above, is_equal = sums_HK > threshold, sums_HK == threshold
    left = on_device(counts, sums_HK.device).unsqueeze(1) - is_above.sum(1, keepdim=True)
    is_kept = (is_above | (is_equal & (is_equal.cumsum(1) <= left))).flatten()
    place = torch.where(is_kept, is_kept.cumsum(0) - 1, total).clamp(max=total)
    number = torch.arange(length, device=sums_HK.device).repeat(heads)
    # Zeros: of sums that are no numbers nothing would be written, and the lists must not lead outside of the keys.
    return number.new_zeros(total + 1).scatter_(0, place, number)[:total]
