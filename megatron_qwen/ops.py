"""The operations that have kernels of their own, as functions of tensors. The only door to `kernels/`.

Each is an operation of torch (namespace `megatron_qwen`), so that torch.compile, activation recompute and CUDA graphs
work, and each has a definition in plain torch that runs anywhere. Which backend computes it is explained in
docs/kernels.md: `MEGATRON_QWEN_BACKEND=auto|cuda|triton|reference`, or `use_backend` around a block.
"""

from __future__ import annotations

import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.backends import (
    BACKENDS,
    OPERATIONS,
    OpChoice,
    explain_choice,
    requested_backend,
    use_backend,
)
from megatron_qwen.kernels.dual_chunk_attention import (
    ChunkLayout,
    dual_chunk_attention,
    dual_chunk_attention_backward,
    log_length_temperature,
    merge_attention,
    paged_decode_attention,
    prescaled_keys,
)
from megatron_qwen.kernels.grouped_mlp import SharedExpert, grouped_mlp, moe_mlp
from megatron_qwen.kernels.linear_cross_entropy import (
    TokenLosses,
    WeightGradient,
    linear_cross_entropy,
    linear_cross_entropy_terms,
)
from megatron_qwen.kernels.moe_permute import ExpertOrder, expert_order, moe_permute, moe_unpermute
from megatron_qwen.kernels.moe_routing import (
    Routing,
    huggingface_balance_loss,
    megatron_balance_loss,
    moe_routing,
    z_loss,
)
from megatron_qwen.kernels.qkv_rope import context_parallel_positions, packed_positions, qkv_rope, rope_tables
from megatron_qwen.kernels.rms_norm import add_rms_norm, rms_norm
from megatron_qwen.kernels.rope import rope_
from megatron_qwen.kernels.sparse_attention import (
    HeadBudget,
    Refinement,
    SparseAttentionConfig,
    SparseIndex,
    attention_recall,
    estimate_index,
    refined_budgets,
    sparse_prefill_attention,
)
from megatron_qwen.kernels.swiglu import swiglu

__all__ = [
    "BACKENDS",
    "OPERATIONS",
    "ChunkLayout",
    "ExpertOrder",
    "HeadBudget",
    "OpChoice",
    "Refinement",
    "Routing",
    "SharedExpert",
    "SparseAttentionConfig",
    "SparseIndex",
    "TokenLosses",
    "WeightGradient",
    "add_rms_norm",
    "attention_recall",
    "choices",
    "context_parallel_positions",
    "dual_chunk_attention",
    "dual_chunk_attention_backward",
    "estimate_index",
    "expert_order",
    "explain_choice",
    "grouped_mlp",
    "huggingface_balance_loss",
    "linear_cross_entropy",
    "linear_cross_entropy_terms",
    "log_length_temperature",
    "megatron_balance_loss",
    "merge_attention",
    "moe_mlp",
    "moe_permute",
    "moe_routing",
    "moe_unpermute",
    "packed_positions",
    "paged_decode_attention",
    "prescaled_keys",
    "qkv_rope",
    "refined_budgets",
    "requested_backend",
    "rms_norm",
    "rope_",
    "rope_tables",
    "sparse_prefill_attention",
    "swiglu",
    "use_backend",
    "z_loss",
]


def choices() -> list[OpChoice]:
    """Return which backend each operation would use here for bf16 tensors, and why; by name.

    On the CUDA device if there is one, on the CPU otherwise. A request that cannot be met shows as backend "none"
    with the words of the error.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for op in sorted(OPERATIONS):
        try:
            found.append(explain_choice(op, device))
        except ConfigError as error:
            found.append(OpChoice(op=op, backend="none", reason=str(error)))
    return found
