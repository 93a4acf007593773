"""The two halves of `linear_cross_entropy` by the backend that is chosen; see `reference.py` for what they compute."""

from __future__ import annotations

import torch

from .. import checks
from ..backends import backend_for, register_operation
from . import reference
from .reference import WeightGradient

OP = "linear_cross_entropy"
register_operation(OP, "triton")


def statistics(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.forward` of hidden [..., H] and labels [...]; results have the shape of labels."""
    if backend_for(OP, hidden) == "reference":
        lse, label_logit = reference.forward(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), rows)
        return lse.view(labels.shape), label_logit.view(labels.shape)
    lse, label_logit = (hidden.new_empty(labels.shape, dtype=torch.float32) for _ in range(2))
    if labels.numel():
        from . import kernel

        flat = checks.as_rows(OP, "hidden", hidden), checks.as_rows(OP, "weight", weight), labels.reshape(-1)
        kernel.launch_forward(*flat, rows, lse.view(-1), label_logit.view(-1))
    return lse, label_logit


def gradients(
    grad_lse: torch.Tensor,
    grad_label_logit: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    rows: int,
    weight_gradient: WeightGradient,
) -> torch.Tensor:
    """`reference.backward` with [...] and [..., H] in place of [N] and [N, H]."""
    per_token = [each.reshape(-1) for each in (grad_lse, grad_label_logit, labels, lse)]
    grad_lse, grad_label_logit, labels, lse = per_token
    if backend_for(OP, hidden) == "reference":
        flat = hidden.reshape(-1, hidden.shape[-1])
        grad = reference.backward(grad_lse, grad_label_logit, flat, weight, labels, lse, rows, weight_gradient)
    else:
        from . import kernel

        flat, weight = checks.as_rows(OP, "hidden", hidden), checks.as_rows(OP, "weight", weight)
        grad = kernel.backward(grad_lse, grad_label_logit, flat, weight, labels, lse, rows, weight_gradient)
    return grad.view(hidden.shape)
