"""What attention is, in plain torch: all logits of all three rotations, a few rows at a time; fp64 heads make it exact.

Shapes: T tokens of one sequence, S of them as rows, G key heads, M query heads for each, H = G M, D head size, B
sequences and N tokens of a page in decoding. q [T, H, D], k, v [T, G, D]; decoding: q [B, H, D], pages [P, N, G, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function

Tables = tuple[torch.Tensor, torch.Tensor]
PAGE = 16
"""Tokens of a page."""
LOGITS = 2**26
"""Logits that are held at once, of one rotation."""


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, **rest: Any) -> torch.Tensor:
    """The definition for rows at these positions, against all keys."""
    return _in_pieces(q, k, v, rows, attend_rows, **rest)


def recomputing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, *, seed: int, **rest: Any
) -> torch.Tensor:
    """The definition with the gradient of an operation that keeps one number per row, in fp32.

    Such a one computes logits again, and not with the same roundings: here the numbers of a head are in another order.
    See docs/kernels.md, "How exact".
    """
    order = torch.randperm(q.shape[-1], generator=torch.Generator().manual_seed(seed)).to(q.device)
    return _in_pieces(q, k, v, rows, functools.partial(_attend_recomputing, order=order), **rest)


def _in_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, attend: Function, **rest: Any
) -> torch.Tensor:
    logits_of: Function = plain_logits
    if rest:
        layout = ops.ChunkLayout(rest["chunk"], rest["local"])
        turn = functools.partial(turned, tables=(rest["cos"], rest["sin"]))
        k = turn(k, torch.arange(len(k), device=k.device) % layout.stride)
        logits_of = functools.partial(variant_logits, layout=layout, turn=turn)
    # The gradients of keys from all pieces add up in fp32: in bf16 those sums would be the largest error of all, and
    # ours may make twice the error that is found here.
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(wide), v.to(wide)
    run: Function = functools.partial(attend, logits_of=logits_of)
    if torch.is_grad_enabled():
        run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    step = max(1, LOGITS // (q.shape[1] * len(k)))
    parts = zip(torch.split(q, step), torch.split(rows, step), strict=True)
    return torch.cat([run(of_q, k, v, of_rows) for of_q, of_rows in parts])


def decode_plain(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, page_table: torch.Tensor,
    lengths: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, chunk: int, local: int, longest: int,
) -> torch.Tensor:  # fmt: skip
    """The definition for the last row of every sequence; keys come rotated."""
    del longest
    turn = functools.partial(turned, tables=(cos, sin))
    logits_of = functools.partial(variant_logits, layout=ops.ChunkLayout(chunk, local), turn=turn)
    output = torch.zeros_like(q)
    for index, length in enumerate(lengths.tolist()):
        if length:
            pages = page_table[index, : -(-length // PAGE)].long()
            keys, values = (each[pages].flatten(0, 1)[:length] for each in (key_pages, value_pages))
            row = torch.tensor([length - 1], device=q.device)
            output[index] = attend_rows(q[index, None], keys, values, row, logits_of=logits_of)[0]
    return output


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, *, logits_of: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Softmax and sum in fp32 (fp64 for fp64), probabilities rounded to the dtype of q; keys, values may be wider."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    probabilities = torch.softmax(_visible(logits_of, q, k, rows), dim=-1).to(q.dtype)
    return _summed(probabilities, v).transpose(0, 1)


def _attend_recomputing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, *, logits_of: Callable[..., torch.Tensor],
    order: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    with torch.no_grad():
        again = _visible(functools.partial(logits_of, order=order), q, k, rows)
    output: torch.Tensor = _Recomputing.apply(_visible(logits_of, q, k, rows), again, v)  # type: ignore[no-untyped-call]
    return output.transpose(0, 1)


class _Recomputing(torch.autograd.Function):
    """Softmax and sum [H, S, D] of logits [H, S, T]; backward has the lse, the output, and logits of its own."""

    @staticmethod
    def forward(ctx: Any, logits_HST: torch.Tensor, again_HST: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        lse = logits_HST.logsumexp(-1, keepdim=True)
        output = _summed((logits_HST - lse).exp(), v)
        ctx.save_for_backward(again_HST, lse, v, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        again_HST, lse, v, output = ctx.saved_tensors
        probabilities = (again_HST - lse).exp()
        # The query heads of a key head as rows of one product.
        of_keys = grads[0].reshape(v.shape[1], -1, v.shape[-1])
        dv = probabilities.reshape(v.shape[1], -1, len(v)).transpose(1, 2) @ of_keys
        of_probabilities = (of_keys @ v.permute(1, 2, 0)).reshape(again_HST.shape)
        of_logits = probabilities * (of_probabilities - (grads[0] * output).sum(-1, keepdim=True))
        return of_logits, None, dv.transpose(0, 1)


def _visible(
    logits_of: Callable[..., torch.Tensor], q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Logits [H, S, T], scaled, -inf for keys behind a row."""
    columns = torch.arange(len(k), device=k.device)
    logits_HST: torch.Tensor = logits_of(q, k, rows, columns) * q.shape[-1] ** -0.5
    return logits_HST.masked_fill(columns > rows[:, None], -torch.inf)


def _summed(probabilities_HST: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Values by their probabilities, [H, S, D]; the query heads of a key head are rows of one product."""
    heads, rows, keys = probabilities_HST.shape
    summed: torch.Tensor = probabilities_HST.reshape(v.shape[1], -1, keys) @ v.transpose(0, 1)
    return summed.reshape(heads, rows, -1)


def plain_logits(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """Products of heads, [H, S, T], wide; their numbers in another order, where one is given."""
    del rows, columns
    if order is not None:
        q, k = q[..., order], k[..., order]
    products = q.transpose(0, 1).reshape(k.shape[1], -1, q.shape[-1]) @ k.permute(1, 2, 0)
    return products.reshape(q.shape[1], len(q), len(k)).to(torch.promote_types(q.dtype, torch.float32))


def variant_logits(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, *, layout: ops.ChunkLayout,
    turn: Callable[..., torch.Tensor], order: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """For each key those of the rotation that its chunk asks for."""
    within = rows % layout.stride
    back = (rows // layout.stride)[:, None] - columns // layout.stride
    positions = within, (within + layout.stride).clamp(max=layout.limit), torch.full_like(rows, layout.inter_position)
    intra, succ, inter = (plain_logits(turn(q, each), k, rows, columns, order) for each in positions)
    return torch.where(back == 0, intra, torch.where(back == 1, succ, inter))


def turned(heads: torch.Tensor, positions: torch.Tensor, *, tables: Tables) -> torch.Tensor:
    """Heads [S, H, D] rotated at positions [S] in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(heads.dtype, torch.float32)
    cos, sin = (table[positions.long()].unsqueeze(1).to(wide) for table in tables)
    first, second = heads.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(heads.dtype)
