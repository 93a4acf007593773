"""Checks of the operations of a mixture of experts, for any backend; see op_checks.py.

Shapes: T tokens, E experts, k experts per token, H hidden size, F an expert's width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from op_checks import check_against_fp64, plain_swiglu, random, results, rows_beyond_32_bits

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


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes of a layer of experts; `shared` is the shared expert's width, 0 for none."""

    tokens: int
    experts: int
    topk: int
    hidden: int
    width: int
    shared: int = 0
    gated: bool = True
    empty: tuple[int, ...] = ()

    @property
    def order(self) -> ops.ExpertOrder:
        return ops.expert_order(some_experts(self.tokens, self.experts, self.topk, self.empty), self.experts)

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """x, weights, W1 and W2 of all experts, and those of the shared one with its gate."""
        shapes = [(self.experts, 2 * self.width, self.hidden), (self.experts, self.hidden, self.width)]
        if self.shared:
            shapes += [(2 * self.shared, self.hidden), (self.hidden, self.shared)]
            shapes += [(1, self.hidden)] if self.gated else []
        matrices = [random(shape, dtype, seed=10 + i, scale=shape[-1] ** -0.5) for i, shape in enumerate(shapes)]
        weights = random((self.tokens, self.topk), dtype, seed=1).abs()
        return [random((self.tokens, self.hidden), dtype, seed=0), weights, *matrices]

    def moe_mlp(self, x: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor, **options: bool) -> torch.Tensor:
        """By ops.moe_mlp; the weights' gradient is rounded to the dtype of the inputs, which bound its error."""
        fc1, fc2, *shared = matrices
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        common = ops.SharedExpert(*shared) if shared else None
        return ops.moe_mlp(x, wide, self.order, fc1.unbind(), fc2.unbind(), shared=common, **options)


def plain_mlp(x: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    return plain_swiglu(x @ fc1.t()) @ fc2.t()


def roundings_of(layer: Layer, dtype: torch.dtype) -> float:
    """The gradient of a token's only weight is one number, a sum of terms that nearly cancel."""
    if layer.tokens > 1:
        return 1.0
    return 256.0 if dtype == torch.float32 else 8.0


def plain_moe_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    *shared: torch.Tensor,
) -> torch.Tensor:
    """What `ops.moe_mlp` computes, from the experts [T, k] of each token."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide)
    for expert, pair in enumerate(zip(fc1, fc2, strict=True)):
        token, slot = torch.where(experts == expert)
        terms = plain_mlp(x[token], *pair) * weights[token, slot].unsqueeze(-1)
        y = y.index_add(0, token, terms.to(wide))
    if shared:
        common = plain_mlp(x, *shared[:2])
        y = y + (common * torch.sigmoid(x @ shared[2].t()) if len(shared) == 3 else common)
    return y.to(x.dtype)


def check_moe_mlp(layer: Layer, dtype: torch.dtype, backend: str, recompute: bool = False) -> None:
    order = layer.order
    rows = torch.arange(layer.tokens * layer.topk)
    experts = torch.searchsorted(order.offsets[1:], rows, right=True)[order.positions]

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return layer.moe_mlp(*inputs, recompute=recompute)

    def plain(x: torch.Tensor, weights: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        return plain_moe_mlp(x, weights, experts, *matrices)

    grad = random((layer.tokens, layer.hidden), dtype, seed=2)
    roundings = roundings_of(layer, dtype)
    check_against_fp64(ours, plain, layer.inputs(dtype), [grad], backend, surround=False, roundings=roundings)


def check_block(layer: Layer, renormalize: bool, dtype: torch.dtype, backend: str) -> None:
    """Routing, order and experts as one: y, both losses, and the gradients of logits, x and all matrices.

    Logits are exact in every dtype, so that all choose the same experts.
    """
    x, _, *matrices = layer.inputs(dtype)
    logits = random((layer.tokens, layer.experts), dtype, seed=3, scale=2.0)
    logits[:, list(layer.empty)] -= 100.0
    sizes = {"num_tokens": layer.tokens, "topk": layer.topk}

    def ours(logits: torch.Tensor, x: torch.Tensor, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = ops.moe_routing(logits, layer.topk, renormalize=renormalize)
        order = ops.expert_order(routing.experts, layer.experts)
        fc1, fc2, *shared = matrices
        common = ops.SharedExpert(*shared) if shared else None
        y = ops.moe_mlp(x, routing.weights, order, fc1.unbind(), fc2.unbind(), shared=common)
        balance = ops.megatron_balance_loss(routing.counts, routing.probability_sums, **sizes)
        return y, balance, ops.z_loss(routing.z_sum, layer.tokens)

    def plain(logits: torch.Tensor, x: torch.Tensor, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, sums, z_sum, experts = plain_routing(logits, layer.topk, renormalize)
        counts = torch.bincount(experts.flatten(), minlength=layer.experts)
        balance = layer.experts / layer.topk * (counts / layer.tokens * (sums / layer.tokens)).sum()
        return plain_moe_mlp(x, weights, experts, *matrices), balance, z_sum / layer.tokens

    wide = torch.promote_types(dtype, torch.float32)
    grads = [
        random((layer.tokens, layer.hidden), dtype, seed=2),
        torch.tensor(0.7).to(wide),
        torch.tensor(0.3).to(wide),
    ]
    roundings = max(2.0, roundings_of(layer, dtype))
    check_against_fp64(ours, plain, [logits, x, *matrices], grads, backend, surround=False, roundings=roundings)


def check_matrices_beyond_32_bits(backend: str) -> None:
    """Matrices, and the buffers their gradients go to, 2^30 and 2^31 elements behind the first one."""
    layer = Layer(tokens=5, experts=3, topk=2, hidden=24, width=20, shared=36)
    x, weights, fc1, fc2, *shared = layer.inputs(torch.bfloat16)
    matrices = [*fc1, *fc2, *shared]

    def apart(like: list[torch.Tensor]) -> list[torch.Tensor]:
        """Uninitialised; the memory between them is never touched, so it costs addresses only."""
        memory, size = torch.empty(2**31 + 2**16, dtype=torch.bfloat16), 2048
        starts = [(index % 3) * 2**30 + (index // 3) * size for index in range(len(like))]
        return [memory[at : at + each.numel()].view(each.shape) for at, each in zip(starts, like, strict=True)]

    def run(values: list[torch.Tensor], sinks: list[torch.Tensor]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(each) for each in values]
        for parameter, sink in zip(parameters, sinks, strict=True):
            parameter.main_grad, parameter.grad_added_to_main_grad = sink.zero_(), False
        leaves = [x.clone().requires_grad_(), weights.float().requires_grad_()]
        common = ops.SharedExpert(*parameters[6:])
        with ops.use_backend(backend):
            y = ops.moe_mlp(*leaves, layer.order, parameters[:3], parameters[3:6], shared=common)
            y.square().sum().backward()
        assert all(each.grad_added_to_main_grad for each in parameters)
        return [y.detach(), *(each.grad for each in leaves), *(each.clone() for each in sinks)]

    far = apart(matrices)
    for there, each in zip(far, matrices, strict=True):
        there.copy_(each)
    found = run(far, apart(matrices)), run([each.clone() for each in matrices], [each.clone() for each in matrices])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(each.abs().sum() > 0 for each in found[0])


def check_kept(recompute: bool, backend: str) -> None:
    """For backward: inputs, the order, and unless recomputed the outputs of the first matrices; no byte more."""
    layer = Layer(tokens=64, experts=4, topk=4, hidden=32, width=4, shared=8)
    inputs = [each.requires_grad_() for each in layer.inputs(torch.float32)]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with ops.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.moe_mlp(*inputs, recompute=recompute).sum().backward()
    given = {each.untyped_storage().data_ptr() for each in inputs}
    more = sum(size for address, size in kept.items() if address not in given)
    outputs = 4 * (64 * 4 * 2 * 4 + 64 * 2 * 8)
    order = 8 * (2 * 64 * 4 + 4 + 1)
    assert more == order + (0 if recompute else outputs)


def check_grouped_mlp(layer: Layer, dtype: torch.dtype, backend: str) -> None:
    """Rows in expert order: the same as a top-1 layer whose tokens are sorted."""
    layer = dataclasses.replace(layer, shared=0)
    offsets = ops.expert_order(some_experts(layer.tokens, layer.experts, 1, layer.empty), layer.experts).offsets

    def ours(x: torch.Tensor, weights: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        return ops.grouped_mlp(x, wide, offsets, fc1.unbind(), fc2.unbind())

    def plain(x: torch.Tensor, weights: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
        groups = zip(x.split(offsets.diff().tolist()), fc1, fc2, strict=True)
        return torch.cat([plain_mlp(*each) for each in groups]) * weights.unsqueeze(-1)

    x, weights, *matrices = layer.inputs(dtype)
    grad = random((layer.tokens, layer.hidden), dtype, seed=2)
    roundings = roundings_of(layer, dtype)
    inputs = [x, weights[:, 0], *matrices]
    check_against_fp64(ours, plain, inputs, [grad], backend, surround=False, roundings=roundings)


def check_main_grads(buffer_dtype: torch.dtype, backend: str) -> None:
    """What was in a buffer stays, the gradient comes on top, and Megatron's hook is told."""
    layer = Layer(tokens=19, experts=3, topk=2, hidden=24, width=20, shared=36)
    x, weights, fc1, fc2, *shared = layer.inputs(torch.float32)
    first, second, common = ([torch.nn.Parameter(each) for each in group] for group in (fc1, fc2, shared))

    def run() -> None:
        with ops.use_backend(backend):
            y = ops.moe_mlp(x, weights, layer.order, first, second, shared=ops.SharedExpert(*common))
            y.sum().backward()

    run()
    parameters = [*first, *second, *common]
    plain = [each.grad.clone() for each in parameters]
    for each in parameters:
        each.main_grad = torch.full_like(each, 3.0, dtype=buffer_dtype)
        each.grad_added_to_main_grad = False
    run()
    for each, grad in zip(parameters, plain, strict=True):
        assert each.grad_added_to_main_grad
        torch.testing.assert_close(each.main_grad - 3.0, grad.to(buffer_dtype), rtol=1e-5, atol=2e-5)


def check_moe_same_bits_again(backend: str) -> None:
    layer = Layer(tokens=37, experts=5, topk=2, hidden=24, width=20, shared=36)
    grads = [random((37, 24), torch.bfloat16, seed=2)]
    with ops.use_backend(backend):
        once, again = (results(layer.moe_mlp, layer.inputs(torch.bfloat16), grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


LAYERS = {
    "one token": Layer(tokens=1, experts=3, topk=2, hidden=67, width=33, shared=35),
    "no token": Layer(tokens=0, experts=2, topk=1, hidden=8, width=4, shared=4),
    "empty experts": Layer(tokens=37, experts=9, topk=2, hidden=33, width=17, shared=34, empty=(0, 4, 8)),
    "all on one": Layer(tokens=23, experts=4, topk=1, hidden=16, width=16, empty=(0, 1, 3)),
    "all experts": Layer(tokens=13, experts=4, topk=4, hidden=24, width=20, shared=40, gated=False),
}
