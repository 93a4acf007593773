"""The table of attention over context-parallel ranks of a CPU, at a size that takes no time."""

from __future__ import annotations

import pytest

from megatron_qwen.benchmark import context_cpu


@pytest.mark.multirank
def test_a_table_with_a_row_per_attention_communication_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    context_cpu.main(
        ["--length", "64", "--ranks", "1", "2", "--chunk-size", "16", "--local-size", "4", "--rounds", "1"]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] for row in rows] == [
        [attention, kind, ranks]
        for attention in ("plain", "DCA 16/4")
        for kind in ("p2p", "all_gather")
        for ranks in ("1", "2")
    ]
    # Output and gradients of q, k, v of a rank: 64 / ranks tokens of 4, 4, 2, 2 heads of 64 in fp32.
    assert all(float(row[5]) * 2**20 > 64 / int(row[2]) * 12 * 64 * 4 for row in rows)
