"""Checks of operations against fp64, for any backend: called directly, and in the process that interprets Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.testing.compare import assert_close_to_fp64, assert_relative
from megatron_qwen.testing.poison import poisoned_outputs, surrounded

Function = Callable[..., object]


def random(shape: Sequence[int], dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def results(function: Function, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of `function` and the gradients of its inputs."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = function(*leaves)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)  # type: ignore[call-overload]
    return [*(each.detach() for each in outputs), *torch.autograd.grad(outputs, leaves, list(grads))]


def check_against_fp64(
    ours: Function,
    plain: Function,
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    backend: str,
    surround: bool = True,
    roundings: float = 1.0,
) -> None:
    """Outputs and gradients by the fp64 rule, with poisoned outputs and inputs surrounded by NaN.

    Of a handful of numbers plain torch's error is a matter of luck: allow more `roundings` there.
    """
    wide = torch.float64
    plainly = results(plain, inputs, grads)
    exactly = results(plain, [x.to(wide) for x in inputs], [g.to(wide) for g in grads])
    # A leaf keeps its strides: what surrounds the data goes into the operation too.
    given = [surrounded(each) for each in inputs] if surround else list(inputs)
    with ops.use_backend(backend), poisoned_outputs() as memory:
        mine = results(ours, given, grads)
    assert memory.count
    for index, (result, simple, exact) in enumerate(zip(mine, plainly, exactly, strict=True)):
        assert result.dtype == simple.dtype
        assert result.shape == simple.shape
        if result.numel():
            assert_close_to_fp64(result, simple, exact, roundings=roundings, name=f"{backend} result {index}")


def plain_swiglu(packed: torch.Tensor) -> torch.Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return functional.silu(gate) * up


def check_swiglu(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    packed = random((*shape[:-1], 2 * shape[-1]), dtype, seed=0, scale=3.0)
    check_against_fp64(ops.swiglu, plain_swiglu, [packed], [random(shape, dtype, seed=1)], backend)


def check_swiglu_extremes(backend: str) -> None:
    """Gates at which exp overflows give 0 or the gate itself, not NaN."""
    packed = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4] + [2.0] * 5])
    with ops.use_backend(backend):
        y, grad = results(ops.swiglu, [packed], [torch.ones(1, 5)])
    assert torch.equal(y, torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]]))
    assert torch.equal(grad, torch.tensor([[0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 100.0, 1e4]]))


def check_gradient_of_a_sum(backend: str) -> None:
    """Autograd hands in a gradient whose strides are all zero."""
    packed = random((3, 10), torch.float32, seed=0).requires_grad_()
    with ops.use_backend(backend):
        (ours,) = torch.autograd.grad(ops.swiglu(packed).sum(), packed)
    (plain,) = torch.autograd.grad(plain_swiglu(packed).sum(), packed)
    torch.testing.assert_close(ours, plain)


EPS = 1e-5


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def plain_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + residual
    return plain_rms_norm(total, weight), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, weight, eps=EPS)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ops.add_rms_norm(x, residual, weight, eps=EPS)


def check_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x, grad = random(shape, dtype, seed=0, scale=3.0), random(shape, dtype, seed=1)
    weight = (random(shape[-1:], torch.float32, seed=2) * 0.2 + 1.0).to(dtype)
    check_against_fp64(rms_norm, plain_rms_norm, [x, weight], [grad], backend)


def check_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x, residual = (random(shape, dtype, seed=seed, scale=3.0) for seed in (0, 3))
    grads = [random(shape, dtype, seed=seed) for seed in (1, 4)]
    weight = (random(shape[-1:], torch.float32, seed=2) * 0.2 + 1.0).to(dtype)
    check_against_fp64(add_rms_norm, plain_add_rms_norm, [x, residual, weight], grads, backend)


def check_rms_norm_of_another_weight_dtype(backend: str) -> None:
    x, weight = random((5, 24), torch.bfloat16, seed=0), random((24,), torch.float32, seed=1)
    grad = random((5, 24), torch.bfloat16, seed=2)
    with ops.use_backend(backend):
        y, grad_x, grad_weight = results(rms_norm, [x, weight], [grad])
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = results(plain_rms_norm, [x.double(), weight.double()], [grad.double()])
    assert_relative(y, exact[0], 2.0**-8)
    assert_relative(grad_x, exact[1], 2.0**-8)
    assert_relative(grad_weight, exact[2], 1e-5)  # only the results of bf16 inputs are rounded to bf16


def check_rms_norm_of_one_column(backend: str) -> None:
    """The gradient is a difference of nearly equal terms, exact only against their size."""
    x = torch.tensor([[1.5], [-0.25], [0.0]])
    with ops.use_backend(backend):
        y, grad_x, grad_weight = results(rms_norm, [x, torch.tensor([2.0])], [torch.ones(3, 1)])
    exact = results(plain_rms_norm, [x.double(), torch.tensor([2.0]).double()], [torch.ones(3, 1).double()])
    torch.testing.assert_close(y.double(), exact[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad_x.double(), exact[1], rtol=1e-6, atol=1e-6 / 0.25)
    torch.testing.assert_close(grad_weight.double(), exact[2], rtol=1e-6, atol=1e-6)


def check_rms_norm_rows(backend: str) -> None:
    """Zero rows stay zero, NaN stays in its row, and tiny rows stay finite."""
    x = torch.zeros(3, 8)
    x[1, 2], x[2] = float("nan"), 1e-30
    with ops.use_backend(backend):
        y = rms_norm(x, torch.ones(8))
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert torch.isfinite(y[2]).all()


def check_gradients_of_single_outputs(backend: str) -> None:
    """A loss may use the norm only, or the sum only."""
    inputs = [random((5, 6), torch.float32, seed=0), random((5, 6), torch.float32, seed=1), torch.full((6,), 1.5)]
    for index in (0, 1):
        ours, plain = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
        with ops.use_backend(backend):
            (add_rms_norm(*ours)[index] ** 2).sum().backward()
        (plain_add_rms_norm(*plain)[index] ** 2).sum().backward()
        for mine, simple in zip(ours, plain, strict=True):
            assert (mine.grad is None) == (simple.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, simple.grad)


def check_same_bits_again(backend: str) -> None:
    inputs = [random((67, 96), torch.bfloat16, seed=0), random((96,), torch.bfloat16, seed=1)]
    grad = [random((67, 96), torch.bfloat16, seed=2)]
    with ops.use_backend(backend):
        once, again = (results(rms_norm, inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def check_rms_norm_offsets(backend: str) -> None:
    x = rows_beyond_32_bits(12)
    x.copy_(random((3, 12), torch.bfloat16, seed=0))
    weight, grad = random((12,), torch.bfloat16, seed=1), random((3, 12), torch.bfloat16, seed=2)
    with ops.use_backend(backend):
        far = results(rms_norm, [x, weight], [grad])
        near = results(rms_norm, [x.contiguous(), weight], [grad])
        total = ops.add_rms_norm(near[0], x, weight, eps=EPS)[1]
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
    assert torch.equal(total, near[0] + x)


def rows_beyond_32_bits(width: int, dtype: torch.dtype = torch.bfloat16, distance: int = 2**30) -> torch.Tensor:
    """Rows, the last at an offset of 2^31 elements, while the distance itself fits 32 bits: three, or more if nearer.

    The memory between them is never touched, so it costs addresses only.
    """
    rows = 2**31 // distance + 1
    return torch.empty(2**31 + width, dtype=dtype).as_strided((rows, width), (distance, 1))


def check_swiglu_offsets(backend: str) -> None:
    packed = rows_beyond_32_bits(12)
    packed.copy_(random((3, 12), torch.bfloat16, seed=0))
    grad = random((3, 6), torch.bfloat16, seed=1)
    with ops.use_backend(backend):
        far = results(ops.swiglu, [packed], [grad])
        near = results(ops.swiglu, [packed.contiguous()], [grad])
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def run_transposed(backend: str) -> None:
    with ops.use_backend(backend):
        rms_norm(torch.zeros(3, 2, 4).transpose(0, 1), torch.ones(4))


def run_long_row(backend: str) -> None:
    with ops.use_backend(backend):
        rms_norm(torch.zeros(1, 16385), torch.ones(16385))


def run_fp64_weight(backend: str) -> None:
    with ops.use_backend(backend):
        rms_norm(torch.zeros(3, 4), torch.ones(4, dtype=torch.float64))


def run_fp64_bias(backend: str) -> None:
    tables = ops.rope_tables(torch.tensor([1.0, 0.1]), 3)
    with ops.use_backend(backend):
        ops.qkv_rope(torch.zeros(3, 12), *tables, num_groups=1, head_dim=4, bias=torch.zeros(12, dtype=torch.float64))


def check_rounding_of_bf16() -> None:
    """1 + 2^-8 lies halfway: down to the even neighbour; 1 + 3 * 2^-8 up to it; the rest to the nearer one."""
    gate = torch.full((5,), 40.0)  # silu(40) is 40 in fp32
    up = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-12, 1 + 2.0**-9, 1.99999])
    out = torch.empty(1, 5, dtype=torch.bfloat16)
    from megatron_qwen.kernels.swiglu import kernel

    kernel.launch_forward(torch.cat([gate, up]).view(1, 10), out)
    assert torch.equal(out[0], (gate * up).bfloat16())


def plain_qkv_rope(
    packed: torch.Tensor, bias: torch.Tensor | None, groups: int, head_dim: int, freqs: torch.Tensor, mscale: float
) -> tuple[torch.Tensor, ...]:
    """The chain of plain torch operations; freqs [..., R / 2] are the angles of each token."""
    if bias is not None:
        packed = packed + bias
    heads = packed.unflatten(-1, (groups, packed.shape[-1] // groups // head_dim, head_dim))
    q, k, v = heads[..., :-2, :].flatten(-3, -2), heads[..., -2, :], heads[..., -1, :]
    return plain_rotate(q, freqs, mscale), plain_rotate(k, freqs, mscale), v


def plain_rotate(x: torch.Tensor, freqs: torch.Tensor, mscale: float = 1.0) -> torch.Tensor:
    """Heads [..., N, D] rotated by the angles of each token, freqs [..., R / 2]."""
    cos, sin = ((torch.cat([f, f], -1) * mscale).to(x.dtype)[..., None, :] for f in (freqs.cos(), freqs.sin()))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def check_qkv_rope(
    lead: tuple[int, ...],
    heads: tuple[int, int, int],
    rotated: int,
    dtype: torch.dtype,
    backend: str,
    *,
    with_bias: bool = True,
    positions: torch.Tensor | None = None,
    mscale: float = 1.0,
) -> None:
    """Args: leading axes; groups, query heads per group and head size; rotated dimensions."""
    groups, queries, head_dim = heads
    width = groups * (queries + 2) * head_dim
    packed = random((*lead, width), dtype, seed=0)
    inputs = [packed, random((width,), dtype, seed=1)] if with_bias else [packed]
    grads = [
        random((*lead, each, head_dim), dtype, seed=2 + i) for i, each in enumerate((groups * queries, groups, groups))
    ]
    inv_freq = 1.0 / 100.0 ** (torch.arange(rotated // 2, dtype=torch.float64) * 2 / rotated)
    rows = torch.arange(lead[0]) if positions is None else positions
    freqs = rows.double()[..., None] * inv_freq
    if rows.dim() < len(lead):
        freqs = freqs.unsqueeze(1)
    cos, sin = ops.rope_tables(inv_freq, 64, mscale=mscale)

    def ours(packed: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return ops.qkv_rope(packed, cos, sin, num_groups=groups, head_dim=head_dim, bias=bias, positions=positions)

    def plain(packed: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return plain_qkv_rope(packed, bias, groups, head_dim, freqs, mscale)

    check_against_fp64(ours, plain, inputs, grads, backend)


def check_gradients_at_foreign_strides(backend: str) -> None:
    """Attention hands back gradients as [B, N, S, D]."""
    packed = random((5, 2, 2 * 4 * 8), torch.float32, seed=0).requires_grad_()
    bias = random((64,), torch.float32, seed=1).requires_grad_()
    cos, sin = ops.rope_tables(torch.tensor([1.0, 0.3, 0.1, 0.01]), 5)
    grads = [random((2, heads, 5, 8), torch.float32, seed=heads).permute(2, 0, 1, 3) for heads in (4, 2, 2)]
    found = []
    for make in (lambda x: x, torch.Tensor.contiguous):
        with ops.use_backend(backend):
            out = ops.qkv_rope(packed, cos, sin, num_groups=2, head_dim=8, bias=bias)
            found.append(torch.autograd.grad(out, [packed, bias], [make(grad) for grad in grads]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def check_positions_outside_the_tables(backend: str) -> None:
    """Such tokens get NaN in queries and keys, no stray read."""
    cos, sin = ops.rope_tables(torch.tensor([1.0, 0.1]), 4)
    with ops.use_backend(backend):
        q, k, v = ops.qkv_rope(
            torch.ones(3, 12), cos, sin, num_groups=1, head_dim=4, positions=torch.tensor([3, 4, -1])
        )
    assert torch.isfinite(q[0]).all()
    assert q[1:].isnan().all()
    assert k[1:].isnan().all()
    assert (v == 1).all()


def check_qkv_rope_offsets(backend: str) -> None:
    packed = rows_beyond_32_bits(24)
    packed.copy_(random((3, 24), torch.bfloat16, seed=0))
    cos, sin = ops.rope_tables(torch.tensor([1.0, 0.1, 0.01]), 3)
    with ops.use_backend(backend):
        far = ops.qkv_rope(packed, cos, sin, num_groups=1, head_dim=6)
        near = ops.qkv_rope(packed.contiguous(), cos, sin, num_groups=1, head_dim=6)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def check_rope(
    lead: tuple[int, ...], heads: tuple[int, int, int], rotated: int, dtype: torch.dtype, backend: str, *, inverse: bool
) -> None:
    """In place on parts of a wider tensor, NaN around them; args: leading axes; heads of q and of k, and their size."""
    q_heads, k_heads, head_dim = heads
    q, k = (random((*lead, number, head_dim), dtype, seed=number) for number in (q_heads, k_heads))
    generator = torch.Generator().manual_seed(5)
    positions = torch.randint(0, 50, lead, generator=generator)
    inv_freq = 10.0 ** -torch.arange(rotated // 2, dtype=torch.float64)
    cos, sin = ops.rope_tables(inv_freq, 50, mscale=1.1)
    freqs = positions.double()[..., None] * inv_freq * (-1 if inverse else 1)
    given = [surrounded(each) for each in (q, k)]
    with ops.use_backend(backend):
        returned = ops.rope_(*given, cos, sin, positions=positions, inverse=inverse)
    for each, mine, back in zip((q, k), given, returned, strict=True):
        assert back is mine
        exact = plain_rotate(each.double(), freqs, 1.1)
        if each.numel():
            assert_close_to_fp64(mine, plain_rotate(each, freqs, 1.1), exact, name=f"{backend} rope_")
        around = torch.as_strided(mine, (mine.untyped_storage().nbytes() // mine.element_size(),), (1,), 0)
        assert int(around.isnan().sum()) == around.numel() - mine.numel(), "written outside of the heads"
