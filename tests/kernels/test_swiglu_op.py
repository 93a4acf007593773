"""`swiglu` by its reference; the Triton kernels are in test_triton_interpreter.py and test_triton_compiled.py."""

from __future__ import annotations

import op_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

OP = "swiglu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (7, 3, 65), (33, 352), (0, 4), (2, 0, 4), (3, 0)])
def test_reference_is_as_exact_as_plain_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    op_checks.check_swiglu(shape, dtype, "reference")


def test_extremes_and_expanded_gradients() -> None:
    op_checks.check_swiglu_extremes("reference")
    op_checks.check_gradient_of_a_sum("reference")


def test_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(ops.swiglu, torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("make", [torch.Tensor.contiguous, lambda x: x.transpose(0, 1)], ids=["rows", "transposed"])
def test_operation_is_registered_as_torch_wants_it(make) -> None:
    packed = make(torch.randn(4, 6, 10)).requires_grad_()
    torch.library.opcheck(torch.ops.megatron_qwen.swiglu.default, (packed,))
    torch.library.opcheck(
        torch.ops.megatron_qwen.swiglu_backward.default, (torch.randn(*packed.shape[:-1], 5), packed.detach())
    )


def test_a_second_derivative_is_refused() -> None:
    packed = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="swiglu_backward has no gradient"):
        torch.autograd.grad(ops.swiglu(packed).sum(), packed, create_graph=True)


def two_layers(x: torch.Tensor) -> torch.Tensor:
    return ops.swiglu(ops.swiglu(x * 2.0) + 1.0).sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_equal_results(backend: str) -> None:
    torch.compiler.reset()
    x = torch.randn(3, 16, requires_grad=True)
    compiled = torch.compile(two_layers, fullgraph=True, backend=backend)
    for rows in (3, 5):
        x = torch.randn(rows, 16, requires_grad=True)
        eager, graph = two_layers(x), compiled(x)
        torch.testing.assert_close(graph, eager)
        torch.testing.assert_close(torch.autograd.grad(graph, x), torch.autograd.grad(eager, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradient(reentrant: bool) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    kept = torch.autograd.grad(two_layers(x), x)
    loss = torch.utils.checkpoint.checkpoint(two_layers, x, use_reentrant=reentrant)
    loss.backward()
    assert torch.equal(x.grad, kept[0])


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (torch.zeros(2, 5), r"packed has shape \(2, 5\); expected an even last axis"),
        (torch.zeros(2, 4, dtype=torch.int32), "packed has dtype torch.int32; expected a floating dtype"),
        (torch.tensor(1.0), "packed is a scalar"),
    ],
)
def test_bad_input_is_named(packed: torch.Tensor, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ops.swiglu(packed)
