"""The Triton kernels of sparse prefill, line by line on a CPU, with tiles of 16 rows and keys."""

from __future__ import annotations

import pytest
import sparse_kernel_checks as checks
import torch

from megatron_qwen import ops

WHOLE_TILES, ODD = ops.ChunkLayout.released(20, 4), ops.ChunkLayout.paper(26, 7)
# A slash longer than block and tile and single distances; gaps of 1, 2 and of more than a tile; neighbours closer than
# a tile with columns inside and outside of them.
SLASHES = {*range(40), 55, 57, 60, 90}
MIXED: checks.Lists = [({0, 3, 41, 43, 70}, SLASHES), ({1, 2, 20, 64}, {2, 5, 17})]


@pytest.mark.parametrize(
    ("chunks", "rows", "length", "lists", "dtype"),
    [
        (WHOLE_TILES, 37, 93, MIXED, torch.float32),
        (ODD, 27, 71, [({0, 3, 41, 70}, {0, 33, 34, 35, 60}), (set(), set())], torch.bfloat16),
        (None, 20, 60, [(set(range(0, 60, 3)), set(range(20)))], torch.float16),
        (ops.ChunkLayout.released(8, 5), 5, 11, [({4}, set()), (set(), {6})], torch.float32),
    ],
    ids=["whole tiles", "odd, an empty head", "plain", "short chunks"],
)
def test_kept_pairs(interpreted, chunks, rows: int, length: int, lists: checks.Lists, dtype: torch.dtype) -> None:
    interpreted(checks.check, chunks, rows, length, lists, dtype, "triton")


def test_heads_share_keys_by_groups(interpreted) -> None:
    lists: checks.Lists = [({index}, {index, 9 + index}) for index in range(4)]
    interpreted(checks.check, None, 3, 17, lists, torch.float32, "triton", groups=2)


def test_a_full_index_equals_dense(interpreted) -> None:
    interpreted(checks.check_full, WHOLE_TILES, 20, 52, "triton")


def test_views_and_keys_of_a_cache(interpreted) -> None:
    interpreted(checks.check_views_and_rotated_keys, ODD, "triton")


def test_a_launch_waits_for_no_device(interpreted) -> None:
    interpreted(checks.check_no_host_read)
