"""Log-sum-exp and label logit in Triton, and the logits' gradient; the two products of backward are cuBLAS's.

Forward multiplies tiles of tokens and vocabulary rows on tensor cores and folds each into a running maximum and sum;
logits never leave registers. The vocabulary is split between programs, whose partial sums are combined in a fixed
order. Backward multiplies the same tiles again, chunk by chunk of the vocabulary, and writes the gradient of the
logits in the dtype of the inputs. That chunk is then a factor of two plain products, which cuBLAS does best:
N x C times C x H, added up in fp32, and C x N times N x H, which is the final gradient of C rows of the weight.
So 8 N V H operations, where logits that are kept need 6, and no pass over memory beyond the chunk's own.

Shapes: N tokens, H hidden size, V rows of the weight, C rows of a chunk.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ..column_sum import multiprocessors
from .reference import WeightGradient, add_product, chunks

# A chunk of gradients: 256 MiB in 16 bits; 16384 rows for 8192 tokens, ten chunks of Qwen's vocabulary.
CHUNK_ELEMENTS = 1 << 27
SMALLEST_CHUNK = 4096
# Programs of the forward per multiprocessor: the last ones to end leave at most a sixteenth of the device idle.
PROGRAMS_PER_MULTIPROCESSOR = 16
# The interpreter multiplies bf16 as the integers it holds them in; a device must get 16 bits for its tensor cores.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, token, row, hidden_size, hidden_stride, weight_stride,
    BLOCK_HIDDEN: tl.constexpr, IS_EVEN: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Return hidden[token] @ weight[row]^T in fp32; every token and row must exist."""
    column = tl.arange(0, BLOCK_HIDDEN)
    hidden_ptrs = hidden_ptr + token.to(tl.int64)[:, None] * hidden_stride + column[None, :]
    weight_ptrs = weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :]
    logits = tl.zeros([token.shape[0], row.shape[0]], tl.float32)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        if IS_EVEN:
            hidden = tl.load(hidden_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            inside = column[None, :] < hidden_size - first
            hidden = tl.load(hidden_ptrs, mask=inside, other=0.0)
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        if WIDENS:
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        logits = tl.dot(hidden, weight.T, logits, input_precision="ieee")
        hidden_ptrs += BLOCK_HIDDEN
        weight_ptrs += BLOCK_HIDDEN
    return logits


@triton.jit
def logit_statistics_kernel(
    hidden_ptr, weight_ptr, labels_ptr, partial_ptr, label_logit_ptr, tokens, rows, rows_per_split, hidden_size,
    hidden_stride, weight_stride, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    IS_EVEN: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Write lse over this program's rows to partial [splits, N], and the label's logit if the label is among them.

    Programs of one split are neighbours, so that they read the same rows of the weight at the same time.
    """
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    split = tl.program_id(0) // token_blocks
    token = (tl.program_id(0) % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < tokens
    label = tl.load(labels_ptr + token, mask=is_token, other=-1)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    largest = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    label_logit = tl.zeros([BLOCK_TOKENS], tl.float32)
    for first in range(begin, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        # The last token and row stand in for those beyond the end: loads need no mask.
        logits = logits_tile(
            hidden_ptr, weight_ptr, tl.minimum(token, tokens - 1), tl.minimum(row, rows - 1), hidden_size,
            hidden_stride, weight_stride, BLOCK_HIDDEN, IS_EVEN, WIDENS,
        )  # fmt: skip
        logits = tl.where(row[None, :] < end, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), axis=1)
        largest = new_largest
        label_logit += tl.sum(tl.where(row[None, :] == label[:, None], logits, 0.0), axis=1)
    tl.store(partial_ptr + split.to(tl.int64) * tokens + token, largest + tl.log(total), mask=is_token)
    tl.store(label_logit_ptr + token, label_logit, mask=is_token & (label >= begin) & (label < end))


@triton.jit
def logit_gradient_kernel(
    hidden_ptr, weight_ptr, labels_ptr, lse_ptr, grad_lse_ptr, grad_label_logit_ptr, out_ptr, tokens, begin, end,
    hidden_size, hidden_stride, weight_stride, out_stride, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, IS_EVEN: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Write out [N, end - begin] = grad_lse softmax + grad_label_logit (row is label); a program per tile."""
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    token = (tl.program_id(0) % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row = begin + (tl.program_id(0) // token_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_token = token < tokens
    logits = logits_tile(
        hidden_ptr, weight_ptr, tl.minimum(token, tokens - 1), tl.minimum(row, end - 1), hidden_size, hidden_stride,
        weight_stride, BLOCK_HIDDEN, IS_EVEN, WIDENS,
    )  # fmt: skip
    label = tl.load(labels_ptr + token, mask=is_token, other=-1)
    lse = tl.load(lse_ptr + token, mask=is_token, other=0.0)
    grad_lse = tl.load(grad_lse_ptr + token, mask=is_token, other=0.0)
    grad_label_logit = tl.load(grad_label_logit_ptr + token, mask=is_token, other=0.0)
    grad = tl.exp(logits - lse[:, None]) * grad_lse[:, None]
    grad = tl.where(row[None, :] == label[:, None], grad + grad_label_logit[:, None], grad)
    out_ptrs = out_ptr + token.to(tl.int64)[:, None] * out_stride + (row - begin)[None, :]
    tl.store(out_ptrs, grad.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & (row < end)[None, :])


def launch_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    rows: int,
    lse: torch.Tensor,
    label_logit: torch.Tensor,
) -> None:
    """Fill lse and label_logit [N], fp32; hidden [N, H] and weight [V, H] may have any row stride. N is positive."""
    tokens = hidden.shape[0]
    label_logit.zero_()
    if not rows:
        lse.fill_(-torch.inf)
        return
    blocks = _blocks(hidden)
    token_blocks, row_blocks = triton.cdiv(tokens, blocks["BLOCK_TOKENS"]), triton.cdiv(rows, blocks["BLOCK_ROWS"])
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(hidden.device), token_blocks)
    rows_per_split = triton.cdiv(row_blocks, wanted) * blocks["BLOCK_ROWS"]
    splits = triton.cdiv(rows, rows_per_split)
    partial = torch.empty(splits, tokens, dtype=torch.float32, device=hidden.device)
    logit_statistics_kernel[(token_blocks * splits,)](
        hidden, weight, labels, partial, label_logit, tokens, rows, rows_per_split, hidden.shape[1], hidden.stride(0),
        weight.stride(0), **blocks,
    )  # fmt: skip
    torch.logsumexp(partial, dim=0, out=lse)


def backward(
    grad_lse: torch.Tensor,
    grad_label_logit: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    rows: int,
    weight_gradient: WeightGradient,
) -> torch.Tensor:
    """Return the gradient of hidden [N, H] and hand that of the weight on; see `reference.backward`."""
    tokens = hidden.shape[0]
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    parts = list(chunks(tokens, rows, CHUNK_ELEMENTS, SMALLEST_CHUNK))
    buffer = hidden.new_empty(tokens * (parts[0].stop if parts else 0))
    labels, lse, grad_lse, grad_label_logit = (each.contiguous() for each in (labels, lse, grad_lse, grad_label_logit))
    for part in parts:
        size = part.stop - part.start
        grad_logits = buffer[: tokens * size].view(tokens, size)
        if tokens:
            launch_logit_gradient(hidden, weight, labels, lse, grad_lse, grad_label_logit, part, grad_logits)
        add_product(grad_hidden, grad_logits, weight[part])
        weight_gradient.add(part, grad_logits, hidden)
    return grad_hidden.to(hidden.dtype)


def launch_logit_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_label_logit: torch.Tensor,
    part: slice,
    out: torch.Tensor,
) -> None:
    """Fill out [N, C] with the gradient of the logits of these rows; matrices may have any row stride."""
    tokens = hidden.shape[0]
    blocks = _blocks(hidden)
    tiles = triton.cdiv(tokens, blocks["BLOCK_TOKENS"]) * triton.cdiv(part.stop - part.start, blocks["BLOCK_ROWS"])
    logit_gradient_kernel[(tiles,)](
        hidden, weight, labels, lse, grad_lse, grad_label_logit, out, tokens, part.start, part.stop, hidden.shape[1],
        hidden.stride(0), weight.stride(0), out.stride(0), **blocks,
    )  # fmt: skip


def _blocks(hidden: torch.Tensor) -> dict[str, Any]:
    """Return tile sizes and compile options: those of a GEMM, whose time this is.

    In 16 bits, 128 x 256 is the largest tile whose fp32 sums fit the registers of two warp groups (128 each thread).
    An A100 has no room for it beside the operands, which there pass through registers; and rows that are not a
    multiple of a block, which no Qwen model has, are loaded through registers too. fp32 has no tensor cores without
    rounding the inputs.
    """
    is_even = hidden.shape[1] % 64 == 0
    if hidden.dtype == torch.float32 or not is_even:
        # An address per element on top of fp32 operands does not fit the registers of four warps.
        warps = 4 if is_even or hidden.dtype != torch.float32 else 8
        sizes = {"BLOCK_TOKENS": 64, "BLOCK_ROWS": 64, "BLOCK_HIDDEN": 32, "num_warps": warps, "num_stages": 3}
    elif _is_before_hopper():
        sizes = {"BLOCK_TOKENS": 128, "BLOCK_ROWS": 128, "BLOCK_HIDDEN": 64, "num_warps": 8, "num_stages": 3}
    else:
        sizes = {"BLOCK_TOKENS": 128, "BLOCK_ROWS": 256, "BLOCK_HIDDEN": 64, "num_warps": 8, "num_stages": 3}
    return {**sizes, "IS_EVEN": is_even, "WIDENS": _IS_INTERPRETED and hidden.dtype == torch.bfloat16}


def _is_before_hopper() -> bool:
    return not _IS_INTERPRETED and driver.active.get_current_target().arch < 90
