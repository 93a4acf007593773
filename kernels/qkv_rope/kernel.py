"""Bias, rotary embedding and split in Triton: one launch, one read and one write of each byte, arithmetic in fp32.

A program has some heads of some tokens. Both halves of a head are in one program, so that rotating moves nothing
between threads; the bias stays in registers over the program's tokens, and so does the bias's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..column_sum import launch_column_sum, programs_of_first_stage
from .layout import Layout

BLOCK_HEADS = 16
# Tokens that share one load of the bias; their loads are independent and in flight together.
TOKENS = 4


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, positions_ptr, token, tokens, table_rows, repeat, column, turns,
    HALF: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Cos and sin for each head of a token: 1 and 0 for value heads, NaN for a position outside the tables."""
    position = token // repeat
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + position, mask=token < tokens, other=0).to(tl.int64)
    known = (column < HALF) & (position >= 0) & (position < table_rows)
    cos = tl.load(cos_ptr + position * HALF + column, mask=known, other=float("nan"))[None, :]
    sin = tl.load(sin_ptr + position * HALF + column, mask=known, other=float("nan"))[None, :]
    return tl.where(turns, cos, 1.0), tl.where(turns, sin, 0.0)


@triton.jit
def _store_heads(q_ptr, k_ptr, v_ptr, value, token, q_row, kv_row, offset, is_q, is_k, is_v):
    tl.store(q_ptr + token * q_row + offset, value.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(k_ptr + token * kv_row + offset, value.to(k_ptr.dtype.element_ty), mask=is_k)
    tl.store(v_ptr + token * kv_row + offset, value.to(v_ptr.dtype.element_ty), mask=is_v)


@triton.jit
def qkv_rope_forward_kernel(
    packed_ptr, bias_ptr, cos_ptr, sin_ptr, positions_ptr, q_ptr, k_ptr, v_ptr, tokens, table_rows, repeat, packed_row,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write q, k, v of TOKENS tokens and BLOCK_HEADS heads; the grid is token blocks times head blocks."""
    HEADS: tl.constexpr = GROUPS * PER_GROUP
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    q_row = GROUPS * (PER_GROUP - 2) * HEAD_DIM
    kv_row = GROUPS * HEAD_DIM
    program = tl.program_id(0)
    first_token = (program // HEAD_BLOCKS).to(tl.int64) * TOKENS
    head = (program % HEAD_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    group, slot = head // PER_GROUP, head % PER_GROUP
    column = tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS) & (column[None, :] < HALF)
    is_q, is_k, is_v = slot < PER_GROUP - 2, slot == PER_GROUP - 2, slot == PER_GROUP - 1
    offset = head * HEAD_DIM + column[None, :]
    # A head goes to one of the three outputs, so one offset serves all.
    head_out = tl.where(is_q, group * (PER_GROUP - 2) + slot, group) * HEAD_DIM
    offset_out = head_out + column[None, :]
    if HAS_BIAS:
        bias1 = tl.load(bias_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        bias2 = tl.load(bias_ptr + offset + HALF, mask=inside, other=0.0).to(tl.float32)
    for step in tl.static_range(TOKENS):
        token = first_token + step
        here = inside & (token < tokens)
        x1 = tl.load(packed_ptr + token * packed_row + offset, mask=here, other=0.0).to(tl.float32)
        x2 = tl.load(packed_ptr + token * packed_row + offset + HALF, mask=here, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x1 += bias1
            x2 += bias2
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, positions_ptr, token, tokens, table_rows, repeat, column, slot < PER_GROUP - 1,
            HALF, HAS_POSITIONS,
        )  # fmt: skip
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        _store_heads(q_ptr, k_ptr, v_ptr, y1, token, q_row, kv_row, offset_out, here & is_q, here & is_k, here & is_v)
        _store_heads(
            q_ptr, k_ptr, v_ptr, y2, token, q_row, kv_row, offset_out + HALF, here & is_q, here & is_k, here & is_v
        )
    if BLOCK_REST:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        within = (head < HEADS) & (rest < HEAD_DIM)
        for step in tl.static_range(TOKENS):
            token = first_token + step
            here = within & (token < tokens)
            x = tl.load(packed_ptr + token * packed_row + head * HEAD_DIM + rest, mask=here, other=0.0).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias_ptr + head * HEAD_DIM + rest, mask=within, other=0.0).to(tl.float32)
            _store_heads(
                q_ptr, k_ptr, v_ptr, x, token, q_row, kv_row, head_out + rest, here & is_q, here & is_k, here & is_v
            )


@triton.jit
def _load_heads(
    q_ptr, k_ptr, v_ptr, q_base, k_base, v_base, q_head, k_head, v_head, group, slot, column, is_q, is_k, is_v,
    PER_GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of the heads of a token from three tensors; each element is in one of them."""
    q_offset = q_base + (group * (PER_GROUP - 2) + slot) * q_head + column
    grad = tl.load(q_ptr + q_offset, mask=is_q, other=0.0).to(tl.float32)
    grad += tl.load(k_ptr + k_base + group * k_head + column, mask=is_k, other=0.0).to(tl.float32)
    return grad + tl.load(v_ptr + v_base + group * v_head + column, mask=is_v, other=0.0).to(tl.float32)


@triton.jit
def qkv_rope_backward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr, grad_ptr, partial_ptr, tokens, tokens_per_program, table_rows,
    repeat, batch, q_seq, q_batch, q_head, k_seq, k_batch, k_head, v_seq, v_batch, v_head,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Write the packed gradient of a range of tokens and BLOCK_HEADS heads, and the bias's over them to partial."""
    HEADS: tl.constexpr = GROUPS * PER_GROUP
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    program = tl.program_id(0)
    chunk = (program // HEAD_BLOCKS).to(tl.int64)
    head = (program % HEAD_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    group, slot = head // PER_GROUP, head % PER_GROUP
    column = tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS) & (column[None, :] < HALF)
    is_q, is_k, is_v = slot < PER_GROUP - 2, slot == PER_GROUP - 2, slot == PER_GROUP - 1
    bias1 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    bias2 = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
    offset = head * HEAD_DIM + column[None, :]
    if BLOCK_REST:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        within = (head < HEADS) & (rest < HEAD_DIM)
        bias3 = tl.zeros([BLOCK_HEADS, BLOCK_REST], tl.float32)
    for index in range(0, tokens_per_program):
        token = chunk * tokens_per_program + index
        here = inside & (token < tokens)
        row, column_of_batch = token // batch, token % batch
        q_base = row * q_seq + column_of_batch * q_batch
        k_base = row * k_seq + column_of_batch * k_batch
        v_base = row * v_seq + column_of_batch * v_batch
        g1 = _load_heads(
            q_ptr, k_ptr, v_ptr, q_base, k_base, v_base, q_head, k_head, v_head, group, slot, column[None, :],
            here & is_q, here & is_k, here & is_v, PER_GROUP,
        )  # fmt: skip
        g2 = _load_heads(
            q_ptr, k_ptr, v_ptr, q_base, k_base, v_base, q_head, k_head, v_head, group, slot, column[None, :] + HALF,
            here & is_q, here & is_k, here & is_v, PER_GROUP,
        )  # fmt: skip
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, positions_ptr, token, tokens, table_rows, repeat, column, slot < PER_GROUP - 1,
            HALF, HAS_POSITIONS,
        )  # fmt: skip
        x1, x2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        tl.store(grad_ptr + token * WIDTH + offset, x1.to(grad_ptr.dtype.element_ty), mask=here)
        tl.store(grad_ptr + token * WIDTH + offset + HALF, x2.to(grad_ptr.dtype.element_ty), mask=here)
        if HAS_BIAS:
            bias1 += tl.where(here, x1, 0.0)
            bias2 += tl.where(here, x2, 0.0)
        if BLOCK_REST:
            there = within & (token < tokens)
            g3 = _load_heads(
                q_ptr, k_ptr, v_ptr, q_base, k_base, v_base, q_head, k_head, v_head, group, slot, rest,
                there & is_q, there & is_k, there & is_v, PER_GROUP,
            )  # fmt: skip
            tl.store(grad_ptr + token * WIDTH + head * HEAD_DIM + rest, g3.to(grad_ptr.dtype.element_ty), mask=there)
            bias3 += g3
    if HAS_BIAS:
        tl.store(partial_ptr + chunk * WIDTH + offset, bias1, mask=inside)
        tl.store(partial_ptr + chunk * WIDTH + offset + HALF, bias2, mask=inside)
        if BLOCK_REST:
            tl.store(partial_ptr + chunk * WIDTH + head * HEAD_DIM + rest, bias3, mask=within)


def _constants(layout: Layout) -> dict[str, int]:
    """Return the compile-time arguments of both kernels, num_warps among them."""
    heads, rest = layout.groups * layout.per_group, layout.head_dim - 2 * layout.half
    block_heads = min(BLOCK_HEADS, triton.next_power_of_2(heads))
    block_half = triton.next_power_of_2(layout.half)
    return {
        "GROUPS": layout.groups,
        "PER_GROUP": layout.per_group,
        "HEAD_DIM": layout.head_dim,
        "HALF": layout.half,
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": triton.next_power_of_2(rest) if rest else 0,
        # 8 elements per thread: one 16-byte access of bf16 per half.
        "num_warps": min(8, max(1, block_heads * block_half // 256)),
    }


def _forward_registers(layout: Layout, dtype: torch.dtype) -> int | None:
    """`maxnreg` of forward: without it ptxas goes from 64 to 56, and spills for that at 3B and 14B with positions."""
    is_whole = 2 * layout.half == layout.head_dim and triton.next_power_of_2(layout.half) == layout.half
    return 64 if is_whole and dtype.itemsize == 2 else None


def _head_blocks(layout: Layout) -> int:
    """Return how many programs share the heads of a token."""
    return int(triton.cdiv(layout.groups * layout.per_group, _constants(layout)["BLOCK_HEADS"]))


def launch_forward(
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    repeat: int,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: Layout,
) -> None:
    """Fill q, k, v, contiguous, from packed [T, W] with any row stride; token t has position positions[t // repeat]."""
    tokens = packed.shape[0]
    grid = (triton.cdiv(tokens, TOKENS) * _head_blocks(layout),)
    qkv_rope_forward_kernel[grid](
        packed, bias, *tables, positions, *outputs, tokens, tables[0].shape[0], repeat, packed.stride(0),
        HAS_BIAS=bias is not None, HAS_POSITIONS=positions is not None, TOKENS=TOKENS,
        maxnreg=_forward_registers(layout, packed.dtype), **_constants(layout),
    )  # fmt: skip


def launch_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    repeat: int,
    grad_packed: torch.Tensor,
    grad_bias: torch.Tensor | None,
    layout: Layout,
) -> None:
    """Fill grad_packed [T, W], contiguous, and grad_bias [W] from grads [S, B, heads, D], each head contiguous."""
    tokens, width = grad_packed.shape
    head_blocks = _head_blocks(layout)
    chunks = max(1, programs_of_first_stage(tokens, grad_packed.device) // head_blocks)
    tokens_per_program = triton.cdiv(tokens, chunks)
    chunks = triton.cdiv(tokens, tokens_per_program)
    partial = None
    if grad_bias is not None:
        partial = torch.empty(chunks, width, dtype=torch.float32, device=grad_packed.device)
    strides = [stride for grad in grads for stride in grad.stride()[:3]]
    qkv_rope_backward_kernel[(chunks * head_blocks,)](
        *grads, *tables, positions, grad_packed, partial, tokens, tokens_per_program, tables[0].shape[0], repeat,
        grads[0].shape[1], *strides, HAS_BIAS=partial is not None, HAS_POSITIONS=positions is not None,
        **_constants(layout),
    )  # fmt: skip
    if partial is not None and grad_bias is not None:
        launch_column_sum(partial, grad_bias)
