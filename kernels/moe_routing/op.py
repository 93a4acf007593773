"""`moe_routing` as an operation of torch: checks, launches, gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, register_operation
from ..registration import register_differentiable
from . import reference

OP = "moe_routing"
# A row of logits must fit the registers of one program.
MOST_EXPERTS = 1024
register_operation(OP, "triton")


class Routing(NamedTuple):
    """Where tokens go; T tokens, E experts, k experts per token, on the device of the logits.

    Attributes:
        weights: [T, k] fp32 (fp64 for fp64), largest first; differentiable.
        experts: [T, k] int64, different within a row.
        counts: [E] int64, tokens of each expert.
        offsets: [E + 1] int64, 0 and the running sum of counts: where each expert's rows begin, sorted by expert.
        probability_sums: [E] fp32, sums over tokens of the probability of each expert, chosen or not; differentiable.
        z_sum: scalar fp32, the sum over tokens of logsumexp(logits)^2; differentiable.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    probability_sums: torch.Tensor
    z_sum: torch.Tensor


def _forward(
    logits: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if _backend(logits) == "reference":
        return reference.forward(logits, topk, renormalize)
    outputs = _forward_fake(logits, topk, renormalize)
    if not logits.shape[0]:
        return (*outputs[:2], *(each.zero_() for each in outputs[2:]))  # type: ignore[return-value]
    from . import kernel

    kernel.launch_forward(checks.as_rows(OP, "logits", logits), renormalize, *outputs)
    return outputs


def _forward_fake(
    logits: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty(tokens, topk, dtype=wide),
        logits.new_empty(tokens, topk, dtype=torch.int64),
        logits.new_empty(num_experts, dtype=torch.int64),
        logits.new_empty(num_experts + 1, dtype=torch.int64),
        logits.new_empty(num_experts, dtype=wide),
        logits.new_empty((), dtype=wide),
    )


def _backward(
    grad_weights: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_z: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    renormalize: bool,
) -> torch.Tensor:
    if _backend(logits) == "reference":
        return reference.backward(grad_weights, grad_sums, grad_z, logits, experts, renormalize)
    grad_logits = logits.new_empty(logits.shape)
    if grad_logits.numel():
        from . import kernel

        grads = grad_weights.contiguous(), grad_sums.contiguous(), grad_z
        kernel.launch_backward(*grads, checks.as_rows(OP, "logits", logits), experts, renormalize, grad_logits)
    return grad_logits


def _backward_fake(
    grad_weights: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_z: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    renormalize: bool,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _backend(logits: torch.Tensor) -> str:
    experts = logits.shape[1]
    unfit = "" if experts <= MOST_EXPERTS else f"{experts} experts do not fit one program (at most {MOST_EXPERTS})"
    return backend_for(OP, logits, unfit)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, renormalize = inputs
    ctx.renormalize = renormalize
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(logits, output[1])


def _differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    grad_weights, _, _, _, grad_sums, grad_z = grads
    return backward(grad_weights, grad_sums, grad_z, *ctx.saved_tensors, ctx.renormalize), None, None


_moe_routing = register_differentiable(
    OP, _forward, _forward_fake, ("moe_routing_backward", _backward, _backward_fake), _save, _differentiate
)


def moe_routing(logits: torch.Tensor, topk: int, *, renormalize: bool) -> Routing:
    """Choose the `topk` likeliest experts of every token, and sum what the router's losses need.

    Softmax over all experts in fp32. The experts with the largest logits are chosen, equal ones by the lower index, so
    a choice depends neither on the backend nor on the batch. A row with a NaN chooses its NaN first, by index, with
    weights NaN. Nothing waits for the device. Kept for backward: logits and experts.

    Args:
        logits: [T, E], floating point. Triton takes any row stride.
        topk: k, from 1 to E.
        renormalize: divide the weights of a token by their sum (`norm_topk_prob`).

    Raises:
        ConfigError: a bad shape, dtype or topk, strides that a kernel cannot take, or a backend that cannot run.
    """
    checks.require_floating(OP, "logits", logits)
    if logits.dim() != 2:
        raise ConfigError(f"{OP}: logits has shape {tuple(logits.shape)}; expected [tokens, experts]")
    if not 1 <= topk <= logits.shape[1]:
        raise ConfigError(f"{OP}: topk is {topk}; expected 1 to {logits.shape[1]}, the number of experts")
    return Routing(*_moe_routing(logits, topk, renormalize))
