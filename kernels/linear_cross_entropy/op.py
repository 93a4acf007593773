"""`linear_cross_entropy` as an operation of torch: checks, launches, gradient.

The operation proper returns log-sum-exp and label logit of each token; what is made of them is a few passes over
[N] numbers, whose gradients torch finds by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...errors import ConfigError
from .. import checks
from ..registration import register_differentiable
from . import parallel
from .dispatch import OP, gradients, statistics
from .reference import NewWeightGradient, WeightGradient


class TokenLosses(NamedTuple):
    """What `linear_cross_entropy_terms` returns, each in the shape of the labels, fp32 (fp64 for fp64).

    Attributes:
        loss: cross-entropy plus z_loss * log_sum_exp^2; differentiate this one.
        cross_entropy: for the log; detached.
        log_sum_exp: of all logits of the token; detached.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    log_sum_exp: torch.Tensor


def _forward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(labels.shape, dtype=wide), hidden.new_empty(labels.shape, dtype=wide)


def _backward(
    grad_lse: torch.Tensor,
    grad_label_logit: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight_gradient = NewWeightGradient(weight, rows)
    grad_hidden = gradients(grad_lse, grad_label_logit, hidden, weight, labels, lse, rows, weight_gradient)
    return grad_hidden, weight_gradient.result()


def _backward_fake(
    grad_lse: torch.Tensor,
    grad_label_logit: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, weight, labels, ctx.rows = inputs
    ctx.save_for_backward(hidden, weight, labels, output[0])


def _differentiate(ctx: Any, backward: Callable[..., Any], *grads: torch.Tensor) -> Any:
    return (*backward(*grads, *ctx.saved_tensors, ctx.rows), None, None)


_statistics = register_differentiable(
    OP, statistics, _forward_fake, (f"{OP}_backward", _backward, _backward_fake), _save, _differentiate
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    weight_gradient: WeightGradient | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of each token of a linear layer, without ever holding its logits.

    Backward computes the logits again, chunk by chunk, so gradients are exact for any weight per token. Products are
    taken in the dtype of hidden and summed in fp32; softmax and loss are fp32 (fp64 for fp64).

    Args:
        hidden: [..., H], floating point; with `sequence_parallel` this rank's part along the first axis.
        weight: [V, H], of the dtype of hidden; with a group of W ranks, the rows rank * V .. of W * V.
        labels: [...], int32 or int64, the same on every rank of the group; each is in 0 .. vocab_size - 1 or
            `ignore_index`. Another one is an error on a CPU, and a NaN loss without gradient elsewhere and in
            compiled code, where looking would wait for the device.
        ignore_index: the label of tokens whose loss is 0.
        z_loss: adds z_loss * lse^2 (arXiv 2204.02311), lse being the log of the softmax's denominator.
        vocab_size: rows over all ranks that count; those behind it are padding. All by default.
        group: tensor-parallel ranks that hold the vocabulary in equal parts; also sums up the gradient of hidden.
        sequence_parallel: hidden is split over the group along its first axis; gathered here, as Megatron-Core's
            output layer does, and its gradient scattered back.
        weight_gradient: takes the gradient of the weight instead of a new tensor; not under torch.compile.

    Returns:
        [...], the loss of each token in nats, of the same value on every rank of the group.

    Raises:
        ConfigError: a bad shape, dtype, device, label or option, or a backend that cannot run.
    """
    return linear_cross_entropy_terms(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        z_loss=z_loss,
        vocab_size=vocab_size,
        group=group,
        sequence_parallel=sequence_parallel,
        weight_gradient=weight_gradient,
    ).loss


def linear_cross_entropy_terms(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    weight_gradient: WeightGradient | None = None,
) -> TokenLosses:
    """`linear_cross_entropy` with the parts of the loss: the plain cross-entropy is what one logs beside a z-loss.

    Args and errors: see there. Tokens of `ignore_index` have 0 in all three.
    """
    ranks = parallel.Ranks.of(group)
    _check(hidden, weight, labels, ranks, sequence_parallel, z_loss)
    held = ranks.size * weight.shape[0]
    total = held if vocab_size is None else vocab_size
    if not 0 < total <= held:
        raise ConfigError(f"{OP}: vocab_size is {vocab_size}; expected 1 to {held}, the rows of weight over all ranks")
    is_ignored, is_valid = labels == ignore_index, (labels >= 0) & (labels < total)
    if labels.is_cpu and not torch.compiler.is_compiling():
        _refuse_labels(labels, is_ignored | is_valid, total, ignore_index)
    first = ranks.rank * weight.shape[0]
    rows = min(max(total - first, 0), weight.shape[0])
    local = torch.where(is_valid & (labels >= first) & (labels < first + rows), labels - first, -1)
    if ranks.size == 1 and weight_gradient is None:
        lse, label_logit = _statistics(hidden, weight, local, rows)
    else:
        lse, label_logit = parallel.statistics(hidden, weight, local, rows, ranks, sequence_parallel, weight_gradient)
    cross_entropy = torch.where(is_ignored, 0.0, torch.where(is_valid, lse - label_logit, torch.nan))
    lse = torch.where(is_ignored, 0.0, lse)
    loss = cross_entropy + z_loss * lse.square() if z_loss else cross_entropy
    return TokenLosses(loss, cross_entropy.detach(), lse.detach())


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    ranks: parallel.Ranks,
    sequence_parallel: bool,
    z_loss: float,
) -> None:
    checks.require_floating(OP, "hidden", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ConfigError(
            f"{OP}: weight has shape {tuple(weight.shape)}; expected (rows, {hidden.shape[-1]}), neither of them 0"
        )
    checks.require_dtype(OP, "weight", weight, hidden.dtype)
    checks.require_device(OP, "weight", weight, hidden, "hidden")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"{OP}: labels has dtype {labels.dtype}; expected torch.int64 or torch.int32")
    shape = tuple(hidden.shape[:-1])
    if sequence_parallel:
        if not shape:
            raise ConfigError(f"{OP}: hidden has shape {tuple(hidden.shape)}; expected an axis to gather along")
        shape = (shape[0] * ranks.size, *shape[1:])
    checks.require_shape(OP, "labels", labels, shape)
    checks.require_device(OP, "labels", labels, hidden, "hidden")
    if not 0.0 <= z_loss < float("inf"):
        raise ConfigError(f"{OP}: z_loss is {z_loss}; expected a finite number, 0 or more")


def _refuse_labels(labels: torch.Tensor, is_fine: torch.Tensor, total: int, ignore_index: int) -> None:
    if not is_fine.all():
        bad = labels[~is_fine]
        raise ConfigError(
            f"{OP}: labels holds {int(bad[0])} ({len(bad)} such labels); expected 0 to {total - 1}, or {ignore_index} "
            "(ignore_index) for a token without a loss"
        )
