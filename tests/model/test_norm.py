from __future__ import annotations

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.norm import RMSNorm
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.tiny import tiny_dense


def make(dtype: torch.dtype, hidden: int) -> RMSNorm:
    return RMSNorm(tiny_dense().to_transformer_config(dtype=torch.float32), hidden, eps=1e-5).to(dtype)


def by_the_formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (7, 3, 65), (33, 896)])
def test_output_and_gradients_are_as_exact_as_plain_torch(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    norm = make(dtype, shape[-1])
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for wide in (dtype, torch.float64):
        inputs = [t.detach().to(wide).requires_grad_() for t in (x, norm.weight)]
        y = by_the_formula(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, grad.to(wide))))
    ours_x = x.clone().requires_grad_()
    y = norm(ours_x)
    ours = (y, *torch.autograd.grad(y, [ours_x, norm.weight], grad))
    for name, mine, plain, exact in zip(("output", "grad x", "grad weight"), ours, *results, strict=True):
        assert mine.dtype == dtype
        assert_close_to_fp64(mine, plain, exact, name=name)


def test_gradient_is_that_of_finite_differences():
    norm = make(torch.float64, 5)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, norm.weight)
    )


def test_zero_rows_stay_zero_and_nan_stays_in_its_row():
    norm = make(torch.float32, 8)
    x = torch.zeros(3, 8)
    x[1, 2] = float("nan")
    x[2] = 1e-30
    y = norm(x)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert torch.isfinite(y[2]).all()


def test_weight_is_marked_for_sequence_parallelism_only_where_it_is_on():
    for on in (False, True):
        config = tiny_dense().to_transformer_config()
        config.sequence_parallel = on
        assert RMSNorm(config, 8).weight.sequence_parallel is on


def test_another_normalisation_is_refused():
    config = tiny_dense().to_transformer_config()
    config.normalization = "LayerNorm"
    with pytest.raises(ConfigError, match="LayerNorm"):
        RMSNorm(config, 8)
