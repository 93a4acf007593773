"""Bitmaps of an index in Triton, three per head: distances in slashes, vertical columns, keys in blocks of a tile.

K bits each, so 48 KiB per head at 131,072 tokens. Bit b of a bitmap stands for number b - PAD, as places relative to a
tile begin below 0. Distances come in descending order, as keys ascend then: bit b is distance 64 W - 1 - 2 PAD - b.

Shapes: H query heads, W words of 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import TileBlocks
from .index import SparseIndex

SLASH, VERTICAL, COVERED = (tl.constexpr(number) for number in range(3))
PAD = 128
"""At least as many as a tile has rows and a block keys."""
WORDS = 16
"""Of a program."""


@triton.jit
def count_below(list_ptr, count, target, steps):
    """Return how many of `count` ascending int32 are below the target, for each of them; 2 ** steps > count."""
    low = tl.zeros_like(target)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        is_below = is_open & (tl.load(list_ptr + middle, mask=is_open, other=0) < target)
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_open & (is_below == 0), middle, high)
    return low


@triton.jit
def window(words_ptr, bit):
    """Return the 64 bits from number `bit` on, the first one lowest."""
    word_ptr = words_ptr + bit // 64
    shift = (bit % 64).to(tl.uint64)
    low, high = (tl.load(word_ptr).to(tl.uint64, bitcast=True), tl.load(word_ptr + 1).to(tl.uint64, bitcast=True))
    # In two steps: a shift by all 64 bits is undefined.
    return (low >> shift) | ((high << 1) << (63 - shift))


@triton.jit
def _store_words(words_ptr, first_word, words, bits, WORDS: tl.constexpr):
    """Store bits [WORDS, 64] as words."""
    word = first_word + tl.arange(0, WORDS)
    packed = tl.sum(bits.to(tl.int64) << tl.arange(0, 64).to(tl.int64)[None, :], axis=1)
    tl.store(words_ptr + word, packed, mask=word < words)


@triton.jit
def _is_in_block(starts_ptr, count, x, steps, BLOCK_KEYS: tl.constexpr):
    """Return whether keys at x are in one of the blocks that begin at `count` ascending numbers."""
    before = count_below(starts_ptr, count, x + 1, steps)
    start = tl.load(starts_ptr + before - 1, mask=before > 0, other=0)
    return (before > 0) & (x < start + BLOCK_KEYS)


@triton.jit(do_not_specialize=("room", "words", "steps"))
def bitmap_kernel(
    slashes_ptr, slash_bounds_ptr, verticals_ptr, vertical_bounds_ptr, starts_ptr, counts_ptr, out_ptr,
    room, words, steps, PAD: tl.constexpr, BLOCK_KEYS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write words of the three bitmaps of a head, out [H, 3, W]."""
    head = tl.program_id(1)
    first_word = tl.program_id(0) * WORDS
    bit = (first_word + tl.arange(0, WORDS))[:, None] * 64 + tl.arange(0, 64)[None, :]
    number = bit - PAD
    out_ptr += head.to(tl.int64) * 3 * words
    begin, end = tl.load(slash_bounds_ptr + head), tl.load(slash_bounds_ptr + head + 1)
    # Ends of slashes ascend strictly, so an odd number of them at or below a distance means: inside of one.
    crossed = count_below(slashes_ptr + 2 * begin, (2 * (end - begin)).to(tl.int32), words * 64 - 2 * PAD - bit, steps)
    _store_words(out_ptr + words * SLASH, first_word, words, crossed % 2, WORDS)
    begin, end = tl.load(vertical_bounds_ptr + head), tl.load(vertical_bounds_ptr + head + 1)
    count = (end - begin).to(tl.int32)
    before = count_below(verticals_ptr + begin, count, number, steps)
    found = tl.load(verticals_ptr + begin + before, mask=before < count, other=-PAD - 1)
    _store_words(out_ptr + words * VERTICAL, first_word, words, found == number, WORDS)
    starts_ptr += head.to(tl.int64) * (2 * room + 1)
    covered = _is_in_block(starts_ptr, tl.load(counts_ptr + 2 * head), number, steps, BLOCK_KEYS)
    covered |= _is_in_block(starts_ptr + room, tl.load(counts_ptr + 2 * head + 1), number, steps, BLOCK_KEYS)
    _store_words(out_ptr + words * COVERED, first_word, words, covered, WORDS)


def bitmaps(index: SparseIndex, blocks: TileBlocks, keys: int) -> torch.Tensor:
    """Return the bitmaps of all heads, int64 [H, 3, W], with room for a window behind every key."""
    words = triton.cdiv(index.length + 4 * PAD, 64)
    out = torch.empty((index.heads, 3, words), dtype=torch.int64, device=index.slashes.device)
    room = blocks.starts.shape[-1]
    # A head has no more ends of slashes than distances and one more.
    steps = max(index.length + 1, room).bit_length()
    bitmap_kernel[(triton.cdiv(words, WORDS), index.heads)](
        index.slashes, index.slash_bounds, index.verticals, index.vertical_bounds, blocks.starts, blocks.counts, out,
        room, words, steps, PAD=PAD, BLOCK_KEYS=keys, WORDS=WORDS, num_warps=4,
    )  # fmt: skip
    return out
