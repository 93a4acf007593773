"""Positions of Dual Chunk Attention (arXiv 2402.17463; Qwen2.5-1M, arXiv 2501.15383, figure 2).

A sequence is cut into chunks of L = c - w tokens: c is the length the model was trained on (`chunk_size` in
`dual_chunk_attention_config`), w the local window (`local_size`). Key j is rotated once, at j mod L. Row i, with
n = i // L and a = i % L, is rotated up to three times, by the chunk of the keys it meets:

    same chunk      [n L, i]          a                  causal
    previous chunk  [(n - 1) L, n L)  min(a + L, cap)    all keys
    older chunks    [0, (n - 1) L)    min(2 L - 1, cap)  all keys

So no distance exceeds the cap, and the first rows of a chunk see the last keys of the chunk before at true distance.
The released code clamps at cap = c, the papers write c - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import ConfigError


@dataclass(frozen=True)
class ChunkLayout:
    """How Dual Chunk Attention cuts sequences.

    Attributes:
        chunk_size: c, tokens the model was trained on.
        local_size: w, tokens of the previous chunk at true distance; 0 <= w < c.
        cap: largest position of a query: c as in the released code (also for None), or c - 1 as in the paper.

    Raises:
        ConfigError: sizes out of range, or another cap.
    """

    chunk_size: int
    local_size: int
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            raise ConfigError(
                f"dual_chunk_attention: local_size is {self.local_size}, chunk_size {self.chunk_size}; "
                "expected 0 <= local_size < chunk_size"
            )
        if self.cap not in (None, self.chunk_size, self.chunk_size - 1):
            raise ConfigError(
                f"dual_chunk_attention: cap is {self.cap}; expected chunk_size = {self.chunk_size} (the released "
                f"code) or {self.chunk_size - 1} (the paper)"
            )

    @classmethod
    def released(cls, chunk_size: int, local_size: int) -> ChunkLayout:
        """The layout of the released code: queries up to position chunk_size."""
        return cls(chunk_size, local_size, chunk_size)

    @classmethod
    def paper(cls, chunk_size: int, local_size: int) -> ChunkLayout:
        """The layout of the papers: queries up to position chunk_size - 1."""
        return cls(chunk_size, local_size, chunk_size - 1)

    @property
    def stride(self) -> int:
        """L = c - w, tokens of a chunk ("chunk_len" in vLLM)."""
        return self.chunk_size - self.local_size

    @property
    def limit(self) -> int:
        """`cap`, as a number."""
        return self.chunk_size if self.cap is None else self.cap

    @property
    def inter_position(self) -> int:
        """Position of every query that meets a key two or more chunks back; no position is larger."""
        return min(2 * self.stride - 1, self.limit)

    @property
    def alike_from(self) -> int:
        """The first row of a chunk whose position towards the previous chunk is `inter_position`: w, if L > w."""
        return self.inter_position - self.stride if self.inter_position >= self.stride else 0


def query_positions(chunks: ChunkLayout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the positions of query rows (integers) towards the same, the previous and older chunks."""
    within = rows % chunks.stride
    return within, (within + chunks.stride).clamp(max=chunks.limit), torch.full_like(rows, chunks.inter_position)


def key_positions(chunks: ChunkLayout, columns: torch.Tensor) -> torch.Tensor:
    """Return the one position of each key."""
    return columns % chunks.stride


def chunks_back(chunks: ChunkLayout, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return how many chunks before that of its row each key lies, [rows, columns]; negative for keys to come."""
    return (rows // chunks.stride)[:, None] - (columns // chunks.stride)[None, :]


def relative_positions(chunks: ChunkLayout, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the distance each row has to each key, [rows, columns]: the matrix M of the papers, -1 where masked."""
    back = chunks_back(chunks, rows, columns)
    intra, succ, inter = (positions[:, None] for positions in query_positions(chunks, rows))
    of_rows = torch.where(back == 0, intra, torch.where(back == 1, succ, inter))
    is_visible = columns[None, :] <= rows[:, None]
    return torch.where(is_visible, of_rows - key_positions(chunks, columns)[None, :], -1)
