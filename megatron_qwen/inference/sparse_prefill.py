"""Sparse prefill: prompts beyond a threshold attend to the columns and diagonals that matter, chosen as they come.

How much each head keeps is calibrated before (`megatron-qwen eval sparse-calibration`) and read from config.json, or
from a `sparse_attention_config.json` beside it, as Qwen2.5-1M's files and vLLM have it. What is kept is chosen anew for
every piece of a prompt within a chunk, from the attention of the piece's last rows. Decoding and training stay dense.

Shapes: T new tokens of one sequence, K its tokens so far, N query heads and G key heads of this rank, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.model.config import QwenConfig

CONFIG_FILE = "sparse_attention_config.json"
THRESHOLD = 32768
"""Tokens of a prompt up to which it is dense, where config.json does not say; vLLM's `sparse_attention_threshold`."""
LAST_ROWS = 64
"""Rows that are scored, where config.json does not say; vLLM's `sparse_attention_last_q`."""

Mode = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class SparseRequest:
    """What a caller asks for.

    Attributes:
        mode: "auto" for what the model's files say, "on" (budgets must be there) or "off".
        config_file: budgets in the place of the model's; asks for sparse prefill by itself.
        threshold: tokens in the place of the model's.

    Raises:
        ConfigError: a mode that does not exist or contradicts the rest, or a negative threshold.
    """

    mode: str = "auto"
    config_file: Path | None = None
    threshold: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"sparse prefill: got {self.mode!r}, expected one of {', '.join(get_args(Mode))}")
        if self.mode == "off" and (self.config_file is not None or self.threshold is not None):
            raise ConfigError(
                f"sparse prefill is off, and budgets ({self.config_file}) or a threshold ({self.threshold}) are given; "
                "expected neither, or sparse prefill on"
            )
        if self.threshold is not None and self.threshold < 0:
            raise ConfigError(f"sparse prefill: threshold is {self.threshold}; expected 0 tokens or more")


@dataclass(frozen=True, kw_only=True)
class SparsePrefill:
    """How long prompts are attended.

    Attributes:
        budgets: of all layers and query heads of the model.
        threshold: prompts with more tokens are sparse, whole; those with fewer, or as many, are dense.
        last_rows: rows of a piece from which columns and diagonals are chosen.
    """

    budgets: ops.SparseAttentionConfig
    threshold: int = THRESHOLD
    last_rows: int = LAST_ROWS

    @classmethod
    def of_model(
        cls, config: QwenConfig, folder: Path | None, request: SparseRequest, *, has_chunks: bool
    ) -> SparsePrefill | None:
        """Return what a model's files and a request come to, None for dense prefill.

        Left to the model, prefill is sparse where Dual Chunk Attention is on, budgets are there, and config.json does
        not say `"sparse_attention_enabled": false`.

        Args:
            config: of the model.
            folder: of the model; budgets may lie in a file beside its config.json. None for none.
            request: what is asked for.
            has_chunks: whether texts are attended in chunks.

        Raises:
            ConfigError: the request or config.json asks for it and there are no budgets, or they do not fit the model.
        """
        block = config.dual_chunk_attention
        enabled = None if block is None else block.sparse_attention_enabled
        is_asked = request.mode == "on" or request.config_file is not None
        if request.mode == "off" or not (is_asked or (has_chunks and enabled is not False)):
            return None
        budgets = _find_budgets(config, folder, request.config_file)
        if budgets is None and (is_asked or enabled):
            raise ConfigError(_no_budgets(folder, by_model=not is_asked))
        if budgets is None:
            return None
        own = None if block is None else block.sparse_attention_threshold
        last_rows = None if block is None else block.sparse_attention_last_q
        thresholds = (each for each in (request.threshold, own, THRESHOLD) if each is not None)
        return cls(budgets=budgets, threshold=next(thresholds), last_rows=last_rows or LAST_ROWS)

    def applies_to(self, prompt_tokens: int) -> bool:
        """Whether a prompt of so many tokens is attended sparsely; of vLLM's, too, the whole length counts."""
        return prompt_tokens > self.threshold


def _find_budgets(config: QwenConfig, folder: Path | None, file: Path | None) -> ops.SparseAttentionConfig | None:
    sizes = {"num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads}
    if file is not None:
        return ops.SparseAttentionConfig.read(file, **sizes)
    block = config.dual_chunk_attention
    if block is not None and block.sparse_attention_config is not None:
        try:
            return ops.SparseAttentionConfig.from_json(block.sparse_attention_config, **sizes)
        except ConfigError as error:
            raise ConfigError(f"dual_chunk_attention_config.sparse_attention_config: {error}") from None
    if folder is None:
        return None
    from megatron_qwen.conversion.loading import config_folder

    beside = config_folder(folder) / CONFIG_FILE
    return ops.SparseAttentionConfig.read(beside, **sizes) if beside.is_file() else None


def _no_budgets(folder: Path | None, *, by_model: bool) -> str:
    asks = "the model's config.json says sparse_attention_enabled" if by_model else "sparse prefill is asked for"
    return (
        f"{asks}, and there are no budgets for the model's heads: no sparse_attention_config in config.json, no "
        f"{CONFIG_FILE} in {folder or 'a folder of the model'}. Calibrate them (megatron-qwen eval sparse-calibration "
        f"{folder or 'MODEL'} --text FILE --out {folder or 'MODEL'}), give a file (--sparse-attention-config, "
        "SparseRequest(config_file=)), or switch it off (--sparse-prefill off, SparseRequest(mode='off'))"
    )


@dataclass(frozen=True, kw_only=True)
class PromptAttention:
    """The attention of one layer for new tokens of one prompt, on this rank.

    Attributes:
        layer: number of the layer in the model, from 0.
        first_head: number of this rank's first query head in the layer.
        query: raw, [T, N, D].
        keys: rotated, [K, G, D]; K >= T, the new tokens are the last.
        values: [K, G, D].
        logit_scale: see `LongContext.logit_scale`, [T] or None.
        chunks: of Dual Chunk Attention, or None.
        tables: cos and sin with the positions of `table_rows`.
        softmax_scale: None for 1 / sqrt(D).
    """

    layer: int
    first_head: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    logit_scale: torch.Tensor | None
    chunks: ops.ChunkLayout | None
    tables: tuple[torch.Tensor, torch.Tensor]
    softmax_scale: float | None

    def budgets(self, config: ops.SparseAttentionConfig) -> Sequence[ops.HeadBudget]:
        """Return the budgets of this layer's heads on this rank."""
        return config.layers[self.layer][self.first_head : self.first_head + self.query.shape[1]]

    def within_chunks(self) -> Iterator[tuple[slice, PromptAttention]]:
        """Yield rows of the query that lie in one chunk, and the attention of these: the unit of selection."""
        start, end = self.keys.shape[0] - self.query.shape[0], self.keys.shape[0]
        while start < end:
            stop = end if self.chunks is None else min((start // self.chunks.stride + 1) * self.chunks.stride, end)
            yield self._rows(start, stop)
            start = stop

    def _rows(self, start: int, stop: int) -> tuple[slice, PromptAttention]:
        before = self.keys.shape[0] - self.query.shape[0]
        rows = slice(start - before, stop - before)
        values: dict[str, Any] = {**vars(self), "query": self.query[rows]}
        values |= {"keys": self.keys[:stop], "values": self.values[:stop]}
        values |= {"logit_scale": None if self.logit_scale is None else self.logit_scale[rows]}
        return rows, PromptAttention(**values)

    @property
    def options(self) -> dict[str, Any]:
        """What the operations are told beside query, keys and values."""
        return {
            "chunks": self.chunks,
            "tables": self.tables,
            "keys_rotated": True,
            "softmax_scale": self.softmax_scale,
            "logit_scale": self.logit_scale,
        }


def attend_sparsely(attention: PromptAttention, sparse: SparsePrefill) -> torch.Tensor:
    """Return the output [T, N, D] over the pairs that the budgets keep.

    Beside the index, kilobytes, it takes what `ops.estimate_index` and `ops.sparse_prefill_attention` take for a piece.
    """
    output = torch.empty_like(attention.query)
    for rows, part in attention.within_chunks():
        index = ops.estimate_index(
            part.query, part.keys, part.budgets(sparse.budgets), last_rows=sparse.last_rows, **part.options
        )
        output[rows], _ = ops.sparse_prefill_attention(part.query, part.keys, part.values, index, **part.options)
    return output


def table_rows(chunks: ops.ChunkLayout) -> int:
    """Return the positions of rotary tables for choosing: queries are scored at positions without a clamp."""
    return 2 * chunks.chunk_size - chunks.local_size
