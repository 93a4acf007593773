"""The comparison of Dual Chunk Attention with torch's attention on a CPU, at a size that takes no time."""

from __future__ import annotations

import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.benchmark import attention_cpu


def test_a_table_with_a_row_per_dtype_length_and_pass(capsys: pytest.CaptureFixture[str]) -> None:
    attention_cpu.main(
        ["--length", "24", "40", "--chunk-size", "16", "--local-size", "4", "--rounds", "1", "--backward"]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] for row in rows] == [
        [dtype, length, label]
        for dtype in ("float32", "bfloat16")
        for length in ("24", "40")
        for label in ("forward", "forward + backward")
    ]
    assert all(float(row[5]) > 0 for row in rows)


def test_both_compute_the_same_within_a_chunk() -> None:
    chunks = ops.ChunkLayout.released(64, 16)
    sizes = attention_cpu.Sizes(length=48, heads=4, groups=2, head_dim=8, chunks=chunks, dtype=torch.float32)
    q, k, v = sizes.tensors()
    ours, plain = attention_cpu.contestants(sizes).values()
    rotated = [each.clone() for each in (q, k)]
    ops.rope_(*(each.transpose(0, 1) for each in rotated), *sizes.tables())
    torch.testing.assert_close(ours(q, k, v), plain(*rotated, v), rtol=1e-5, atol=1e-5)


def test_memory_counts_what_is_held_at_once() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        held = x + 1
        return held * 2

    def one_after_the_other(x: torch.Tensor) -> None:
        for _ in range(3):
            x + 1

    x = torch.zeros(1000)
    assert 8000 <= attention_cpu.peak_bytes(both, [x]) < 8100
    assert 4000 <= attention_cpu.peak_bytes(one_after_the_other, [x]) < 4100
