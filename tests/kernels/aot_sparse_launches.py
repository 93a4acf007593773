"""As aot_launches.py, for sparse prefill.

Usage: aot_sparse_launches.py ARCHITECTURE [LABEL ...].
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable

import torch
from aot_dual_chunk_launches import CHUNKS, HEADS, TOKENS
from aot_launches import DTYPES, facts, meta

from megatron_qwen import ops
from megatron_qwen.kernels.dual_chunk_attention.request import AttentionRequest
from megatron_qwen.kernels.sparse_attention import kernel

SLASHES, VERTICALS = 6096, 1000


def launch_sparse(size: int, dtype: torch.dtype, chunks: ops.ChunkLayout | None) -> None:
    """The last half of the tokens, with a temperature where there are chunks. Meta tensors: reading one raises."""
    heads, heads_k = HEADS[size]
    q, k = meta(TOKENS // 2, heads, size, dtype=dtype), meta(TOKENS, heads_k, size, dtype=dtype)
    table = meta(TOKENS, size // 2, dtype=torch.float32)
    bounds = meta(heads + 1, dtype=torch.int64)
    verticals, slashes = meta(heads * VERTICALS, dtype=torch.int32), meta(heads * SLASHES, 2, dtype=torch.int32)
    request = AttentionRequest(
        chunks=chunks,
        tables=(table, table),
        keys_rotated=False,
        cu_seqlens=None,
        query_start=TOKENS // 2,
        key_start=0,
        scale=size**-0.5,
        logit_scale=None if chunks is None else meta(TOKENS // 2, dtype=torch.float32),
        deterministic=True,
    )
    kernel.launch_forward(q, k, k, ops.SparseIndex(TOKENS, verticals, bounds, slashes, bounds), request)


def launches() -> dict[str, Callable[[], None]]:
    """Launch by label: segments, head size, dtype."""
    return {
        f"sparse {segments} {size} {name}": functools.partial(launch_sparse, size, dtype, chunks)
        for size, (name, dtype), (segments, chunks) in itertools.product(HEADS, DTYPES.items(), CHUNKS.items())
    }


if __name__ == "__main__":
    architecture, wanted = int(sys.argv[1]), sys.argv[2:]
    table = launches()
    print(json.dumps([row for label in wanted or table for row in facts(label, table[label], architecture)]))
