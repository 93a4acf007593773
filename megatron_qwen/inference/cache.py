"""Keys and values of sequences of any length, in pages that are handed out and taken back.

A page holds `page_size` consecutive tokens of one sequence, in every layer at the same place. A sequence gets all the
pages that it can come to need when it is admitted, so nothing runs out half-way through a text; they are free for
others when it is done.

Keys are rotated once, when they are written: at their position, or with dual chunk attention at their position within
a chunk.

Shapes: P pages, Z tokens of a page, G key-value heads of this rank, D head size, T tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_qwen.errors import ConfigError

PAGE_SIZE = 64
"""Tokens of a page: at 8,192 tokens a table of 128 entries, and 32 tokens lost per sequence on average."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a cache on one rank.

    Attributes:
        num_layers: attention layers of this rank.
        num_heads: G.
        head_dim: D.
        dtype: of keys and values.
        page_size: Z.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int = PAGE_SIZE

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ConfigError(f"page size of the key-value cache: got {self.page_size}, expected at least 1 token")

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers, keys and values."""
        return 2 * self.num_layers * self.page_size * self.num_heads * self.head_dim * self.dtype.itemsize

    def pages_for(self, tokens: int) -> int:
        """Return the pages of a sequence of so many tokens."""
        return -(-tokens // self.page_size)


class PagedCache:
    """Pages of all attention layers of this rank, and whose they are.

    Attributes:
        shape: sizes.
        num_pages: P.
        keys: per layer, [P, Z, G, D].
        values: per layer, [P, Z, G, D].
    """

    def __init__(self, shape: CacheShape, num_pages: int, device: torch.device) -> None:
        """Allocate.

        Raises:
            ConfigError: the pages do not fit into the memory of the device.
        """
        self.shape, self.num_pages = shape, num_pages
        _require_memory(shape, num_pages, device)
        size = num_pages, shape.page_size, shape.num_heads, shape.head_dim
        # Zeros: a kernel may multiply what lies behind a sequence's end by a weight of zero, which NaN would survive.
        self.keys = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        self._free = list(range(num_pages))
        self._pages: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def can_admit(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens gets its pages now.

        Raises:
            ConfigError: it never will.
        """
        needed = self.shape.pages_for(tokens)
        if needed > self.num_pages:
            raise ConfigError(
                f"key-value cache: a sequence of {tokens:,} tokens needs {needed:,} pages of {self.shape.page_size} "
                f"tokens, {_size(needed * self.shape.page_bytes)} on this rank; the cache has {self.num_pages:,}, "
                f"{_size(self.num_pages * self.shape.page_bytes)}. Give the cache more tokens (--cache-tokens, "
                "cache_tokens=), shorten the prompt, or ask for fewer new tokens"
            )
        return needed <= len(self._free)

    def admit(self, sequence: int, tokens: int) -> None:
        """Give a sequence the pages of all its tokens, present and future; the lowest free ones.

        Raises:
            ConfigError: they are not free.
        """
        assert sequence not in self._pages, sequence
        if not self.can_admit(tokens):
            raise ConfigError(
                f"key-value cache: a sequence of {tokens:,} tokens needs {self.shape.pages_for(tokens):,} pages, "
                f"{len(self._free):,} of {self.num_pages:,} are free; wait until another sequence is done"
            )
        needed = self.shape.pages_for(tokens)
        self._pages[sequence], self._free = self._free[:needed], self._free[needed:]

    def release(self, sequence: int) -> None:
        """Take a sequence's pages back."""
        for page in self._pages.pop(sequence):
            bisect.insort(self._free, page)

    def pages(self, sequence: int) -> list[int]:
        """Return the pages of a sequence, in the order of its tokens."""
        return self._pages[sequence]

    def slots(self, sequence: int, start: int, end: int) -> list[int]:
        """Return where tokens start to end - 1 of a sequence lie, counted in tokens over all pages."""
        pages, size = self._pages[sequence], self.shape.page_size
        return [pages[token // size] * size + token % size for token in range(start, end)]


def gather(pages: torch.Tensor, tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> torch.Tensor:
    """Return the first tokens of several sequences one behind the other, [T, G, D].

    Args:
        pages: keys or values of one layer, [P, Z, G, D].
        tables: the pages of each sequence.
        lengths: tokens to take of each.
    """
    parts = [_first_tokens(pages, table, length) for table, length in zip(tables, lengths, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _first_tokens(pages: torch.Tensor, table: Sequence[int], length: int) -> torch.Tensor:
    count = -(-length // pages.shape[1])
    first, last = table[0], table[count - 1]
    if last - first == count - 1:  # pages are handed out in ascending order: these follow one another, a view will do
        return pages[first : last + 1].flatten(0, 1)[:length]
    return pages[torch.tensor(table[:count], device=pages.device)].flatten(0, 1)[:length]


def _require_memory(shape: CacheShape, num_pages: int, device: torch.device) -> None:
    needed, available = num_pages * shape.page_bytes, _free_memory(device)
    where = "the GPU" if device.type == "cuda" else "this machine"
    if needed > available:
        raise ConfigError(
            f"key-value cache: {num_pages:,} pages of {shape.page_size} tokens need {_size(needed)} on this rank, "
            f"{_size(available)} of {where} are free. Give fewer or shorter prompts at once, limit the cache's tokens "
            "(--cache-tokens, cache_tokens=) so that prompts wait for one another, or use more ranks"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, or in this machine's memory."""
    if device.type != "cuda":
        import psutil

        return int(psutil.virtual_memory().available)
    # What torch has taken from the device and does not use: the cache of the call before this one, for example.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
