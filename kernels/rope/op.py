"""`rope_` as an operation of torch: checks, launch, gradient."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, launches, register_operation
from ..qkv_rope.tables import check_positions, check_tables
from ..registration import LIBRARY, refuse
from . import reference

OP = "rope"
register_operation(OP, "triton", "cuda")


def _run(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    inverse: bool,
) -> None:
    if not q.numel():
        return
    backend = backend_for(OP, q)
    heads = [_with_batch(each) for each in (q, k) if each is not None]
    if backend == "reference":
        for each in heads:
            reference.rotate_(each, cos, sin, _of_rows(positions, each), inverse)
        return
    repeat = q.shape[1] if q.dim() == 4 and (positions is None or positions.dim() == 1) else 1
    launches(OP, backend).launch_rope(
        heads[0], heads[1] if k is not None else None, (cos, sin), positions, repeat, inverse
    )


def _with_batch(heads: torch.Tensor) -> torch.Tensor:
    """[S, B, N, D], as a view."""
    return heads if heads.dim() == 4 else heads.unsqueeze(1)


def _of_rows(positions: torch.Tensor | None, heads: torch.Tensor) -> torch.Tensor | None:
    """Positions [T] of [T, N, D] serve as [S] of [S, 1, N, D]."""
    return positions if positions is None or positions.dim() == 1 else positions.view(heads.shape[:2])


LIBRARY.define(  # type: ignore[no-untyped-call]
    "rope_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, Tensor? positions, bool inverse) -> ()"
)
LIBRARY.impl("rope_", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("megatron_qwen::rope_", lambda *_: None, lib=LIBRARY)
_rope_ = torch.ops.megatron_qwen.rope_.default


class _InPlace(torch.autograd.Function):
    """Rotates its first argument; the gradient is rotated back. One tensor: autograd takes no two that are views."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, *rest: Any) -> torch.Tensor:
        cos, sin, positions, inverse = rest
        _rope_(heads, None, cos, sin, positions, inverse)
        ctx.save_for_backward(cos, sin, positions)
        ctx.inverse = inverse
        ctx.mark_dirty(heads)
        return heads

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            refuse("rope_")
        cos, sin, positions = ctx.saved_tensors
        # Autograd may hand the same gradient to others: it is not ours to overwrite.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        _rope_(grad, None, cos, sin, positions, not ctx.inverse)
        return grad, None, None, None, None


def rope_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate the heads of queries and keys where they are, both in one launch (one each where gradients are wanted).

    For what has already been split; `qkv_rope` does bias, rotation and split in one pass. Computed in fp32 and rounded
    once. Nothing is kept for backward but the tables.

    Args:
        q: [S, B, N, D] or [T, N, D], any strides with neighbouring numbers of a head; no leaf that requires a gradient.
        k: the same with its own number of heads, or None.
        cos: fp32 [P, R / 2] (fp64 for fp64), contiguous, with YaRN's mscale in it; see `rope_tables`.
        sin: as cos.
        positions: as in `qkv_rope`: None for 0, 1, ... along the first axis.
        inverse: rotate by the opposite angle; with mscale 1 that undoes a rotation.

    Returns:
        q and k themselves.

    Raises:
        ConfigError: a bad shape, dtype or device, strides that a kernel cannot take, or a backend that cannot run.
    """
    _check_heads("q", q)
    if k is not None:
        _check_heads("k", k)
        checks.require_shape(OP, "k", k, (*q.shape[:-2], k.shape[-2], q.shape[-1]))
        checks.require_dtype(OP, "k", k, q.dtype)
        checks.require_device(OP, "k", k, q, "q")
    check_tables(OP, "q", q, cos, sin, q.shape[-1])
    check_positions(OP, "q", q, q.shape[:-2], cos, positions)
    rest = cos, sin, positions, inverse
    if not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (q, k))):
        _rope_(q, k, *rest)
        return q, k
    return tuple(None if each is None else _InPlace.apply(each, *rest) for each in (q, k))  # type: ignore[return-value,no-untyped-call]


def _check_heads(name: str, heads: torch.Tensor) -> None:
    checks.require_floating(OP, name, heads)
    if heads.dim() not in (3, 4):
        raise ConfigError(f"{OP}: {name} has shape {tuple(heads.shape)}; expected [S, B, N, D] or [T, N, D]")
    if heads.shape[-1] > 1 and heads.stride(-1) != 1:
        raise ConfigError(
            f"{OP}: {name} has strides {heads.stride()}; expected stride 1 within a head: call .contiguous() first"
        )
