"""Next-token cross-entropy in the form Megatron's schedules average over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LossSums(NamedTuple):
    """Sums over one micro-batch, detached: of the loss (nats) and of the unmasked tokens."""

    loss: torch.Tensor
    tokens: torch.Tensor


def lm_loss(loss_mask_BS: torch.Tensor | None, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, LossSums]:
    """Sum the per-token losses where the mask is one.

    With `calculate_per_token_loss` Megatron divides gradients by the tokens of the global batch once, at the end;
    so micro-batches with different masks weigh as their tokens do.

    Args:
        loss_mask_BS: 1 where the token counts, float [B, S].
        losses_BS: cross-entropy of each token, float32 [B, S].

    Returns:
        The sum (with gradient), the number of tokens (int), and both again, detached, for the report.
    """
    assert loss_mask_BS is not None, "only the last stage computes a loss, and it has the mask"
    loss = (losses_BS.float() * loss_mask_BS).sum()
    tokens = loss_mask_BS.sum()
    # The schedules scale the first value in place: the report needs its own copy.
    return loss, tokens.int(), LossSums(loss.detach().clone(), tokens)
