"""`qkv_rope` as an operation of torch: checks, launches, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, launches, register_operation, unfit_dtype
from ..registration import register_differentiable
from . import reference
from .layout import Layout
from .tables import check_positions, check_tables

OP = "qkv_rope"
register_operation(OP, "triton", "cuda")

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _forward(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    num_groups: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = backend_for(OP, packed, unfit_dtype("bias", bias))
    if backend == "reference":
        return reference.forward(packed, cos, sin, bias, positions, num_groups, head_dim)
    outputs = _forward_fake(packed, cos, sin, bias, positions, num_groups, head_dim)
    if packed.numel():
        launches(OP, backend).launch_forward(
            checks.as_rows(OP, "packed", packed),
            None if bias is None else bias.contiguous(),
            (cos, sin),
            positions,
            _tokens_per_position(packed, positions),
            outputs,
            Layout(
                groups=num_groups,
                per_group=packed.shape[-1] // head_dim // num_groups,
                head_dim=head_dim,
                half=cos.shape[-1],
            ),
        )
    return outputs


def _forward_fake(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    num_groups: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lead, heads = packed.shape[:-1], packed.shape[-1] // head_dim
    kv = (*lead, num_groups, head_dim)
    return packed.new_empty(*lead, heads - 2 * num_groups, head_dim), packed.new_empty(kv), packed.new_empty(kv)


def _backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = backend_for(OP, packed, unfit_dtype("bias", bias))
    if backend == "reference":
        grads = grad_q, grad_k, grad_v
        grad_packed, grad_bias = reference.backward(grads, packed, cos, sin, positions, bias is not None)
        return grad_packed, packed.new_empty(0) if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
    grad_packed, grad_bias = _backward_fake(grad_q, grad_k, grad_v, packed, cos, sin, bias, positions)
    if not packed.numel():
        return grad_packed, grad_bias.zero_()
    groups, head_dim = grad_k.shape[-2:]
    launches(OP, backend).launch_backward(
        (_with_batch(grad_q), _with_batch(grad_k), _with_batch(grad_v)),
        (cos, sin),
        positions,
        _tokens_per_position(packed, positions),
        grad_packed.view(-1, packed.shape[-1]),
        None if bias is None else grad_bias,
        Layout(groups=groups, per_group=packed.shape[-1] // head_dim // groups, head_dim=head_dim, half=cos.shape[-1]),
    )
    return grad_packed, grad_bias


def _backward_fake(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_bias = packed.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return packed.new_empty(packed.shape), grad_bias


def _with_batch(grad: torch.Tensor) -> torch.Tensor:
    """[S, B, heads, D] at the strides autograd hands in; copied only where D is not contiguous (that of a sum)."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return grad if grad.dim() == 4 else grad.unsqueeze(1)


def _tokens_per_position(packed: torch.Tensor, positions: torch.Tensor | None) -> int:
    """How many neighbouring tokens share a position: the batch, where there is one position per row of it."""
    shared = packed.dim() == 3 and (positions is None or positions.dim() == 1)
    return packed.shape[1] if shared else 1


def _save(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    packed, cos, sin, bias, positions, _, _ = inputs
    # Only dtype and shape of the input matter: its memory is let go.
    ctx.like = packed.dtype, packed.shape
    ctx.save_for_backward(cos, sin, bias, positions)


def _differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    cos, sin, bias, positions = ctx.saved_tensors
    dtype, shape = ctx.like
    like = torch.empty(1, dtype=dtype, device=cos.device).expand(shape)
    grad_packed, grad_bias = backward(*grads, like, cos, sin, bias, positions)
    return grad_packed, None, None, None if bias is None else grad_bias, None, None, None


_qkv_rope = register_differentiable(
    OP, _forward, _forward_fake, ("qkv_rope_backward", _backward, _backward_fake), _save, _differentiate
)


def qkv_rope(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_groups: int,
    head_dim: int,
    bias: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the bias to Megatron-Core's packed QKV projection, rotate queries and keys, and split, in one pass.

    Rotation is "rotate half" on the first R dimensions of a head; the rest passes through. Computed in fp32 and rounded
    once. Nothing is kept for backward but the tables; the bias's gradient is summed in fp32 in a fixed order.

    Args:
        packed: [S, B, W] or [T, W] with W = G (M + 2) D: per group M query heads, a key head and a value head.
        cos: fp32 [P, R / 2], contiguous, with YaRN's mscale in it; see `rope_tables`.
        sin: as cos.
        num_groups: G, the key-value heads of this rank.
        head_dim: D.
        bias: [W], added before rotating; None if the projection adds it itself.
        positions: int32 or int64, contiguous: [S] for all sequences of a batch, or one per token ([S, B] or [T]). None:
            0, 1, ... along the first axis. For packed sequences and context parallelism see `packed_positions` and
            `context_parallel_positions`. A position outside the tables gives NaN in a kernel, an IndexError in torch.

    Returns:
        q [..., G M, D], k [..., G, D] and v [..., G, D], contiguous, in the dtype of `packed`.

    Raises:
        ConfigError: a bad shape, dtype or device, strides that a kernel cannot take, or a backend that cannot run.
    """
    _check(packed, cos, sin, num_groups, head_dim)
    if bias is not None:
        checks.require_floating(OP, "bias", bias)
        checks.require_shape(OP, "bias", bias, (packed.shape[-1],))
        checks.require_device(OP, "bias", bias, packed, "packed")
    check_positions(OP, "packed", packed, packed.shape[:-1], cos, positions)
    return _qkv_rope(packed, cos, sin, bias, positions, num_groups, head_dim)  # type: ignore[no-any-return]


def _check(packed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_groups: int, head_dim: int) -> None:
    checks.require_floating(OP, "packed", packed)
    if packed.dim() not in (2, 3):
        raise ConfigError(f"{OP}: packed has shape {tuple(packed.shape)}; expected [S, B, W] or [T, W]")
    width = packed.shape[-1]
    if num_groups < 1 or head_dim < 1 or width % (num_groups * head_dim) or width < 3 * num_groups * head_dim:
        raise ConfigError(
            f"{OP}: packed has rows of {width}; expected num_groups * (M + 2) * head_dim with M >= 1, "
            f"num_groups {num_groups} and head_dim {head_dim}"
        )
    check_tables(OP, "packed", packed, cos, sin, head_dim)
