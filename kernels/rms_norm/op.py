"""`rms_norm` and `add_rms_norm` as operations of torch: checks, launches, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, launches, register_operation, unfit_dtype
from ..registration import register_differentiable
from . import reference

OP = "rms_norm"
# A row must fit the registers, or the shared memory, of one program.
LARGEST_HIDDEN = 16384
register_operation(OP, "triton", "cuda")


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    backend = _backend(x, weight)
    if backend == "reference":
        return reference.forward(x, weight, eps)
    y, inverse_rms = _forward_fake(x, weight, eps)
    if x.numel():
        rows = checks.as_rows(OP, "x", x)
        outputs = y.view(rows.shape), None, inverse_rms.view(-1)
        launches(OP, backend).launch_forward(rows, None, weight.contiguous(), eps, *outputs)
    return y, inverse_rms


def _forward_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), _empty_inverse_rms(x)


def _add_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    backend = _backend(x, weight)
    if backend == "reference":
        return reference.add_forward(x, residual, weight, eps)
    y, total, inverse_rms = _add_forward_fake(x, residual, weight, eps)
    if x.numel():
        rows, added = checks.as_rows(OP, "x", x), checks.as_rows(OP, "residual", residual)
        outputs = y.view(rows.shape), total.view(rows.shape), inverse_rms.view(-1)
        launches(OP, backend).launch_forward(rows, added, weight.contiguous(), eps, *outputs)
    return y, total, inverse_rms


def _add_forward_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _empty_inverse_rms(x)


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, grad_sum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = _backend(x, weight)
    if backend == "reference":
        return reference.backward(grad, x, weight, inverse_rms, grad_sum)
    if not x.numel():
        return x.new_empty(x.shape), torch.zeros_like(weight)
    grad_x, grad_weight = _backward_fake(grad, x, weight, inverse_rms, grad_sum)
    rows = checks.as_rows(OP, "x", x)
    launches(OP, backend).launch_backward(
        checks.gradient_as_rows(grad),
        None if grad_sum is None else checks.gradient_as_rows(grad_sum),
        rows,
        weight.contiguous(),
        inverse_rms,
        grad_x.view(rows.shape),
        grad_weight,
    )
    return grad_x, grad_weight


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor, grad_sum: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _backend(x: torch.Tensor, weight: torch.Tensor) -> str:
    hidden = x.shape[-1]
    unfit = "" if hidden <= LARGEST_HIDDEN else f"a row of {hidden} does not fit one program (at most {LARGEST_HIDDEN})"
    return backend_for(OP, x, unfit or unfit_dtype("weight", weight))


def _empty_inverse_rms(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor | None) -> Any:
    grad = grads[0]
    return (None, None, None) if grad is None else (*backward(grad, *ctx.saved_tensors, None), None)


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, total, inverse_rms = output
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, inputs[2], inverse_rms)


def _add_differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor | None) -> Any:
    grad, grad_sum, _ = grads
    if grad is None:
        return grad_sum, grad_sum, None, None
    grad_x, grad_weight = backward(grad, *ctx.saved_tensors, grad_sum)
    return grad_x, grad_x, grad_weight, None


_BACKWARD = ("rms_norm_backward", _backward, _backward_fake)
_rms_norm = register_differentiable(OP, _forward, _forward_fake, _BACKWARD, _save, _differentiate)
_add_rms_norm = register_differentiable(
    "add_rms_norm", _add_forward, _add_forward_fake, _BACKWARD, _add_save, _add_differentiate
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Computed in fp32 (fp64 for fp64) and rounded once. The gradient of `weight` is summed in fp32 in a fixed order.

    Args:
        x: [..., H], floating point. Kernels take any strides that make it rows at one distance.
        weight: [H], floating point of any dtype.
        eps: added to the mean square; 0 or more.

    Returns:
        [..., H], contiguous, in the dtype of x.

    Raises:
        ConfigError: a bad shape, dtype, device or eps, strides that a kernel cannot take, or a backend that cannot run.
    """
    _check(x, weight, eps)
    return _rms_norm(x, weight, eps)[0]  # type: ignore[no-any-return]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rms_norm(s) and s = x + residual, in one pass over memory.

    s is rounded to the dtype of x before it is normalised, as it is where the two are separate.

    Args:
        x: [..., H], floating point; see `rms_norm`.
        residual: as x.
        weight: [H].
        eps: added to the mean square; 0 or more.

    Returns:
        The norm and the sum, both [..., H], contiguous, in the dtype of x.

    Raises:
        ConfigError: see `rms_norm`.
    """
    _check(x, weight, eps)
    checks.require_shape(OP, "residual", residual, tuple(x.shape))
    checks.require_dtype(OP, "residual", residual, x.dtype)
    checks.require_device(OP, "residual", residual, x, "x")
    return _add_rms_norm(x, residual, weight, eps)[:2]  # type: ignore[no-any-return]


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    checks.require_floating(OP, "x", x)
    checks.require_floating(OP, "weight", weight)
    if x.shape[-1] == 0:
        raise ConfigError(f"{OP}: x has shape {tuple(x.shape)}; expected a last axis of at least 1")
    checks.require_shape(OP, "weight", weight, (x.shape[-1],))
    checks.require_device(OP, "weight", weight, x, "x")
    if not eps >= 0.0:
        raise ConfigError(f"{OP}: eps is {eps}; expected 0 or more")
