"""Core attention in the place of Megatron's local one: plain, Dual Chunk Attention, and across context-parallel ranks.

Plain attention on one rank is torch's scaled_dot_product_attention: Megatron's `DotProductAttention` repeats keys and
values for grouped queries and holds the scores [B, N, S, S]; this one does neither where torch has a fused kernel for
the case. The others are `ops.dual_chunk_attention`, of which plain causal attention is a special case; where the keys
of other ranks come from is in `parallel/context.py`.

Shapes: S query tokens, T key tokens, B sequences, N query heads and G key-value heads of this rank,
D head size.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.dual_chunk import DualChunk, dual_chunk_of
from megatron_qwen.model.gathered_attention import CausalAttention, attend_gathered, attend_packed, plan_packed
from megatron_qwen.model.positions import bounds_on_host, packed_bounds, rank_positions, sequence_length
from megatron_qwen.model.ring_attention import attend_ring
from megatron_qwen.parallel.context import RING, packed_lengths, require_comm_type
from megatron_qwen.parallel.per_tensor import PerTensor

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.transformer_config import TransformerConfig


class CoreAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """softmax(Q K^T / sqrt(D)) V with Megatron's interface; it has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        """Check that the configuration asks for nothing this module does not do.

        Args:
            config: the model.
            layer_number: not used.
            attn_mask_type: causal kinds mask the future; others mask nothing by themselves.
            attention_type: not used.
            attention_dropout: probability; the configuration's if None.
            softmax_scale: D^-0.5 if None.
            cp_comm_type: how context-parallel ranks come by the keys: "p2p" (also for None) or "all_gather".
            pg_collection: Megatron's groups, of which the context-parallel one is taken; the running ones if None.

        Raises:
            ConfigError: windows, a softmax offset, layer-wise scaling, another kind of context parallelism, or that
                with dropout.
        """
        super().__init__(config=config)
        _require_supported(config)
        self.is_causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.softmax_scale
        self.dual_chunk: DualChunk | None = dual_chunk_of(config)
        self.cp_group, self.cp_comm_type = None, cp_comm_type or RING
        if config.context_parallel_size > 1:
            require_comm_type(self.cp_comm_type, "cp_comm_type")
            if self.dropout:
                raise ConfigError(f"attention_dropout: got {self.dropout}; expected 0 with context parallelism")
            self.cp_group = _context_parallel_group(config.context_parallel_size, pg_collection)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, N, D], or [S, N, D] packed. Rotated; but where Dual Chunk Attention is active for sequences
                of this length (`DualChunk.is_active`), as projected.
            key: [T, B, G, D], or [T, G, D] packed; T >= S with a key-value cache. Rotated; for Dual Chunk Attention
                at the positions within chunks.
            value: as key.
            attention_mask: bool, True where a query must not see a key, broadcastable to [B, N, S, T];
                it is the whole mask. None: the last query sees every key, and earlier ones fewer, if causal.
            attn_mask_type: not used. Megatron says "no mask" once there is a cache, meaning one new
                token; the causal rule covers that and several new tokens too.
            attention_bias: must be None.
            packed_seq_params: sequence boundaries (`cu_seqlens_q`, `cu_seqlens_kv`) of packed input.

        Returns:
            [S, B, N * D], or [S, N * D] packed.

        Raises:
            ConfigError: an attention bias; or a mask, dropout or a cache where the operation takes none.
        """
        if attention_bias is not None:
            raise ConfigError("attention bias is not supported by the local backend; use backend 'te'")
        packed = packed_seq_params if query.dim() == 3 else None
        length = self._chunked_length(key, packed)
        if length is not None or self.cp_group is not None:
            self._require_plain_causal(attention_mask, query, key)
            return self._by_operation(query, key, value, packed, length)
        if packed_seq_params is not None and query.dim() == 3:
            return self._packed(query, key, value, packed_seq_params)
        q_BNSD, k_BGTD, v_BGTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BNSD = self._attend(q_BNSD, k_BGTD, v_BGTD, attention_mask)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        # One call per sequence: neither a [S, T] mask nor a token of another sequence is ever touched.
        query_bounds, key_bounds = (bounds_on_host(packed_bounds(packed, of_keys=each)) for each in (False, True))
        outs = []
        for q, q_end, k, k_end in zip(query_bounds, query_bounds[1:], key_bounds, key_bounds[1:], strict=False):
            parts = query[q:q_end], key[k:k_end], value[k:k_end]
            q_BNSD, k_BGTD, v_BGTD = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            outs.append(self._attend(q_BNSD, k_BGTD, v_BGTD, None)[0].transpose(0, 1).flatten(1))
        return torch.cat(outs)

    def _attend(
        self, q_BNSD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        queries, keys = q_BNSD.shape[2], k_BGTD.shape[2]
        is_causal = attention_mask is None and self.is_causal and queries > 1
        allowed = None if attention_mask is None else ~attention_mask
        if is_causal and queries != keys:
            # torch aligns is_causal to the first key; with a cache the last query meets the last key.
            allowed = torch.ones(queries, keys, dtype=torch.bool, device=q_BNSD.device).tril(keys - queries)
            is_causal = False
        dropout = self.dropout if self.training else 0.0
        with self._dropout_stream() if dropout else contextlib.nullcontext():
            return functional.scaled_dot_product_attention(
                q_BNSD, k_BGTD, v_BGTD, attn_mask=allowed, dropout_p=dropout, is_causal=is_causal,
                scale=self.softmax_scale, enable_gqa=q_BNSD.shape[1] != k_BGTD.shape[1],
            )  # fmt: skip

    def _dropout_stream(self) -> contextlib.AbstractContextManager[None]:
        # Heads differ between tensor-parallel ranks and must be dropped independently, as in Megatron's own.
        if self.config.sequence_parallel:
            return contextlib.nullcontext()
        return get_cuda_rng_tracker().fork()  # type: ignore[no-any-return]

    def _chunked_length(self, key: torch.Tensor, packed: PackedSeqParams | None) -> int | None:
        """Return the length of the longest sequence where Dual Chunk Attention is active for it, else None."""
        if self.dual_chunk is None:
            return None
        length = sequence_length(key.shape[0], packed, self.config.context_parallel_size)
        return length if self.dual_chunk.is_active(length) else None

    def _by_operation(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams | None,
        length: int | None,
    ) -> torch.Tensor:
        """Attend by `ops.dual_chunk_attention`; `length` is that of the longest sequence, None for plain attention."""
        dual = self.dual_chunk if length is not None else None
        attention, logit_scale = CausalAttention(softmax_scale=self.softmax_scale), None
        if dual is not None and length is not None:
            attention = CausalAttention(
                chunks=dual.chunks_at(length), tables=dual.tables(query.device), softmax_scale=self.softmax_scale
            )
            if dual.has_temperature(length):
                rows, offset = query.shape[0], key.shape[0] - query.shape[0]
                logit_scale = dual.logit_scale(
                    rank_positions(rows, packed, query.device, offset=offset, group=self.cp_group)
                )
        bounds = None if packed is None else packed_bounds(packed)
        if self.cp_group is None:
            output = _on_one_rank(query, key, value, attention, bounds, logit_scale)
        else:
            output = self._across_ranks(query, key, value, attention, bounds, logit_scale)
        return output.flatten(-2)

    def _across_ranks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention: CausalAttention,
        bounds: torch.Tensor | None,
        logit_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        group = self.cp_group
        assert group is not None, "only with context parallelism"
        rows = query, key, value, attention, group
        if self.cp_comm_type == RING:
            lengths = None
            if bounds is not None:
                lengths = packed_lengths(bounds_on_host(bounds), size=group.size())
            return attend_ring(*rows, lengths=lengths, logit_scale=logit_scale)
        if bounds is None:
            return attend_gathered(*rows, logit_scale=logit_scale)
        plan = _PLANS.get(bounds, lambda: plan_packed(bounds, rank=group.rank(), size=group.size()))
        return attend_packed(query, key, value, plan, attention, group, logit_scale=logit_scale)

    def _require_plain_causal(
        self, attention_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
    ) -> None:
        what = "context parallelism" if self.cp_group is not None else "Dual Chunk Attention"
        problems = {
            "an attention mask": attention_mask is not None,
            "attention that is not causal": not self.is_causal,
            "attention dropout in training": bool(self.dropout) and self.training,
            "a key-value cache": self.cp_group is not None and key.shape[0] != query.shape[0],
        }
        found = [name for name, is_there in problems.items() if is_there]
        if found:
            raise ConfigError(f"local attention: {' and '.join(found)} with {what}; expected none")


_PLANS = PerTensor()


def _on_one_rank(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention: CausalAttention,
    bounds: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
) -> torch.Tensor:
    options = {**attention.options(), "logit_scale": logit_scale}
    if bounds is not None:
        return ops.dual_chunk_attention(query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)[0]
    output, _ = ops.dual_chunk_attention(*(each.transpose(0, 1) for each in (query, key, value)), **options)
    return output.transpose(0, 1)


def _context_parallel_group(size: int, pg_collection: Any) -> Any:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group(False) if pg_collection is None else pg_collection.cp
    if group is None or group.size() != size:
        running = "none" if group is None else f"one of {group.size()} ranks"
        raise ConfigError(f"context_parallel_size: got {size}, but the context-parallel group is {running}")
    return group


def _require_supported(config: TransformerConfig) -> None:
    problems = {
        "softmax_type": (config.softmax_type, "vanilla"),
        "window_size": (config.window_size, None),
        "apply_query_key_layer_scaling": (config.apply_query_key_layer_scaling, False),
    }
    found = [f"{name}: got {got!r}, supported {good!r}" for name, (got, good) in problems.items() if got != good]
    if found:
        raise ConfigError(
            f"local attention: {'; '.join(found)}. Use backend 'te' on a GPU, or leave these at their defaults."
        )
