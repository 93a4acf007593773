"""`moe_routing` by its reference, and the router's losses; the Triton kernels are in test_moe_triton_interpreter.py."""

from __future__ import annotations

import moe_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 1, 1), (7, 5, 2), (61, 60, 4), (33, 8, 8), (5, 129, 1)])
def test_reference_is_as_exact_as_plain_torch(tokens: int, experts: int, topk: int, renormalize: bool, dtype) -> None:
    moe_checks.check_routing(tokens, experts, topk, renormalize, dtype, "reference")


@pytest.mark.parametrize(
    "check",
    [
        moe_checks.check_routing_of_no_tokens,
        moe_checks.check_routing_of_equal_logits,
        moe_checks.check_routing_same_bits_again,
        moe_checks.check_routing_offsets,
    ],
)
def test_reference_in_special_cases(check) -> None:
    check("reference")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("topk", [1, 3, 5])
def test_gradients_are_those_of_finite_differences(topk: int, renormalize: bool) -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def differentiable(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ops.moe_routing(x, topk, renormalize=renormalize)
        return out.weights, out.probability_sums, out.z_sum

    assert torch.autograd.gradcheck(differentiable, logits)


@pytest.mark.parametrize("make", [torch.Tensor.contiguous, lambda x: x.t().contiguous().t()], ids=["rows", "columns"])
def test_operation_is_registered_as_torch_wants_it(make) -> None:
    logits = make(torch.randn(6, 10)).requires_grad_()
    library = torch.ops.megatron_qwen
    torch.library.opcheck(library.moe_routing.default, (logits, 3, True))
    experts = ops.moe_routing(logits, 3, renormalize=True).experts
    grads = torch.randn(6, 3), torch.randn(10), torch.randn(())
    torch.library.opcheck(library.moe_routing_backward.default, (*grads, logits.detach(), experts, True))


def router_loss(logits: torch.Tensor) -> torch.Tensor:
    out = ops.moe_routing(logits, 2, renormalize=True)
    balance = ops.megatron_balance_loss(out.counts, out.probability_sums, logits.shape[0], topk=2)
    return out.weights.square().sum() + balance + ops.z_loss(out.z_sum, logits.shape[0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_equal_results(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(router_loss, fullgraph=True, backend=backend)
    for rows in (3, 5):
        logits = torch.randn(rows, 6, requires_grad=True)
        eager, graph = router_loss(logits), compiled(logits)
        torch.testing.assert_close(graph, eager)
        torch.testing.assert_close(torch.autograd.grad(graph, logits), torch.autograd.grad(eager, logits))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradient(reentrant: bool) -> None:
    logits = torch.randn(9, 6, requires_grad=True)
    kept = torch.autograd.grad(router_loss(logits), logits)
    torch.utils.checkpoint.checkpoint(router_loss, logits, use_reentrant=reentrant).backward()
    assert torch.equal(logits.grad, kept[0])


def test_losses_by_their_definitions_and_gradients() -> None:
    """f and P by one-hot vectors, as both sources define them; Megatron's balanced value is 1, Hugging Face's k."""
    logits = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    out = ops.moe_routing(logits, 2, renormalize=False)
    probs = torch.softmax(logits, -1)
    fractions = torch.nn.functional.one_hot(probs.topk(2).indices, 6).double().mean(0)  # [k, E]
    expected = 6 * (fractions * probs.mean(0)).sum()
    ours = ops.huggingface_balance_loss(out.counts, out.probability_sums, 11)
    torch.testing.assert_close(ours, expected)
    megatrons = ops.megatron_balance_loss(out.counts, out.probability_sums, torch.tensor(11), topk=2)
    torch.testing.assert_close(megatrons, expected / 2)
    z = ops.z_loss(out.z_sum, 11)
    torch.testing.assert_close(z, torch.logsumexp(logits, -1).square().mean())
    for mine, plain in ((ours, expected), (z, torch.logsumexp(logits, -1).square().mean())):
        grads = (torch.autograd.grad(each, logits, retain_graph=True) for each in (mine, plain))
        torch.testing.assert_close(*grads)
    even = torch.full((6,), 4), torch.full((6,), 2.0)  # 12 tokens, 2 experts each
    assert float(ops.huggingface_balance_loss(*even, 12)) == pytest.approx(2.0)
    assert float(ops.megatron_balance_loss(*even, 12, topk=2)) == pytest.approx(1.0)


@pytest.mark.parametrize("nothing", [0, torch.tensor(0)])
def test_losses_of_no_tokens_are_zero(nothing) -> None:
    zero = torch.zeros(4)
    assert float(ops.huggingface_balance_loss(zero.long(), zero, nothing)) == 0.0
    assert float(ops.z_loss(zero[0], nothing)) == 0.0


@pytest.mark.parametrize(
    ("logits", "topk", "words"),
    [
        (torch.zeros(2, 4), 0, "topk is 0; expected 1 to 4, the number of experts"),
        (torch.zeros(2, 4), 5, "topk is 5; expected 1 to 4"),
        (torch.zeros(2, 3, 4), 1, r"logits has shape \(2, 3, 4\); expected \[tokens, experts\]"),
        (torch.zeros(2, 4, dtype=torch.int32), 1, "logits has dtype torch.int32"),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, topk: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ops.moe_routing(logits, topk, renormalize=False)
