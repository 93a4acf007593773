"""ResidualNormLayer against Megatron-Core's own layer with the same modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_qwen import ops
from megatron_qwen.model import norm
from megatron_qwen.model.build import build_model
from megatron_qwen.model.layer import ResidualNormLayer, _AddBeforeNorm
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

MODELS = {"dense": tiny_dense(layers=2), "moe": tiny_moe(layers=2)}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of the fused operation."""
    made: list[int] = []
    original = ops.add_rms_norm

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(norm.ops, "add_rms_norm", counting)
    return made


def model_of(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(2)
    return build_model(MODELS[name], dtype=torch.float32, backend="local", **options)


def logits_and_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    tokens = torch.randint(0, 512, (2, 19), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    logits = model(tokens, torch.arange(19).expand(2, 19), None)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize(("options", "expected"), [({}, 2), (FULL, 4)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_equal_those_of_separate_add_and_norm(name, options, expected, calls, monkeypatch):
    model = model_of(name, **options)
    ours = logits_and_gradients(model)
    assert len(calls) == expected, "one per layer, and one more where it is computed again"
    monkeypatch.setattr(ResidualNormLayer, "__init__", TransformerLayer.__init__)
    apart = model_of(name, **options)
    apart.load_state_dict(model.state_dict())
    theirs = logits_and_gradients(apart)
    assert len(calls) == expected
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    "options",
    [{"hidden_dropout": 0.1}, {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}],
)
def test_what_stands_between_the_two_keeps_them_apart(options, calls):
    model = model_of("dense", **options)
    assert not any(isinstance(layer.self_attn_bda, _AddBeforeNorm) for layer in model.decoder.layers)
    if "hidden_dropout" in options:  # Megatron-Core recomputes norms on CUDA devices only
        logits_and_gradients(model)
        assert not calls


def test_a_norm_kept_ready_serves_the_sum_it_was_computed_of_and_no_other():
    module = model_of("dense").decoder.layers[0].pre_mlp_layernorm
    x, residual = torch.randn(3, 1, 64), torch.randn(3, 1, 64)
    total = module.add(x, residual)
    other = torch.randn(3, 1, 64)
    torch.testing.assert_close(module(other), ops.rms_norm(other, module.weight, eps=module.eps))
    torch.testing.assert_close(module(total), ops.rms_norm(x + residual, module.weight, eps=module.eps))
    ready = module.add(x, residual)
    assert torch.equal(module(ready), module(ready)), "computed the second time"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_for_them(mode, monkeypatch):
    model = model_of("dense")
    original = ops.add_rms_norm
    results = []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        results.extend(original(*args, **kwargs))
        return results[-2:]

    monkeypatch.setattr(norm.ops, "add_rms_norm", keeping)
    with mode():
        model(torch.arange(8)[None], torch.arange(8)[None], None)
    assert results
    assert not any(each.requires_grad for each in results)
