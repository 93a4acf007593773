"""The vocabulary in parts: each rank of a group holds the same number of rows, and sees all tokens.

Forward gathers two numbers per token from each rank; backward sums the gradient of hidden over the ranks, as each
has found what its rows contribute.

Shapes: N tokens, H hidden size, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..registration import refuse
from . import dispatch
from .reference import NewWeightGradient, WeightGradient


@dataclass(frozen=True)
class Ranks:
    """A group, its size and this process's place in it; one rank without a group."""

    group: dist.ProcessGroup | None
    size: int
    rank: int

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> Ranks:
        """Return the ranks of a group."""
        return Ranks(None, 1, 0) if group is None else Ranks(group, group.size(), group.rank())


def statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    rows: int,
    ranks: Ranks,
    sequence_parallel: bool,
    weight_gradient: WeightGradient | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-sum-exp and label logit of each token over the rows of all ranks, in the shape of labels.

    Args:
        hidden: [..., H]; with sequence_parallel this rank's part of the first axis.
        weight: [V, H], this rank's rows.
        labels: [...], all tokens; the row of this rank's weight, -1 for one of another rank.
        rows: the first rows of this rank's weight, which count.
        ranks: who holds the other rows.
        sequence_parallel: gather hidden, and scatter its gradient.
        weight_gradient: takes the weight's gradient instead of a new tensor.
    """
    gathers = sequence_parallel and ranks.size > 1
    return _Statistics.apply(hidden, weight, labels, rows, ranks, gathers, weight_gradient)  # type: ignore[no-any-return, no-untyped-call]


class _Statistics(torch.autograd.Function):
    """Keeps this rank's part of hidden only, and gathers it again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        rows: int,
        ranks: Ranks,
        gathers: bool,
        weight_gradient: WeightGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = _gather_sequence(hidden, ranks) if gathers else hidden
        lse, label_logit = dispatch.statistics(whole, weight, labels, rows)
        if ranks.size > 1:
            lse, label_logit = _combine(lse, label_logit, ranks)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.options = rows, ranks, gathers, weight_gradient
        return lse, label_logit

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse(f"{dispatch.OP}_backward")
        hidden, weight, labels, lse = ctx.saved_tensors
        rows, ranks, gathers, weight_gradient = ctx.options
        weight_gradient = weight_gradient or NewWeightGradient(weight, rows)
        whole = _gather_sequence(hidden, ranks) if gathers else hidden
        # With the sum over all rows, exp(l - lse) is this rank's part of the softmax: no further collective.
        grad_lse, grad_label_logit = grads
        grad_whole = dispatch.gradients(grad_lse, grad_label_logit, whole, weight, labels, lse, rows, weight_gradient)
        if gathers:
            grad_hidden = grad_whole.new_empty(hidden.shape)
            dist.reduce_scatter_tensor(grad_hidden, grad_whole, group=ranks.group)
        else:
            grad_hidden = grad_whole
            if ranks.size > 1:
                dist.all_reduce(grad_hidden, group=ranks.group)
        return grad_hidden, weight_gradient.result(), None, None, None, None, None


def _gather_sequence(hidden: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    whole = hidden.new_empty(ranks.size * hidden.shape[0], *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=ranks.group)
    return whole


def _combine(lse: torch.Tensor, label_logit: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both over all ranks: one collective, added up in the order of ranks."""
    mine = torch.stack([lse, label_logit])
    parts = mine.new_empty(ranks.size, *mine.shape)
    dist.all_gather_into_tensor(parts.view(-1), mine.view(-1), group=ranks.group)
    return torch.logsumexp(parts[:, 0], dim=0), parts[:, 1].sum(dim=0)
