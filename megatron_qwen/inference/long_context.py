"""How far a model's text may go, and how it attends there.

Plain attention ends at the positions the model was made for. With Dual Chunk Attention (arXiv 2402.17463) no distance
exceeds the trained ones, so text may be of any length; within the first chunk it is plain attention. Beyond the trained
length the logits are scaled by the square of the log-length temperature (Qwen2.5-1M, arXiv 2501.15383, equation 1).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.inference.sparse_prefill import SparsePrefill, SparseRequest, table_rows
from megatron_qwen.model.dual_chunk import chunk_layout, dual_chunk_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from megatron_qwen.model.config import QwenConfig


@dataclass(frozen=True, kw_only=True)
class LongContext:
    """What the engine asks of attention.

    Attributes:
        positions: tokens a text may have; None for as many as memory holds.
        chunks: Dual Chunk Attention, or None for plain attention.
        original_length: tokens from which the temperature rises; 0 for never.
        sparse: how long prompts are attended sparsely, or None for never.
    """

    positions: int | None
    chunks: ops.ChunkLayout | None = None
    original_length: int = 0
    sparse: SparsePrefill | None = None

    @classmethod
    def of_built(cls, model: Any) -> LongContext:
        """Return what a built GPTModel was configured with."""
        dual = dual_chunk_of(model.config)
        if dual is None:
            return cls(positions=model.max_sequence_length)
        return cls(positions=None, chunks=dual.chunks, original_length=dual.original_length)

    @classmethod
    def plain(cls, config: QwenConfig) -> LongContext:
        """Return plain attention up to the positions of a model; YaRN's count where they are more.

        YaRN is often added to a config.json without a change of max_position_embeddings.
        """
        yarn, positions = config.rope_scaling, config.max_position_embeddings
        stretched = 0 if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings)
        return cls(positions=max(positions, stretched))

    @classmethod
    def of_model(
        cls,
        config: QwenConfig,
        *,
        chunk_size: int | None = None,
        local_size: int | None = None,
        folder: Path | None = None,
        sparse: SparseRequest | None = None,
    ) -> LongContext:
        """Return what fits a model.

        Args:
            config: its dual_chunk_attention_config switches Dual Chunk Attention on.
            chunk_size: tokens of a chunk and its window, in the place of the configuration's; 0 for plain attention.
            local_size: tokens of the window; a sixteenth of chunk_size if None, as ChunkLlama has it for Qwen.
            folder: of the model; see `SparsePrefill.of_model`.
            sparse: what is asked of prompts; None leaves it to the model.

        Raises:
            ConfigError: a window without chunks, sizes out of range, chunks beyond what the model was trained on; or as
                `SparsePrefill.of_model`.
        """
        dense = cls._dense(config, chunk_size, local_size)
        has_chunks = dense.chunks is not None
        prefill = SparsePrefill.of_model(config, folder, sparse or SparseRequest(), has_chunks=has_chunks)
        return dataclasses.replace(dense, sparse=prefill)

    @classmethod
    def _dense(cls, config: QwenConfig, chunk_size: int | None, local_size: int | None) -> LongContext:
        if not chunk_size and local_size is not None:
            raise ConfigError(f"local_size is {local_size} without chunk_size; give both, or chunk_size alone")
        own, plain = config.dual_chunk_attention, cls.plain(config)
        if chunk_size == 0 or (chunk_size is None and own is None):
            return plain
        if chunk_size is None:
            assert own is not None
            return cls(positions=None, chunks=chunk_layout(own), original_length=own.original_max_position_embeddings)
        trained = plain.positions if own is None else own.original_max_position_embeddings or own.chunk_size
        assert trained is not None
        if chunk_size > trained:
            raise ConfigError(
                f"dual chunk attention: chunk_size is {chunk_size:,}, the model was trained on {trained:,} tokens; "
                f"distances up to chunk_size occur, so it must be at most {trained:,}"
            )
        window = max(chunk_size // 16, 1) if local_size is None else local_size
        original_length = trained if own is None else own.original_max_position_embeddings
        return cls(positions=None, chunks=ops.ChunkLayout.released(chunk_size, window), original_length=original_length)

    def logit_scale(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return the factor of each query's logits, fp32 like positions; None if all are 1.

        A token at position p counts the p + 1 tokens up to itself, so a row does not depend on what follows: decoding
        equals prefill, however it is cut. The released code takes the whole prompt's length for all of its rows.

        Args:
            positions: integers.
        """
        if not self.original_length or not positions.numel() or int(positions.max()) < self.original_length:
            return None
        return ops.log_length_temperature(positions + 1, self.original_length).square()

    def within(self, tokens: int) -> LongContext:
        """Return the same for texts of at most so many tokens.

        Attention is plain if the first chunk holds them, and dense if no prompt can be beyond the threshold.
        """
        is_one_chunk = self.chunks is not None and tokens <= self.chunks.stride
        is_dense = self.sparse is None or not self.sparse.applies_to(tokens)
        return dataclasses.replace(
            self, chunks=None if is_one_chunk else self.chunks, sparse=None if is_dense else self.sparse
        )

    def is_sparse(self, prompt_tokens: int) -> bool:
        """Whether a prompt of so many tokens is attended sparsely."""
        return self.sparse is not None and self.sparse.applies_to(prompt_tokens)

    def table_rows(self, tokens: int, *, is_watched: bool = False) -> int:
        """Return the positions that rotary tables must have for texts of so many tokens.

        Args:
            tokens: of the longest.
            is_watched: for scores of columns and diagonals, too, though prefill is dense.
        """
        if self.chunks is None:
            return tokens
        attended = self.chunks.limit + 1
        return attended if self.sparse is None and not is_watched else max(attended, table_rows(self.chunks))

    def key_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return where keys are rotated, given where they are in their text."""
        return positions if self.chunks is None else positions % self.chunks.stride

    def require(self, prompt_tokens: int, what: str) -> None:
        """Refuse a text that leaves no position for a further token.

        Raises:
            ConfigError: it does.
        """
        if self.positions is not None and prompt_tokens >= self.positions:
            chunk_size = self.positions // 4 * 3
            raise ConfigError(
                f"{what} has {prompt_tokens:,} tokens; the model has {self.positions:,} positions, and at least one is "
                "needed for the completion; shorten the prompt, or go beyond with dual chunk attention: "
                f"--dca-chunk-size {chunk_size} --dca-local-size {chunk_size // 16} (chunk_size=, local_size=)"
            )
