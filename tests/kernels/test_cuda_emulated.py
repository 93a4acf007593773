"""CUDA kernels run on the CPU (csrc/tests/emulation): their logic, indices and bounds, through the operations."""

from __future__ import annotations

import op_checks
import pytest
import torch
from emulated_extension import Emulation

from megatron_qwen import ops
from megatron_qwen.kernels.qkv_rope import reference
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.poison import surrounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (37, 67)])
def test_column_sums(emulation: Emulation, rows: int, columns: int, dtype: torch.dtype) -> None:
    partial = op_checks.random((rows, columns), torch.float32, seed=0)
    out = torch.full((columns,), float("nan"), dtype=dtype)
    emulation.module.column_sum(
        partial=partial.data_ptr(), out=out.data_ptr(), rows=rows, columns=columns, dtype=str(dtype)[6:]
    )
    exact = partial.double().sum(0)
    assert_close_to_fp64(out, partial.sum(0).to(dtype), exact)


def test_the_emulation_notices_stray_and_misaligned_accesses(emulation: Emulation) -> None:
    source, short = torch.zeros(64), torch.zeros(63)
    copy = emulation.module.copy_bandwidth
    copy(short.data_ptr(), source.data_ptr(), 4 * 63)
    with pytest.raises(RuntimeError, match=r"a write of 16 bytes at .* is outside of every tensor"):
        copy(short.data_ptr(), source.data_ptr(), 4 * 64)
    sizes = {"rows": 1, "columns": 3, "dtype": "float32"}
    with pytest.raises(RuntimeError, match=r"a read of 4 bytes at .* is outside of every tensor"):
        emulation.module.column_sum(partial=short.data_ptr() + 4 * 61, out=source.data_ptr(), **sizes)


# Groups, queries per group, head size; rotated dimensions. The last is too odd for 16 bytes.
HEADS = [((2, 7, 64), 64), ((1, 5, 128), 128), ((2, 3, 64), 32), ((3, 1, 10), 6)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lead", [(7,), (5, 2), (1, 1), (0, 2)])
def test_qkv_rope_is_as_exact_as_plain_torch(
    emulation: Emulation, lead: tuple[int, ...], heads: tuple[tuple[int, int, int], int], dtype: torch.dtype
) -> None:
    op_checks.check_qkv_rope(lead, *heads, dtype, "cuda")
    if lead == (7,):
        op_checks.check_qkv_rope(lead, *heads, dtype, "cuda", with_bias=False, mscale=1.2)
    assert ("qkv_rope_forward" in emulation.calls) == (0 not in lead)


def test_qkv_rope_finds_positions(emulation: Emulation) -> None:
    check = op_checks.check_qkv_rope
    check((7,), (2, 2, 8), 8, torch.float32, "cuda", positions=ops.packed_positions(torch.tensor([0, 3, 3, 7])))
    check((3, 2), (2, 2, 8), 8, torch.float32, "cuda", positions=torch.tensor([9, 4, 50]))
    check((3, 2), (2, 2, 8), 8, torch.bfloat16, "cuda", positions=torch.tensor([[9, 4], [50, 0], [1, 2]]))


def test_qkv_rope_at_odd_strides_offsets_and_positions(emulation: Emulation) -> None:
    op_checks.check_gradients_at_foreign_strides("cuda")
    op_checks.check_positions_outside_the_tables("cuda")
    op_checks.check_qkv_rope_offsets("cuda")


@pytest.mark.parametrize("tokens", [200, 19])
def test_tokens_are_shared_among_blocks_and_programs(emulation: Emulation, tokens: int) -> None:
    """Many tokens take a warp each, few a block each; the backward's programs have several tokens, the last fewer."""
    emulation.set_multiprocessors(1)
    positions = torch.arange(tokens) % 61
    op_checks.check_qkv_rope((tokens,), (1, 2, 64), 64, torch.bfloat16, "cuda", positions=positions)
    programs = emulation.module.qkv_rope_backward_programs(layout=(1, 2, 64), half=32, tokens=tokens, dtype="bfloat16")
    assert 1 < programs < tokens or tokens == 19


def packed_and_tables(dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(8.0), torch.linspace(1.0, 0.1, head_dim // 2))
    return op_checks.random((8, 4 * head_dim), dtype, seed=0), angles.cos(), angles.sin()


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 8), (torch.bfloat16, 16), (torch.float16, 64)])
def test_accesses_are_16_bytes_where_sizes_and_addresses_allow_it(
    emulation: Emulation, dtype: torch.dtype, head_dim: int
) -> None:
    packed, cos, sin = packed_and_tables(dtype, head_dim)
    bias = op_checks.random(packed.shape[-1:], dtype, seed=1)

    def narrow_accesses(packed: torch.Tensor, bias: torch.Tensor) -> int:
        with ops.use_backend("cuda"):
            found = ops.qkv_rope(packed, cos, sin, num_groups=1, head_dim=head_dim, bias=bias)
        expected = reference.forward(packed, cos, sin, bias, None, 1, head_dim)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
        assert emulation.accesses(16) or emulation.accesses(packed.element_size())
        return emulation.accesses(2) + emulation.accesses(4)

    assert narrow_accesses(packed, bias) == 0
    assert narrow_accesses(surrounded(packed), bias) == 0
    shifted = torch.cat([packed.flatten()[:1], packed.flatten()])[1:].view_as(packed)
    assert narrow_accesses(shifted, bias) > 0
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert narrow_accesses(packed, bias.to(other)) > 0


def test_values_with_infinities_pass_through_untouched(emulation: Emulation) -> None:
    packed, cos, sin = packed_and_tables(torch.float32, 8)
    packed[:, 24:26] = float("inf")
    with ops.use_backend("cuda"):
        v = ops.qkv_rope(packed, cos, sin, num_groups=1, head_dim=8)[2]
    assert torch.equal(v[:, 0], packed[:, 24:])


def test_the_same_input_gives_the_same_bits(emulation: Emulation) -> None:
    packed, cos, sin = packed_and_tables(torch.bfloat16, 16)
    leaf, bias = packed.requires_grad_(), torch.zeros(64, requires_grad=True)
    with ops.use_backend("cuda"):
        loss = sum(x.float().square().sum() for x in ops.qkv_rope(leaf, cos, sin, num_groups=1, head_dim=16, bias=bias))
        first = torch.autograd.grad(loss, [leaf, bias], retain_graph=True)
        again = torch.autograd.grad(loss, [leaf, bias])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (128, 64), (10, 6)])
def test_rope_in_place_there_and_back(emulation: Emulation, dtype: torch.dtype, head_dim: int, rotated: int) -> None:
    from megatron_qwen.kernels.qkv_rope import cuda

    angles = torch.outer(torch.arange(9.0), torch.linspace(1.0, 0.1, rotated // 2))
    tables = angles.cos(), angles.sin()
    q = surrounded(op_checks.random((5, 2, 7, head_dim), dtype, seed=0))
    k = surrounded(op_checks.random((5, 2, 1, head_dim), dtype, seed=1))
    before = q.clone(), k.clone()
    positions = torch.tensor([8, 0, 3, 3, 1], dtype=torch.int32)

    def rotated_by(x: torch.Tensor, wide: torch.dtype, sign: float) -> torch.Tensor:
        cos, sin = (table[positions.long()].to(wide)[:, None, None] for table in tables)
        first, second, rest = x.to(wide).split([rotated // 2, rotated // 2, head_dim - rotated], dim=-1)
        return torch.cat([first * cos - sign * second * sin, second * cos + sign * first * sin, rest], dim=-1)

    for inverse, sign in ((False, 1.0), (True, -1.0)):
        expected = [(rotated_by(x, dtype, sign), rotated_by(x, torch.float64, sign)) for x in (q, k)]
        cuda.launch_rope(q, k, tables, positions, 2, inverse)
        for found, (plain, exact) in zip((q, k), expected, strict=True):
            assert_close_to_fp64(found, plain, exact)
    for found, start in zip((q, k), before, strict=True):
        assert_close_to_fp64(found, start, start.double(), roundings=4.0)
    only = q.clone()
    cuda.launch_rope(only, None, tables, positions, 2, False)
    assert not torch.equal(only, q)
