"""Checks of the arguments of `dual_chunk_attention`."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...errors import ConfigError
from .. import checks
from ..qkv_rope.tables import check_tables
from .layout import ChunkLayout
from .request import AttentionRequest

OP = "dual_chunk_attention"
KERNEL_HEAD_SIZES = (64, 128)
# Within a tile of 128 rows kernels count in 32 bits: 64 would take registers that the gradients of k and v do not have.
KERNEL_ROW_STRIDE = 2**24


def checked_request(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    query_start: int | None,
    key_start: int,
    softmax_scale: float | None,
    logit_scale: torch.Tensor | None,
    deterministic: bool,
) -> AttentionRequest:
    """Return the arguments of `dual_chunk_attention` as a request.

    Raises:
        ConfigError: one of them does not fit; the message names it.
    """
    _check_heads(q, k, v)
    cu_seqlens = _checked_boundaries(q, k, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens is not None and (query_start is not None or key_start):
        raise ConfigError(
            f"{OP}: query_start is {query_start}, key_start {key_start} with packed sequences; expected None and 0: "
            "there the queries of a sequence end where its keys end"
        )
    if key_start < 0:
        raise ConfigError(f"{OP}: key_start is {key_start}; expected 0 or more")
    if cu_seqlens is not None:
        query_start = 0
    elif query_start is None:
        query_start = key_start + k.shape[-3] - q.shape[-3]
    _check_tables(q, chunks, tables)
    if tables is not None and chunks is None:
        _check_lengths(q, k, tables, cu_seqlens, query_start, key_start, keys_rotated)
    if logit_scale is not None:
        checks.require_shape(OP, "logit_scale", logit_scale, (q.shape[-3],))
        checks.require_dtype(OP, "logit_scale", logit_scale, torch.promote_types(q.dtype, torch.float32))
        checks.require_device(OP, "logit_scale", logit_scale, q, "q")
        logit_scale = logit_scale.detach().contiguous()
    return AttentionRequest(
        chunks=chunks,
        tables=tables,
        keys_rotated=keys_rotated,
        cu_seqlens=cu_seqlens,
        query_start=query_start,
        key_start=key_start,
        scale=_checked_scale(softmax_scale, q.shape[-1]),
        logit_scale=logit_scale,
        deterministic=deterministic,
    )


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, heads in (("q", q), ("k", k), ("v", v)):
        checks.require_floating(OP, name, heads)
        if heads.dim() not in (3, 4):
            raise ConfigError(f"{OP}: {name} has shape {tuple(heads.shape)}; expected [B, S, H, D] or [T, H, D]")
        if heads.shape[-1] == 0 or heads.shape[-2] == 0:
            raise ConfigError(f"{OP}: {name} has shape {tuple(heads.shape)}; expected at least one head and number")
        if heads.shape[-1] > 1 and heads.stride(-1) != 1:
            raise ConfigError(
                f"{OP}: {name} has strides {heads.stride()}; expected stride 1 within a head: call .contiguous() first"
            )
    lead, heads_q = q.shape[:-3], q.shape[-2]
    if k.dim() != q.dim() or k.shape[:-3] != lead or k.shape[-1] != q.shape[-1] or heads_q % k.shape[-2]:
        raise ConfigError(
            f"{OP}: k has shape {tuple(k.shape)} with q {tuple(q.shape)}; expected ({', '.join(map(str, lead))}"
            f"{', ' if lead else ''}tokens, a number of heads that divides {heads_q}, {q.shape[-1]})"
        )
    checks.require_shape(OP, "v", v, tuple(k.shape))
    for name, heads in (("k", k), ("v", v)):
        checks.require_dtype(OP, name, heads, q.dtype)
        checks.require_device(OP, name, heads, q, "q")


def _checked_boundaries(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if q.dim() == 4 and cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if q.dim() == 4 or cu_seqlens_q is None or cu_seqlens_k is None:
        given = [None if each is None else tuple(each.shape) for each in (cu_seqlens_q, cu_seqlens_k)]
        raise ConfigError(
            f"{OP}: q has shape {tuple(q.shape)}, cu_seqlens_q and cu_seqlens_k are {given}; expected both for packed "
            "[T, H, D], none for [B, S, H, D]"
        )
    for name, bounds, tokens in (("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k)):
        is_vector = bounds.dim() == 1 and bounds.shape == cu_seqlens_q.shape and bounds.numel() > 0
        if not is_vector or bounds.dtype not in (torch.int32, torch.int64) or not bounds.is_contiguous():
            raise ConfigError(
                f"{OP}: {name} has shape {tuple(bounds.shape)}, dtype {bounds.dtype}; expected a contiguous vector of "
                "int32 or int64 [sequences + 1], the same for queries and keys"
            )
        checks.require_device(OP, name, bounds, q, "q")
        if bounds.is_cpu and not torch.compiler.is_compiling():
            _check_ascending(name, bounds, tokens.shape[0])
    return cu_seqlens_q, cu_seqlens_k


def _check_ascending(name: str, bounds: torch.Tensor, tokens: int) -> None:
    if int(bounds[0]) != 0 or int(bounds[-1]) != tokens or bool((bounds.diff() < 0).any()):
        raise ConfigError(f"{OP}: {name} is {bounds.tolist()}; expected ascending numbers from 0 to {tokens}")


def _check_tables(
    q: torch.Tensor, chunks: ChunkLayout | None, tables: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    if tables is None:
        if chunks is not None:
            raise ConfigError(f"{OP}: tables is None with {chunks}; expected cos and sin: a query has three rotations")
        return
    check_tables(OP, "q", q, *tables, q.shape[-1])
    if chunks is not None and tables[0].shape[0] <= chunks.inter_position:
        raise ConfigError(
            f"{OP}: tables have {tables[0].shape[0]} positions; expected more than {chunks.inter_position}, the "
            f"largest of {chunks}"
        )


def _check_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None,
    query_start: int,
    key_start: int,
    keys_rotated: bool,
) -> None:
    """Plain positions fit the tables; of packed sequences that is known on a CPU only."""
    if cu_seqlens is None:
        positions = max(query_start + q.shape[-3], 0 if keys_rotated else key_start + k.shape[-3])
    elif cu_seqlens[1].is_cpu and cu_seqlens[1].numel() > 1 and not torch.compiler.is_compiling():
        positions = int(cu_seqlens[1].diff().max())
    else:
        return
    if positions > tables[0].shape[0]:
        raise ConfigError(f"{OP}: tables have {tables[0].shape[0]} positions; expected at least {positions}")


def _checked_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not math.isfinite(softmax_scale):
        raise ConfigError(f"{OP}: softmax_scale is {softmax_scale}; expected a finite number")
    return float(softmax_scale)


def check_backward(grad: torch.Tensor, q: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> None:
    """Raise ConfigError unless grad and output are as q, and lse has a number per row and head."""
    rows: dict[str, Any] = {"grad": grad, "output": output}
    for name, tensor in rows.items():
        checks.require_shape(OP, name, tensor, tuple(q.shape))
        checks.require_dtype(OP, name, tensor, q.dtype)
        checks.require_device(OP, name, tensor, q, "q")
    checks.require_shape(OP, "lse", lse, (*q.shape[:-3], q.shape[-2], q.shape[-3]))
    checks.require_dtype(OP, "lse", lse, torch.promote_types(q.dtype, torch.float32))
    checks.require_device(OP, "lse", lse, q, "q")


def unfit(q: torch.Tensor, cos: torch.Tensor | None, scale: float, *rows: torch.Tensor) -> str:
    """Return why no kernel can take heads like those of q, or these further [..., rows, heads, D]; empty if it can."""
    if q.shape[-1] not in KERNEL_HEAD_SIZES:
        return f"heads have {q.shape[-1]} numbers, and kernels take {' or '.join(map(str, KERNEL_HEAD_SIZES))}"
    if cos is not None and 2 * cos.shape[-1] != q.shape[-1]:
        return f"{2 * cos.shape[-1]} of {q.shape[-1]} numbers of a head are rotated, and kernels rotate all"
    far = max(each.stride(-3) for each in (q, *rows))
    if far > KERNEL_ROW_STRIDE:
        return f"rows are {far} numbers apart, and kernels take up to {KERNEL_ROW_STRIDE}"
    return "" if scale > 0.0 else f"softmax_scale is {scale}, and kernels need a positive one"
