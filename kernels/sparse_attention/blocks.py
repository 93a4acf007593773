"""Blocks of keys that the slashes of a head cover, relative to a tile of rows: the same for every tile.

Slashes move with the rows. Let x be how far a key lies before the first row of a tile; row r of it is x + r away from
the key, so of a slash [a, b) a tile of R rows meets the keys x in [a - R + 1, b), wherever it is. Where such ranges
come closer than a block they are one. They are cut into blocks from their nearest key on. A block whose distances
x ... x + B + R - 2 all lie in one slash is whole: no pair of it needs a mask. Nothing here waits for the device.

Shapes: H query heads, N slashes, C slots for blocks, R rows of a tile, B keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .index import SparseIndex

WHOLE, PARTIAL = range(2)


@dataclass(frozen=True)
class TileBlocks:
    """Blocks of all heads; a block at x has the keys first - x - B + 1 to first - x of a tile whose first row is first.

    Attributes:
        starts: int32 [H, 2, C], x of whole and of partial blocks, ascending; those behind the counts are undefined.
        counts: int32 [H, 2].
    """

    starts: torch.Tensor
    counts: torch.Tensor


def slots(length: int, rows: int, keys: int) -> int:
    """Return how many blocks a head may have: they fill [1 - rows, length) at most, every range with a rest."""
    return (length + rows - 2) // keys + 1


def tile_blocks(index: SparseIndex, rows: int, keys: int) -> TileBlocks:
    """Return the blocks of `keys` keys for tiles of `rows` rows."""
    heads, room = index.heads, slots(index.length, rows, keys)
    starts = index.slashes.new_empty((heads, 2 * room + 1))
    if not len(index.slashes):
        return TileBlocks(torch.unflatten(starts[:, :-1], 1, (2, room)), starts.new_zeros((heads, 2)))
    near, far = index.slashes.long().unbind(1)
    behind, nearest = _blocks_so_far(index, near, far, rows, keys)
    before = torch.cat([behind.new_zeros(1), behind])[index.slash_bounds]
    slot_HC = before[:-1, None] + torch.arange(room, device=near.device)
    is_block = slot_HC < before[1:, None]
    # The slash in whose range a block begins.
    owner = torch.searchsorted(behind, slot_HC, right=True).clamp(max=len(near) - 1)
    x_HC = nearest[owner] + slot_HC * keys
    is_whole = is_block & _lies_in_one_slash(index, near, far, x_HC, rows + keys - 1)
    places = [
        torch.where(each, each.cumsum(1) - 1 + first, 0)
        for each, first in ((is_whole, 0), (is_block & ~is_whole, room))
    ]
    # What is no block goes behind all.
    place = torch.where(is_block, places[0] + places[1], 2 * room)
    starts.scatter_(1, place, x_HC.to(torch.int32))
    whole = is_whole.sum(1)
    counts = torch.stack([whole, is_block.sum(1) - whole], 1).to(torch.int32)
    return TileBlocks(torch.unflatten(starts[:, :-1], 1, (2, room)), counts)


def _blocks_so_far(
    index: SparseIndex, near: torch.Tensor, far: torch.Tensor, rows: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, of each slash, the blocks of all slashes up to it, and x of block number 0 if all were of its range."""
    number = torch.arange(len(near), device=near.device)
    head = torch.searchsorted(index.slash_bounds, number, right=True) - 1
    is_slash = head < index.heads
    far_before = torch.cat([far[:1], far[:-1]])
    begins = (number == index.slash_bounds[head.clamp(max=index.heads)]) | (near - far_before >= rows + keys - 1)
    begins &= is_slash
    # Ranges are numbered from 1; those that do not begin here write to 0.
    of_range = begins.cumsum(0)
    first_x = near.new_zeros(len(near) + 1).scatter_(0, torch.where(begins, of_range, 0), near - (rows - 1))[of_range]
    through = (far - first_x + keys - 1) // keys
    through_before = torch.where(begins, 0, torch.cat([through[:1], through[:-1]]))
    behind = torch.where(is_slash, through - through_before, 0).cumsum(0)
    return behind, first_x - (behind - through) * keys


def _lies_in_one_slash(
    index: SparseIndex, near: torch.Tensor, far: torch.Tensor, x_HC: torch.Tensor, distances: int
) -> torch.Tensor:
    """Whether distances x to x + distances - 1 are those of one slash, [H, C]."""
    number = torch.arange(len(near), device=near.device)
    head = torch.searchsorted(index.slash_bounds, number, right=True) - 1
    # Slashes of all heads in one order; x may be negative.
    step = 2 * (index.length + distances)
    of_head = torch.arange(index.heads, device=near.device)[:, None] * step
    last = torch.searchsorted(head * step + near, of_head + x_HC, right=True) - 1
    found = last.clamp(min=0)
    return (last >= index.slash_bounds[:-1, None]) & (x_HC + distances <= far[found])
