"""Rotary embedding of queries and keys in place in Triton: one launch for both, one read and one write of each byte.

A program has some heads of some tokens, query heads first, key heads behind them. Both halves of a head are in one
program, which has read them before it writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_HEADS = 16
# Tokens of a program, whose loads are independent and in flight together.
TOKENS = 4


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, positions_ptr, tokens, table_rows, repeat, batch,
    q_seq, q_batch, q_head, k_seq, k_batch, k_head,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rotate BLOCK_HEADS heads of TOKENS tokens; the grid is token blocks times head blocks."""
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    program = tl.program_id(0)
    first_token = (program // HEAD_BLOCKS).to(tl.int64) * TOKENS
    head = (program % HEAD_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)
    inside = column[None, :] < HALF
    is_q, is_k = inside & (head < Q_HEADS), inside & (head >= Q_HEADS) & (head < HEADS)
    for step in tl.static_range(TOKENS):
        token = first_token + step
        here_q, here_k = is_q & (token < tokens), is_k & (token < tokens)
        row, column_of_batch = token // batch, token % batch
        q = q_ptr + row * q_seq + column_of_batch * q_batch + head * q_head + column[None, :]
        k = k_ptr + row * k_seq + column_of_batch * k_batch + (head - Q_HEADS) * k_head + column[None, :]
        # A head is in one of the two tensors.
        x1 = tl.load(q, mask=here_q, other=0.0).to(tl.float32) + tl.load(k, mask=here_k, other=0.0).to(tl.float32)
        x2 = tl.load(q + HALF, mask=here_q, other=0.0).to(tl.float32)
        x2 += tl.load(k + HALF, mask=here_k, other=0.0).to(tl.float32)
        position = token // repeat
        if HAS_POSITIONS:
            position = tl.load(positions_ptr + position, mask=token < tokens, other=0).to(tl.int64)
        known = (column < HALF) & (position >= 0) & (position < table_rows)
        cos = tl.load(cos_ptr + position * HALF + column, mask=known, other=float("nan"))[None, :]
        sin = tl.load(sin_ptr + position * HALF + column, mask=known, other=float("nan"))[None, :]
        if INVERSE:
            sin = -sin
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        tl.store(q, y1.to(q_ptr.dtype.element_ty), mask=here_q)
        tl.store(q + HALF, y2.to(q_ptr.dtype.element_ty), mask=here_q)
        tl.store(k, y1.to(k_ptr.dtype.element_ty), mask=here_k)
        tl.store(k + HALF, y2.to(k_ptr.dtype.element_ty), mask=here_k)


def launch_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    repeat: int,
    inverse: bool,
) -> None:
    """Rotate q [S, B, heads, D] and k in place, at any strides with each head contiguous; back again if inverse."""
    tokens, batch, half = q.shape[0] * q.shape[1], q.shape[1], tables[0].shape[1]
    heads = q.shape[2] + (0 if k is None else k.shape[2])
    block_heads = min(BLOCK_HEADS, triton.next_power_of_2(heads))
    block_half = triton.next_power_of_2(half)
    grid = (triton.cdiv(tokens, TOKENS) * triton.cdiv(heads, block_heads),)
    keys = q if k is None else k
    rope_kernel[grid](
        q, keys, *tables, positions, tokens, tables[0].shape[0], repeat, batch, *q.stride()[:3], *keys.stride()[:3],
        Q_HEADS=q.shape[2], HEADS=heads, HALF=half, HAS_POSITIONS=positions is not None, INVERSE=inverse,
        BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, TOKENS=TOKENS,
        # 8 elements per thread: one 16-byte access of bf16 per half.
        num_warps=min(8, max(1, block_heads * block_half // 256)),
    )  # fmt: skip
