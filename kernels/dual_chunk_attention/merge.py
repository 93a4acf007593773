"""Attention over parts of the keys, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import ConfigError


def merge_attention(outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp over all keys from those over disjoint parts of them; exact, in fp32.

    o = sum_p o_p softmax_p(lse_p), lse = log sum_p exp(lse_p). A part without visible keys (lse = -inf) has no weight.

    Args:
        outputs: of each part, [..., S, H, D], all of one shape and dtype.
        lses: of each part, natural logarithms, [..., H, S], fp32 (fp64 for fp64).

    Returns:
        Output in the dtype of the parts, and lse; 0 and -inf where no part has a key.

    Raises:
        ConfigError: no parts, or shapes that do not fit.
    """
    if not outputs or len(outputs) != len(lses):
        raise ConfigError(f"merge_attention: {len(outputs)} outputs, {len(lses)} lses; expected as many, 1 or more")
    for output, lse in zip(outputs, lses, strict=True):
        expected = (*outputs[0].shape[:-3], outputs[0].shape[-2], outputs[0].shape[-3])
        if output.shape != outputs[0].shape or tuple(lse.shape) != expected:
            raise ConfigError(
                f"merge_attention: output {tuple(output.shape)} with lse {tuple(lse.shape)}; expected "
                f"{tuple(outputs[0].shape)} with {expected}"
            )
    parts = torch.stack(list(lses))
    lse = parts.logsumexp(0)
    # exp(parts - lse) would not add up to 1: lse is rounded, by up to 32 times 2^-24 where it is 16 to 32, and that
    # error of the output puts D in backward off by as much.
    weights = torch.where(lse == -torch.inf, 0.0, parts.softmax(0)).transpose(-1, -2).unsqueeze(-1)
    total = torch.zeros(outputs[0].shape, dtype=lse.dtype, device=lse.device)
    for output, weight in zip(outputs, weights, strict=True):
        total.addcmul_(output.to(lse.dtype), weight)
    return total.to(outputs[0].dtype), lse
