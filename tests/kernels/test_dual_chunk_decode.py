"""`paged_decode_attention`: the new token of each sequence against a cache in pages."""

from __future__ import annotations

from typing import Any

import dual_chunk_checks as checks
import pytest
import torch
from dual_chunk_checks import Example
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.dual_chunk_attention import layout
from megatron_qwen.testing.compare import assert_relative

LENGTHS = (23, 0, 1, 14, 5, 8)
PAGE = 4
UTILITIES = ("test_schema", "test_faketensor")  # the others are of gradients, or compile it again
RELEASED = ops.ChunkLayout.released(8, 3)


def paged(k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Pages of k and v [sequences, S, G, D] in random order, NaN where nothing is, and the page table, -1 if unused."""
    width = -(-max(lengths) // PAGE) + 1
    pages = torch.randperm(len(lengths) * width + 2, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    cache = [k.new_full((len(pages), PAGE, *k.shape[2:]), float("nan")) for _ in range(2)]
    taken = 0
    for index, length in enumerate(lengths):
        for first in range(0, length, PAGE):
            page, last = int(pages[taken]), min(first + PAGE, length)
            table[index, first // PAGE] = page
            taken += 1
            for into, heads in zip(cache, (k, v), strict=True):
                into[page, : last - first] = heads[index, first:last]
    return *cache, table


def example(
    chunks: ops.ChunkLayout | None, dtype: torch.dtype, heads: tuple[int, int] = (14, 2)
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    given = Example(lengths=(max(LENGTHS),), batch=len(LENGTHS), heads=heads, chunks=chunks)
    return given.inputs(dtype), given.options(dtype)


def rotated_keys(k: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    at = torch.arange(k.shape[1])
    at = at if options["chunks"] is None else layout.key_positions(options["chunks"], at)
    return torch.stack([checks.rotated(each, options["tables"], at) for each in k])


def last_rows(heads: torch.Tensor) -> torch.Tensor:
    return torch.stack([heads[index, max(length - 1, 0)] for index, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [RELEASED, ops.ChunkLayout.paper(8, 3), ops.ChunkLayout.released(4, 3), None])
def test_decoding_a_token_equals_its_row_of_the_prefill(chunks: ops.ChunkLayout | None, dtype: torch.dtype) -> None:
    (q, k, v, _), options = example(chunks, dtype)
    scale = torch.linspace(1.0, 1.5, len(LENGTHS)).to(torch.promote_types(dtype, torch.float32))
    expected = []
    for index, length in enumerate(LENGTHS):
        factors = scale[index].expand(q.shape[1])
        output, _ = ops.dual_chunk_attention(
            *(each[index : index + 1] for each in (q, k, v)), **{**options, "logit_scale": factors}
        )
        expected.append(output[0, max(length - 1, 0)] * (length > 0))
    key_pages, value_pages, table = paged(rotated_keys(k, options), v, LENGTHS, seed=1)
    output = ops.paged_decode_attention(
        last_rows(q),
        key_pages,
        value_pages,
        table,
        torch.tensor(LENGTHS, dtype=torch.int32),
        chunks=chunks,
        tables=options["tables"],
        logit_scale=scale,
    )
    assert_relative(output, torch.stack(expected), {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 1e-2))


def test_queries_that_are_rotated_by_the_caller() -> None:
    (q, k, v, _), options = example(None, torch.float32)
    key_pages, value_pages, table = paged(rotated_keys(k, options), v, LENGTHS, seed=2)
    at = torch.tensor([max(length - 1, 0) for length in LENGTHS])
    cache = key_pages, value_pages, table, torch.tensor(LENGTHS)
    by_caller = checks.rotated(last_rows(q), options["tables"], at)
    found = [
        ops.paged_decode_attention(queries, *cache, chunks=None, tables=tables, softmax_scale=0.3)
        for queries, tables in ((last_rows(q), options["tables"]), (by_caller, None))
    ]
    torch.testing.assert_close(*found)


class Gathered(TorchDispatchMode):
    """Counts how often pages are indexed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.index.Tensor and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def test_pages_in_a_row_are_not_copied_and_give_the_same_bits() -> None:
    (q, k, v, _), options = example(RELEASED, torch.float32)
    key_pages, value_pages, table = paged(k, v, LENGTHS, seed=4)
    used = table >= 0
    in_a_row = table.clone()
    in_a_row[used] = torch.arange(int(used.sum()), dtype=torch.int32)
    moved = [torch.cat([pages[table[used].long()], pages[:2]]) for pages in (key_pages, value_pages)]
    found, gathered = [], []
    for pages in ((key_pages, value_pages, table), (*moved, in_a_row)):
        with Gathered() as seen:
            found.append(
                ops.paged_decode_attention(
                    last_rows(q), *pages, torch.tensor(LENGTHS), chunks=RELEASED, tables=options["tables"]
                )
            )
        gathered.append(seen.count)
    assert torch.equal(*found)
    assert gathered[0] > 0 == gathered[1]


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    (q, k, v, _), options = example(RELEASED, torch.float32)
    key_pages, value_pages, table = paged(k, v, LENGTHS, seed=3)
    tensors = last_rows(q), key_pages.nan_to_num(), value_pages.nan_to_num(), table, torch.tensor(LENGTHS)

    def decode(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.paged_decode_attention(*tensors, chunks=RELEASED, tables=options["tables"])

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(decode, fullgraph=True, backend="aot_eager")(*tensors), decode(*tensors))
    operation = torch.ops.megatron_qwen.paged_decode_attention.default
    torch.library.opcheck(operation, (*tensors, *options["tables"], None, [8, 3, 8], 0.3), test_utils=UTILITIES)


def test_of_no_sequences() -> None:
    pages, none = torch.zeros(2, PAGE, 2, 8), torch.zeros(0, dtype=torch.int32)
    tables = checks.tables(9, torch.float32)
    output = ops.paged_decode_attention(
        torch.zeros(0, 4, 8), pages, pages, none.view(0, 3), none, chunks=RELEASED, tables=tables
    )
    assert output.shape == (0, 4, 8)


BAD: dict[str, dict[str, Any]] = {
    "q has shape": {"q": torch.zeros(6, 1, 4, 8)},
    "key_pages has shape": {"key_pages": torch.zeros(9, PAGE, 3, 8)},
    "value_pages has shape": {"value_pages": torch.zeros(8, PAGE, 2, 8)},
    "value_pages has dtype": {"value_pages": torch.zeros(9, PAGE, 2, 8, dtype=torch.bfloat16)},
    "page_table has shape": {"page_table": torch.zeros(5, 3, dtype=torch.int32)},
    "page_table has .* dtype": {"page_table": torch.zeros(6, 3)},
    "lengths has shape": {"lengths": torch.zeros(6, 1, dtype=torch.int32)},
    "lengths goes up to 13": {"lengths": torch.full((6,), 13)},
    "logit_scale has shape": {"logit_scale": torch.ones(5)},
    "tables is None": {"tables": None},
    "tables have 5 positions": {
        "tables": checks.tables(5, torch.float32),
        "chunks": None,
        "lengths": torch.full((6,), 6),
    },
    "requires a gradient": {"q": torch.zeros(6, 4, 8, requires_grad=True)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_of_decoding(message: str) -> None:
    valid = {
        "q": torch.zeros(6, 4, 8),
        "key_pages": torch.zeros(9, PAGE, 2, 8),
        "value_pages": torch.zeros(9, PAGE, 2, 8),
        "page_table": torch.zeros(6, 3, dtype=torch.int32),
        "lengths": torch.full((6,), 12),
        "chunks": RELEASED,
        "tables": checks.tables(9, torch.float32),
    }
    ops.paged_decode_attention(**valid)
    with pytest.raises(ConfigError, match=message):
        ops.paged_decode_attention(**{**valid, **BAD[message]})
