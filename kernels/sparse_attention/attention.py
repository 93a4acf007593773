"""Attention over the pairs that an index keeps, with the positions of Dual Chunk Attention; in plain torch, any device.

Rows are taken in tiles of one chunk. For a tile and head the keys are of two kinds: those that every row keeps, because
their distances to all rows lie in one slash, and those that some rows keep (edges of slashes, verticals). Both are
gathered for each of the three position rules; the first need no mask and take the kernels of dense attention
(`pieces.py`), the second are products with a mask. The parts are merged exactly by their log-sum-exp. A key is gathered
once, be it a vertical inside of a slash, and a rule whose keys are all left out is no part at all.

Shapes: S, K tokens of q and k, R rows of a tile, H query heads, G key heads, D head size, N slashes, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..dual_chunk_attention import pieces
from ..dual_chunk_attention.merge import merge_attention
from ..dual_chunk_attention.request import AttentionRequest, Sequences
from ..dual_chunk_attention.rotation import Rotation
from ..dual_chunk_attention.segments import Run, runs
from .index import SparseIndex

TILE = 64
"""Rows of a tile, as in vLLM's kernel. For a slash of one distance they gather 64 keys, of which each row keeps one."""
MASKED_KEYS = 16384
"""Keys of one masked product, 4 MiB of logits."""


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: SparseIndex, request: AttentionRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [S, H, D] and lse [H, S] as `sparse_prefill_attention` does; q [S, H, D], k and v [K, G, D]."""
    output = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    each = Sequences(slice(0, q.shape[0]), slice(0, k.shape[0]), request.query_start, 0)
    rotation = Rotation(request, each, q.device)
    keys_GKD, values_GKD = rotation.keys(k.unsqueeze(0))[0].transpose(0, 1), v.transpose(0, 1)
    shared = q.shape[1] // k.shape[1]
    heads = [_Head(index, head, q.device) for head in range(q.shape[1])]
    for run in runs(request.chunks, request.query_start, q.shape[0], 0, k.shape[0], TILE):
        rows = slice(run.first_row, run.last_row)
        variants = {piece.variant for piece in run.pieces}
        queries = {each: rotation.queries(q.unsqueeze(0), rows.start, rows.stop, each)[0] for each in variants}
        for number, head in enumerate(heads):
            of_head = {variant: rotated[:, number] for variant, rotated in queries.items()}
            keys_values = keys_GKD[number // shared], values_GKD[number // shared]
            output[rows, number], lse[number, rows] = _attend_tile(run, request, head, of_head, keys_values)
    return output, lse


class _Head:
    """The index of one head, with one flag per column and per distance: K bytes each, for masks."""

    def __init__(self, index: SparseIndex, head: int, device: torch.device) -> None:
        verticals, slashes = index.of_head(head)
        self.verticals, self.slashes = verticals.long(), slashes.long()
        self.is_vertical = torch.zeros(index.length, dtype=torch.bool, device=device)
        self.is_vertical[self.verticals] = True
        self.is_slash = torch.zeros(index.length, dtype=torch.bool, device=device)
        self.is_slash[_expanded(self.slashes[:, 0], self.slashes[:, 1])] = True

    def kept(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """As `SparseIndex.kept`, by one look-up per pair."""
        distances = rows[:, None] - columns[None, :]
        return (distances >= 0) & (self.is_vertical[columns] | self.is_slash[distances.clamp(min=0)])


@dataclass(frozen=True)
class TileColumns:
    """The keys of a tile of rows; no key is in both.

    Attributes:
        whole: int64 [C], kept by every row.
        partial: int64 [C], that a row may keep or not.
    """

    whole: torch.Tensor
    partial: torch.Tensor


def tile_columns(verticals: torch.Tensor, slashes: torch.Tensor, first: int, last: int) -> TileColumns:
    """Return the keys that rows at positions first to last - 1 keep by the verticals [V] and slashes [N, 2] of a head.

    Row i meets distances [a, b) in keys [i - b + 1, i - a + 1): all rows in [last - b, first - a + 1), any row in
    [first - b + 1, last - a). Longer distances are earlier keys, so a slash's range ends where that of the slash before
    begins.
    """
    near, far = slashes.unbind(1)
    starts = (first - far + 1).clamp(min=0)
    before = torch.cat([starts.new_full((1,), last), starts[:-1]])
    ends = torch.minimum(last - near, before).clamp(min=0)
    ends = torch.maximum(ends, starts)
    whole_starts = (last - far).clamp(min=0)
    whole_ends = (first - near + 1).clamp(min=0)
    has_whole = whole_ends > whole_starts
    whole_starts, whole_ends = (torch.where(has_whole, each, ends) for each in (whole_starts, whole_ends))
    edges = _expanded(torch.cat([starts, whole_ends]), torch.cat([whole_starts, ends]))
    # Ranges descend: the one that could hold a column is the first that starts at or before it.
    verticals = verticals[verticals < last]
    if len(starts) and len(verticals):
        of_range = torch.searchsorted(-starts, -verticals)
        is_inside = (of_range < len(starts)) & (verticals < torch.cat([ends, ends.new_zeros(1)])[of_range])
        verticals = verticals[~is_inside]
    return TileColumns(_expanded(whole_starts, whole_ends), torch.cat([edges, verticals]))


def _expanded(starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """All numbers of ranges [starts, ends), one range after the other."""
    counts = ends - starts
    before = counts.cumsum(0) - counts
    numbers = (starts - before).repeat_interleave(counts)
    return numbers + torch.arange(len(numbers), device=numbers.device)


def _attend_tile(
    run: Run,
    request: AttentionRequest,
    head: _Head,
    queries: dict[int, torch.Tensor],
    keys_values: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [R, D] and lse [R] of one head; queries [R, D] by position rule, keys and values [K, D]."""
    first, last = (row + request.query_start for row in (run.first_row, run.last_row))
    rows = torch.arange(first, last, device=keys_values[0].device)
    columns = tile_columns(head.verticals, head.slashes, first, last)
    keys, values = keys_values
    parts = []
    # The pieces of a run lie behind one another: those of one rule are a range of keys.
    for variant, query in queries.items():
        of_rule = [piece for piece in run.pieces if piece.variant == variant]
        lower, upper = of_rule[0].first_key, of_rule[-1].last_key
        whole, partial = (each[(each >= lower) & (each < upper)] for each in (columns.whole, columns.partial))
        if len(whole):
            parts.append(_attend_all(query, keys[whole], values[whole], request.scale))
        for start in range(0, len(partial), MASKED_KEYS):
            some = partial[start : start + MASKED_KEYS]
            parts.append(_attend_kept(query, keys[some], values[some], request.scale, head.kept(rows, some)))
    return _merged(queries, parts)


def _merged(
    queries: dict[int, torch.Tensor], parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [R, D] and lse [R] over all parts; 0 and -inf without any."""
    if not parts:
        like = next(iter(queries.values()))
        wide = torch.promote_types(like.dtype, torch.float32)
        return like.new_zeros(like.shape), like.new_full(like.shape[:1], -torch.inf, dtype=wide)
    outputs, lses = zip(*parts, strict=True)
    output, lse = merge_attention([each.unsqueeze(1) for each in outputs], [each.unsqueeze(0) for each in lses])
    return output[:, 0], lse[0]


def _attend_all(
    q_RD: torch.Tensor, k_CD: torch.Tensor, v_CD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row to every key."""
    output, lse = pieces.attend(q_RD[None, :, None], k_CD[None, :, None], v_CD[None, :, None], scale, False)
    return output[0, :, 0], lse[0, 0]


def _attend_kept(
    q_RD: torch.Tensor, k_CD: torch.Tensor, v_CD: torch.Tensor, scale: float, kept_RC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the keys a row keeps; 0 and -inf for a row that keeps none."""
    wide = torch.promote_types(q_RD.dtype, torch.float32)
    # Products of bf16 would be rounded to bf16: of a trained head's logits, of 100 and more, by halves.
    logits = (q_RD.to(wide) @ k_CD.to(wide).t() * scale).masked_fill(~kept_RC, -torch.inf)
    lse = logits.logsumexp(-1)
    probabilities = logits.softmax(-1).masked_fill(lse.unsqueeze(-1) == -torch.inf, 0.0)
    return probabilities.to(q_RD.dtype) @ v_CD, lse
