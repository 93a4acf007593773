"""Grouped GEMMs in Triton: persistent programs over the tiles of routed groups and of the shared expert alike.

A group is an expert with its rows, none included; the shared expert is one more group, with every token and its own
width. Its tiles come first in the schedule of every launch, as they are the longest, and the routed ones fill the tail.
Which expert a routed tile belongs to is looked up in a map that `tile_map_kernel` makes of the offsets on the device.

Matrices are found as offsets, in elements, from the first one (the shared expert's is the last), so that one typed and
aligned pointer serves all. The rows of group g in a flat buffer lie at `base + (row - first) * width`, see `_place`.

Shapes: T tokens, R routed rows, E experts, H hidden size, F and Fs widths; rows R.. R + T are the shared expert's.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A size of 1 would become a Python constant, which has no dtype.
UNSPECIALIZED = ("routed", "tokens")


@triton.jit
def tile_map_kernel(
    offsets_ptr, group_ptr, row_ptr, count_ptr, slots, num_experts, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write expert and first row of each tile of BLOCK_ROWS rows, and their number."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.zeros([BLOCK], tl.int32)
    row = tl.zeros([BLOCK], tl.int64)
    first = tl.zeros([], tl.int64)
    for expert in range(0, num_experts):
        begin = tl.load(offsets_ptr + expert)
        tiles = tl.cdiv(tl.load(offsets_ptr + expert + 1) - begin, BLOCK_ROWS)
        here = (slot >= first) & (slot < first + tiles)
        group = tl.where(here, expert, group)
        row = tl.where(here, begin + (slot - first) * BLOCK_ROWS, row)
        first += tiles
    tl.store(group_ptr + slot, group, mask=slot < slots)
    tl.store(row_ptr + slot, row, mask=slot < slots)
    tl.store(count_ptr, first)


@triton.jit
def _schedule(tokens, count_ptr, routed_columns, shared_columns, BLOCK_ROWS: tl.constexpr):
    """Return how many tiles the shared expert has, and how many there are in all, from blocks of columns per row."""
    shared_tiles = tl.cdiv(tokens, BLOCK_ROWS) * shared_columns
    return shared_tiles, shared_tiles + tl.load(count_ptr).to(tl.int32) * routed_columns


@triton.jit
def _tile(tile, shared_tiles, routed_columns, shared_columns, offsets_ptr, group_ptr, row_ptr, routed, tokens,
          num_experts, width, shared_width, BLOCK_ROWS: tl.constexpr):  # fmt: skip
    """Return group, rows [BLOCK_ROWS], which of them are the group's, its width, and block of columns of a tile."""
    is_shared = tile < shared_tiles
    columns = tl.where(is_shared, shared_columns, routed_columns)
    local = tl.where(is_shared, tile, tile - shared_tiles)
    slot = local // columns
    group = tl.load(group_ptr + slot, mask=is_shared == 0, other=0)
    first = tl.load(row_ptr + slot, mask=is_shared == 0, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=is_shared == 0, other=0)
    group = tl.where(is_shared, num_experts, group)
    first = tl.where(is_shared, routed + slot.to(tl.int64) * BLOCK_ROWS, first)
    end = tl.where(is_shared, (routed + tokens).to(tl.int64), end)
    row = first + tl.arange(0, BLOCK_ROWS)
    own = tl.where(group == num_experts, shared_width, width)
    return group, row, row < end, own, local % columns


@triton.jit
def _place(row, group, num_experts, routed, width, shared_width):
    """Return where a row begins in a flat buffer [R, width] followed by [T, shared_width]."""
    beyond = (row - routed) * shared_width + routed.to(tl.int64) * width
    return tl.where(group == num_experts, beyond, row * width)


@triton.jit
def _token(row, inside, group, num_experts, routed, source_ptr, topk, GATHERS: tl.constexpr):
    """Return the row of x behind each row: its token, or itself where rows come sorted."""
    if GATHERS:
        source = tl.load(source_ptr + row, mask=inside & (group != num_experts), other=0)
        return tl.where(group == num_experts, row - routed, source // topk)
    return row


@triton.jit
def _row_weights(row, inside, group, num_experts, routed, source_ptr, weights_ptr, gate_ptr,
                 GATHERS: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Return each row's weight: the router's, sigmoid(x g) of the shared expert, or 1 where that has no gate."""
    at = row
    if GATHERS:
        at = tl.load(source_ptr + row, mask=inside & (group != num_experts), other=0)
    weights = tl.load(weights_ptr + at, mask=inside & (group != num_experts), other=1.0)
    if GATED:
        gates = tl.load(gate_ptr + row - routed, mask=inside & (group == num_experts), other=1.0)
        weights = tl.where(group == num_experts, gates, weights)
    return weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def up_kernel(
    x_ptr, source_ptr, fc1_ptr, fc1_offsets_ptr, offsets_ptr, group_ptr, row_ptr, count_ptr, packed_ptr, hidden_ptr,
    routed, tokens, num_experts, size, width, shared_width, topk,
    GATHERS: tl.constexpr, KEEPS: tl.constexpr, ACTIVATES: tl.constexpr, ALIGNMENT: tl.constexpr,
    WIDENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Write packed = x W1^T if KEEPS and hidden = silu(gate) * up if ACTIVATES, gathering rows of x [T, H]."""
    routed_columns, shared_columns = tl.cdiv(width, BLOCK_COLUMNS), tl.cdiv(shared_width, BLOCK_COLUMNS)
    shared_tiles, tiles = _schedule(tokens, count_ptr, routed_columns, shared_columns, BLOCK_ROWS)
    inner = tl.arange(0, BLOCK_INNER)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        group, row, inside, own, block = _tile(
            tile, shared_tiles, routed_columns, shared_columns, offsets_ptr, group_ptr, row_ptr, routed, tokens,
            num_experts, width, shared_width, BLOCK_ROWS,
        )  # fmt: skip
        column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        real = column < own
        x_row = x_ptr + _token(row, inside, group, num_experts, routed, source_ptr, topk, GATHERS) * size
        matrix = fc1_ptr + tl.multiple_of(tl.load(fc1_offsets_ptr + group), ALIGNMENT)
        gate_row = matrix + column.to(tl.int64) * size
        up_row = gate_row + own.to(tl.int64) * size
        gate = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        up = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for first in range(0, size, BLOCK_INNER):
            at = first + inner
            x = tl.load(x_row[:, None] + at[None, :], mask=inside[:, None] & (at < size)[None, :], other=0.0)
            wanted = real[None, :] & (at < size)[:, None]
            w_gate = tl.load(gate_row[None, :] + at[:, None], mask=wanted, other=0.0)
            w_up = tl.load(up_row[None, :] + at[:, None], mask=wanted, other=0.0)
            if WIDENS:
                x, w_gate, w_up = x.to(tl.float32), w_gate.to(tl.float32), w_up.to(tl.float32)
            gate = tl.dot(x, w_gate, gate, input_precision="ieee")
            up = tl.dot(x, w_up, up, input_precision="ieee")
        stored = inside[:, None] & real[None, :]
        if KEEPS:
            place = _place(row, group, num_experts, routed, 2 * width, 2 * shared_width)
            out = packed_ptr + place[:, None] + column[None, :]
            tl.store(out, gate.to(packed_ptr.dtype.element_ty), mask=stored)
            tl.store(out + own, up.to(packed_ptr.dtype.element_ty), mask=stored)
        if ACTIVATES:
            place = _place(row, group, num_experts, routed, width, shared_width)
            activated = gate * tl.sigmoid(gate) * up
            out = hidden_ptr + place[:, None] + column[None, :]
            tl.store(out, activated.to(hidden_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def down_kernel(
    a_ptr, source_ptr, matrix_ptr, matrix_offsets_ptr, weights_ptr, gate_ptr, offsets_ptr, group_ptr, row_ptr,
    count_ptr, out_ptr, routed, tokens, num_experts, size, width, shared_width,
    GATHERS: tl.constexpr, GATED: tl.constexpr, WEIGHS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNMENT: tl.constexpr, WIDENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Write out [R + T, H] = a W, rows weighted if WEIGHS; a is flat, [R, width] and [T, shared_width].

    W is [width, H] or, if TRANSPOSED, kept as [H, width].
    """
    columns = tl.cdiv(size, BLOCK_COLUMNS)
    shared_tiles, tiles = _schedule(tokens, count_ptr, columns, columns, BLOCK_ROWS)
    inner = tl.arange(0, BLOCK_INNER)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        group, row, inside, own, block = _tile(
            tile, shared_tiles, columns, columns, offsets_ptr, group_ptr, row_ptr, routed, tokens, num_experts, width,
            shared_width, BLOCK_ROWS,
        )  # fmt: skip
        column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        real = column < size
        a_row = a_ptr + _place(row, group, num_experts, routed, width, shared_width)
        matrix = matrix_ptr + tl.multiple_of(tl.load(matrix_offsets_ptr + group), ALIGNMENT)
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for first in range(0, own, BLOCK_INNER):
            at = first + inner
            a = tl.load(a_row[:, None] + at[None, :], mask=inside[:, None] & (at < own)[None, :], other=0.0)
            if TRANSPOSED:
                w_ptrs = matrix + column.to(tl.int64)[None, :] * own + at[:, None]
            else:
                w_ptrs = matrix + at.to(tl.int64)[:, None] * size + column[None, :]
            w = tl.load(w_ptrs, mask=real[None, :] & (at < own)[:, None], other=0.0)
            if WIDENS:
                a, w = a.to(tl.float32), w.to(tl.float32)
            total = tl.dot(a, w, total, input_precision="ieee")
        if WEIGHS:
            weights = _row_weights(row, inside, group, num_experts, routed, source_ptr, weights_ptr, gate_ptr, GATHERS,
                                   GATED)  # fmt: skip
            total *= weights[:, None]
        out = out_ptr + row[:, None] * size + column[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def activation_backward_kernel(
    grad_ptr, source_ptr, fc2_ptr, fc2_offsets_ptr, weights_ptr, gate_ptr, offsets_ptr, group_ptr, row_ptr, count_ptr,
    packed_ptr, grad_packed_ptr, hidden_ptr, partial_ptr, routed, tokens, num_experts, size, width, shared_width, topk,
    GATHERS: tl.constexpr, GATED: tl.constexpr, ALIGNMENT: tl.constexpr, WIDENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Write grad_packed, the weighted hidden (operand of W2's gradient) and partial sums of the weights' gradients.

    d = dy W2 of gathered rows of dy [T, H]; partial [columns, R] and then [shared columns, T] are flat.
    """
    routed_columns, shared_columns = tl.cdiv(width, BLOCK_COLUMNS), tl.cdiv(shared_width, BLOCK_COLUMNS)
    shared_tiles, tiles = _schedule(tokens, count_ptr, routed_columns, shared_columns, BLOCK_ROWS)
    inner = tl.arange(0, BLOCK_INNER)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        group, row, inside, own, block = _tile(
            tile, shared_tiles, routed_columns, shared_columns, offsets_ptr, group_ptr, row_ptr, routed, tokens,
            num_experts, width, shared_width, BLOCK_ROWS,
        )  # fmt: skip
        column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        real = column < own
        grad_row = grad_ptr + _token(row, inside, group, num_experts, routed, source_ptr, topk, GATHERS) * size
        matrix = fc2_ptr + tl.multiple_of(tl.load(fc2_offsets_ptr + group), ALIGNMENT)
        grad = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for first in range(0, size, BLOCK_INNER):
            at = first + inner
            dy = tl.load(grad_row[:, None] + at[None, :], mask=inside[:, None] & (at < size)[None, :], other=0.0)
            w_ptrs = matrix + at.to(tl.int64)[:, None] * own + column[None, :]
            w = tl.load(w_ptrs, mask=real[None, :] & (at < size)[:, None], other=0.0)
            if WIDENS:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            grad = tl.dot(dy, w, grad, input_precision="ieee")
        # In an order that keeps few tiles alive at a time: registers are what bounds this kernel.
        stored = inside[:, None] & real[None, :]
        dtype = grad_packed_ptr.dtype.element_ty
        place = _place(row, group, num_experts, routed, 2 * width, 2 * shared_width)
        gate = tl.load((packed_ptr + place)[:, None] + column[None, :], mask=stored, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        slope = sigmoid * (1.0 + gate - silu)
        up = tl.load((packed_ptr + place + own)[:, None] + column[None, :], mask=stored, other=0.0).to(tl.float32)
        grad_weights = tl.sum(grad * silu * up, axis=1)
        first_partial = block * routed.to(tl.int64) + row
        if GATHERS:
            source = tl.load(source_ptr + row, mask=inside & (group != num_experts), other=0)
            first_partial = block * routed.to(tl.int64) + source
        beyond = routed_columns * routed.to(tl.int64) + block * tokens.to(tl.int64) + row - routed
        tl.store(partial_ptr + tl.where(group == num_experts, beyond, first_partial), grad_weights, mask=inside)
        weights = _row_weights(row, inside, group, num_experts, routed, source_ptr, weights_ptr, gate_ptr, GATHERS,
                               GATED)[:, None]  # fmt: skip
        hidden = hidden_ptr + _place(row, group, num_experts, routed, width, shared_width)
        tl.store(hidden[:, None] + column[None, :], (silu * up * weights).to(dtype), mask=stored)
        grad *= weights
        grad_packed = grad_packed_ptr + place
        tl.store((grad_packed + own)[:, None] + column[None, :], (grad * silu).to(dtype), mask=stored)
        tl.store(grad_packed[:, None] + column[None, :], (grad * up * slope).to(dtype), mask=stored)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weight_gradient_kernel(
    flat_ptr, x_ptr, source_ptr, offsets_ptr, out_ptr, out_offsets_ptr, routed, tokens, num_experts, size, width,
    shared_width, topk, GATHERS: tl.constexpr, TRANSPOSED: tl.constexpr, ADDS: tl.constexpr, ALIGNMENT: tl.constexpr,
    WIDENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Write, or add if ADDS, flat_g^T x_g [width, H] of gathered rows of x, or x_g^T flat_g [H, width] if TRANSPOSED.

    A program adds up all rows of its tiles, in order.
    """
    columns = tl.cdiv(size, BLOCK_COLUMNS)
    shared_tiles = tl.cdiv(shared_width, BLOCK_WIDTH) * columns
    per_group = tl.cdiv(width, BLOCK_WIDTH) * columns
    inner = tl.arange(0, BLOCK_INNER)
    for tile in range(tl.program_id(0), shared_tiles + num_experts * per_group, tl.num_programs(0)):
        is_shared = tile < shared_tiles
        group = tl.where(is_shared, num_experts, (tile - shared_tiles) // per_group)
        local = tl.where(is_shared, tile, (tile - shared_tiles) % per_group)
        begin = tl.load(offsets_ptr + group, mask=is_shared == 0, other=0)
        end = tl.load(offsets_ptr + group + 1, mask=is_shared == 0, other=0)
        begin = tl.where(is_shared, routed.to(tl.int64), begin)
        end = tl.where(is_shared, (routed + tokens).to(tl.int64), end)
        own = tl.where(is_shared, shared_width, width)
        wide = (local // columns) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        column = (local % columns) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        real_wide, real = wide < own, column < size
        total = tl.zeros([BLOCK_WIDTH, BLOCK_COLUMNS], tl.float32)
        for first in range(begin, end, BLOCK_INNER):
            row = first + inner
            inside = row < end
            flat_row = flat_ptr + _place(row, group, num_experts, routed, width, shared_width)
            x_row = x_ptr + _token(row, inside, group, num_experts, routed, source_ptr, topk, GATHERS) * size
            flat = tl.load(flat_row[:, None] + wide[None, :], mask=inside[:, None] & real_wide[None, :], other=0.0)
            x = tl.load(x_row[:, None] + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
            if WIDENS:
                flat, x = flat.to(tl.float32), x.to(tl.float32)
            total = tl.dot(tl.trans(flat), x, total, input_precision="ieee")
        matrix = out_ptr + tl.multiple_of(tl.load(out_offsets_ptr + group), ALIGNMENT)
        if TRANSPOSED:
            out = matrix + column.to(tl.int64)[None, :] * own + wide[:, None]
        else:
            out = matrix + wide.to(tl.int64)[:, None] * size + column[None, :]
        stored = real_wide[:, None] & real[None, :]
        if ADDS:
            total += tl.load(out, mask=stored, other=0.0).to(tl.float32)
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=stored)
