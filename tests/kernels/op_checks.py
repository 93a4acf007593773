"""Checks of operations against fp64, for any backend: called directly, and in the process that interprets Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.testing.compare import assert_close_to_fp64
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
) -> None:
    """Outputs and gradients by the fp64 rule, with poisoned outputs and inputs surrounded by NaN."""
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
            assert_close_to_fp64(result, simple, exact, name=f"{backend} result {index}")


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


def rows_beyond_32_bits(width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Three rows, the last at an offset of 2^31 elements, while the distance itself fits 32 bits.

    The memory between them is never touched, so it costs addresses only.
    """
    distance = 2**30
    return torch.empty(2 * distance + width, dtype=dtype).as_strided((3, width), (distance, 1))


def check_swiglu_offsets(backend: str) -> None:
    packed = rows_beyond_32_bits(12)
    packed.copy_(random((3, 12), torch.bfloat16, seed=0))
    grad = random((3, 6), torch.bfloat16, seed=1)
    with ops.use_backend(backend):
        far = results(ops.swiglu, [packed], [grad])
        near = results(ops.swiglu, [packed.contiguous()], [grad])
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
