"""Checks of the operations of a mixture of experts, for any backend; see op_checks.py.

Shapes: T tokens, E experts, k experts per token, H hidden size, F an expert's width.
"""

from __future__ import annotations

import torch
from op_checks import check_against_fp64, random, results, rows_beyond_32_bits

from megatron_qwen import ops
from megatron_qwen.testing.poison import poisoned_outputs


def plain_routing(logits: torch.Tensor, topk: int, renormalize: bool) -> tuple[torch.Tensor, ...]:
    """Weights, sums of probabilities, sum of squared logsumexps; then experts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = torch.softmax(wide, -1)
    experts = torch.stack([torch.tensor(_order(row)[:topk], dtype=torch.int64) for row in wide.tolist()] or [])
    weights = probs.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, probs.sum(0), torch.logsumexp(wide, -1).square().sum(), experts


def _order(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))


def check_routing(tokens: int, experts: int, topk: int, renormalize: bool, dtype: torch.dtype, backend: str) -> None:
    logits = random((tokens, experts), dtype, seed=0, scale=2.0)

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ops.moe_routing(x, topk, renormalize=renormalize)
        return out.weights, out.probability_sums, out.z_sum

    def plain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return plain_routing(x, topk, renormalize)[:3]

    grads = [random(shape, torch.float32, seed=1) for shape in ((tokens, topk), (experts,), ())]
    check_against_fp64(ours, plain, [logits], grads, backend)
    with ops.use_backend(backend):
        out = ops.moe_routing(logits, topk, renormalize=renormalize)
    expected = plain_routing(logits, topk, renormalize)[3]
    assert torch.equal(out.experts, expected)
    assert torch.equal(out.counts, torch.bincount(expected.flatten(), minlength=experts))
    assert out.offsets.tolist() == [0, *expected.flatten().bincount(minlength=experts).cumsum(0).tolist()]


def check_routing_of_no_tokens(backend: str) -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    with ops.use_backend(backend):
        out = ops.moe_routing(logits, 2, renormalize=True)
        (grad,) = torch.autograd.grad(out.weights.sum() + out.z_sum + out.probability_sums.sum(), logits)
    assert (out.weights.shape, out.experts.shape, grad.shape) == ((0, 2), (0, 2), (0, 5))
    assert out.counts.tolist() == [0] * 5
    assert out.offsets.tolist() == [0] * 6
    assert out.probability_sums.tolist() == [0.0] * 5
    assert out.z_sum.item() == 0.0


def check_routing_of_equal_logits(backend: str) -> None:
    """Lower index first, zeros of both signs alike, infinities in their order, a NaN before everything."""
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor(
        [
            [1.0] * 6,
            [0.0, -0.0, 0.0, -0.0, -1.0, 2.0],
            [-inf, 3.0, -inf, 3.0, -inf, -inf],
            [1.0, nan, 2.0, 5.0, nan, inf],
            [nan] * 6,
            [-3.0, -1.0, -2.0, -1.0, -3.0, -1.0],
        ]
    )
    expected = [[0, 1, 2, 3], [5, 0, 1, 2], [1, 3, 0, 2], [1, 4, 5, 3], [0, 1, 2, 3], [1, 3, 5, 2]]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with ops.use_backend(backend):
            out = ops.moe_routing(rows.to(dtype), 4, renormalize=False)
        assert out.experts.tolist() == expected
        assert out.weights[[3, 4]].isnan().all()
        assert torch.isfinite(out.weights[[0, 1, 2, 5]]).all()
        assert out.weights[2].tolist() == [0.5, 0.5, 0.0, 0.0]
        assert int(out.counts.sum()) == 24


def check_routing_same_bits_again(backend: str) -> None:
    logits = [random((67, 13), torch.bfloat16, seed=0)]
    grads = [random(shape, torch.float32, seed=1) for shape in ((67, 3), (13,), ())]

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ops.moe_routing(x, 3, renormalize=True)
        return out.weights, out.probability_sums, out.z_sum

    with ops.use_backend(backend):
        once, again = (results(ours, logits, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def check_routing_offsets(backend: str) -> None:
    logits = rows_beyond_32_bits(12, torch.float32)
    logits.copy_(random((3, 12), torch.float32, seed=0))
    with ops.use_backend(backend):
        far = ops.moe_routing(logits, 3, renormalize=True)
        near = ops.moe_routing(logits.contiguous(), 3, renormalize=True)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def some_experts(tokens: int, num_experts: int, topk: int, empty: tuple[int, ...] = ()) -> torch.Tensor:
    """[T, k] different experts per token, none of `empty`."""
    scores = random((tokens, num_experts), torch.float32, seed=5)
    scores[:, list(empty)] = float("-inf")
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :topk].contiguous()


def check_order(tokens: int, num_experts: int, topk: int, empty: tuple[int, ...], backend: str) -> None:
    experts = some_experts(tokens, num_experts, topk, empty)
    choices = sorted(range(tokens * topk), key=lambda choice: (int(experts.view(-1)[choice]), choice))
    with ops.use_backend(backend), poisoned_outputs() as memory:
        order = ops.expert_order(experts, num_experts)
    assert memory.count
    assert order.source.tolist() == choices
    assert order.positions.shape == (tokens, topk)
    assert order.positions.view(-1)[order.source].tolist() == list(range(tokens * topk))
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    assert order.offsets.tolist() == [0, *counts.cumsum(0).tolist()]


def check_permute(tokens: int, num_experts: int, topk: int, hidden: int, dtype: torch.dtype, backend: str) -> None:
    experts = some_experts(tokens, num_experts, topk)
    order = ops.expert_order(experts, num_experts)
    token_of_row = order.source // topk
    x, rows = random((tokens, hidden), dtype, seed=0), random((tokens * topk, hidden), dtype, seed=1)
    weights = random((tokens, topk), torch.float32, seed=2)

    def plain_unpermute(y: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        terms = y[order.positions].to(torch.promote_types(y.dtype, torch.float32))
        return (terms if w is None else terms * w.unsqueeze(-1)).sum(1).to(y.dtype)

    def ours_unpermute(y: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        return ops.moe_unpermute(y, order, w)

    check_against_fp64(lambda x: ops.moe_permute(x, order), lambda x: x[token_of_row], [x], [rows], backend)
    check_against_fp64(ours_unpermute, plain_unpermute, [rows], [x], backend)
    check_against_fp64(ours_unpermute, plain_unpermute, [rows, weights], [x], backend)


def check_permute_offsets(backend: str) -> None:
    x = rows_beyond_32_bits(12)
    x.copy_(random((3, 12), torch.bfloat16, seed=0))
    order = ops.expert_order(torch.tensor([[2, 0], [1, 0], [2, 1]]), 3)
    one = ops.expert_order(torch.tensor([[2], [0], [1]]), 3)
    grad = random((3, 12), torch.bfloat16, seed=1)
    weights = random((3, 1), torch.float32, seed=2)
    with ops.use_backend(backend):
        assert torch.equal(ops.moe_permute(x, order), ops.moe_permute(x.contiguous(), order))
        far = results(lambda y, w: ops.moe_unpermute(y, one, w), [x, weights], [grad])
        near = results(lambda y, w: ops.moe_unpermute(y, one, w), [x.contiguous(), weights], [grad])
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
