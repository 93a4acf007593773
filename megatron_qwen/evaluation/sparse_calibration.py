"""Budgets for sparse prefill: how much each head must keep of a text to hold on to its attention.

Sparsity refinement (Qwen2.5-1M, arXiv 2501.15383, algorithm 1): texts are read densely, and wherever sparse prefill
would choose what to keep (each piece of the prompt within a chunk), the budgets of a head grow until the kept keys hold
the wanted share of its attention, the recall exp(lse_sparse - lse_dense), as a mean over the rows. Then all is measured
once more with the budgets found.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.inference.engine import Engine
    from megatron_qwen.inference.sparse_prefill import PromptAttention

VERTICALS, SLASHES = 1000, 6096
"""What most heads of the published files begin and end with."""


@dataclass(frozen=True, kw_only=True)
class HeadCalibration:
    """What was found for one query head.

    Attributes:
        layer: from 0.
        head: from 0.
        verticals: columns to keep.
        slashes: diagonals to keep.
        recall: with these, the mean over all rows of all texts.
        lowest_recall: of the piece of a prompt where it was least, the mean over its rows.
        kept: share of pairs of row and key that are kept of all that causal attention has.
    """

    layer: int
    head: int
    verticals: int
    slashes: int
    recall: float
    lowest_recall: float
    kept: float


def uniform_budgets(num_layers: int, num_heads: int, *, verticals: int, slashes: int) -> ops.SparseAttentionConfig:
    """Return the same budget for every head, to begin with."""
    return ops.SparseAttentionConfig(((ops.HeadBudget(verticals, slashes),) * num_heads,) * num_layers)


def calibrate(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    start: ops.SparseAttentionConfig,
    refinement: ops.Refinement,
    *,
    last_rows: int,
    on_call: Callable[[], None] | None = None,
) -> list[HeadCalibration]:
    """Return what every query head of the model needs, by layer and head; collective, as `Engine.generate`.

    Args:
        engine: attends densely; its pieces (`prefill_chunk_size`) should be those of later use.
        texts: token ids, as long as the prompts to come.
        start: budgets to begin with.
        refinement: recall to reach in every piece, and steps.
        last_rows: see `SparsePrefill`.
        on_call: called after each observation of `Engine.watch`, of which every text has two rounds.

    Raises:
        ConfigError: no text; texts of which the budgets to begin with keep everything; steps by which a head would lose
            columns; or see `Engine.watch`.
    """
    check(texts, start, refinement)
    budgets = _Refined(start, refinement, last_rows)
    _watch(engine, texts, budgets.take, on_call)
    measured = _Measured(budgets.config(), last_rows)
    _watch(engine, texts, measured.take, on_call)
    return _of_all_ranks(measured.heads())


def as_config(heads: Sequence[HeadCalibration]) -> ops.SparseAttentionConfig:
    """Return what `sparse_attention_config.json` holds; the score of a head is its recall."""
    return ops.SparseAttentionConfig(
        tuple(
            tuple(ops.HeadBudget(each.verticals, each.slashes, each.recall) for each in layer)
            for layer in by_layer(heads)
        )
    )


def by_layer(heads: Sequence[HeadCalibration]) -> list[list[HeadCalibration]]:
    """Return the heads of each layer; `heads` as `calibrate` returns them."""
    return [list(layer) for _, layer in itertools.groupby(heads, key=lambda each: each.layer)]


def check(texts: Sequence[Sequence[int]], start: ops.SparseAttentionConfig, refinement: ops.Refinement) -> None:
    """Refuse what `calibrate` refuses, before a model is loaded.

    Raises:
        ConfigError: see there.
    """
    if not texts:
        raise ConfigError("sparse calibration: no text; expected at least one")
    most = min(max(each.verticals, each.slashes) for layer in start.layers for each in layer)
    longest = max(len(text) for text in texts)
    if refinement.vertical_step < 100 and any(each.verticals == 30 for layer in start.layers for each in layer):
        raise ConfigError(
            "sparse calibration: heads begin with 30 columns, of which prefill makes 130, as vLLM does; a vertical "
            f"step of {refinement.vertical_step} would take some away; expected 100 or more, or 31 columns at first"
        )
    if longest <= most:
        raise ConfigError(
            f"sparse calibration: the longest text has {longest:,} tokens, and every head begins with {most:,} columns "
            "or diagonals, which is all of it; give a longer text, or smaller budgets to begin with"
        )


def _watch(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    take: Callable[[PromptAttention], None],
    on_call: Callable[[], None] | None,
) -> None:
    def observe(call: PromptAttention) -> None:
        take(call)
        if on_call:
            on_call()

    for text in texts:
        engine.watch(text, observe)


class _Refined:
    """Budgets of this rank's heads, while they grow."""

    def __init__(self, start: ops.SparseAttentionConfig, refinement: ops.Refinement, last_rows: int) -> None:
        self._layers = [list(layer) for layer in start.layers]
        self._refinement, self._last_rows = refinement, last_rows

    def config(self) -> ops.SparseAttentionConfig:
        return ops.SparseAttentionConfig(tuple(tuple(layer) for layer in self._layers))

    def take(self, call: PromptAttention) -> None:
        for _, part in call.within_chunks():
            found = ops.refined_budgets(
                part.query,
                part.keys,
                part.budgets(self.config()),
                self._refinement,
                last_rows=self._last_rows,
                **part.options,
            )
            self._layers[call.layer][call.first_head : call.first_head + len(found)] = found


@dataclass
class _Sums:
    """Of one head: recall summed over rows, rows, the least mean of a piece, kept pairs and all pairs."""

    recall: float = 0.0
    rows: int = 0
    lowest: float = 1.0
    kept: int = 0
    pairs: int = 0


class _Measured:
    """Recall and kept pairs of this rank's heads under fixed budgets."""

    def __init__(self, budgets: ops.SparseAttentionConfig, last_rows: int) -> None:
        self._budgets, self._last_rows = budgets, last_rows
        self._sums: dict[tuple[int, int], _Sums] = {}

    def take(self, call: PromptAttention) -> None:
        for _, part in call.within_chunks():
            q, k, v = part.query, part.keys, part.values
            index = ops.estimate_index(q, k, part.budgets(self._budgets), last_rows=self._last_rows, **part.options)
            sparse = ops.sparse_prefill_attention(q, k, v, index, **part.options)[1]
            dense = ops.dual_chunk_attention(q[None], k[None], v[None], **part.options)[1][0]
            recalls = ops.attention_recall(sparse, dense).tolist()
            rows, last = q.shape[0], k.shape[0]
            pairs = rows * (2 * last - rows + 1) // 2
            for number, recall in enumerate(recalls):
                sums = self._sums.setdefault((call.layer, call.first_head + number), _Sums())
                sums.recall += recall * rows
                sums.rows += rows
                sums.lowest = min(sums.lowest, recall)
                sums.kept += kept_pairs(index, number, last - rows, last)
                sums.pairs += pairs

    def heads(self) -> list[HeadCalibration]:
        return [
            HeadCalibration(
                layer=layer,
                head=head,
                verticals=self._budgets.layers[layer][head].verticals,
                slashes=self._budgets.layers[layer][head].slashes,
                recall=sums.recall / sums.rows,
                lowest_recall=sums.lowest,
                kept=sums.kept / sums.pairs,
            )
            for (layer, head), sums in self._sums.items()
        ]


def kept_pairs(index: ops.SparseIndex, head: int, first: int, last: int) -> int:
    """Return how many pairs of rows first to last - 1 and keys a head keeps, a key that is twice kept once."""
    verticals, slashes = (each.long() for each in index.of_head(head))
    # Of distances below x, how many lie in slashes: row i keeps below[i + 1] keys by them.
    steps = torch.zeros(last + 2, dtype=torch.int64, device=verticals.device)
    steps[(slashes[:, 0] + 1).clamp(max=last + 1)] += 1
    steps[(slashes[:, 1] + 1).clamp(max=last + 1)] -= 1
    below = steps[: last + 1].cumsum(0).cumsum(0)
    total = int(below[first + 1 : last + 1].sum())
    seen = verticals[verticals < last]
    starts = seen.clamp(min=first)  # rows that a column has: from here to last - 1, those in slashes are counted
    covered = below[last - seen] - below[starts - seen]
    return total + int((last - starts - covered).sum())


def _of_all_ranks(heads: list[HeadCalibration]) -> list[HeadCalibration]:
    """Return the heads of all ranks, each once, by layer and head."""
    parts: list[list[HeadCalibration] | None] = [heads]
    if dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, heads)
    found = {(each.layer, each.head): each for part in parts for each in part or []}
    return [found[place] for place in sorted(found)]
