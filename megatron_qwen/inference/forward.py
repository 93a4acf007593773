"""One forward call over the paged cache: new tokens of some sequences, through every stage of the model.

The tokens of all sequences stand one behind the other, without padding, whether they are parts of prompts (prefill) or
one new token of each (decode). A prompt that is attended sparsely has calls of its own. During a call every layer's
self-attention is replaced; its projections, the norms, the MLPs and the parameters stay the model's, of whatever
backend.

Shapes: T new tokens, R sequences, N query heads and G key-value heads of this rank, D head size, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_qwen import ops
from megatron_qwen.inference.cache import PagedCache, gather
from megatron_qwen.inference.long_context import LongContext
from megatron_qwen.inference.sparse_prefill import PromptAttention, attend_sparsely
from megatron_qwen.model.rope import model_tables


@dataclass(frozen=True, kw_only=True)
class Segment:
    """New tokens of one sequence.

    Attributes:
        sequence: its number in the cache.
        tokens: token ids.
        start: position of the first of them; everything before is in the cache.
        prompt_tokens: length of the prompt that they are a part of; 0 for a token that was chosen.
    """

    sequence: int
    tokens: Sequence[int]
    start: int
    prompt_tokens: int = 0

    @property
    def end(self) -> int:
        """Tokens of the sequence that the cache holds after the call."""
        return self.start + len(self.tokens)


class PagedForward:
    """A model over a cache, on this rank.

    Collective: all ranks of the layout make the same calls.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        cache: PagedCache,
        context: LongContext,
        max_tokens: int,
        observer: Callable[[PromptAttention], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            chunks: this rank's GPTModel, or its virtual stages.
            cache: with as many layers as they have together.
            context: how to attend.
            max_tokens: of the longest sequence.
            observer: shown the attention of each layer of this rank before it is computed, in calls of one prompt.
        """
        self._chunks, self._cache, self._observer = chunks, cache, observer
        self._context = context.within(max_tokens)
        has_chunks = self._context.chunks is not None
        rows = self._context.table_rows(max_tokens, is_watched=observer is not None)
        self._tables = model_tables(chunks[0], rows, exact=has_chunks)
        self._step: _Step | None = None

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """Have the model's attention modules use the cache, for one call: in between the model is its owner's."""
        layers = [layer.self_attention for chunk in self._chunks for layer in chunk.decoder.layers]
        try:
            for index, attention in enumerate(layers):
                attention.forward = _CachedAttention(self, attention, index)
            yield
        finally:
            for attention in layers:
                vars(attention).pop("forward", None)

    def hidden(self, segments: Sequence[Segment]) -> torch.Tensor | None:
        """Return the last layer's hidden states [T, 1, H] of the segments' tokens on the last stage, else None."""
        self._step = _Step.of(segments, self._cache, self._context, self._tables[0].device)
        with self._attached():
            return self._through_stages(self._step)

    def _through_stages(self, step: _Step) -> torch.Tensor | None:
        from megatron.core import parallel_state

        hidden: torch.Tensor | None = None
        for chunk in self._chunks:
            if chunk.pre_process:
                hidden = chunk.embedding(input_ids=step.tokens[None], position_ids=step.positions[None])
            else:
                size = len(step.tokens), 1, chunk.config.hidden_size
                received = torch.empty(size, dtype=chunk.config.pipeline_dtype, device=step.tokens.device)
                dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
                chunk.set_input_tensor(received)
                hidden = None
            hidden = chunk.decoder(hidden_states=hidden, attention_mask=None)
            if not chunk.post_process:
                assert hidden is not None
                dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
                hidden = None
        return hidden

    def logits(self, segments: Sequence[Segment], wanted: Sequence[int]) -> torch.Tensor | None:
        """Return the logits [segments, V] behind the last token of the wanted segments on the last stage, else None.

        V counts the rows of the output layer on all ranks, padding included.
        """
        hidden_T1H = self.hidden(segments)
        if hidden_T1H is None or not wanted:
            return None
        ends = list(itertools.accumulate(len(segment.tokens) for segment in segments))
        rows = torch.tensor([ends[index] - 1 for index in wanted], device=hidden_T1H.device)
        model = self._chunks[-1]
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        logits_R1V, _ = model.output_layer(hidden_T1H[rows], weight=weight, runtime_gather_output=True)
        return logits_R1V[:, 0]  # type: ignore[no-any-return]

    def attend(self, attention: Any, layer: int, hidden_T1H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do what a self-attention module does, with keys and values of the cache; see `_CachedAttention`."""
        step, context = self._step, self._context
        assert step is not None
        query, key, value = (each[:, 0] for each in attention.get_query_key_value_tensors(hidden_T1H, None))
        cos, sin = self._tables
        ops.rope_(key, None, cos, sin, positions=step.key_positions)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.flatten(0, 1)[step.slots] = key
        values.flatten(0, 1)[step.slots] = value
        options: dict[str, Any] = {
            "chunks": context.chunks,
            "tables": self._tables,
            "softmax_scale": attention.config.softmax_scale,
            "logit_scale": step.logit_scale,
        }
        if step.is_decode:
            output = ops.paged_decode_attention(query, keys, values, step.page_table, step.cached_lengths, **options)
            return attention.linear_proj(output.flatten(1)[:, None])  # type: ignore[no-any-return]
        packed = [gather(pages, step.pages, step.lengths) for pages in (keys, values)]
        if self._observer is not None:
            self._observer(_of_prompt(attention, query, packed, options))
        if step.is_sparse:
            assert context.sparse is not None
            output = attend_sparsely(_of_prompt(attention, query, packed, options), context.sparse)
        else:
            output, _ = ops.dual_chunk_attention(
                query, *packed, keys_rotated=True, cu_seqlens_q=step.query_bounds, cu_seqlens_k=step.key_bounds,
                **options,
            )  # fmt: skip
        return attention.linear_proj(output.flatten(1)[:, None])  # type: ignore[no-any-return]


def _of_prompt(
    attention: Any, query: torch.Tensor, packed: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> PromptAttention:
    """Say of which layer and heads the query [T, N, D], keys and values [K, G, D] of one prompt are."""
    from megatron.core import parallel_state

    keys, values = packed
    return PromptAttention(
        layer=attention.layer_number - 1,  # Megatron counts the layers of all stages, from 1
        first_head=parallel_state.get_tensor_model_parallel_rank() * query.shape[1],
        query=query,
        keys=keys,
        values=values,
        **options,
    )


class _CachedAttention:
    """In the place of a self-attention module's `forward`, as its layer calls it."""

    def __init__(self, forward: PagedForward, attention: Any, layer: int) -> None:
        self._forward, self._attention, self._layer = forward, attention, layer

    def __call__(
        self, hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # what else a layer says (mask, rotation) the step knows better
        return self._forward.attend(self._attention, self._layer, hidden_states)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Where the tokens of one call come from and go to; the same for all layers.

    Attributes:
        tokens: ids, int64 [T].
        positions: in their texts, int64 [T].
        key_positions: rows of the rotary tables at which keys are rotated, int64 [T].
        slots: where keys and values go, over all pages, int64 [T].
        logit_scale: see `LongContext`, fp32 [T].
        pages: of each sequence.
        lengths: tokens of each sequence, the new ones included.
        query_bounds, key_bounds: where sequences start in packed queries and keys, int32 [R + 1].
        page_table: pages, int32 [R, most pages], zeros behind the last of a sequence.
        cached_lengths: `lengths` as int32 [R].
        is_decode: there is one new token per sequence, and none of a sparse prompt.
        is_sparse: the tokens are of one prompt, which is attended sparsely.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    key_positions: torch.Tensor
    slots: torch.Tensor
    logit_scale: torch.Tensor | None
    pages: list[list[int]]
    lengths: list[int]
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    page_table: torch.Tensor
    cached_lengths: torch.Tensor
    is_decode: bool
    is_sparse: bool

    @classmethod
    def of(cls, segments: Sequence[Segment], cache: PagedCache, context: LongContext, device: torch.device) -> _Step:
        positions = torch.cat([torch.arange(each.start, each.end) for each in segments])
        slots = [slot for each in segments for slot in cache.slots(each.sequence, each.start, each.end)]
        lengths = [each.end for each in segments]
        pages = [cache.pages(each.sequence)[: cache.shape.pages_for(each.end)] for each in segments]
        most = max(len(each) for each in pages)
        scale = context.logit_scale(positions)
        is_sparse = any(context.is_sparse(each.prompt_tokens) for each in segments)
        assert not is_sparse or len(segments) == 1, "a sparse prompt shares a call with others"
        return cls(
            tokens=torch.tensor([token for each in segments for token in each.tokens], device=device),
            positions=positions.to(device),
            key_positions=context.key_positions(positions).to(device),
            slots=torch.tensor(slots, device=device),
            logit_scale=None if scale is None else scale.to(device),
            pages=pages,
            lengths=lengths,
            query_bounds=_bounds([len(each.tokens) for each in segments], device),
            key_bounds=_bounds(lengths, device),
            page_table=torch.tensor([each + [0] * (most - len(each)) for each in pages], dtype=torch.int32).to(device),
            cached_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            is_decode=not is_sparse and all(len(each.tokens) == 1 for each in segments),
            is_sparse=is_sparse,
        )


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
