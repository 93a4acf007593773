"""Sparse prefill inside Dual Chunk Attention: budgets, estimation, index, attention over kept pairs, calibration."""

from .calibration import Refinement, attention_recall, refined_budgets
from .configuration import HeadBudget, SparseAttentionConfig
from .estimation import estimate_index
from .index import SparseIndex
from .op import sparse_prefill_attention

__all__ = [
    "HeadBudget",
    "Refinement",
    "SparseAttentionConfig",
    "SparseIndex",
    "attention_recall",
    "estimate_index",
    "refined_budgets",
    "sparse_prefill_attention",
]
