"""`qkv_rope` by its reference, and the tables and positions it looks up."""

from __future__ import annotations

import op_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(7,), (5, 2), (1, 1), (0, 2), (0,)])
def test_reference_is_as_exact_as_plain_torch(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    op_checks.check_qkv_rope(lead, (2, 7, 64), 64, dtype, "reference")
    op_checks.check_qkv_rope(lead, (3, 1, 10), 6, dtype, "reference", with_bias=False, mscale=1.2)


def test_positions_of_tokens_of_rows_and_of_packed_sequences() -> None:
    check = op_checks.check_qkv_rope
    packed = ops.packed_positions(torch.tensor([0, 3, 3, 7]))
    assert packed.tolist() == [0, 1, 2, 0, 1, 2, 3]
    check((7,), (2, 2, 8), 8, torch.float32, "reference", positions=packed)
    check((3, 2), (2, 2, 8), 8, torch.float32, "reference", positions=torch.tensor([9, 4, 50]))
    check((3, 2), (2, 2, 8), 8, torch.float32, "reference", positions=torch.tensor([[9, 4], [50, 0], [1, 2]]))


def test_ranks_of_context_parallelism_have_every_position_once() -> None:
    assert ops.context_parallel_positions(8, cp_size=2, cp_rank=0).tolist() == [0, 1, 6, 7]
    assert ops.context_parallel_positions(8, cp_size=2, cp_rank=1).tolist() == [2, 3, 4, 5]
    bounds = torch.tensor([0, 12, 12, 36])
    ranks = [ops.packed_positions(bounds, cp_size=3, cp_rank=rank) for rank in range(3)]
    assert ranks[1].tolist() == [2, 3, 8, 9, 4, 5, 6, 7, 16, 17, 18, 19]
    assert sorted(torch.cat(ranks).tolist()) == sorted([*range(12), *range(24)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.packed_positions(torch.tensor([0, 5, 3])), r"cu_seqlens is \[0, 5, 3\]; expected 0 and ascending"),
        (lambda: ops.packed_positions(torch.tensor([1, 5])), "expected 0 and ascending"),
        (lambda: ops.packed_positions(torch.tensor([0.0, 5.0])), "dtype torch.float32; expected a vector of int32"),
        (lambda: ops.packed_positions(torch.tensor([0, 6]), cp_size=2), r"6 tokens; expected a multiple of .* = 4"),
        (lambda: ops.context_parallel_positions(8, cp_size=2, cp_rank=2), "cp_rank is 2; expected 0 to"),
    ],
)
def test_bad_boundaries_are_named(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


def test_tables_are_exact_at_a_million() -> None:
    inv_freq = torch.tensor([1.0, 0.7390625])
    cos, sin = ops.rope_tables(inv_freq, 1_000_001, mscale=1.5)
    angle = 1_000_000 * inv_freq.double()
    torch.testing.assert_close(cos[-1].double(), 1.5 * angle.cos(), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(sin[-1].double(), 1.5 * angle.sin(), rtol=0.0, atol=1e-7)


def test_gradients_at_the_strides_of_attention() -> None:
    op_checks.check_gradients_at_foreign_strides("reference")
    op_checks.check_qkv_rope_offsets("reference")


def wide_tables(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(rows).double(), torch.tensor([1.0, 0.1]).double())
    return angles.cos(), angles.sin()


def test_gradients_are_those_of_finite_differences() -> None:
    packed, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 30), (30,)))
    cos, sin = wide_tables(3)
    assert torch.autograd.gradcheck(
        lambda packed, bias: ops.qkv_rope(packed, cos, sin, num_groups=2, head_dim=5, bias=bias), (packed, bias)
    )


@pytest.mark.parametrize("positions", [None, torch.tensor([2, 0, 1], dtype=torch.int32)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_operation_is_registered_as_torch_wants_it(with_bias: bool, positions: torch.Tensor | None) -> None:
    packed = torch.randn(3, 2, 24, requires_grad=True)
    bias = torch.randn(24, requires_grad=True) if with_bias else None
    cos, sin = ops.rope_tables(torch.tensor([1.0, 0.1]), 4)
    torch.library.opcheck(torch.ops.megatron_qwen.qkv_rope.default, (packed, cos, sin, bias, positions, 2, 4))


def test_compiles_as_one_graph_and_recomputes() -> None:
    packed, bias = torch.randn(3, 2, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    cos, sin = ops.rope_tables(torch.tensor([1.0, 0.1]), 4)

    def loss(packed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = ops.qkv_rope(packed * 2.0, cos, sin, num_groups=2, head_dim=4, bias=bias)
        return (q.unflatten(-2, (2, -1)) * k.unsqueeze(-2) * v.unsqueeze(-2)).sum()

    torch.compiler.reset()
    expected = torch.autograd.grad(loss(packed, bias), [packed, bias])
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")(packed, bias)
    torch.testing.assert_close(torch.autograd.grad(graph, [packed, bias]), expected)
    torch.utils.checkpoint.checkpoint(loss, packed, bias, use_reentrant=False).backward()
    assert torch.equal(packed.grad, expected[0])
    assert torch.equal(bias.grad, expected[1])


def test_the_packed_input_is_not_kept_for_backward() -> None:
    kept: list[tuple[int, ...]] = []
    cos, sin = ops.rope_tables(torch.tensor([1.0, 0.1]), 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        ops.qkv_rope(torch.randn(3, 2, 24, requires_grad=True), cos, sin, num_groups=2, head_dim=4)
    assert set(kept) == {(4, 2)}


PACKED, TABLE = torch.zeros(3, 2, 24), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packed": torch.zeros(24)}, r"packed has shape \(24,\); expected \[S, B, W\] or \[T, W\]"),
        ({"packed": torch.zeros(3, 2, 23)}, r"rows of 23; expected num_groups \* \(M \+ 2\) \* head_dim"),
        ({"packed": torch.zeros(3, 2, 16)}, "rows of 16"),
        ({"num_groups": 0}, "num_groups 0"),
        ({"cos": torch.zeros(4, 3)}, r"cos has shape \(4, 3\); expected .* R at most 4"),
        ({"sin": torch.zeros(5, 2)}, r"sin has shape \(5, 2\)"),
        ({"cos": TABLE.bfloat16()}, "cos has dtype torch.bfloat16; expected torch.float32"),
        ({"sin": torch.zeros(2, 4).t()}, "sin has strides"),
        ({"bias": torch.zeros(23)}, r"bias has shape \(23,\); expected \(24,\)"),
        ({"cos": TABLE[:2], "sin": TABLE[:2]}, "packed has 3 positions; expected at most 2"),
        ({"positions": torch.zeros(3)}, "positions has dtype torch.float32"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, r"positions has shape \(2,\).*expected \(3, 2\) or \(3,\)"),
        ({"positions": torch.zeros(3, dtype=torch.int32, device="meta")}, "positions is on meta; expected cpu"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], words: str) -> None:
    arguments = {"packed": PACKED, "cos": TABLE, "sin": TABLE, "num_groups": 2, "head_dim": 4, **change}
    with pytest.raises(ConfigError, match=words):
        ops.qkv_rope(**arguments)
