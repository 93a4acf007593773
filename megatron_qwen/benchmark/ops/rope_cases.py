"""Bias, rotary embedding and split of Megatron-Core's packed QKV projection, and the rotation alone, in place.

Shapes: T tokens, G groups of M query heads, a key and a value head of D numbers each; W = G (M + 2) D; R rotated
dimensions of a head. packed [T, 1, W] (one sequence), or [T, W] (packed sequences); q [..., G M, D], k, v [..., G, D].
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function, OpCase, Sizes, Workload, random_normal
from megatron_qwen.model.config import QwenConfig

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SEQUENCES = 64  # of the packed case


def _sizes(config: QwenConfig, length: int) -> dict[str, int]:
    groups = config.num_key_value_heads
    queries = config.num_attention_heads // groups
    return {"tokens": length, "groups": groups, "queries": queries, "head": config.head_dim, "rotated": config.head_dim}


def _packed_sizes(config: QwenConfig, length: int) -> dict[str, int]:
    return {**_sizes(config, length), "sequences": min(SEQUENCES, length)}


def width(sizes: Sizes) -> int:
    """Return W, the length of a packed row."""
    return sizes["groups"] * (sizes["queries"] + 2) * sizes["head"]


def sequence_lengths(sizes: Sizes) -> list[int]:
    """Return ragged lengths of the packed sequences, always the same; one sequence without the size "sequences"."""
    tokens, count = sizes["tokens"], sizes.get("sequences", 1)
    cuts = sorted(random.Random(count).sample(range(1, tokens), count - 1))  # noqa: S311 no secret
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True)]


def _workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    lengths = sequence_lengths(sizes)
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths]).to(device)
    rotated, lead = sizes["rotated"], (sizes["tokens"],) if "sequences" in sizes else (sizes["tokens"], 1)
    inv_freq = 1e6 ** (-torch.arange(0, rotated, 2, dtype=torch.float64, device=device) / rotated)
    cos, sin = ops.rope_tables(inv_freq, max(lengths))
    heads = sizes["groups"] * sizes["queries"], sizes["groups"], sizes["groups"]
    angles = torch.outer(torch.arange(max(lengths), dtype=torch.float64, device=device), inv_freq)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return Workload(
        leaves={
            "packed": random_normal((*lead, width(sizes)), dtype, device, seed),
            "bias": random_normal((width(sizes),), dtype, device, seed + 1),
        },
        others={
            "cos": cos,
            "sin": sin,
            "positions": positions,
            "cos_rows": _rows(cos, positions, len(lead)).to(dtype),
            "sin_rows": _rows(sin, positions, len(lead)).to(dtype),
            "freqs": torch.cat([angles, angles], -1).float()[:, None, None],
            "cu_seqlens": ends.to(device, torch.int32),
        },
        grads=tuple(
            random_normal((*lead, count, sizes["head"]), dtype, device, seed + 2 + i) for i, count in enumerate(heads)
        ),
        shared=frozenset({"bias", "cos", "sin", "freqs", "cu_seqlens"}),
        constants={"num_groups": sizes["groups"], "head_dim": sizes["head"]},
    )


def _without_bias(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    full = _workload(sizes, dtype, device, seed)
    return replace(full, leaves={"packed": full.leaves["packed"]}, constants={**full.constants, "bias": None})


def _rows(table: torch.Tensor, positions: torch.Tensor, lead: int) -> torch.Tensor:
    """[P, R / 2] to [T, 1, R] or [T, 1, 1, R]: what a model without kernels keeps at hand, both halves side by side."""
    of_tokens = table[positions.long()]
    return torch.cat([of_tokens, of_tokens], -1)[(slice(None), *[None] * lead)]


def _ours(packed: torch.Tensor, bias: Any, cos: Any, sin: Any, num_groups: int, head_dim: int, **_: Any) -> Three:
    return ops.qkv_rope(packed, cos, sin, num_groups=num_groups, head_dim=head_dim, bias=bias)


def _ours_packed(
    packed: torch.Tensor, bias: Any, cos: Any, sin: Any, positions: Any, num_groups: int, head_dim: int, **_: Any
) -> Three:
    return ops.qkv_rope(packed, cos, sin, num_groups=num_groups, head_dim=head_dim, bias=bias, positions=positions)


def _split(packed: torch.Tensor, bias: torch.Tensor | None, groups: int, head: int) -> Three:
    """The bias's addition, and views of queries (a copy, as their heads lie apart), keys and values."""
    packed = packed if bias is None else packed + bias
    heads = torch.unflatten(packed, -1, (groups, packed.shape[-1] // groups // head, head))
    return heads[..., :-2, :].flatten(-3, -2), heads[..., -2, :], heads[..., -1, :]


def rotate(x: torch.Tensor, cos_rows: torch.Tensor, sin_rows: torch.Tensor) -> torch.Tensor:
    """Return x [..., D] rotated on its first R dimensions, as Megatron-Core and transformers write it."""
    turned, rest = x[..., : cos_rows.shape[-1]], x[..., cos_rows.shape[-1] :]
    first, second = turned.chunk(2, -1)
    turned = turned * cos_rows + torch.cat([-second, first], -1) * sin_rows
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _plain(
    packed: torch.Tensor,
    bias: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    cos_rows: Any,
    sin_rows: Any,
    num_groups: int,
    head_dim: int,
    **_: Any,
) -> Three:
    if cos_rows.dtype != packed.dtype:  # the fp64 reference: from the fp32 tables that the kernels read
        cos_rows, sin_rows = (_rows(table, positions, packed.dim() - 1) for table in (cos, sin))
    q, k, v = _split(packed, bias, num_groups, head_dim)
    return rotate(q, cos_rows, sin_rows), rotate(k, cos_rows, sin_rows), v.contiguous()


def _liger() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(
        packed: torch.Tensor, bias: Any, cos_rows: Any, sin_rows: Any, num_groups: int, head_dim: int, **_: Any
    ) -> Three:
        q, k, v = _split(packed, bias, num_groups, head_dim)
        # It wants [batch, heads, T, D] and works on the memory of [batch, T, heads, D], which is ours for a batch of 1.
        q, k = (each.reshape(1, len(packed), -1, head_dim).transpose(1, 2) for each in (q, k.contiguous()))
        rows = (table.reshape(1, len(packed), -1) for table in (cos_rows, sin_rows))
        q, k = LigerRopeFunction.apply(q, k, *rows)
        return q.transpose(1, 2).view(*packed.shape[:-1], -1, head_dim), k.transpose(1, 2).view(v.shape), v.contiguous()

    return run


def _transformer_engine() -> Function:
    from transformer_engine.pytorch.attention.rope import apply_fused_qkv_rotary_pos_emb

    def run(packed: torch.Tensor, bias: Any, freqs: Any, num_groups: int, head_dim: int, **_: Any) -> Three:
        mixed = torch.unflatten(packed if bias is None else packed + bias, -1, (num_groups, -1))
        split = [mixed.shape[-1] - 2 * head_dim, head_dim, head_dim]
        q, k, v = apply_fused_qkv_rotary_pos_emb(mixed, freqs, freqs, split)
        return q, k, v

    return run


def _transformer_engine_packed() -> Function:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    def run(
        packed: torch.Tensor, bias: Any, freqs: Any, cu_seqlens: Any, num_groups: int, head_dim: int, **_: Any
    ) -> Three:
        q, k, v = _split(packed, bias, num_groups, head_dim)
        q, k = (
            apply_rotary_pos_emb(each, freqs, tensor_format="thd", fused=True, cu_seqlens=cu_seqlens) for each in (q, k)
        )
        return q, k, v.contiguous()

    return run


def _heads_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    full = _workload(sizes, dtype, device, seed)
    counts = {"q": sizes["groups"] * sizes["queries"], "k": sizes["groups"]}
    leaves = {
        name: random_normal((sizes["tokens"], 1, count, sizes["head"]), dtype, device, seed + index)
        for index, (name, count) in enumerate(counts.items())
    }
    return replace(full, leaves=leaves, grads=(), constants={})


def _heads_ours(q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, **_: Any) -> Any:
    return ops.rope_(q, k, cos, sin)


def _heads_plain(
    q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any, positions: Any, cos_rows: Any, sin_rows: Any, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if cos_rows.dtype != q.dtype:  # as in `_plain`
        cos_rows, sin_rows = (_rows(table, positions, 2) for table in (cos, sin))
    return rotate(q, cos_rows, sin_rows), rotate(k, cos_rows, sin_rows)


def _heads_liger() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(q: torch.Tensor, k: torch.Tensor, cos_rows: Any, sin_rows: Any, **_: Any) -> Any:
        # [T, 1, heads, D] has the memory of [1, T, heads, D], on which it works in place.
        moved = (each.transpose(0, 1).transpose(1, 2) for each in (q, k))
        rows = (table.reshape(1, len(q), -1) for table in (cos_rows, sin_rows))
        return tuple(each.transpose(1, 2).transpose(0, 1) for each in LigerRopeFunction.apply(*moved, *rows))

    return run


def _heads_transformer_engine() -> Function:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    def run(q: torch.Tensor, k: torch.Tensor, freqs: Any, **_: Any) -> Any:
        return tuple(apply_rotary_pos_emb(each, freqs, tensor_format="sbhd", fused=True) for each in (q, k))

    return run


def _heads_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """The rotated part of queries and keys in and out, and the tables."""
    assert direction == "forward", direction
    numbers = sizes["tokens"] * sizes["groups"] * (sizes["queries"] + 1) * sizes["rotated"]
    return 2 * element * numbers + table_bytes(sizes)


def table_bytes(sizes: Sizes) -> int:
    """Both fp32 half tables, each row once, and for packed sequences the int32 position of each token."""
    positions = 4 * sizes["tokens"] if "sequences" in sizes else 0
    return 2 * 4 * max(sequence_lengths(sizes)) * (sizes["rotated"] // 2) + positions


def _bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: packed, bias, q, k, v; backward: dq, dk, dv, d packed, d bias. And the tables."""
    assert direction in ("forward", "backward"), direction
    return element * (2 * sizes["tokens"] + 1) * width(sizes) + table_bytes(sizes)


def _bytes_without_bias(sizes: Sizes, direction: str, element: int) -> int:
    return _bytes(sizes, direction, element) - element * width(sizes)


def rotation_flops(sizes: Sizes) -> int:
    """Four products and two sums for each pair of rotated numbers of queries and keys."""
    return 3 * sizes["tokens"] * sizes["groups"] * (sizes["queries"] + 1) * sizes["rotated"]


def _flops(sizes: Sizes, direction: str) -> int:
    """The rotation, and an addition per number: the bias, or into its gradient."""
    assert direction in ("forward", "backward"), direction
    return rotation_flops(sizes) + sizes["tokens"] * width(sizes)


def _flops_without_bias(sizes: Sizes, direction: str) -> int:
    return _flops(sizes, direction) - sizes["tokens"] * width(sizes)


_ODD = (
    {"tokens": 1, "groups": 1, "queries": 1, "head": 8, "rotated": 8},
    {"tokens": 67, "groups": 2, "queries": 7, "head": 64, "rotated": 64},
    {"tokens": 33, "groups": 3, "queries": 5, "head": 128, "rotated": 96},
)
_OUTPUTS = ("q", "k", "v")


def _case(name: str, about: str, *, packed: bool = False, **fields: Any) -> OpCase:
    engine: Callable[[], Function] = _transformer_engine_packed if packed else _transformer_engine
    return OpCase(
        name=name,
        family="rope",
        operation="qkv_rope",
        about=about,
        outputs=_OUTPUTS,
        **{
            "sizes": _packed_sizes if packed else _sizes,
            "workload": _workload,
            "ours": _ours_packed if packed else _ours,
            "plain": _plain,
            "peers": {"liger": _liger, "te": engine},
            "bytes_moved": _bytes,
            "flops": _flops,
            "odd_sizes": tuple({**each, "sequences": min(5, each["tokens"])} for each in _ODD) if packed else _ODD,
            **fields,
        },
    )


CASES = (
    _case("qkv_rope", "bias + RoPE + split of one long sequence"),
    _case(
        "qkv_rope_no_bias",
        "RoPE + split, the bias added by the projection",
        workload=_without_bias,
        lengths={"cuda": (32_768,), "cpu": (256,)},
        bytes_moved=_bytes_without_bias,
        flops=_flops_without_bias,
    ),
    _case(
        "qkv_rope_packed",
        f"bias + RoPE + split of {SEQUENCES} ragged sequences",
        packed=True,
        lengths={"cuda": (32_768,), "cpu": (256,)},
    ),
    OpCase(
        name="rope",
        family="rope",
        operation="rope",
        about="RoPE of queries and keys alone, in place",
        outputs=("q", "k"),
        directions=("forward",),
        sizes=_sizes,
        workload=_heads_workload,
        ours=_heads_ours,
        plain=_heads_plain,
        peers={"liger": _heads_liger, "te": _heads_transformer_engine},
        bytes_moved=_heads_bytes,
        flops=lambda sizes, direction: rotation_flops(sizes),
        odd_sizes=_ODD,
        in_place=True,
    ),
)
