"""What every operation has to have, for each of them alike: see op_table.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import op_checks
import pytest
import torch
from op_properties import check_far_rows
from op_table import CASES, NO_OPERATIONS, Case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels import registration
from megatron_qwen.kernels.backends import OPERATIONS
from megatron_qwen.kernels.grouped_mlp import op as grouped_mlp

WITHOUT_GRADIENT = {"expert_order", "paged_decode_attention", "sparse_prefill_attention"}

every_operation = pytest.mark.parametrize("name", CASES)
every_operation_on_rows = pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.is_dense])


def registered() -> set[str]:
    """Names in torch's namespace `megatron_qwen`."""
    names = torch._C._dispatch_get_all_op_names()
    return {
        name.removeprefix("megatron_qwen::").partition(".")[0] for name in names if name.startswith("megatron_qwen::")
    }


def test_no_operation_is_left_out() -> None:
    assert set(ops.__all__) == {*CASES, *NO_OPERATIONS}, "add an operation to op_table.py"
    covered = {name for case in CASES.values() for name in case.registered}
    assert {name for name in registered() if not name.endswith("_backward")} == covered
    assert set(OPERATIONS) <= {name.rstrip("_") for name in covered}


def random_like(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [op_checks.random(tuple(each.shape), each.dtype, seed=10 + i) for i, each in enumerate(tensors)]


def gradients(case: Case, arguments: dict[str, Any]) -> list[torch.Tensor]:
    out = case.run(arguments)
    return op_checks.results(case.of_leaves(arguments), case.tensors(arguments), random_like(out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_operation
def test_forward_and_backward_are_as_exact_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    for rows in case.sizes:
        arguments, wide = case.arguments(rows, dtype), case.arguments(rows, torch.float64)

        def plain(*leaves: torch.Tensor, arguments: Any = arguments, wide: Any = wide) -> Any:
            given = wide if leaves[0].dtype == torch.float64 else arguments
            return case.of_leaves(given, plain=True)(*leaves)

        op_checks.check_against_fp64(
            case.of_leaves(arguments),
            plain,
            case.tensors(arguments),
            random_like(case.run(arguments)),
            "reference",
            surround=False,
        )


@every_operation
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    case = CASES[name]
    arguments = case.arguments(3, torch.float64)
    leaves = [each.requires_grad_() for each in case.tensors(arguments)]
    assert torch.autograd.gradcheck(case.of_leaves(arguments), leaves)


class Calls(TorchDispatchMode):
    """Records the calls of registered operations, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatron_qwen":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


class Compiling:
    """torch, as it looks from inside torch.compile; not patched in torch itself, which must know that function."""

    compiler = SimpleNamespace(is_compiling=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def through_torch() -> Iterator[None]:
    """Eager calls on a CPU go past torch's dispatcher; compiled and CUDA ones do not."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (registration, grouped_mlp):
            patch.setattr(module, "torch", Compiling())
        yield


@every_operation
def test_operations_and_their_gradients_are_registered_as_torch_wants_it(name: str) -> None:
    case = CASES[name]
    with through_torch(), Calls() as calls:
        gradients(case, case.arguments(5, torch.float32))
    names = {func._schema.name.removeprefix("megatron_qwen::") for func, _ in calls.made}
    assert set(case.registered) - WITHOUT_GRADIENT <= names
    is_own_gradient = name == "rope_"  # a rotation back; so the operation itself has none
    assert is_own_gradient or any(each.endswith("_backward") for each in names)
    for func, args in calls.made:
        is_gradient = is_own_gradient or func._schema.name.endswith("_backward")
        torch.library.opcheck(func, tree_map_only(torch.Tensor, torch.detach, args) if is_gradient else args)


@every_operation
def test_function_and_operation_give_the_same_bits(name: str) -> None:
    case = CASES[name]
    arguments = case.arguments(5, torch.bfloat16)
    by_function = gradients(case, arguments)
    with through_torch():
        by_operation = gradients(case, arguments)
    assert all(torch.equal(a, b) for a, b in zip(by_function, by_operation, strict=True))


def weighted_sum(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([(out.float() * (i + 1)).square().sum() for i, out in enumerate(outputs)]).sum()


@every_operation
def test_compiles_as_one_graph_with_equal_results(name: str) -> None:
    case = CASES[name]
    torch.compiler.reset()
    arguments = case.arguments(5, torch.float32)
    leaves = [each.requires_grad_() for each in case.tensors(arguments)]

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return weighted_sum(case.of_leaves(arguments)(*(each * 1.5 for each in leaves)))

    expected = loss(*leaves)
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(graph, expected)
    torch.testing.assert_close(torch.autograd.grad(graph, leaves), torch.autograd.grad(expected, leaves))


@every_operation
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    """By torch's two ways of recompute, and Megatron-Core's own."""
    from megatron_qwen.parallel.device import install_cpu_platform

    install_cpu_platform()
    from megatron.core.tensor_parallel import checkpoint as megatron_checkpoint
    from torch.utils.checkpoint import checkpoint

    case = CASES[name]
    arguments = case.arguments(5, torch.float32)
    leaves = [each.requires_grad_() for each in case.tensors(arguments)]

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return weighted_sum(case.of_leaves(arguments)(*(each * 1.5 for each in leaves)))

    kept = torch.autograd.grad(loss(*leaves), leaves)
    for again in (
        checkpoint(loss, *leaves, use_reentrant=False),
        checkpoint(loss, *leaves, use_reentrant=True),
        megatron_checkpoint(loss, False, *leaves),
    ):
        for leaf in leaves:
            leaf.grad = None
        again.backward()
        for leaf, expected in zip(leaves, kept, strict=True):
            assert torch.equal(leaf.grad, expected)


@every_operation
def test_a_second_derivative_is_refused(name: str) -> None:
    case = CASES[name]
    arguments = case.arguments(3, torch.float32)
    leaves = [each.requires_grad_() for each in case.tensors(arguments)]
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.autograd.grad(weighted_sum(case.of_leaves(arguments)(*leaves)), leaves, create_graph=True)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values; columns one apart, rows two rows apart."""
    wide = torch.full((tensor.shape[0], 2, *tensor.shape[1:]), float("nan"), dtype=tensor.dtype)
    wide[:, 0] = tensor
    return wide[:, 0]


@every_operation_on_rows
def test_rows_that_are_apart_give_what_neighbouring_ones_give(name: str) -> None:
    case = CASES[name]
    near = case.arguments(5, torch.bfloat16)
    far = {**near, case.leaves[0]: strided(near[case.leaves[0]])}
    assert not far[case.leaves[0]].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(gradients(case, near), gradients(case, far), strict=True))


@every_operation_on_rows
def test_rows_beyond_32_bit_offsets(name: str) -> None:
    check_far_rows(name, "reference")


@every_operation_on_rows
def test_rows_beyond_32_bit_offsets_in_triton(interpreted: Any, name: str) -> None:
    interpreted(check_far_rows, name, "triton")


def bad_arguments(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Valid arguments with one tensor of another device, dtype or shape, and that argument's name."""
    case = CASES[name]
    valid = case.arguments(4, torch.float32)
    tensors = {key: value for key, value in valid.items() if isinstance(value, torch.Tensor)}
    for key, value in tensors.items():
        others = valid.keys() - {key}
        if any(isinstance(valid[other], (torch.Tensor, tuple)) for other in others):
            # The first tensor says where the others have to be, so that one of those is named.
            yield "" if key == next(iter(tensors)) else key, {**valid, key: value.to("meta")}
        yield key, {**valid, key: value.to(torch.complex64)}
        yield key, {**valid, key: value.new_ones(())}
    for key in case.narrowed:
        yield key, {**valid, key: valid[key][..., :-1]}


@every_operation
def test_bad_input_is_named_with_what_it_is_and_what_it_should_be(name: str) -> None:
    case = CASES[name]
    seen = 0
    for key, arguments in bad_arguments(name):
        with pytest.raises(ConfigError) as caught:
            case.function(**arguments)
        message = str(caught.value)
        assert key in message, f"{key}: {message}"
        assert "expected" in message or "scalar" in message, message
        seen += 1
    assert seen >= 2
