from __future__ import annotations

import copy

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.adam import FusedLayoutAdam


def gradients(step: int, params: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize(("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_follows_torch(decoupled: bool, reference: type[torch.optim.Optimizer]) -> None:
    start = [torch.randn(7, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    ours, theirs = [p.clone() for p in start], [p.clone() for p in start]
    options = {"lr": 3e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    first, second = FusedLayoutAdam(ours, adam_w_mode=decoupled, **options), reference(theirs, **options)  # type: ignore[arg-type]
    for step in range(20):
        gradients(step, ours)
        gradients(step, theirs)
        first.step()
        second.step()
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-12, atol=1e-14)


def test_state_has_the_layout_of_the_fused_optimizers_and_resumes() -> None:
    params = [torch.ones(4), torch.ones(2)]
    optimizer = FusedLayoutAdam(params, lr=0.1)
    gradients(0, params)
    params[1].grad = None
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert set(optimizer.state[params[0]]) == {"exp_avg", "exp_avg_sq"}
    assert params[1] not in optimizer.state

    copies = [p.clone() for p in params]
    resumed = FusedLayoutAdam(copies, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for chosen, which in ((params, optimizer), (copies, resumed)):
        gradients(1, chosen)
        which.step()
    for mine, his in zip(params, copies, strict=True):
        assert torch.equal(mine, his)


@pytest.mark.parametrize("option", [{"capturable": True}, {"exp_avg_dtype": torch.bfloat16}])
def test_says_what_only_transformer_engine_can(option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        FusedLayoutAdam([torch.ones(1)], **option)  # type: ignore[arg-type]


def test_a_step_that_raises_leaves_no_divisor_behind() -> None:
    params = [torch.ones(4)]
    optimizer = FusedLayoutAdam(params, lr=0.1)
    params[0].grad = torch.ones(4)
    optimizer.gradient_divisor = 8.0
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.gradient_divisor == 1.0
