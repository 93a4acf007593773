"""As aot_launches.py, for Dual Chunk Attention.

Usage: aot_dual_chunk_launches.py ARCHITECTURE [LABEL ...].
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable

import torch
from aot_launches import DTYPES, facts, meta

from megatron_qwen import ops
from megatron_qwen.kernels.dual_chunk_attention import decode_kernel, kernel
from megatron_qwen.kernels.dual_chunk_attention.request import AttentionRequest

TOKENS = 32768
CHUNKS = {"chunks": ops.ChunkLayout.released(8192, 1024), "plain": None}
# Query and key heads by the size of a head: Qwen2.5 0.5B and 7B.
HEADS = {64: (14, 2), 128: (28, 4)}
PAGE = 256


def launch_attention(size: int, dtype: torch.dtype, chunks: ops.ChunkLayout | None, packed: bool) -> None:
    """Forward and backward; packed ones have a temperature too, and what takes fewest registers is not compiled."""
    heads, heads_k = HEADS[size]
    lead = () if packed else (1,)
    q, k = meta(*lead, TOKENS, heads, size, dtype=dtype), meta(*lead, TOKENS, heads_k, size, dtype=dtype)
    table = meta(TOKENS, size // 2, dtype=torch.float32)
    bounds = meta(9, dtype=torch.int32)
    request = AttentionRequest(
        chunks=chunks,
        tables=(table, table),
        keys_rotated=False,
        cu_seqlens=(bounds, bounds) if packed else None,
        query_start=0,
        key_start=0,
        scale=size**-0.5,
        logit_scale=meta(TOKENS, dtype=torch.float32) if packed else None,
        deterministic=True,
    )
    output, lse = kernel.launch_forward(q, k, k, request)
    kernel.launch_backward(output, q, k, k, output, lse, request)


def launch_decode(size: int, dtype: torch.dtype, chunks: ops.ChunkLayout | None) -> None:
    heads, heads_k = HEADS[size]
    pages = meta(1024, PAGE, heads_k, size, dtype=dtype)
    table = meta(TOKENS, size // 2, dtype=torch.float32)
    index = meta(16, TOKENS // PAGE, dtype=torch.int32)
    decode_kernel.launch_decode(
        meta(16, heads, size, dtype=dtype), pages, pages, index, meta(16, dtype=torch.int32), chunks, (table, table),
        size**-0.5, None,
    )  # fmt: skip


def launches() -> dict[str, Callable[[], None]]:
    """Launch by label: operation, form, segments, head size, dtype."""
    table: dict[str, Callable[[], None]] = {}
    for size, (name, dtype), (segments, chunks) in itertools.product(HEADS, DTYPES.items(), CHUNKS.items()):
        label = f"{segments} {size} {name}"
        for form in ("batch", "packed"):
            table[f"attention {form} {label}"] = functools.partial(
                launch_attention, size, dtype, chunks, form == "packed"
            )
        table[f"decode {label}"] = functools.partial(launch_decode, size, dtype, chunks)
    return table


if __name__ == "__main__":
    architecture, wanted = int(sys.argv[1]), sys.argv[2:]
    table = launches()
    print(json.dumps([row for label in wanted or table for row in facts(label, table[label], architecture)]))
