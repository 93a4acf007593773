"""Dual Chunk Attention of a model: what its core attention is told for a sequence of a given length.

Shapes: P positions, R rotated dimensions of a head.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from megatron_qwen import ops
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.model.rope import inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron.core.transformer.transformer_config import TransformerConfig

ATTRIBUTE = "dual_chunk_attention"
"""Of Megatron's configuration, which has no field for it."""


@dataclass(frozen=True, kw_only=True)
class DualChunk:
    """The settings of one model, as an attribute of Megatron's configuration.

    Attributes:
        chunks: how sequences are cut.
        original_length: length from which logits are multiplied by the square of the temperature; 0 for never.
        head_dim: R; the models rotate whole heads.
        rope_theta: base of the frequencies.
        rope_scaling: YaRN's changes to them, or None.
    """

    chunks: ops.ChunkLayout
    original_length: int
    head_dim: int
    rope_theta: float
    rope_scaling: YarnScaling | None = None

    @classmethod
    def of(cls, config: QwenConfig) -> DualChunk | None:
        """Return the settings of a model, None if it has no Dual Chunk Attention."""
        block = config.dual_chunk_attention
        if block is None:
            return None
        return cls(
            chunks=chunk_layout(block),
            original_length=block.original_max_position_embeddings,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
        )

    def is_active(self, length: int) -> bool:
        """Whether a sequence of `length` tokens is attended otherwise than by ordinary causal attention."""
        return length > self.chunks.stride or self.has_temperature(length)

    def has_temperature(self, length: int) -> bool:
        """Whether logits of a sequence of `length` tokens are scaled."""
        return 0 < self.original_length < length

    def chunks_at(self, length: int) -> ops.ChunkLayout | None:
        """Return the layout for sequences of up to `length` tokens; None where all are within one chunk."""
        return self.chunks if length > self.chunks.stride else None

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of positions 0 to the cap, fp32 [P, R / 2], with YaRN's factor in them."""
        return _tables(self, device)

    def key_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the rows of the tables by which keys at these positions are rotated, of the same shape and dtype."""
        return positions % self.chunks.stride

    def logit_scale(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return what multiplies the logits of queries at these positions, fp32, or None.

        A query at position i has seen i + 1 tokens: their temperature, whatever follows. So a token's output is the
        same in training, in prefill and in decoding.
        """
        if not self.original_length:
            return None
        temperature = ops.log_length_temperature(positions + 1, self.original_length)
        return temperature.square()


def dual_chunk_of(config: TransformerConfig) -> DualChunk | None:
    """Return the settings that `make_transformer_config` has put into Megatron's configuration, if any."""
    return cast("DualChunk | None", getattr(config, ATTRIBUTE, None))


def chunk_layout(block: DualChunkAttention) -> ops.ChunkLayout:
    """Return the operation's layout of a configuration's block."""
    make: Callable[[int, int], ops.ChunkLayout]
    make = ops.ChunkLayout.released if block.cap == "released" else ops.ChunkLayout.paper
    return make(block.chunk_size, block.local_size)


@functools.lru_cache(maxsize=4)
def _tables(dual: DualChunk, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # so that tables made while generating text serve a training step, too
        frequencies = inverse_frequencies(dual.head_dim, dual.rope_theta, dual.rope_scaling).to(device)
        mscale = 1.0 if dual.rope_scaling is None else dual.rope_scaling.concentration()
        return ops.rope_tables(frequencies, dual.chunks.limit + 1, mscale=mscale)
