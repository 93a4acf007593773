"""`rms_norm` and `add_rms_norm` by their reference."""

from __future__ import annotations

import op_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3), (7,), (7, 3, 65), (33, 896), (0, 4), (2, 0, 4)])
def test_reference_is_as_exact_as_plain_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    op_checks.check_rms_norm(shape, dtype, "reference")
    op_checks.check_add_rms_norm(shape, dtype, "reference")


@pytest.mark.parametrize(
    "check",
    [
        op_checks.check_rms_norm_of_another_weight_dtype,
        op_checks.check_rms_norm_of_one_column,
        op_checks.check_rms_norm_rows,
        op_checks.check_gradients_of_single_outputs,
        op_checks.check_same_bits_again,
        op_checks.check_rms_norm_offsets,
    ],
)
def test_reference_in_special_cases(check) -> None:
    check("reference")


def test_gradients_are_those_of_finite_differences() -> None:
    x, residual = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(op_checks.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(op_checks.add_rms_norm, (x, residual, weight))


@pytest.mark.parametrize("make", [torch.Tensor.contiguous, lambda x: x.transpose(0, 1)], ids=["rows", "transposed"])
def test_operations_are_registered_as_torch_wants_it(make) -> None:
    x, residual = (make(torch.randn(4, 6, 10)).requires_grad_() for _ in range(2))
    weight = torch.randn(10, requires_grad=True)
    library = torch.ops.megatron_qwen
    torch.library.opcheck(library.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(library.add_rms_norm.default, (x, residual, weight, 1e-6))
    y, inverse_rms = library.rms_norm(x.detach(), weight.detach(), 1e-6)
    for grad_sum in (None, y):
        torch.library.opcheck(
            library.rms_norm_backward.default, (y, x.detach(), weight.detach(), inverse_rms, grad_sum)
        )


def test_operation_and_eager_function_give_the_same_bits() -> None:
    inputs = [torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)]
    grads = [torch.randn(5, 8), torch.randn(5, 8)]
    by_function = op_checks.results(op_checks.add_rms_norm, inputs, grads)
    by_operation = op_checks.results(
        lambda *x: torch.ops.megatron_qwen.add_rms_norm(*x, op_checks.EPS)[:2], inputs, grads
    )
    assert all(torch.equal(a, b) for a, b in zip(by_function, by_operation, strict=True))


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(2, 4, requires_grad=True), torch.ones(4)
    with pytest.raises(RuntimeError, match="rms_norm_backward has no gradient"):
        torch.autograd.grad(op_checks.rms_norm(x, weight).sum(), x, create_graph=True)
    (grad,) = torch.autograd.grad(torch.ops.megatron_qwen.rms_norm(x, weight, 1e-6)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_backward has no gradient"):
        grad.sum().backward()


def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y, total = ops.add_rms_norm(x, x * 2.0, weight, eps=1e-6)
    return (ops.rms_norm(y, weight, eps=1e-6) * total).sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_equal_results(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    weight = torch.randn(16, requires_grad=True)
    for rows in (3, 5):
        x = torch.randn(rows, 16, requires_grad=True)
        eager, graph = block(x, weight), compiled(x, weight)
        torch.testing.assert_close(graph, eager)
        expected = torch.autograd.grad(eager, [x, weight])
        torch.testing.assert_close(torch.autograd.grad(graph, [x, weight]), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool) -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    kept = torch.autograd.grad(block(x, weight), [x, weight])
    torch.utils.checkpoint.checkpoint(block, x, weight, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, kept[0])
    assert torch.equal(weight.grad, kept[1])


X, W = torch.zeros(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "eps", "words"),
    [
        ((X, torch.ones(5)), 1e-6, r"weight has shape \(5,\); expected \(4,\)"),
        ((X, W.int()), 1e-6, "weight has dtype torch.int32"),
        ((X.int(), W), 1e-6, "x has dtype torch.int32"),
        ((torch.zeros(2, 0), torch.ones(0)), 1e-6, "expected a last axis of at least 1"),
        ((X, W.to("meta")), 1e-6, "weight is on meta; expected cpu, where x is"),
        ((X, W), -1.0, "eps is -1.0; expected 0 or more"),
        ((X, W), float("nan"), "eps is nan"),
        ((X, torch.zeros(3, 4), W), 1e-6, r"residual has shape \(3, 4\); expected \(2, 4\)"),
        ((X, X.half(), W), 1e-6, "residual has dtype torch.float16; expected torch.float32"),
    ],
)
def test_bad_input_is_named(arguments, eps: float, words: str) -> None:
    function = ops.rms_norm if len(arguments) == 2 else ops.add_rms_norm
    with pytest.raises(ConfigError, match=words):
        function(*arguments, eps=eps)
