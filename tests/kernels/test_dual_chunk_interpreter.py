"""The Triton kernels of Dual Chunk Attention, line by line on a CPU, with tiles of 16 rows and keys."""

from __future__ import annotations

import dual_chunk_checks as checks
import dual_chunk_kernel_checks as kernel_checks
import pytest
import torch
from dual_chunk_checks import Example

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

# Tiles that divide a chunk and tiles that do not, chunks shorter than a tile, both caps, a window past a chunk.
LAYOUTS = {
    "whole tiles": ops.ChunkLayout.released(20, 4),
    "odd": ops.ChunkLayout.paper(26, 7),
    "short": ops.ChunkLayout.released(8, 5),
    "plain": None,
}


@pytest.mark.parametrize(
    ("name", "length", "dtype"),
    [
        ("whole tiles", 34, torch.float32),
        ("whole tiles", 34, torch.bfloat16),
        ("odd", 41, torch.float16),
        ("short", 11, torch.float32),
        ("plain", 33, torch.float32),
        ("plain", 17, torch.bfloat16),
    ],
)
def test_batch(interpreted, name: str, length: int, dtype: torch.dtype) -> None:
    # Two key heads take turns in backward, one does not.
    heads = (2, 2 if name == "odd" else 1)
    example = Example(lengths=(length,), heads=heads, size=64, chunks=LAYOUTS[name], with_temperature=True, batch=1)
    interpreted(checks.check, example, dtype, "triton")


def test_packed_sequences(interpreted) -> None:
    """Empty ones, few new rows, and more queries than keys."""
    example = Example(
        lengths=(5, 0, 35, 3), new_rows=(5, 0, 6, 5), heads=(2, 1), size=64, chunks=LAYOUTS["whole tiles"]
    )
    interpreted(checks.check, example, torch.float32, "triton")


@pytest.mark.parametrize("name", ["short", "plain"])
def test_decoding(interpreted, name: str) -> None:
    interpreted(kernel_checks.check_decoding, LAYOUTS[name], (37, 0, 1, 23), torch.bfloat16, "triton")


def test_parts_of_the_keys_at_foreign_strides(interpreted) -> None:
    interpreted(kernel_checks.check_parts_of_the_keys, ops.ChunkLayout.released(20, 4), "triton")


def test_other_heads_are_refused(interpreted) -> None:
    with pytest.raises(ConfigError, match="heads have 8 numbers, and kernels take 64 or 128"):
        interpreted(checks.check, Example(lengths=(3,)), torch.float32, "triton")


def test_memory_of_backward(interpreted) -> None:
    """18 bytes for each number of q in 16 bits and a copy of k, of one key head of four at a time."""
    run = interpreted(kernel_checks.bytes_of_backward, (8, 4), 1024)
    assert 18 / 4 < run < 20 / 4
