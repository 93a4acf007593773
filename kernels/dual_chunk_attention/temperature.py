"""Attention temperature by length (YaRN, arXiv 2309.00071; Qwen2.5-1M, arXiv 2501.15383, equation 1)."""

from __future__ import annotations

import torch

from ...errors import ConfigError


def log_length_temperature(lengths: torch.Tensor, original_length: int, coefficient: float = 0.1) -> torch.Tensor:
    """Return s = max(1, coefficient * ln(length / original_length) + 1), fp32; logits are multiplied by s^2.

    Two uses, with the same results as long as s is that of the whole prompt:

    - `logit_scale=s.square()`, as the definition has it: keys stay as they are. For training.
    - `logit_scale=s` and keys multiplied by s (`prescaled_keys`) before they go into the cache: what vLLM does. In
      decoding a key then keeps the s of the length at which it was written.

    Args:
        lengths: number of tokens of the sequence each row belongs to (or seen so far), any shape.
        original_length: `original_max_position_embeddings` of the configuration.
        coefficient: 0.1 in all publications.

    Raises:
        ConfigError: original_length is not positive.
    """
    if original_length <= 0:
        raise ConfigError(f"log_length_temperature: original_length is {original_length}; expected 1 or more")
    wide = lengths.to(torch.float64)
    return (coefficient * (wide / original_length).log() + 1.0).clamp(min=1.0).float()


def prescaled_keys(k: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Return keys [..., H, D] times the temperature [...] of their tokens, in fp32 and rounded once."""
    return (k * temperature[..., None, None]).to(k.dtype)
