"""Attention: Dual Chunk Attention and plain causal attention of prompts, its gradient, decoding from a paged cache.

Plain torch is the definition (`attention_definition.py`) and is not timed.

Shapes: T tokens of one sequence, S of them as rows, G key heads, M query heads for each, H = G M, D head size, B
sequences and N tokens of a page in decoding. q [T, H, D], k, v [T, G, D]; decoding: q [B, H, D], pages [P, N, G, D].
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from megatron_qwen import ops
from megatron_qwen.benchmark.ops import attention_definition as definition
from megatron_qwen.benchmark.ops import attention_peers as peers
from megatron_qwen.benchmark.ops.case import OpCase, Sizes, Workload, random_normal
from megatron_qwen.model.config import QwenConfig

_LONG = 16_384
"""Tokens above which only rows at the edges of chunks are compared with fp64 where there is no gradient."""


def _heads(config: QwenConfig, length: int) -> dict[str, int]:
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    return {"tokens": length, "groups": groups, "queries": queries, "head": config.head_dim}


def _chunked(config: QwenConfig, length: int) -> dict[str, int]:
    """32K with chunks of 8K and a window of 1K, 128K with 32K and 2K."""
    chunk = max(length // 4, 2)
    return {**_heads(config, length), "chunk": chunk, "local": chunk // (8 if length <= 32_768 else 16)}


def _decoding(config: QwenConfig, length: int, *, batch: int) -> dict[str, int]:
    chunk = min(max(length // 4, 2), 32_768)
    return {**_heads(config, length), "batch": batch, "chunk": chunk, "local": chunk // 16}


def _fewer_heads(sizes: dict[str, int]) -> dict[str, int]:
    """A quarter of the key heads, for a CPU."""
    return {**sizes, "groups": max(sizes["groups"] // 4, 1)}


def _tables(sizes: Sizes, positions: int, device: torch.device) -> definition.Tables:
    head = sizes["head"]
    return ops.rope_tables(
        1e6 ** (-torch.arange(0, head, 2, dtype=torch.float64, device=device) / head),
        max(positions, sizes["chunk"] + 1),
    )


def _edges(sizes: Sizes) -> tuple[tuple[int, int], ...]:
    """Rows around the ends of chunks (of a quarter of the tokens, where there are none), the first and the last."""
    tokens = sizes["tokens"]
    stride = sizes["chunk"] - sizes["local"] if "chunk" in sizes else tokens // 4
    inner = [(end - 16, end + 16) for end in range(stride, tokens - 32, stride)]
    return ((0, 16), *inner, (tokens - 16, tokens))


def _prompt(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, *, is_inference: bool) -> Workload:
    tokens, groups, head = sizes["tokens"], sizes["groups"], sizes["head"]
    shape = (tokens, groups * sizes["queries"], head)
    others: dict[str, torch.Tensor] = {"rows": torch.arange(tokens, dtype=torch.int32, device=device)}
    if "chunk" in sizes:
        others["cos"], others["sin"] = _tables(sizes, 0, device)
    return Workload(
        leaves={
            "q": random_normal(shape, dtype, device, seed),
            "k": random_normal((tokens, groups, head), dtype, device, seed + 1),
            "v": random_normal((tokens, groups, head), dtype, device, seed + 2),
        },
        others=others,
        grads=(random_normal(shape, dtype, device, seed + 3),),
        shared=frozenset({"k", "v", "cos", "sin"}),
        constants={name: sizes[name] for name in ("chunk", "local") if name in sizes},
        width=shape[1] * tokens,
        compared=_edges(sizes) if is_inference and tokens > _LONG else (),
    )


def _cache(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    """Sequences of all tokens, or each shorter than the one before by "ragged"; the pages of each follow each other."""
    batch, tokens, groups, head = (sizes[name] for name in ("batch", "tokens", "groups", "head"))
    pages = -(-tokens // definition.PAGE)
    lengths = [max(tokens - index * sizes.get("ragged", 0), 0) for index in range(batch)]
    cos, sin = _tables(sizes, 0, device)
    shape = (batch * pages, definition.PAGE, groups, head)
    return Workload(
        leaves={"q": random_normal((batch, groups * sizes["queries"], head), dtype, device, seed)},
        others={
            # No leaves: nobody changes these 8 GiB (16 times 256K tokens), and a copy for each contestant and the fp64
            # one of all would not fit beside each other.
            "key_pages": random_normal(shape, dtype, device, seed + 1),
            "value_pages": random_normal(shape, dtype, device, seed + 2),
            "page_table": torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages),
            "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
            "cos": cos,
            "sin": sin,
        },
        grads=(),
        shared=frozenset({"q", "y"}),
        constants={"chunk": sizes["chunk"], "local": sizes["local"], "longest": tokens},
    )


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, **rest: Any) -> torch.Tensor:
    """With chunks, heads are rotated here; without, they came rotated."""
    chunks = ops.ChunkLayout(rest["chunk"], rest["local"]) if rest else None
    tables = (rest["cos"], rest["sin"]) if rest else None
    return ops.dual_chunk_attention(q[None], k[None], v[None], chunks=chunks, tables=tables)[0][0]


def _decode_ours(
    q: torch.Tensor, key_pages: torch.Tensor, value_pages: torch.Tensor, page_table: torch.Tensor,
    lengths: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, chunk: int, local: int, longest: int,
) -> torch.Tensor:  # fmt: skip
    del longest  # for peers that must know it on the host
    chunks = ops.ChunkLayout(chunk, local)
    return ops.paged_decode_attention(q, key_pages, value_pages, page_table, lengths, chunks=chunks, tables=(cos, sin))


def _flops(sizes: Sizes, direction: str) -> int:
    """Two products of the causal triangle, five in backward; chunks change none of them."""
    tokens = sizes["tokens"]
    triangle = tokens * (tokens + 1) // 2 * sizes["groups"] * sizes["queries"] * sizes["head"]
    return {"forward": 4, "backward": 10, "both": 14}[direction] * triangle


def _bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: q, k, v, output, lse; backward: those, their gradients but lse's, and that of the output."""
    heads = sizes["tokens"] * sizes["groups"] * sizes["head"]
    of_q, of_keys, lse = heads * sizes["queries"], 2 * heads, 4 * sizes["tokens"] * sizes["groups"] * sizes["queries"]
    forward = element * (2 * of_q + of_keys) + lse
    backward = forward + element * (2 * of_q + of_keys)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def _decode_flops(sizes: Sizes, direction: str) -> int:
    """Two products of all keys."""
    del direction
    return 4 * sizes["batch"] * sizes["tokens"] * sizes["groups"] * sizes["queries"] * sizes["head"]


def _decode_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Keys and values once; q and output."""
    del direction
    heads = sizes["groups"] * sizes["head"] * element
    return 2 * sizes["batch"] * heads * (sizes["tokens"] + sizes["queries"])


def _few(sizes: Sizes) -> int:
    """5 rounds where one run takes a quarter of a second on an H200."""
    return 50 if sizes["tokens"] <= 32_768 else 5


def _odd(tokens: int, queries: int, head: int, chunk: int, local: int) -> dict[str, int]:
    return {"tokens": tokens, "groups": 2, "queries": queries, "head": head, "chunk": chunk, "local": local}


# One token; a prime; one more than a chunk of L = 32; one less than c = 48; L below the window: succ has no end.
_ODD = (
    _odd(1, 7, 64, 8, 2),
    _odd(131, 7, 64, 48, 16),
    _odd(33, 2, 128, 48, 16),
    _odd(47, 7, 128, 48, 7),
    _odd(67, 1, 64, 24, 17),
)
_LENGTHS = {"cuda": (32_768, 131_072), "cpu": (1024,)}
_MODELS = {"cuda": ("7b",), "cpu": ("7b",)}


def _without_chunks(sizes: Sizes) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name not in ("chunk", "local")}


def _prompt_case(name: str, *, is_inference: bool = True, **rest: Any) -> OpCase:
    fields = {
        "family": "attention",
        "operation": "dual_chunk_attention",
        "outputs": ("y",),
        "directions": ("forward",) if is_inference else ("backward", "both"),
        "bound": "compute",
        "sizes": _chunked,
        "workload": functools.partial(_prompt, is_inference=is_inference),
        "ours": _ours,
        "plain": definition.plain,
        "bytes_moved": _bytes,
        "flops": _flops,
        "odd_sizes": _ODD,
        "lengths": _LENGTHS,
        "models": _MODELS,
        "is_inference": is_inference,
        "is_plain_timed": False,
        "on_cpu": _fewer_heads,
        "most_rounds": _few,
    }
    return OpCase(name=name, **{**fields, **rest})


def _decode_case(name: str, batch: int) -> OpCase:
    return OpCase(
        name=name,
        family="attention",
        operation="paged_decode_attention",
        about=f"decoding with Dual Chunk Attention, {batch} sequence{'s' * (batch > 1)}",
        outputs=("y",),
        directions=("forward",),
        sizes=functools.partial(_decoding, batch=batch),
        workload=_cache,
        ours=_decode_ours,
        plain=definition.decode_plain,
        peers={
            "three_call": lambda: peers.three_call_decode(has_fa3=False),
            "three_call_fa3": lambda: peers.three_call_decode(has_fa3=True),
        },
        bytes_moved=_decode_bytes,
        flops=_decode_flops,
        odd_sizes=tuple({**each, "batch": min(batch, 3), "ragged": 23} for each in _ODD),
        lengths={"cuda": (131_072, 262_144), "cpu": (4096,)},
        models=_MODELS,
        is_inference=True,
        is_graphed=True,
        is_plain_timed=False,
        on_cpu=_fewer_heads,
    )


CASES = (
    _prompt_case(
        "dca_prefill",
        about="Dual Chunk Attention of a prompt",
        peers={
            "three_call": lambda: peers.three_call(peers.Sdpa()),
            "three_call_fa3": lambda: peers.three_call(peers.FlashAttention3()),
            "per_head": lambda: peers.per_head(peers.Sdpa()),
        },
    ),
    _prompt_case(
        "dca_train",
        is_inference=False,
        about="Dual Chunk Attention with its gradient",
        lengths={"cuda": (32_768,), "cpu": (512,)},
        peers={"three_call": peers.three_call_training},
        # The gradient of the query of a single token is 0, in plain torch without any error.
        odd_sizes=(_odd(11, 7, 64, 8, 2), *_ODD[1:]),
        fp32_yardsticks=tuple(functools.partial(definition.recomputing, seed=seed) for seed in range(8)),
        most_rounds=lambda sizes: 20,
    ),
    _prompt_case(
        "causal_prefill",
        about="plain causal attention of a prompt, rotated before: the upper line",
        sizes=_heads,
        odd_sizes=tuple(map(_without_chunks, _ODD[:3])),
        peers={
            "cudnn": lambda: peers.causal_sdpa(SDPBackend.CUDNN_ATTENTION),
            "flash": lambda: peers.causal_sdpa(SDPBackend.FLASH_ATTENTION),
            "fa3": peers.causal_fa3,
        },
    ),
    _decode_case("paged_decode", 1),
    _decode_case("paged_decode_16", 16),
)
