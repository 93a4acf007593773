"""The definition of sparse attention, written anew for tests: every pair by itself.

Shapes: S, K tokens of q and k, H, G heads of queries and keys, D head size.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import dual_chunk_checks as checks
import op_checks
import torch

from megatron_qwen import ops
from megatron_qwen.kernels.sparse_attention.index import intervals

HEADS = 4, 2
SIZE = 8


def inputs(rows: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q [S, H, D], k and v [K, G, D]."""
    shapes = (rows, HEADS[0]), (length, HEADS[1]), (length, HEADS[1])
    return [op_checks.random((*shape, SIZE), dtype, seed=seed, scale=1.5) for seed, shape in enumerate(shapes)]


def options(chunks: ops.ChunkLayout | None, rows: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    positions = length if chunks is None else 2 * chunks.chunk_size
    factors = 1.0 + 0.4 * torch.rand(rows, generator=torch.Generator().manual_seed(9))
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "chunks": chunks,
        "tables": checks.tables(max(positions, 1), dtype, SIZE),
        "logit_scale": factors.to(wide),
    }


Lists = list[tuple[set[int], set[int]]]
"""Columns and distances of every head."""


def random_lists(length: int, seed: int) -> Lists:
    """From next to nothing to nearly all of both, in runs and by ones."""
    choose = random.Random(seed)
    lists = []
    for _ in range(HEADS[0]):
        columns = {j for j in range(length) if choose.random() < choose.choice((0.0, 0.05, 0.3, 0.9))}
        distances = set()
        for _ in range(choose.randrange(5)):
            first = choose.randrange(length + 1)
            distances |= set(range(first, min(first + choose.choice((1, 2, 5, 30)), length)))
        lists.append((columns, distances))
    return lists


def index_of(lists: Lists, length: int) -> ops.SparseIndex:
    columns = [torch.tensor(sorted(each), dtype=torch.int64) for each, _ in lists]
    distances = [torch.tensor(sorted(each), dtype=torch.int64) for _, each in lists]
    merged = [intervals(each, length) for each in distances]
    return ops.SparseIndex.of_heads(length, columns, merged)


def mask(lists: Lists, rows: int, length: int) -> torch.Tensor:
    """Kept pairs [H, S, K], by the words of the definition."""
    start = length - rows
    pairs = [
        [[j <= i and (j in columns or i - j in distances) for j in range(length)] for i in range(start, length)]
        for columns, distances in lists
    ]
    return torch.tensor(pairs, dtype=torch.bool).view(len(lists), rows, length)


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_HSK: torch.Tensor, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [S, H, D] and lse [H, S] with all logits at once, those of pairs that are not kept -inf."""
    rows, length = q.shape[0], k.shape[0]
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    i, j = torch.cartesian_prod(torch.arange(rows), torch.arange(length)).unbind(1)
    pairs = itertools.product(range(length - rows, length), range(length))
    positions = [checks.position_pair(given["chunks"], *pair) for pair in pairs]
    of_q, of_k = torch.tensor(positions).clamp(min=0).unbind(1)
    cos_sin = tuple(each.to(torch.promote_types(q.dtype, torch.float32)) for each in given["tables"])
    logits = (checks.rotated(q[i], cos_sin, of_q) * checks.rotated(k[j], cos_sin, of_k)).sum(-1)
    logits = logits.view(rows, length, -1).permute(2, 0, 1).to(cos_sin[0].dtype) * SIZE**-0.5
    logits = (logits * given["logit_scale"][:, None]).masked_fill(~kept_HSK, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("hsk,khd->shd", weights.to(q.dtype), v), lse
