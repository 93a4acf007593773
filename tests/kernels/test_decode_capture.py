"""A step of decoding can be recorded as a CUDA graph: nothing of it is read on the host, no grid depends on lengths.

The tensors are meta tensors: shapes without numbers on no CPU, so that every read of a number is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_qwen import ops

BATCH, HEADS, HEADS_K, SIZE, PAGE, PAGES = 3, 14, 2, 64, 16, 40


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a step on a device."""

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise PermissionError("a copy to the host")

    monkeypatch.setattr(torch.Tensor, "cpu", refuse)
    table = torch.empty(129, SIZE // 2, device="meta")
    pages = torch.empty(BATCH * PAGES, PAGE, HEADS_K, SIZE, dtype=torch.bfloat16, device="meta")
    return {
        "q": torch.empty(BATCH, HEADS, SIZE, dtype=torch.bfloat16, device="meta"),
        "key_pages": pages,
        "value_pages": pages,
        "page_table": torch.empty(BATCH, PAGES, dtype=torch.int32, device="meta"),
        "lengths": torch.empty(BATCH, dtype=torch.int32, device="meta"),
        "tables": (table, table),
        "logit_scale": torch.empty(BATCH, device="meta"),
    }


def test_a_read_of_a_number_would_be_seen(given: dict[str, Any]) -> None:
    for read in (torch.Tensor.item, torch.Tensor.tolist, lambda tensor: tensor.cpu(), int, bool):
        with pytest.raises((NotImplementedError, PermissionError, RuntimeError)):
            read(given["lengths"].max())


@pytest.mark.parametrize("chunks", [ops.ChunkLayout(128, 32), None])
def test_checks_read_no_number(given: dict[str, Any], chunks: ops.ChunkLayout | None) -> None:
    output = ops.paged_decode_attention(**given, chunks=chunks)
    assert output.shape == given["q"].shape
    assert output.is_meta


class Kernel:
    """Notes what a Triton kernel is launched with."""

    def __init__(self) -> None:
        self.grids: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        self.grids.append(grid)
        return lambda *arguments, **rest: None


def test_the_launch_reads_no_number(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from megatron_qwen.kernels.dual_chunk_attention import decode_kernel

    kernels = {name: Kernel() for name in ("dca_decode_kernel", "dca_merge_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(decode_kernel, name, kernel)
    chunks, scale, logit_scale = ops.ChunkLayout(128, 32), SIZE**-0.5, given.pop("logit_scale")
    tables = given.pop("tables")
    output = decode_kernel.launch_decode(*given.values(), chunks, tables, scale, logit_scale)
    assert output.shape == given["q"].shape
    # By the room of the page table, not by the lengths: a replay may have others.
    (grid,), (merged,) = (kernel.grids for kernel in kernels.values())
    assert grid[0] == BATCH * HEADS_K
    assert grid[1] >= 2
    assert merged == (BATCH * HEADS,)
