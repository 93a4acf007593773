"""Core attention on torch's scaled_dot_product_attention, in the place of Megatron's local one.

Megatron's `DotProductAttention` repeats keys and values for grouped queries and holds the scores
[B, N, S, S]; this one does neither where torch has a fused kernel for the case.

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

from megatron_qwen.errors import ConfigError

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
            cp_comm_type: not used.
            pg_collection: not used; the heads of this rank are read off the inputs.

        Raises:
            ConfigError: context parallelism, windows, a softmax offset or layer-wise scaling.
        """
        super().__init__(config=config)
        _require_supported(config)
        self.is_causal = attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.softmax_scale

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
            query: [S, B, N, D], or [S, N, D] packed.
            key: [T, B, G, D], or [T, G, D] packed; T >= S with a key-value cache.
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
            ConfigError: an attention bias.
        """
        if attention_bias is not None:
            raise ConfigError("attention bias is not supported by the local backend; use backend 'te'")
        if packed_seq_params is not None and query.dim() == 3:
            return self._packed(query, key, value, packed_seq_params)
        q_BNSD, k_BGTD, v_BGTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_BNSD = self._attend(q_BNSD, k_BGTD, v_BGTD, attention_mask)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        # One call per sequence: neither a [S, T] mask nor a token of another sequence is ever touched.
        query_bounds, key_bounds = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist()
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


def _require_supported(config: TransformerConfig) -> None:
    problems = {
        "context_parallel_size": (config.context_parallel_size, 1),
        "softmax_type": (config.softmax_type, "vanilla"),
        "window_size": (config.window_size, None),
        "apply_query_key_layer_scaling": (config.apply_query_key_layer_scaling, False),
    }
    found = [f"{name}: got {got!r}, supported {good!r}" for name, (got, good) in problems.items() if got != good]
    if found:
        raise ConfigError(
            f"local attention: {'; '.join(found)}. Use backend 'te' on a GPU, or leave these at their defaults."
        )
