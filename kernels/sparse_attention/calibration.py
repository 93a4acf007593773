"""Sparsity refinement (Qwen2.5-1M, arXiv 2501.15383, algorithm 1): wider budgets for heads that lose attention.

recall = exp(lse_sparse - lse_dense) is the share of a row's attention that the kept keys hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError
from ..dual_chunk_attention import ChunkLayout, dual_chunk_attention
from .arguments import checked_sequence
from .configuration import HeadBudget
from .estimation import LAST_ROWS, attention_sums, select
from .index import SparseIndex
from .op import sparse_prefill_attention

STEP = 2048
"""What the published budgets grow by: (1000, 6096), (3048, 8144), (5096, 10192), ..."""


def attention_recall(lse_sparse: torch.Tensor, lse_dense: torch.Tensor) -> torch.Tensor:
    """Return the recall of each head, [H], the mean over rows that see any key; of lse [H, S].

    Raises:
        ConfigError: the shapes differ, or no row sees a key.
    """
    if lse_sparse.shape != lse_dense.shape or lse_dense.dim() != 2:
        raise ConfigError(
            f"attention_recall: lse {tuple(lse_sparse.shape)} and {tuple(lse_dense.shape)}; expected [heads, rows] "
            "of both"
        )
    sees = lse_dense != -torch.inf
    if not bool(sees.any(-1).all()) or not lse_dense.numel():
        raise ConfigError("attention_recall: a head without a row that sees a key; expected one or more")
    # A sum over fewer keys, rounded, may come out a little above that over all.
    shares = (lse_sparse - lse_dense.masked_fill(~sees, 0.0)).exp().clamp(max=1.0)
    return shares.masked_fill(~sees, 0.0).sum(-1) / sees.sum(-1)


@dataclass(frozen=True)
class Refinement:
    """How budgets are widened.

    Attributes:
        threshold: recall to reach; the report does not publish its own.
        vertical_step: columns added at a time.
        slash_step: diagonals added at a time.

    Raises:
        ConfigError: threshold outside of (0, 1), or a step is not positive.
    """

    threshold: float
    vertical_step: int = STEP
    slash_step: int = STEP

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"sparse attention: threshold is {self.threshold}; expected above 0 and below 1")
        if min(self.vertical_step, self.slash_step) < 1:
            raise ConfigError(
                f"sparse attention: vertical_step is {self.vertical_step}, slash_step {self.slash_step}; expected 1 or "
                "more of both"
            )


def refined_budgets(
    q: torch.Tensor,
    k: torch.Tensor,
    budgets: Sequence[HeadBudget],
    refinement: Refinement,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool = False,
    softmax_scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
    last_rows: int = LAST_ROWS,
    merge_gap: int = 0,
) -> tuple[HeadBudget, ...]:
    """Return the budgets of one layer, widened head by head until the recall of these rows reaches the threshold.

    Columns and diagonals grow together, by their steps, until then or until one of them is all there is (recall 1). The
    score of every budget returned is its recall. The result goes into `SparseAttentionConfig`; over several calibration
    sequences, hand the budgets of one to the next.

    Args:
        q: [S, H, D] of a calibration sequence; recall is the mean over these rows.
        k: [K, G, D].
        budgets: to begin with, one per query head.
        refinement: threshold and steps.
        chunks: as in `estimate_index`, like all that follow.
        tables: as there.
        keys_rotated: as there.
        softmax_scale: as there.
        logit_scale: as there.
        last_rows: as there.
        merge_gap: as there.

    Raises:
        ConfigError: an argument does not fit.
    """
    options: dict[str, Any] = {"chunks": chunks, "tables": tables, "keys_rotated": keys_rotated}
    options |= {"softmax_scale": softmax_scale, "logit_scale": logit_scale}
    request = checked_sequence(q, k, k, **options)
    if len(budgets) != q.shape[1]:
        raise ConfigError(f"sparse attention: {len(budgets)} budgets; expected {q.shape[1]}, one per query head")
    batch = (each.unsqueeze(0) for each in (q, k, k))
    dense = dual_chunk_attention(*batch, **options)[1][0]
    shared, length = q.shape[1] // k.shape[1], k.shape[0]
    refined = []
    for head, (sums, budget) in enumerate(zip(attention_sums(q, k, request, last_rows), budgets, strict=True)):
        queries, keys = q[:, head : head + 1], k[:, head // shared : head // shared + 1]
        while True:
            verticals, slashes = select(*sums, budget, merge_gap)
            index = SparseIndex.of_heads(length, [verticals], [slashes])
            lse = sparse_prefill_attention(queries, keys, keys, index, **options)[1]
            recall = float(attention_recall(lse, dense[head : head + 1]))
            if recall >= refinement.threshold or max(budget.verticals, budget.slashes) >= length:
                break
            budget = HeadBudget(budget.verticals + refinement.vertical_step, budget.slashes + refinement.slash_step)
        refined.append(HeadBudget(budget.verticals, budget.slashes, recall))
    return tuple(refined)
