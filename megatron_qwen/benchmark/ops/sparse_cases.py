"""Sparse prefill of a prompt of which a tenth of the pairs is kept, and how long it takes to choose an index.

Heads have 1 in 131 columns, the nearest 1 in 40 distances, and intervals of 1 in 2048 until a tenth is kept; at
131,072 tokens that is 1000 columns and 64 distances at a time. Operations count kept pairs only, not what else is in
blocks with a kept pair: the rate is below that per kept block.

Shapes: as in `attention_cases.py`.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

import torch

from megatron_qwen import ops
from megatron_qwen.benchmark.ops import attention_cases as attention
from megatron_qwen.benchmark.ops import attention_definition as definition
from megatron_qwen.benchmark.ops.case import OpCase, Sizes, Workload

KEPT = 0.1
_LISTS = ("verticals", "vertical_bounds", "slashes", "slash_bounds")
_BUDGET = {"verticals": 1000, "slashes": 6096}
"""The commonest one of the 7B model."""


@functools.cache
def head_lists(tokens: int, head: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Return the columns and the intervals of distances of a head; the same for the same sizes."""
    choose = random.Random(head)  # noqa: S311
    columns = tuple(sorted(choose.sample(range(tokens), tokens // 131)))
    is_slash = torch.zeros(tokens, dtype=torch.bool)
    is_slash[: -(-tokens // 40)] = True
    width = max(tokens // 2048, 1)
    while _kept_pairs(columns, is_slash) < KEPT * tokens * (tokens + 1) / 2:
        first = choose.randrange(tokens)
        is_slash[first : first + width] = True
    steps = torch.nn.functional.pad(is_slash.int(), (1, 1)).diff()
    firsts, lasts = ((steps == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return columns, tuple(zip(firsts, lasts, strict=True))


def kept_pairs(tokens: int, columns: tuple[int, ...], slashes: tuple[tuple[int, int], ...]) -> int:
    """Return how many pairs of a row and a key of a causal triangle are kept."""
    is_slash = torch.zeros(tokens, dtype=torch.bool)
    for first, last in slashes:
        is_slash[first:last] = True
    return _kept_pairs(columns, is_slash)


def _kept_pairs(columns: tuple[int, ...], is_slash: torch.Tensor) -> int:
    tokens = len(is_slash)
    # A column adds its rows, at distances 0 to tokens - 1 - column, that are in no slash.
    longest = tokens - torch.tensor(columns, dtype=torch.int64)
    unkept_before = torch.nn.functional.pad((~is_slash).cumsum(0), (1, 0))
    return int((tokens - is_slash.nonzero()).sum() + unkept_before[longest].sum())


def _index(sizes: Sizes, device: torch.device) -> ops.SparseIndex:
    lists = [head_lists(sizes["tokens"], head) for head in range(sizes["groups"] * sizes["queries"])]
    columns, slashes = zip(*lists, strict=True)
    return ops.SparseIndex.of_heads(
        sizes["tokens"],
        [torch.tensor(each, dtype=torch.int32, device=device) for each in columns],
        [torch.tensor(each, dtype=torch.int32, device=device).view(-1, 2) for each in slashes],
    )


def _prompt(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    whole = attention._prompt(sizes, dtype, device, seed, is_inference=True)
    index = _index(sizes, device)
    lists = {name: getattr(index, name) for name in _LISTS}
    return replace(whole, others={**whole.others, **lists}, shared=whole.shared | set(_LISTS))


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, **rest: Any) -> torch.Tensor:
    index = ops.SparseIndex(len(k), *(rest[name] for name in _LISTS))
    chunks = ops.ChunkLayout(rest["chunk"], rest["local"])
    return ops.sparse_prefill_attention(q, k, v, index, chunks=chunks, tables=(rest["cos"], rest["sin"]))[0]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, **rest: Any) -> torch.Tensor:
    """The definition for rows at these positions, against all keys."""
    index = ops.SparseIndex(len(k), *(rest[name] for name in _LISTS))
    layout = ops.ChunkLayout(rest["chunk"], rest["local"])
    turn = functools.partial(definition.turned, tables=(rest["cos"], rest["sin"]))
    k = turn(k, torch.arange(len(k), device=k.device) % layout.stride)

    def logits_of(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        kept_HST = torch.stack([index.kept(head, rows, columns) for head in range(index.heads)])
        return definition.variant_logits(q, k, rows, columns, layout=layout, turn=turn).masked_fill(
            ~kept_HST, -torch.inf
        )

    step = max(1, definition.LOGITS // (q.shape[1] * len(k)))
    parts = zip(torch.split(q, step), torch.split(rows.long(), step), strict=True)
    return torch.cat([definition.attend_rows(each, k, v, at, logits_of=logits_of) for each, at in parts])


def _flops(sizes: Sizes, direction: str) -> int:
    """Two products of the kept pairs."""
    del direction
    heads = range(sizes["groups"] * sizes["queries"])
    pairs = sum(kept_pairs(sizes["tokens"], *head_lists(sizes["tokens"], head)) for head in heads)
    return 4 * pairs * sizes["head"]


def _choosing(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    """Tables as long as positions without a clamp need."""
    whole = attention._prompt(sizes, dtype, device, seed, is_inference=True)
    cos, sin = attention._tables(sizes, 2 * sizes["chunk"], device)
    names = {"q", "k", "v", "rows", "cos", "sin", "y"}
    return replace(whole, others={**whole.others, "cos": cos, "sin": sin}, shared=frozenset(names), compared=())


def _choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, **rest: Any) -> torch.Tensor:
    """Return how many columns and distances each head has, [H, 2]: which they are is compared in the tests."""
    chunks = ops.ChunkLayout(rest["chunk"], rest["local"])
    budgets = [ops.HeadBudget(**_BUDGET)] * q.shape[1]
    index = ops.estimate_index(q, k, budgets, chunks=chunks, tables=(rest["cos"], rest["sin"]))
    widths = torch.cat([index.slashes.new_zeros(1), index.slashes.diff(dim=1).flatten().cumsum(0)])
    counts = index.vertical_bounds.diff(), widths[index.slash_bounds].diff()
    return torch.stack(counts, 1).to(q.dtype)


def _counts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, **rest: Any) -> torch.Tensor:
    counts = [min(_BUDGET[name], len(k)) for name in ("verticals", "slashes")]
    return torch.tensor([counts] * q.shape[1], device=q.device).to(q.dtype)


def _choosing_flops(sizes: Sizes, direction: str) -> int:
    """One product of the last 64 rows."""
    del direction
    return 2 * min(64, sizes["tokens"]) * sizes["tokens"] * sizes["groups"] * sizes["queries"] * sizes["head"]


CASES: tuple[OpCase, ...] = (
    attention._prompt_case(
        "sparse_prefill",
        about="sparse prefill of a prompt, a tenth of the pairs kept",
        operation="sparse_prefill_attention",
        workload=_prompt,
        ours=_ours,
        plain=_plain,
        flops=_flops,
        lengths={"cuda": (131_072,), "cpu": (1024,)},
    ),
    attention._prompt_case(
        "sparse_index",
        about="columns and diagonals of all heads from the last 64 rows, by torch on any device",
        operation="sparse_prefill_attention",
        workload=_choosing,
        ours=_choose,
        plain=_counts,
        flops=_choosing_flops,
        bytes_moved=lambda sizes, direction, element: (
            element * sizes["groups"] * sizes["head"] * (sizes["tokens"] + 64 * sizes["queries"])
        ),
        lengths={"cuda": (131_072,), "cpu": (1024,)},
    ),
)
