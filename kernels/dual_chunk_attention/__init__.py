"""Dual Chunk Attention, plain causal attention, and decoding against a paged cache."""

from .decode import paged_decode_attention
from .layout import ChunkLayout
from .merge import merge_attention
from .op import dual_chunk_attention, dual_chunk_attention_backward
from .temperature import log_length_temperature, prescaled_keys

__all__ = [
    "ChunkLayout",
    "dual_chunk_attention",
    "dual_chunk_attention_backward",
    "log_length_temperature",
    "merge_attention",
    "paged_decode_attention",
    "prescaled_keys",
]
