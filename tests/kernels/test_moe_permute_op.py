"""`expert_order`, `moe_permute` and `moe_unpermute` by their reference."""

from __future__ import annotations

import moe_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError


@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "empty"),
    [(0, 4, 2, ()), (1, 1, 1, ()), (61, 60, 4, (0, 7, 59)), (13, 8, 8, ()), (257, 5, 1, (0, 1, 2, 4))],
)
def test_order_is_by_expert_then_token(tokens: int, experts: int, topk: int, empty) -> None:
    moe_checks.check_order(tokens, experts, topk, empty, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "hidden"), [(0, 4, 2, 8), (1, 1, 1, 3), (61, 60, 4, 65), (13, 8, 8, 24), (5, 3, 2, 0)]
)
def test_reference_is_as_exact_as_plain_torch(tokens: int, experts: int, topk: int, hidden: int, dtype) -> None:
    moe_checks.check_permute(tokens, experts, topk, hidden, dtype, "reference")


def test_reference_beyond_32_bit_offsets() -> None:
    moe_checks.check_permute_offsets("reference")


def test_gradients_are_those_of_finite_differences() -> None:
    order = ops.expert_order(moe_checks.some_experts(5, 4, 2), 4)
    x, y = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (5, 10))
    weights = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.moe_permute(x, order), x)
    assert torch.autograd.gradcheck(lambda y: ops.moe_unpermute(y, order), y)
    assert torch.autograd.gradcheck(lambda y, w: ops.moe_unpermute(y, order, w), (y, weights))


def test_operations_are_registered_as_torch_wants_it() -> None:
    library = torch.ops.megatron_qwen
    experts = moe_checks.some_experts(5, 4, 2)
    torch.library.opcheck(library.expert_order.default, (experts, 4))
    order = ops.expert_order(experts, 4)
    x, y, weights = (torch.randn(shape, requires_grad=True) for shape in ((5, 6), (10, 6), (5, 2)))
    torch.library.opcheck(library.moe_permute.default, (x, order.source, order.positions))
    torch.library.opcheck(library.moe_permute_backward.default, (y.detach(), order.positions))
    for given in (None, weights):
        torch.library.opcheck(library.moe_unpermute.default, (y, given, order.source, order.positions))
    for rows, given in ((None, None), (y.detach(), weights.detach())):
        arguments = (x.detach(), rows, given, order.source, order.positions)
        torch.library.opcheck(library.moe_unpermute_backward.default, arguments)


def round_trip(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    order = ops.expert_order(experts, 4)
    return ops.moe_unpermute(ops.moe_permute(x, order).tanh(), order, weights).square().sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_equal_results(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(round_trip, fullgraph=True, backend=backend)
    for tokens in (3, 5):
        leaves = [torch.randn(tokens, width, requires_grad=True) for width in (6, 2)]
        experts = moe_checks.some_experts(tokens, 4, 2)
        eager, graph = round_trip(*leaves, experts), compiled(*leaves, experts)
        torch.testing.assert_close(graph, eager)
        torch.testing.assert_close(torch.autograd.grad(graph, leaves), torch.autograd.grad(eager, leaves))


@pytest.mark.parametrize("weights_need_it", [False, True])
def test_rows_are_kept_only_for_the_gradient_of_weights(weights_need_it: bool) -> None:
    order = ops.expert_order(moe_checks.some_experts(5, 4, 2), 4)
    x = torch.randn(5, 6, requires_grad=True)
    weights = torch.randn(5, 2, requires_grad=weights_need_it)
    kept: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ops.moe_unpermute(ops.moe_permute(x, order), order, weights)
    assert (torch.Size([10, 6]) in kept) == weights_need_it
    out.sum().backward()
    assert x.grad is not None


ORDER = ops.expert_order(torch.tensor([[1, 0], [0, 2]]), 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.expert_order(torch.zeros(2, 1), 3), "experts has dtype torch.float32; expected torch.int64"),
        (lambda: ops.expert_order(torch.zeros(2, dtype=torch.int64), 3), r"expected \[tokens, topk\]"),
        (lambda: ops.expert_order(torch.zeros(2, 0, dtype=torch.int64), 3), "topk at least 1"),
        (lambda: ops.expert_order(torch.zeros(2, 1, dtype=torch.int64), 0), "num_experts is 0; expected 1 or more"),
        (lambda: ops.moe_permute(torch.zeros(3, 4), ORDER), r"x has shape \(3, 4\); expected \[2, H\]"),
        (lambda: ops.moe_unpermute(torch.zeros(2, 4), ORDER), r"y has shape \(2, 4\); expected \[4, H\]"),
        (lambda: ops.moe_permute(torch.zeros(2, 4).int(), ORDER), "x has dtype torch.int32"),
        (lambda: ops.moe_permute(torch.zeros(2, 4, device="meta"), ORDER), "order is on cpu; expected meta"),
        (lambda: ops.moe_unpermute(torch.zeros(4, 4), ORDER, torch.ones(4)), r"weights has shape \(4,\)"),
        (lambda: ops.moe_unpermute(torch.zeros(4, 4), ORDER, torch.ones(2, 2).half()), "weights has dtype"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


def test_an_expert_that_does_not_exist_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ops.expert_order(torch.tensor([[3]]), 3)
