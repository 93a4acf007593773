"""`moe_mlp` and `grouped_mlp` by their reference, and against the block of transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import moe_checks
import pytest
import torch
from moe_checks import LAYERS, Layer

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Layer(tokens=5, experts=3, topk=2, hidden=6, width=4, shared=8, empty=(1,))
SMALL_TOP1 = Layer(tokens=7, experts=3, topk=1, hidden=6, width=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_reference_is_as_exact_as_plain_torch(layer: Layer, dtype: torch.dtype) -> None:
    moe_checks.check_moe_mlp(layer, dtype, "reference")
    moe_checks.check_moe_mlp(layer, dtype, "reference", recompute=True)
    moe_checks.check_grouped_mlp(layer, dtype, "reference")


def test_blocks_of_elementwise_work_cover_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_qwen.kernels.grouped_mlp import reference

    monkeypatch.setattr(reference, "BLOCK_NUMBERS", 50)
    moe_checks.check_moe_mlp(LAYERS["empty experts"], torch.float32, "reference")


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [each.requires_grad_() for each in SMALL.inputs(torch.float64)]
    assert torch.autograd.gradcheck(SMALL.moe_mlp, inputs)


def test_gradient_buffers_are_added_to() -> None:
    moe_checks.check_main_grads(torch.float32, "reference")


def test_buffers_of_another_dtype_are_left_to_megatrons_hook() -> None:
    x, weights, fc1, fc2 = SMALL_TOP1.inputs(torch.float32)
    parameters = [torch.nn.Parameter(each) for each in (*fc1, *fc2)]
    for each in parameters:
        each.main_grad, each.grad_added_to_main_grad = torch.zeros_like(each, dtype=torch.float64), False
    ops.moe_mlp(x, weights, SMALL_TOP1.order, parameters[:3], parameters[3:]).sum().backward()
    assert not any(each.grad_added_to_main_grad or each.main_grad.any() for each in parameters)
    assert all(each.grad is not None and each.grad.isfinite().all() for each in parameters)


def test_same_bits_again() -> None:
    moe_checks.check_moe_same_bits_again("reference")


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_as_large_as_the_permuted_rows_is_kept(recompute: bool) -> None:
    moe_checks.check_kept(recompute, "reference")


def test_matrices_beyond_32_bit_offsets() -> None:
    moe_checks.check_matrices_beyond_32_bits("reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "no token"])
def test_routing_order_and_experts_together(name: str, renormalize: bool, dtype: torch.dtype) -> None:
    moe_checks.check_block(LAYERS[name], renormalize, dtype, "reference")


def test_products_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an AMD processor with AVX-512, and for groups of any size."""
    from megatron_qwen.kernels import products

    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "has_faster_onednn", lambda: True)
    monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", 1)
    layer = Layer(tokens=331, experts=5, topk=2, hidden=96, width=40, shared=80, empty=(2,))
    moe_checks.check_moe_mlp(layer, torch.float32, "reference")
    moe_checks.check_main_grads(torch.float32, "reference")
    moe_checks.check_moe_same_bits_again("reference")


def test_operation_is_registered_as_torch_wants_it() -> None:
    library, order = torch.ops.megatron_qwen, SMALL.order
    x, weights, fc1, fc2, *shared = (each.requires_grad_() for each in SMALL.inputs(torch.float32))
    matrices = [[each.detach().requires_grad_() for each in group] for group in (fc1, fc2, shared)]
    inputs = (x, weights, order.offsets, order.source, order.positions)
    torch.library.opcheck(library.grouped_mlp.default, (*inputs, *matrices, False))
    torch.library.opcheck(
        library.grouped_mlp.default, (x, weights[:, 0], *inputs[2:3], None, None, *matrices[:2], [], True)
    )
    plain = [each.detach() if isinstance(each, torch.Tensor) else each for each in inputs]
    given = [[each.detach() for each in group] for group in matrices]
    _, *kept = library.grouped_mlp(*plain, *given, False)
    torch.library.opcheck(library.grouped_mlp_backward.default, (torch.randn(5, 6), *plain, *given, *kept))


def loss(
    logits: torch.Tensor, x: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, *shared: torch.Tensor
) -> torch.Tensor:
    """The whole block: routing, order, experts."""
    routing = ops.moe_routing(logits, 2, renormalize=True)
    order = ops.expert_order(routing.experts, 3)
    y = ops.moe_mlp(x, routing.weights, order, fc1.unbind(), fc2.unbind(), shared=ops.SharedExpert(*shared))
    return y.square().sum()


def leaves(tokens: int) -> list[torch.Tensor]:
    layer = Layer(tokens=tokens, experts=3, topk=2, hidden=6, width=4, shared=8)
    x, _, *matrices = layer.inputs(torch.float32)
    return [each.requires_grad_() for each in (torch.randn(tokens, 3), x, *matrices)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_equal_results(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for tokens in (3, 5):
        inputs = leaves(tokens)
        eager, graph = loss(*inputs), compiled(*inputs)
        torch.testing.assert_close(graph, eager)
        torch.testing.assert_close(torch.autograd.grad(graph, inputs), torch.autograd.grad(eager, inputs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool) -> None:
    inputs = leaves(9)
    kept = torch.autograd.grad(loss(*inputs), inputs)
    torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(each.grad, grad) for each, grad in zip(inputs, kept, strict=True))


def test_a_second_derivative_is_refused() -> None:
    inputs = leaves(3)
    with pytest.raises(RuntimeError, match="grouped_mlp_backward has no gradient"):
        torch.autograd.grad(loss(*inputs), inputs[1], create_graph=True)


def test_equals_the_block_of_transformers() -> None:
    """In a process of its own: transformers and our CPU platform do not go together. Triton is interpreted there."""
    program = Path(__file__).parent / "moe_against_transformers.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert any("triton" in name for name in found) == (importlib.util.find_spec("triton") is not None)
    for name, difference in found.items():
        assert difference < 2e-6, f"{name} differs by {difference} of its largest magnitude"


X, W1, W2 = torch.zeros(2, 6), torch.zeros(8, 6), torch.zeros(6, 4)
ORDER = ops.expert_order(torch.tensor([[1, 0], [0, 1]]), 2)
WEIGHTS = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("arguments", "shared", "words"),
    [
        ((X, WEIGHTS, ORDER, [W1], [W2]), None, r"order.offsets has shape \(3,\); expected \(2,\)"),
        ((X, WEIGHTS, ORDER, [], []), None, "got 0 matrices fc1 and 0 fc2; expected one of each per expert"),
        ((X, WEIGHTS, ORDER, [W1, W1], [W2]), None, "got 2 matrices fc1 and 1 fc2"),
        ((X, WEIGHTS, ORDER, [W1, W1[:6]], [W2, W2]), None, r"fc1\[1\] is \(6, 6\)"),
        ((X, WEIGHTS, ORDER, [W1[:7]] * 2, [W2] * 2), None, r"fc1\[0\] has shape \(7, 6\); expected \[2F, 6\]"),
        ((X, WEIGHTS, ORDER, [W1] * 2, [W2, W2.half()]), None, r"fc2\[1\] is \(6, 4\), torch.float16"),
        ((X, WEIGHTS, ORDER, [W1] * 2, [W2.t().contiguous().t()] * 2), None, r"strides \(1, 6\)"),
        ((X, WEIGHTS.half(), ORDER, [W1] * 2, [W2] * 2), None, "weights has dtype torch.float16"),
        ((X, torch.ones(2, 1), ORDER, [W1] * 2, [W2] * 2), None, r"weights has shape \(2, 1\); expected \(2, 2\)"),
        ((torch.zeros(3, 6), WEIGHTS, ORDER, [W1] * 2, [W2] * 2), None, "as x has 3 rows"),
        ((X.t(), WEIGHTS, ORDER, [W1] * 2, [W2] * 2), None, r"expected \[tokens, H\], contiguous"),
        ((X, WEIGHTS, ORDER, [W1] * 2, [W2] * 2), (W1, W2[:, :3]), r"shared.fc2 has shape \(6, 3\); expected \(6, 4\)"),
        ((X, WEIGHTS, ORDER, [W1] * 2, [W2] * 2), (W1, W2, W1[:, :1]), r"shared.gate has shape \(8, 1\)"),
    ],
)
def test_bad_input_is_named(arguments, shared, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ops.moe_mlp(*arguments, shared=ops.SharedExpert(*shared) if shared else None)


def test_bad_rows_are_named() -> None:
    with pytest.raises(ConfigError, match=r"weights has shape \(3,\); expected \(2,\)"):
        ops.grouped_mlp(X, torch.ones(3), ORDER.offsets, [W1] * 2, [W2] * 2)
    with pytest.raises(ConfigError, match=r"offsets has shape \(2,\); expected \(3,\)"):
        ops.grouped_mlp(X, torch.ones(2), ORDER.offsets[:2], [W1] * 2, [W2] * 2)
