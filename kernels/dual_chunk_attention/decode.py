"""`paged_decode_attention`: one new query per sequence against a paged KV cache.

Shapes: B sequences, P pages, N tokens of a page, Hq, Hkv heads, D head size.
"""

from __future__ import annotations

import importlib

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, register_operation
from ..registration import register
from . import blockwise
from .arguments import checked_request, unfit
from .layout import ChunkLayout
from .request import AttentionRequest

OP = "paged_decode_attention"
register_operation(OP, "triton")


def _decode(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    chunks: list[int],
    scale: float,
) -> torch.Tensor:
    layout = ChunkLayout(*chunks) if chunks else None
    tables = None if cos is None or sin is None else (cos, sin)
    if backend_for(OP, q, unfit(q, cos, scale)) != "reference":
        launch = importlib.import_module(".decode_kernel", __package__).launch_decode
        return launch(  # type: ignore[no-any-return]
            q, key_pages, value_pages, page_table, lengths, layout, tables, scale, logit_scale
        )
    output = q.new_zeros(q.shape)
    page = key_pages.shape[1]
    for index, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        pages = page_table[index, : -(-length // page)].long()
        k, v = (_tokens(each, pages)[None, :length] for each in (key_pages, value_pages))
        request = AttentionRequest(
            chunks=layout,
            tables=tables,
            keys_rotated=True,
            cu_seqlens=None,
            query_start=length - 1,
            key_start=0,
            scale=scale,
            logit_scale=None if logit_scale is None else logit_scale[index : index + 1],
            deterministic=True,
        )
        output[index] = blockwise.forward(q[None, None, index], k, v, request)[0][0, 0]
    return output


def _tokens(heads: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Tokens [T, Hkv, D] of these pages; a view where they follow each other."""
    first = int(pages[0])
    is_run = bool((pages.diff() == 1).all())
    return (heads[first : first + len(pages)] if is_run else heads[pages]).flatten(0, 1)


def _decode_fake(q: torch.Tensor, *rest: object) -> torch.Tensor:
    return q.new_empty(q.shape)


_operation = register(OP, _decode, _decode_fake)


def paged_decode_attention(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    softmax_scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of one query per sequence, the one at position length - 1; no gradient.

    Args:
        q: [B, Hq, D]; not rotated, where tables are given.
        key_pages: [P, N, Hkv, D], keys rotated at j mod L (without chunks at j).
        value_pages: as key_pages.
        page_table: int32 or int64 [B, pages]: where token t of a sequence is: page page_table[b, t // N], row t % N.
            Entries behind the last page of a sequence are not read.
        lengths: int32 or int64 [B], keys each query sees, its own included; 0 gives an output of 0.
        chunks: as in `dual_chunk_attention`.
        tables: as there.
        softmax_scale: as there.
        logit_scale: [B], the factor of each sequence's logits.

    Returns:
        [B, Hq, D].

    Raises:
        ConfigError: a bad shape, dtype, device or option, a length beyond the page table, or an input that wants a
            gradient.
    """
    checks.require_floating(OP, "q", q)
    if q.dim() != 3:
        raise ConfigError(f"{OP}: q has shape {tuple(q.shape)}; expected [B, Hq, D]")
    _check_pages(q, key_pages, value_pages, page_table, lengths)
    # One packed sequence of B rows has the checks of heads, tables and factors in common with this.
    request = checked_request(
        q.unsqueeze(0),
        key_pages[:1],
        value_pages[:1],
        chunks=chunks,
        tables=tables,
        keys_rotated=True,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        query_start=0 if chunks is not None or tables is None else _longest(lengths) - q.shape[0],
        key_start=0,
        softmax_scale=softmax_scale,
        logit_scale=logit_scale,
        deterministic=True,
    )
    if torch.is_grad_enabled() and any(each.requires_grad for each in (q, key_pages, value_pages)):
        raise ConfigError(f"{OP}: an input requires a gradient, expected none; differentiate dual_chunk_attention")
    cos, sin = request.tables or (None, None)
    numbers = [] if chunks is None else [chunks.chunk_size, chunks.local_size, chunks.limit]
    run = _decode if q.is_cpu and not torch.compiler.is_compiling() else _operation
    return run(q, key_pages, value_pages, page_table, lengths, cos, sin, request.logit_scale, numbers, request.scale)


def _longest(lengths: torch.Tensor) -> int:
    """The largest length where looking at it waits for no device, else 0."""
    if not lengths.is_cpu or torch.compiler.is_compiling() or not lengths.numel():
        return 0
    return int(lengths.max())


def _check_pages(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dim() != 4 or pages.shape[-1] != q.shape[-1] or 0 in pages.shape[1:] or q.shape[1] % pages.shape[2]:
            raise ConfigError(
                f"{OP}: {name} has shape {tuple(pages.shape)} with q {tuple(q.shape)}; expected [pages, tokens, "
                f"a number of heads that divides {q.shape[1]}, {q.shape[2]}]"
            )
        checks.require_dtype(OP, name, pages, q.dtype)
        checks.require_device(OP, name, pages, q, "q")
    checks.require_shape(OP, "value_pages", value_pages, tuple(key_pages.shape))
    for name, numbers, dims in (("page_table", page_table, 2), ("lengths", lengths, 1)):
        if numbers.dim() != dims or numbers.shape[0] != q.shape[0] or numbers.dtype not in (torch.int32, torch.int64):
            raise ConfigError(
                f"{OP}: {name} has shape {tuple(numbers.shape)}, dtype {numbers.dtype}; expected "
                f"[{q.shape[0]}{', pages' if dims == 2 else ''}] of int32 or int64"
            )
        checks.require_device(OP, name, numbers, q, "q")
    room = page_table.shape[1] * key_pages.shape[1]
    if _longest(lengths) > room:
        raise ConfigError(f"{OP}: lengths goes up to {_longest(lengths)}; expected at most {room}, what the pages hold")
