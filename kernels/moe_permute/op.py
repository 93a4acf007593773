"""`expert_order`, `moe_permute` and `moe_unpermute` as operations of torch: checks, launches, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, register_operation
from ..registration import register, register_differentiable
from . import reference

OP = "moe_permute"
MOST_EXPERTS = 1024
register_operation(OP, "triton")


class ExpertOrder(NamedTuple):
    """The rows of T tokens with k experts each, sorted by expert, then token; int64, on the device of the experts.

    Attributes:
        source: [T k], t k + j of the choice in each row.
        positions: [T, k], the row of each choice.
        offsets: [E + 1], where each expert's rows begin, and their number.
    """

    source: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor


def _order(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unfit = (
        "" if num_experts <= MOST_EXPERTS else f"{num_experts} experts do not fit one program (at most {MOST_EXPERTS})"
    )
    # No arithmetic in floating point: float32 stands for any dtype.
    if backend_for(OP, experts.new_empty(0, dtype=torch.float32), unfit) == "reference":
        return reference.order(experts, num_experts)
    source, positions, offsets = _order_fake(experts, num_experts)
    if not experts.numel():
        return source, positions, offsets.zero_()
    from . import kernel

    kernel.launch_order(experts.contiguous(), source, positions, offsets)
    return source, positions, offsets


def _order_fake(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return experts.new_empty(experts.numel()), experts.new_empty(experts.shape), experts.new_empty(num_experts + 1)


def _gather(x: torch.Tensor, source: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return _weighted_gather(x, source, positions.shape[1], None)


def _weighted_gather(x: torch.Tensor, source: torch.Tensor, topk: int, weights: torch.Tensor | None) -> torch.Tensor:
    if backend_for(OP, x) == "reference":
        return reference.gather(x, source, topk, weights)
    out = x.new_empty(source.shape[0], x.shape[1])
    if out.numel():
        from . import kernel

        kernel.launch_gather(checks.as_rows(OP, "x", x), source, topk, weights, out)
    return out


def _gather_fake(x: torch.Tensor, source: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


def _gather_sum(y: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if backend_for(OP, y) == "reference":
        return reference.gather_sum(y, positions, weights)
    out = y.new_empty(positions.shape[0], y.shape[1])
    if not positions.numel():
        return out.zero_()
    if out.numel():
        from . import kernel

        kernel.launch_gather_sum(checks.as_rows(OP, "y", y), positions, weights, out)
    return out


def _permute_backward(grad: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return _gather_sum(grad.contiguous(), positions, None)


def _permute_backward_fake(grad: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(positions.shape[0], grad.shape[1])


def _unpermute(
    y: torch.Tensor, weights: torch.Tensor | None, source: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    return _gather_sum(y, positions, weights)


def _unpermute_fake(
    y: torch.Tensor, weights: torch.Tensor | None, source: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    return y.new_empty(positions.shape[0], y.shape[1])


def _unpermute_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    weights: torch.Tensor | None,
    source: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = grad.contiguous()
    grad_y = _weighted_gather(grad, source, positions.shape[1], weights)
    if y is None:
        return grad_y, grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    if backend_for(OP, grad) == "reference":
        return grad_y, reference.weight_gradient(grad, y, positions)
    grad_weights = grad.new_empty(positions.shape, dtype=torch.float32)
    if not y.numel():
        return grad_y, grad_weights.zero_()
    from . import kernel

    kernel.launch_weight_gradient(grad, checks.as_rows(OP, "y", y), positions, grad_weights)
    return grad_y, grad_weights


def _unpermute_backward_fake(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    weights: torch.Tensor | None,
    source: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (0,) if y is None else positions.shape
    grad_weights = grad.new_empty(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
    return grad.new_empty(source.shape[0], grad.shape[1]), grad_weights


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _differentiate_permute(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    return backward(grads[0], *ctx.saved_tensors), None, None


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, weights, source, positions = inputs
    # y is large, and only the gradient of the weights reads it.
    ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, weights, source, positions)


def _differentiate_unpermute(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    y, weights, source, positions = ctx.saved_tensors
    grad_y, grad_weights = backward(grads[0], y, weights, source, positions)
    return grad_y, None if y is None else grad_weights, None, None


_expert_order = register("expert_order", _order, _order_fake)
_moe_permute = register_differentiable(
    OP,
    _gather,
    _gather_fake,
    ("moe_permute_backward", _permute_backward, _permute_backward_fake),
    _save_permute,
    _differentiate_permute,
)
_moe_unpermute = register_differentiable(
    "moe_unpermute",
    _unpermute,
    _unpermute_fake,
    ("moe_unpermute_backward", _unpermute_backward, _unpermute_backward_fake),
    _save_unpermute,
    _differentiate_unpermute,
)


def expert_order(experts: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Sort the choices of all tokens by expert, those of one expert by token; nothing waits for the device.

    Args:
        experts: [T, k] int64, each from 0 to num_experts - 1. torch refuses others with an IndexError; a kernel does
            not look, as reading values back would stop the device.
        num_experts: E.

    Raises:
        ConfigError: a bad shape, dtype or number, or a backend that cannot run.
    """
    _check_integers("experts", experts, 2)
    if num_experts < 1:
        raise ConfigError(f"{OP}: num_experts is {num_experts}; expected 1 or more")
    return ExpertOrder(*_expert_order(experts, num_experts))


def moe_permute(x: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """Return the rows of x in expert order, a token's row once per expert it chose.

    The gradient sums a token's rows in fp32, in the order of its slots. Kept for backward: positions.

    Args:
        x: [T, H], floating point. Triton takes any row stride.
        order: of `expert_order`.

    Returns:
        [T k, H], contiguous, in the dtype of x.

    Raises:
        ConfigError: a bad shape, dtype or device, strides that a kernel cannot take, or a backend that cannot run.
    """
    _check_rows("x", x, order, order.positions.shape[0])
    return _moe_permute(x, order.source, order.positions)  # type: ignore[no-any-return]


def moe_unpermute(y: torch.Tensor, order: ExpertOrder, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of each token's rows, weighted if weights are given; summed in fp32 in the order of slots.

    y is kept for backward only if the weights need a gradient. `moe_mlp` and `grouped_mlp` weigh inside the experts,
    where that gradient needs no [T k, H].

    Args:
        y: [T k, H] in expert order, floating point. Triton takes any row stride.
        order: of `expert_order`.
        weights: [T, k], fp32 (fp64 for fp64).

    Returns:
        [T, H], contiguous, in the dtype of y.

    Raises:
        ConfigError: see `moe_permute`.
    """
    _check_rows("y", y, order, order.source.shape[0])
    if weights is not None:
        checks.require_shape(OP, "weights", weights, tuple(order.positions.shape))
        checks.require_dtype(OP, "weights", weights, torch.promote_types(y.dtype, torch.float32))
        checks.require_device(OP, "weights", weights, y, "y")
        weights = weights.contiguous()
    return _moe_unpermute(y, weights, order.source, order.positions)  # type: ignore[no-any-return]


def _check_rows(name: str, tensor: torch.Tensor, order: ExpertOrder, rows: int) -> None:
    checks.require_floating(OP, name, tensor)
    if tensor.dim() != 2 or tensor.shape[0] != rows:
        raise ConfigError(f"{OP}: {name} has shape {tuple(tensor.shape)}; expected [{rows}, H] for this order")
    _check_integers("order.positions", order.positions, 2)
    _check_integers("order.source", order.source, 1)
    checks.require_shape(OP, "order.source", order.source, (order.positions.numel(),))
    checks.require_device(OP, "order", order.source, tensor, name)


def _check_integers(name: str, tensor: torch.Tensor, dimensions: int) -> None:
    checks.require_dtype(OP, name, tensor, torch.int64)
    if tensor.dim() != dimensions or (dimensions == 2 and tensor.shape[1] == 0):
        wanted = "[tokens, topk] with topk at least 1" if dimensions == 2 else "one axis"
        raise ConfigError(f"{OP}: {name} has shape {tuple(tensor.shape)}; expected {wanted}")
