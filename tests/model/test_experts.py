"""LocalExperts against Megatron-Core's own forward of the same module, which computes one expert after another."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_qwen.model.build import build_model
from megatron_qwen.model.experts import LocalExperts
from megatron_qwen.testing.tiny import tiny_moe

COUNTS = ([3, 0, 17, 1], [0, 0, 0, 0], [0, 0, 0, 11], [1, 1, 1, 1], [128, 67, 1, 5])


@pytest.fixture(scope="module")
def experts() -> LocalExperts:
    torch.manual_seed(0)
    model = build_model(tiny_moe(layers=1), dtype=torch.float32, backend="local")
    module = model.decoder.layers[0].mlp.experts
    assert isinstance(module, LocalExperts)
    return module.double()


def run(forward, experts, x, probs, counts, grad):
    x, probs = x.detach().requires_grad_(), probs.detach().requires_grad_()
    y, bias = forward(experts, x, torch.tensor(counts), probs)
    assert bias is None
    weights = list(experts.parameters())
    grads = torch.autograd.grad(y, [x, probs, *weights], grad, allow_unused=True, materialize_grads=True)
    return y, grads


@pytest.mark.parametrize("counts", COUNTS)
def test_output_and_every_gradient_equal_megatrons(experts, counts):
    tokens = sum(counts)
    x, grad = (torch.randn(tokens, 64, dtype=torch.float64) for _ in range(2))
    probs = torch.rand(tokens, dtype=torch.float64)
    ours, our_grads = run(LocalExperts.forward, experts, x, probs, counts, grad)
    theirs, their_grads = run(SequentialMLP.forward, experts, x, probs, counts, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences(experts):
    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(5, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x, probs: experts(x, counts, probs)[0], (x, probs), fast_mode=True)


def test_a_gradient_buffer_collects_the_sum_of_two_batches(experts):
    counts = [3, 0, 4, 1]
    batches = [(torch.randn(8, 64, dtype=torch.float64), torch.rand(8, dtype=torch.float64)) for _ in range(2)]
    expected = [torch.zeros_like(weight) for weight in experts.parameters()]
    for x, probs in batches:
        _, grads = run(LocalExperts.forward, experts, x, probs, counts, torch.ones(8, 64, dtype=torch.float64))
        for total, grad in zip(expected, grads[2:], strict=True):
            total += grad
    for weight in experts.parameters():
        weight.main_grad = torch.zeros_like(weight)
        weight.grad_added_to_main_grad = False
    try:
        for x, probs in batches:
            experts(x, torch.tensor(counts), probs)[0].sum().backward()
        for weight, total in zip(experts.parameters(), expected, strict=True):
            assert weight.grad_added_to_main_grad
            torch.testing.assert_close(weight.main_grad, total)
    finally:
        for weight in experts.parameters():
            del weight.main_grad, weight.grad_added_to_main_grad
            weight.grad = None


def test_probabilities_of_higher_precision_round_once():
    torch.manual_seed(1)
    model = build_model(tiny_moe(layers=1), dtype=torch.bfloat16, backend="local")
    experts = model.decoder.layers[0].mlp.experts
    x, probs, grad = torch.randn(9, 64).bfloat16(), torch.rand(9), torch.randn(9, 64).bfloat16()
    counts = [4, 0, 3, 2]
    ours, our_grads = run(LocalExperts.forward, experts, x, probs, counts, grad)
    assert (ours.dtype, our_grads[1].dtype) == (torch.bfloat16, torch.float32)
    _, their_grads = run(SequentialMLP.forward, experts, x, probs, counts, grad)
    experts.double()
    _, exact = run(LocalExperts.forward, experts, x.double(), probs.double(), counts, grad.double())
    for mine, other, best in zip(our_grads, their_grads, exact, strict=True):
        assert (mine.double() - best).norm() <= 1.5 * (other.double() - best).norm() + 1e-12


@pytest.mark.parametrize("field", ["glu_linear_offset", "activation_func_clamp_value", "moe_apply_probs_on_input"])
def test_what_only_megatrons_forward_does_is_left_to_it(experts, field, monkeypatch):
    monkeypatch.setattr(experts.config, field, 1.0)
    assert not experts.is_plain()


def test_a_second_derivative_is_refused(experts):
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    y, _ = experts(x, torch.tensor([3, 0, 0, 0]), torch.rand(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
