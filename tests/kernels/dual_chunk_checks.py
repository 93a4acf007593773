"""Checks of `dual_chunk_attention` for any backend, in the manner of op_checks.py; the definition is written anew here.

Shapes: S, K tokens of q and k, H, G heads of queries and keys, D head size, M pairs of a row and a key.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import op_checks
import torch

from megatron_qwen import ops
from megatron_qwen.kernels.dual_chunk_attention import reference
from megatron_qwen.kernels.dual_chunk_attention.arguments import checked_request
from megatron_qwen.kernels.dual_chunk_attention.request import AttentionRequest
from megatron_qwen.testing.compare import compare, compare_with_fp64, fp64_bound, largest_finite
from megatron_qwen.testing.poison import poisoned_outputs, surrounded


def tables(length: int, dtype: torch.dtype, rotated: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotated / 2] in fp32, or fp64 for fp64."""
    frequencies = 1e4 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def position_pair(chunks: ops.ChunkLayout | None, row: int, column: int) -> tuple[int, int]:
    """Positions of query and key of one pair, in words of the papers and the released code."""
    if chunks is None:
        return row, column
    length = chunks.chunk_size - chunks.local_size
    cap = chunks.chunk_size if chunks.cap is None else chunks.cap
    behind = row // length - column // length
    if behind == 0:
        return row % length, column % length
    if behind == 1:
        return min(row % length + length, cap), column % length
    return min(2 * length - 1, cap), column % length


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chunks: ops.ChunkLayout | None,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    *,
    logit_scale: torch.Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [S, H, D], k and v [K, G, D]: every pair's logit by itself, in the dtype of q but for softmax and rotation."""
    rows, columns = q.shape[0], k.shape[0]
    start = key_start + columns - rows if query_start is None else query_start
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    pairs = [(i, j) for i in range(rows) for j in range(columns) if j + key_start <= i + start]
    logits = q.new_full((rows, columns, q.shape[1]), -torch.inf, dtype=wide)
    i, j = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    positions = [position_pair(chunks, a + start, b + key_start) for a, b in pairs]
    of_q, of_k = torch.tensor(positions, dtype=torch.int64).view(-1, 2).unbind(1)
    products = (rotated(q[i], cos_sin, of_q) * rotated(k[j], cos_sin, of_k)).sum(-1).to(wide)
    logits = logits.index_put((i, j), products * q.shape[2] ** -0.5)
    if logit_scale is not None:
        logits = logits * logit_scale[:, None, None]
    lse = logits.logsumexp(1)
    weights = (logits - torch.where(lse.isfinite(), lse, 0.0)[:, None]).exp().to(q.dtype)
    return torch.einsum("skh,khd->shd", weights, v), lse.t()


def rotated(heads_MHD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Each of the M heads at its own position; computed wide, rounded once."""
    dtype = torch.promote_types(heads_MHD.dtype, torch.float32)
    cos, sin = (table.to(dtype)[at][:, None] for table in cos_sin)
    half = cos.shape[-1]
    first, second, rest = heads_MHD.to(dtype).split([half, half, heads_MHD.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1).to(heads_MHD.dtype)


RELEASED = ops.ChunkLayout.released(8, 3)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A call of the operation on random numbers.

    Attributes:
        lengths: tokens of the sequences; packed where there are several or `is_packed`.
        heads: of queries and of keys.
        size: of a head.
        chunks: None for plain attention.
        with_temperature: gives every row its own logit_scale.
        keys_rotated: keys are taken as rotated.
        new_rows: queries at the end of each sequence; all by default.
        batch: sequences of the batch form.
    """

    lengths: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    size: int = 8
    chunks: ops.ChunkLayout | None = RELEASED
    with_temperature: bool = False
    keys_rotated: bool = False
    new_rows: tuple[int, ...] | None = None
    batch: int = 0

    @property
    def rows(self) -> tuple[int, ...]:
        """Queries of each sequence."""
        return self.lengths if self.new_rows is None else self.new_rows

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """q, k, v and a gradient of the output."""
        rows, columns = sum(self.rows), sum(self.lengths)
        lead = (self.batch,) if self.batch else ()
        shapes = [(rows, self.heads[0]), (columns, self.heads[1]), (columns, self.heads[1]), (rows, self.heads[0])]
        return [
            op_checks.random((*lead, *shape, self.size), dtype, seed=seed, scale=1.5 if seed < 2 else 1.0)
            for seed, shape in enumerate(shapes)
        ]

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        rows, longest = sum(self.rows), max(self.lengths, default=0)
        last = longest - 1 if self.chunks is None else self.chunks.inter_position
        wide = torch.promote_types(dtype, torch.float32)
        factors = 1.0 + 0.4 * torch.rand(rows, generator=torch.Generator().manual_seed(9))
        options = {
            "chunks": self.chunks,
            "tables": tables(max(last, 0) + 1, dtype, self.size // 2 * 2),
            "keys_rotated": self.keys_rotated,
            "logit_scale": factors.to(wide) if self.with_temperature else None,
        }
        if self.batch:
            return options
        bounds = {"cu_seqlens_q": self.rows, "cu_seqlens_k": self.lengths}
        cumulated = {name: torch.tensor([0, *itertools.accumulate(each)]) for name, each in bounds.items()}
        return {**options, **cumulated}


def definition(example: Example, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and lse by kernels/dual_chunk_attention/reference.py, in the dtype of q."""
    options = {**ABSENT, **example.options(q.dtype)}
    output, lse = reference.forward(q, k, v, checked_request(q, k, v, **options))
    # No sequence with tokens, no graph: what autograd needs to find gradients of 0.
    return output + 0.0 * (q.sum() + k.sum() + v.sum()), lse


ABSENT: dict[str, Any] = {
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
    "query_start": None,
    "key_start": 0,
    "softmax_scale": None,
    "deterministic": True,
}


ORDERS = 8
"""In so many orders of summation plain torch computes what it is compared with; see `recomputed`."""


def roundings_allowed(example: Example, dtype: torch.dtype) -> float:
    """Roundings of the largest number, beside twice autograd's error in plain torch: no gradient may be further off.

    Only results beyond the rule itself get here, and up to what `recomputed` reaches.
    """
    if dtype == torch.float32:
        return 24.0
    return 10.0 if max(example.lengths) < 8 else 1.0


def recomputed(example: Example, inputs: list[torch.Tensor], grad: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Output and gradients by plain torch where backward computes P = exp(x - lse) from logits x of its own.

    An operation that keeps one number per row has to. Its two passes need not add up products in the same order (here
    the numbers of a head are shuffled for each), so x of backward is not the x that lse is of: off by n roundings, dV
    and dS are off by as many of P, where autograd has kept P and its own D = sum P dP. In fp32, |x| up to 16, that was
    1.2 times autograd's error in the mean, and 10 times at most, where few numbers hit the result by luck.
    """
    generator = torch.Generator().manual_seed(seed)
    half = example.options(grad.dtype)["tables"][0].shape[1]
    (given, order), (again, other) = (_shuffled(example, [*inputs, grad], half, generator) for _ in range(2))
    output, lse = reference.forward(*given[:3], _request(example, given, order[:half]))
    output = torch.empty_like(output).index_copy_(-1, order, output)
    grads = reference.backward(again[3], *again[:3], output[..., other], lse, _request(example, again, other[:half]))
    return [output, *(torch.empty_like(each).index_copy_(-1, other, each) for each in grads)]


def _shuffled(
    example: Example, heads: list[torch.Tensor], half: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Heads with the numbers of each in a random order that keeps the pairs which are rotated; and that order."""
    pairs = torch.randperm(half, generator=generator)
    order = torch.cat([pairs, pairs + half, torch.arange(2 * half, example.size)])
    return [each[..., order].contiguous() for each in heads], order


def _request(example: Example, heads: list[torch.Tensor], pairs: torch.Tensor) -> AttentionRequest:
    options = {**ABSENT, **example.options(heads[0].dtype)}
    tables = tuple(table[:, pairs].contiguous() for table in options["tables"])
    return checked_request(*heads[:3], **{**options, "tables": tables})


def check(example: Example, dtype: torch.dtype, backend: str) -> None:
    """Output, gradients and lse by the fp64 rule; gradients beyond it by that of plain torch which recomputes."""
    *inputs, grad = example.inputs(dtype)
    plain, exact = (
        op_checks.results(lambda *heads: definition(example, *heads)[0], [x.to(wide) for x in inputs], [grad.to(wide)])
        for wide in (dtype, torch.float64)
    )
    with ops.use_backend(backend), poisoned_outputs() as memory:
        heads = [surrounded(each) for each in inputs]
        mine = op_checks.results(
            lambda *heads: ops.dual_chunk_attention(*heads, **example.options(dtype))[0], heads, [grad]
        )
        lse = ops.dual_chunk_attention(*heads, **example.options(dtype))[1]
    assert memory.count
    others: list[list[torch.Tensor]] = []
    for index, name in enumerate(("output", "dq", "dk", "dv")):
        assert (mine[index].dtype, mine[index].shape) == (dtype, plain[index].shape)
        if not mine[index].numel():
            continue
        result = compare_with_fp64(mine[index], plain[index], exact[index])
        if not result.ok and index and not result.mismatched:
            others = others or [recomputed(example, inputs, grad, seed) for seed in range(ORDERS)]
            largest = max(compare(each[index], exact[index], 0.0).error for each in others)
            bound = fp64_bound(largest, largest_finite(exact[index]), dtype)
            most = compare_with_fp64(
                mine[index], plain[index], exact[index], roundings=roundings_allowed(example, dtype)
            )
            result = compare(mine[index], exact[index], min(bound, most.bound))
        assert result.ok, f"{backend} {name} of {example}: {result}"
    plain, exact = (definition(example, *(each.to(wide) for each in inputs))[1] for wide in (dtype, torch.float64))
    if lse.numel():
        # The lse is fp32, but of logits of heads that are rounded to dtype.
        result = compare(lse, exact, fp64_bound(compare(plain, exact, 0.0).error, largest_finite(exact), dtype))
        assert result.ok, f"{backend} lse of {example}: {result}"
