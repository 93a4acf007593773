"""Self-attention whose bias, rotary embedding and split into q, k, v are one operation, `ops.qkv_rope`.

Megatron-Core does the three in steps, and leaves the fused kernels it knows for YaRN, packed sequences and context
parallelism. Everything behind q, k and v is Megatron's own: key-value cache, core attention, output projection.

Sequences long enough for Dual Chunk Attention are another case: a query is rotated up to three times, by the core
attention, and a key once, here, by its position within its chunk; that is how keys enter a cache, too.

Shapes: S tokens of a sequence, B sequences, T tokens of packed sequences, W columns of the packed projection,
R rotated dimensions of a head, P positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.dual_chunk import dual_chunk_of
from megatron_qwen.model.positions import rank_positions, sequence_length
from megatron_qwen.model.rope import Rotation, rotation_of

if TYPE_CHECKING:
    import torch.distributed as dist
    from megatron.core.packed_seq_params import PackedSeqParams


class QwenSelfAttention(SelfAttention):  # type: ignore[misc]  # megatron-core is untyped
    """Megatron-Core's SelfAttention with the same parameters; keys enter the cache rotated.

    The projection leaves its bias to `ops.qkv_rope`. What that operation does not do (norms of q and k, an output
    gate, interleaved rotation, positions that differ between the rows of a batch, fewer groups than tensor-parallel
    ranks, Megatron's dynamic batching) takes Megatron's own way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build Megatron's module; arguments are its own."""
        super().__init__(*args, **kwargs)
        self._can_fuse = self.can_fuse()
        self._rotation: Rotation | None = None
        self._key_rotation: Rotation | None = None

    def can_fuse(self) -> bool:
        """Whether `ops.qkv_rope` does all that stands between this module's projection and its core attention."""
        config = self.config
        norms = self.q_layernorm, self.k_layernorm  # none: None since megatron-core 0.17, an IdentityOp before
        return (
            all(norm is None or isinstance(norm, IdentityOp) for norm in norms)
            and not (config.rotary_interleaved or config.flash_decode or config.no_rope_freq or config.test_mode)
            and not getattr(config, "attention_output_gate", False)
            and config.num_query_groups >= self.world_size
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [S, B, H], or [T, 1, H] packed; a part of S or T with sequence parallelism.
            attention_mask: see `CoreAttention`.
            args: further arguments of Megatron's module.
            rotary_pos_emb: angles [P, 1, 1, R] in radians, as GPTModel makes them; None attends without positions.
            inference_context: Megatron's static key-value cache, or None.
            packed_seq_params: boundaries of packed sequences, or None.
            kwargs: as args.

        Returns:
            Output [S, B, H] (or [T, 1, H]), and the bias that the output projection left out, if any.
        """
        rest = {"inference_context": inference_context, "packed_seq_params": packed_seq_params, **kwargs}
        tokens = hidden_states.shape[0] * (self.world_size if self.config.sequence_parallel else 1)
        self._key_rotation = self._rotation_in_chunks(tokens, rotary_pos_emb, inference_context, packed_seq_params)
        if self._key_rotation is not None:
            try:
                return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **rest)  # type: ignore[no-any-return]
            finally:
                self._key_rotation = None
        is_static = inference_context is None or inference_context.is_static_batching()
        is_alike = isinstance(rotary_pos_emb, torch.Tensor) and rotary_pos_emb.shape[1] == 1
        if rotary_pos_emb is None or not (self._can_fuse and is_static and is_alike):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **rest
            )
        self._rotation = rotation_of(
            rotary_pos_emb,
            self.config,
            tokens=tokens,
            offset=0 if inference_context is None else int(inference_context.sequence_len_offset),
            packed=packed_seq_params,
            group=self._context_parallel_group(),
        )
        try:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **rest)  # type: ignore[no-any-return]
        finally:
            self._rotation = None

    def _rotation_in_chunks(
        self, tokens: int, rotary_pos_emb: Any, inference_context: Any, packed: PackedSeqParams | None
    ) -> Rotation | None:
        """Return how keys are rotated where Dual Chunk Attention is active, else None.

        Raises:
            ConfigError: it is active, with something that it cannot have.
        """
        dual = dual_chunk_of(self.config)
        if dual is None:
            return None
        offset = 0
        if inference_context is not None and inference_context.is_static_batching():
            offset = int(inference_context.sequence_len_offset)
        group = self._context_parallel_group()
        if not dual.is_active(sequence_length(offset + tokens, packed, 1 if group is None else group.size())):
            return None
        config = self.config
        problems = {
            "no rotary angles": not isinstance(rotary_pos_emb, torch.Tensor),
            "positions that differ between the rows of a batch": getattr(rotary_pos_emb, "shape", (1, 1))[1] != 1,
            "dynamic batching": inference_context is not None and not inference_context.is_static_batching(),
            "an interleaved rotation": config.rotary_interleaved,
            "flash decoding": config.flash_decode,
            "layers without rotation": bool(config.no_rope_freq),
        }
        found = [name for name, is_there in problems.items() if is_there]
        if found:
            raise ConfigError(f"Dual Chunk Attention beyond {dual.chunks.stride} tokens: got {', '.join(found)}")
        device = rotary_pos_emb.device
        positions = rank_positions(tokens, packed, device, offset=offset, group=group)
        cos, sin = dual.tables(device)
        return Rotation(cos=cos, sin=sin, positions=dual.key_positions(positions))

    def _context_parallel_group(self) -> dist.ProcessGroup | None:
        return self.pg_collection.cp if self.config.context_parallel_size > 1 else None

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return q [S, B, heads, D], k and v [S, B, groups, D] of this rank, q and k rotated.

        Where Dual Chunk Attention is active only k is. Called by Megatron's forward; without a rotation at hand it does
        what Megatron does.
        """
        if self._key_rotation is not None:
            query, key, *others = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
            return query, self._rotated_in_chunks(key, self._key_rotation), *others
        rotation = self._rotation
        if rotation is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        projection = self.linear_qkv
        leaves_bias, projection.skip_bias_add = projection.skip_bias_add, True
        try:
            packed_SBW, bias_W = projection(hidden_states)
        finally:
            projection.skip_bias_add = leaves_bias
        return ops.qkv_rope(
            packed_SBW,
            rotation.cos,
            rotation.sin,
            num_groups=self.num_query_groups_per_partition,
            head_dim=self.hidden_size_per_attention_head,
            bias=bias_W,
            positions=rotation.positions,
        )

    @staticmethod
    def _rotated_in_chunks(key: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        # A copy: k is one of several views of the projection's output, which autograd lets nobody overwrite.
        key = key.clone(memory_format=torch.contiguous_format)
        return ops.rope_(key, None, rotation.cos, rotation.sin, positions=rotation.positions)[0]
