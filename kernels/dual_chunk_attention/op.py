"""`dual_chunk_attention` as an operation of torch: launch, gradient.

Shapes: B sequences, T tokens of packed ones, Sq, Sk tokens of q and k, Hq, Hkv heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..backends import backend_for, launches, register_operation
from ..registration import register_differentiable
from . import blockwise, cuda_limits
from .arguments import OP, check_backward, checked_request, unfit
from .layout import ChunkLayout
from .request import AttentionRequest

register_operation(OP, "triton", "cuda")
Run = TypeVar("Run", bound=Callable[..., Any])


def _request(
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    chunks: list[int],
    keys_rotated: bool,
    query_start: int,
    key_start: int,
    scale: float,
    deterministic: bool,
) -> AttentionRequest:
    return AttentionRequest(
        chunks=ChunkLayout(*chunks) if chunks else None,
        tables=None if cos is None or sin is None else (cos, sin),
        keys_rotated=keys_rotated,
        cu_seqlens=None if cu_seqlens_q is None or cu_seqlens_k is None else (cu_seqlens_q, cu_seqlens_k),
        query_start=query_start,
        key_start=key_start,
        scale=scale,
        logit_scale=logit_scale,
        deterministic=deterministic,
    )


def _with_options(run: Run) -> Run:
    """Give a function of *options the signature that these have in `_request`: torch reads the schema off it."""
    tensors = list(inspect.signature(run).parameters.values())[:-1]
    options = inspect.signature(_request).parameters.values()
    returned = inspect.signature(run).return_annotation
    run.__signature__ = inspect.Signature([*tensors, *options], return_annotation=returned)  # type: ignore[attr-defined]
    return run


@_with_options
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    request = _request(*options)
    cos = request.tables and request.tables[0]
    backend = backend_for(OP, q, unfit(q, cos, request.scale, k, v), lambda: cuda_limits.unfit(cos, q=q, k=k, v=v))
    if backend != "reference":
        return launches(OP, backend).launch_forward(q, k, v, request)  # type: ignore[no-any-return]
    return blockwise.forward(q, k, v, request)


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lead, rows = q.shape[:-3], q.shape[-3]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*lead, q.shape[-2], rows), dtype=wide)


@_with_options
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    request = _request(*options)
    if grad.shape[-1] > 1 and grad.stride(-1) != 1:
        grad = grad.contiguous()  # expanded by autograd: the gradient of a sum
    cos = request.tables and request.tables[0]
    unfit_for_cuda = functools.partial(cuda_limits.unfit, cos, q=q, k=k, v=v, grad=grad, output=output)
    backend = backend_for(OP, q, unfit(q, cos, request.scale, k, v, grad, output), unfit_for_cuda)
    if backend != "reference":
        return launches(OP, backend).launch_backward(grad, q, k, v, output, lse, request)  # type: ignore[no-any-return]
    return blockwise.backward(grad, q, k, v, output, lse, request)


def _backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _as_arguments(request: AttentionRequest) -> tuple[Any, ...]:
    """A request as arguments of the operation, whose schema knows tensors and numbers only."""
    chunks = request.chunks
    return (
        *(request.tables or (None, None)),
        *(request.cu_seqlens or (None, None)),
        request.logit_scale,
        [] if chunks is None else [chunks.chunk_size, chunks.local_size, chunks.limit],
        request.keys_rotated,
        request.query_start,
        request.key_start,
        request.scale,
        request.deterministic,
    )


TENSORS = 5
"""Of `_as_arguments`, the first so many are tensors or None."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *rest[:TENSORS])
    ctx.numbers = rest[TENSORS:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    nothing = (None,) * (TENSORS + len(ctx.numbers))
    return (*backward(grads[0], *ctx.saved_tensors, *ctx.numbers), *nothing)


_attention = register_differentiable(
    OP, _forward, _forward_fake, (f"{OP}_backward", _backward, _backward_fake), _save, _differentiate
)


def dual_chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
    softmax_scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with the positions of Dual Chunk Attention, or plain ones; exact gradient of q, k and v.

    Positions and sources: `ChunkLayout`. Rotated heads are rounded to the dtype of q; softmax and sums are fp32 (fp64
    for fp64). Kept for backward: the inputs, the output and one number per row. Rows without a visible key get 0.

    Args:
        q: [B, Sq, Hq, D], or packed [Tq, Hq, D]; any strides with neighbouring numbers of a head. Not rotated, where
            tables are given.
        k: [B, Sk, Hkv, D] or [Tk, Hkv, D]; Hkv divides Hq, and Hq / Hkv neighbouring query heads share a key head.
        v: as k.
        chunks: None for plain causal attention.
        tables: cos and sin, fp32 [P, R / 2] (fp64 for fp64), row p is position p; see `rope_tables`. P has to be above
            the largest position: `chunks.inter_position`, or without chunks the last token's. None: q and k come
            rotated, for plain attention only.
        keys_rotated: k comes rotated at j mod L (plain: at j), as a KV cache holds it. Its gradient is then that of
            the rotated keys.
        cu_seqlens_q: boundaries of packed sequences, int32 or int64 [sequences + 1]; a sequence may be empty.
        cu_seqlens_k: of the keys, as many; with cu_seqlens_q only.
        query_start: position of the first query; None: queries end where keys end (chunked prefill, decoding). A
            packed sequence's queries always end where its keys end.
        key_start: position of the first key, for context parallelism; keys behind a query are masked.
        softmax_scale: of the logits; 1 / sqrt(D) by default.
        logit_scale: [Sq] or [Tq] in the dtype of the tables, multiplies the logits of each row: the square of
            `log_length_temperature`. No gradient.
        deterministic: gradients have the same bits every time, also where that costs time (a CPU always does).

    Returns:
        Output as q, contiguous, and the natural log-sum-exp of each row's logits [B, Hq, Sq] or [Hq, Tq] in fp32
        (fp64 for fp64), -inf for a row without a visible key. The latter has no gradient: parts of the keys are put
        together by `merge_attention`, and differentiated by `dual_chunk_attention_backward` with the merged lse.

    Raises:
        ConfigError: a bad shape, dtype, device or option, or a backend that cannot run.
    """
    request = checked_request(
        q,
        k,
        v,
        chunks=chunks,
        tables=tables,
        keys_rotated=keys_rotated,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_start=query_start,
        key_start=key_start,
        softmax_scale=softmax_scale,
        logit_scale=logit_scale,
        deterministic=deterministic,
    )
    return _attention(q, k, v, *_as_arguments(request))  # type: ignore[no-any-return]


def dual_chunk_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
    softmax_scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, where these keys may be a part of those the rows have seen.

    For context parallelism: with the output and lse merged over all parts, the gradient of q is the sum over the parts,
    and those of k and v are complete for the given queries.

    Args:
        grad: of output, as output.
        q: as in forward.
        k: as in forward; the part.
        v: as k.
        output: merged output, as q.
        lse: merged, [B, Hq, Sq] or [Hq, Tq].
        chunks: as in `dual_chunk_attention`.
        tables: as there.
        keys_rotated: as there.
        cu_seqlens_q: as there.
        cu_seqlens_k: as there.
        query_start: as there; by default queries end where this part ends.
        key_start: as there, of the part.
        softmax_scale: as there.
        logit_scale: as there.
        deterministic: as there.

    Returns:
        As q, k and v, contiguous.

    Raises:
        ConfigError: see `dual_chunk_attention`.
    """
    request = checked_request(
        q,
        k,
        v,
        chunks=chunks,
        tables=tables,
        keys_rotated=keys_rotated,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        query_start=query_start,
        key_start=key_start,
        softmax_scale=softmax_scale,
        logit_scale=logit_scale,
        deterministic=deterministic,
    )
    check_backward(grad, q, output, lse)
    operation = torch.ops.megatron_qwen.dual_chunk_attention_backward.default
    # Inside a backward pass, where nothing is recorded, a CPU saves the way through torch's dispatcher.
    is_direct = q.is_cpu and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    run = _backward if is_direct else operation
    return run(grad, q, k, v, output, lse, *_as_arguments(request))
