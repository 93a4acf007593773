from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.swiglu import SwiGLU
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.tiny import tiny_dense


def make() -> SwiGLU:
    return SwiGLU(tiny_dense().to_transformer_config(dtype=torch.float32))


def by_the_formula(packed: torch.Tensor) -> torch.Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (7, 3, 130), (33, 704), (0, 8)])
def test_output_and_gradient_are_as_exact_as_plain_torch(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    packed = (torch.randn(shape, generator=generator) * 3).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype)
    results = []
    for function, wide in ((make(), dtype), (by_the_formula, dtype), (by_the_formula, torch.float64)):
        x = packed.detach().to(wide).requires_grad_()
        y = function(x)
        results.append((y, *torch.autograd.grad(y, x, grad.to(wide))))
    for name, mine, plain, exact in zip(("output", "gradient"), *results, strict=True):
        assert mine.dtype == dtype
        if mine.numel():
            assert_close_to_fp64(mine, plain, exact, name=name)


def test_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(make(), torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True))


def test_slices_and_transposes_are_read_at_their_strides():
    packed = torch.randn(6, 20, 5).transpose(1, 2)[1:, ::2]
    assert torch.equal(make()(packed), by_the_formula(packed))


@pytest.mark.parametrize("change", [{"glu_linear_offset": 1.0}, {"activation_func_clamp_value": 7.0}])
def test_another_activation_is_refused(change):
    with pytest.raises(ConfigError, match="expected plain SwiGLU"):
        SwiGLU(tiny_dense().to_transformer_config(dtype=torch.float32, **change))
