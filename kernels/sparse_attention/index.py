"""Which pairs of a row and a key sparse attention keeps, per query head: key columns and intervals of distances.

Row i keeps key j <= i if j is one of the head's verticals or i - j lies in one of its slashes. Both hold for all rows,
so an index takes kilobytes, where blocks listed per row (vLLM) take gigabytes at a million tokens.

Shapes: H query heads, V verticals and N slashes of all heads together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import ConfigError


@dataclass(frozen=True, eq=False)
class SparseIndex:
    """Kept pairs of all query heads for keys 0 to length - 1.

    Attributes:
        length: number of keys.
        verticals: int32 [V], key columns, ascending within a head.
        vertical_bounds: int64 [H + 1]; head h has verticals[vertical_bounds[h] : vertical_bounds[h + 1]].
        slashes: int32 [N, 2], distances first to last - 1, ascending within a head, with a gap between any two. On a
            GPU there may be room behind the last bound: how many intervals were found is not known on the host.
        slash_bounds: int64 [H + 1].

    All tensors are on one device.

    Raises:
        ConfigError: the tensors contradict that. The numbers themselves are checked on a CPU only.
    """

    length: int
    verticals: torch.Tensor
    vertical_bounds: torch.Tensor
    slashes: torch.Tensor
    slash_bounds: torch.Tensor

    def __post_init__(self) -> None:
        self._check_bounds("vertical_bounds", self.vertical_bounds, "verticals", self.verticals, 1)
        self._check_bounds("slash_bounds", self.slash_bounds, "slashes", self.slashes, 2)
        if self.vertical_bounds.shape != self.slash_bounds.shape:
            raise ConfigError(
                f"sparse index: vertical_bounds {tuple(self.vertical_bounds.shape)}, slash_bounds "
                f"{tuple(self.slash_bounds.shape)}; expected heads + 1 of both"
            )
        if self.verticals.is_cpu:
            for head in range(self.heads):
                self._check_head(head)

    @classmethod
    def of_heads(cls, length: int, verticals: Sequence[torch.Tensor], slashes: Sequence[torch.Tensor]) -> SparseIndex:
        """Put together the lists of heads: ascending columns [V_h], and intervals [N_h, 2] as of `intervals`."""
        bounds = [
            torch.tensor([0, *itertools.accumulate(len(each) for each in lists)], dtype=torch.int64).to(lists[0].device)
            for lists in (verticals, slashes)
        ]
        columns, distances = (torch.cat([each.to(torch.int32) for each in lists]) for lists in (verticals, slashes))
        return cls(length, columns, bounds[0], distances.view(-1, 2), bounds[1])

    @classmethod
    def of_numbers(
        cls,
        length: int,
        columns: torch.Tensor,
        distances: torch.Tensor,
        column_counts: Sequence[int],
        distance_counts: Sequence[int],
        merge_gap: int = 0,
    ) -> SparseIndex:
        """Put together columns and distances of all heads, without waiting for the device.

        Args:
            length: number of keys.
            columns: int64 [V], ascending within a head, one head after the other.
            distances: int64, likewise; neighbouring ones become intervals, see `intervals`.
            column_counts: how many columns each head has.
            distance_counts: how many distances.
            merge_gap: see `intervals`.

        Raises:
            ConfigError: merge_gap is negative, or as the class.
        """
        _check_gap(merge_gap)
        offsets = [
            on_device([0, *itertools.accumulate(each)], columns.device) for each in (column_counts, distance_counts)
        ]
        total = len(distances)
        head = torch.searchsorted(offsets[1][1:], torch.arange(total, device=columns.device), right=True)
        # So far apart that no interval goes on in the next head.
        is_cut = (distances + head * (2 * length + merge_gap)).diff() > merge_gap + 1
        end = is_cut.new_ones(min(total, 1))
        begins, ends = torch.cat([end, is_cut]), torch.cat([is_cut, end])
        so_far = begins.cumsum(0)
        slashes = distances.new_zeros((total + 1, 2))
        for side, (is_side, numbers) in enumerate(((begins, distances), (ends, distances + 1))):
            slashes[:, side].scatter_(0, torch.where(is_side, so_far - 1, total), numbers)
        bounds = torch.cat([so_far.new_zeros(1), so_far])[offsets[1]]
        found = slashes[: int(bounds[-1])] if columns.is_cpu else slashes[:total]
        return cls(length, columns.to(torch.int32), offsets[0], found.to(torch.int32), bounds)

    @classmethod
    def full(cls, length: int, heads: int, device: torch.device | None = None) -> SparseIndex:
        """The index that keeps every visible pair."""
        everything = torch.tensor([[0, length]] if length else [], dtype=torch.int32, device=device).view(-1, 2)
        nothing = torch.zeros(0, dtype=torch.int32, device=device)
        return cls.of_heads(length, [nothing] * heads, [everything] * heads)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.vertical_bounds) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all lists: 4 per vertical, 8 per slash, 16 per head."""
        tensors = self.verticals, self.vertical_bounds, self.slashes, self.slash_bounds
        return sum(each.numel() * each.element_size() for each in tensors)

    def of_head(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Verticals [V_h] and slashes [N_h, 2] of one head, views."""
        columns, distances = (
            slice(int(bounds[head]), int(bounds[head + 1])) for bounds in (self.vertical_bounds, self.slash_bounds)
        )
        return self.verticals[columns], self.slashes[distances]

    def kept(self, head: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Whether a head keeps the pairs of positions of rows [S] and key columns [K], bool [S, K]."""
        verticals, slashes = self.of_head(head)
        distances = rows[:, None] - columns[None, :]
        # Bounds ascend strictly, so an odd number of them at or below a distance means: inside of an interval.
        crossed = torch.bucketize(distances, slashes.flatten().to(distances.dtype), right=True)
        return (distances >= 0) & ((crossed % 2 == 1) | torch.isin(columns, verticals.to(columns.dtype)))

    def _check_bounds(self, name: str, bounds: torch.Tensor, of: str, lists: torch.Tensor, axes: int) -> None:
        is_list = lists.dim() == axes and lists.dtype == torch.int32 and tuple(lists.shape[1:]) == (2,) * (axes - 1)
        if not is_list or not lists.is_contiguous():
            raise ConfigError(
                f"sparse index: {of} has shape {tuple(lists.shape)}, dtype {lists.dtype}; expected contiguous int32 "
                f"[entries{', 2' if axes == 2 else ''}]"
            )
        is_bounds = bounds.dim() == 1 and bounds.dtype == torch.int64 and len(bounds) > 0
        if not is_bounds or lists.device != self.verticals.device or bounds.device != lists.device:
            raise ConfigError(
                f"sparse index: {name} has shape {tuple(bounds.shape)}, dtype {bounds.dtype}, device {bounds.device}, "
                f"{of} device {lists.device}; expected int64 [heads + 1] and {self.verticals.device} for all"
            )
        if not bounds.is_cpu:
            return
        if int(bounds[0]) != 0 or int(bounds[-1]) != len(lists) or bool((bounds.diff() < 0).any()):
            raise ConfigError(f"sparse index: {name} is {bounds.tolist()}; expected ascending, from 0 to {len(lists)}")

    def _check_head(self, head: int) -> None:
        verticals, slashes = self.of_head(head)
        for name, numbers, last in (("verticals", verticals, self.length - 1), ("slashes", slashes, self.length)):
            flat = numbers.flatten()
            if len(flat) and (int(flat[0]) < 0 or int(flat[-1]) > last or bool((flat.diff() <= 0).any())):
                raise ConfigError(
                    f"sparse index: {name} of head {head} do not ascend strictly from 0 or more to {last} or less"
                )


def intervals(distances: torch.Tensor, length: int, merge_gap: int = 0) -> torch.Tensor:
    """Return distances [n], ascending and distinct, as merged intervals [N, 2], first and behind the last.

    Args:
        distances: integers, 0 to length - 1.
        length: number of keys.
        merge_gap: intervals with so many or fewer missing distances between them become one. That keeps more pairs, in
            fewer and longer intervals: what a kernel that works in blocks computes anyway.

    Raises:
        ConfigError: merge_gap is negative, or a distance is out of range or order.
    """
    _check_gap(merge_gap)
    if not len(distances):
        return distances.new_zeros((0, 2), dtype=torch.int32)
    steps = distances.diff()
    if int(distances[0]) < 0 or int(distances[-1]) >= length or bool((steps <= 0).any()):
        raise ConfigError(f"sparse index: distances do not ascend strictly from 0 or more to {length - 1} or less")
    is_cut = steps > merge_gap + 1
    first = torch.cat([distances[:1], distances[1:][is_cut]])
    last = torch.cat([distances[:-1][is_cut], distances[-1:]]) + 1
    return torch.stack([first, last], -1).to(torch.int32)


def _check_gap(merge_gap: int) -> None:
    if merge_gap < 0:
        raise ConfigError(f"sparse index: merge_gap is {merge_gap}; expected 0 or more")


def on_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return int64 [n]; from pinned memory, as a copy from any other waits for what the device has to do."""
    is_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=is_gpu).to(device, non_blocking=is_gpu)
