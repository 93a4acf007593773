"""`swiglu` as an operation of torch: checks, launches, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, launches, register_operation
from ..registration import register_differentiable
from . import reference

register_operation("swiglu", "triton", "cuda")


def _forward(packed: torch.Tensor) -> torch.Tensor:
    backend = backend_for("swiglu", packed)
    if backend == "reference":
        return reference.forward(packed)
    out = packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)
    if out.numel():
        launch = launches("swiglu", backend).launch_forward
        launch(checks.as_rows("swiglu", "packed", packed), out.view(-1, out.shape[-1]))
    return out


def _forward_fake(packed: torch.Tensor) -> torch.Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


def _backward(grad: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    backend = backend_for("swiglu", packed)
    if backend == "reference":
        return reference.backward(grad, packed)
    grad_packed = packed.new_empty(packed.shape)
    if grad.numel():
        launches("swiglu", backend).launch_backward(
            checks.gradient_as_rows(grad),
            checks.as_rows("swiglu", "packed", packed),
            grad_packed.view(-1, packed.shape[-1]),
        )
    return grad_packed


def _backward_fake(grad: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return packed.new_empty(packed.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    return backward(grads[0], ctx.saved_tensors[0])


_swiglu = register_differentiable(
    "swiglu", _forward, _forward_fake, ("swiglu_backward", _backward, _backward_fake), _save, _differentiate
)


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of the packed output of a gate-and-up projection.

    Kernels compute in fp32 and round once. Backward reads `packed` again and computes the activation anew: nothing
    else is kept.

    Args:
        packed: [..., 2F], gate first; floating point. Kernels take any strides that make it rows at one distance.

    Returns:
        [..., F], contiguous, of the dtype of `packed`.

    Raises:
        ConfigError: a bad shape or dtype, strides that a kernel cannot take, or a backend that cannot run.
    """
    checks.require_floating("swiglu", "packed", packed)
    if packed.shape[-1] % 2:
        raise ConfigError(f"swiglu: packed has shape {tuple(packed.shape)}; expected an even last axis, gate then up")
    return _swiglu(packed)  # type: ignore[no-any-return]
