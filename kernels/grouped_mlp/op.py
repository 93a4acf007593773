"""`moe_mlp` and `grouped_mlp` as operations of torch: checks, launches, gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ...errors import ConfigError
from .. import checks
from ..backends import backend_for, register_operation
from ..moe_permute import ExpertOrder
from ..registration import LIBRARY, refuse, register, register_backward
from . import cuda_limits
from .inputs import Gradients, Inputs, Sinks

OP = "grouped_mlp"
register_operation(OP, "triton", "cuda")


class SharedExpert(NamedTuple):
    """The parameters of an expert that sees every token, named as in Megatron-Core's SharedExpertMLP.

    Attributes:
        fc1: [2Fs, H], gate then up.
        fc2: [H, Fs].
        gate: [1, H], its output is weighted by sigmoid(x gate^T); None for the weight 1.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    gate: torch.Tensor | None = None


def _computing(inputs: Inputs, grad: torch.Tensor | None = None, sinks: Sinks = ()) -> ModuleType:
    """Return the module with `forward` and `backward` for this call; all take the same arguments."""
    unfit_for_cuda = functools.partial(cuda_limits.unfit, inputs, grad, sinks)
    backend = backend_for(OP, inputs.x, unfit_for_cuda=unfit_for_cuda)
    return importlib.import_module({"triton": ".launch"}.get(backend, f".{backend}"), __package__)


# torch reads the schema of an operation from the annotations of these two.
def _forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor | None,
    positions: torch.Tensor | None,
    fc1: list[torch.Tensor],
    fc2: list[torch.Tensor],
    shared: list[torch.Tensor],
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = Inputs(x, weights, offsets, source, positions, fc1, fc2, shared)
    return _computing(inputs).forward(inputs, keep=not recompute)  # type: ignore[no-any-return]


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor | None,
    positions: torch.Tensor | None,
    fc1: list[torch.Tensor],
    fc2: list[torch.Tensor],
    shared: list[torch.Tensor],
    packed: torch.Tensor,
    common: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    inputs = Inputs(x, weights, offsets, source, positions, fc1, fc2, shared)
    grad = grad.contiguous()
    return _computing(inputs, grad).backward(grad, inputs, packed, common)  # type: ignore[no-any-return]


def _forward_fake(*inputs_and_recompute: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *each, recompute = inputs_and_recompute
    inputs = Inputs(*each)
    packed, common = (0, 0) if recompute else inputs.kept_sizes
    return inputs.x.new_empty(inputs.x.shape), inputs.x.new_empty(packed), inputs.x.new_empty(common)


def _backward_fake(grad: torch.Tensor, *inputs_and_kept: Any) -> Gradients:
    inputs = Inputs(*inputs_and_kept[:-2])
    first, second, others = (
        [each.new_empty(each.shape) for each in group] for group in (inputs.fc1, inputs.fc2, inputs.shared)
    )
    return inputs.x.new_empty(inputs.x.shape), inputs.weights.new_empty(inputs.weights.shape), first, second, others


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    *given, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.num_experts = len(inputs[5])
    ctx.save_for_backward(*output[1:], *_flat(Inputs(*given)))


def _flat(inputs: Inputs) -> list[torch.Tensor | None]:
    """Return all tensors one by one, the matrices last."""
    return [*inputs[:5], *inputs.fc1, *inputs.fc2, *inputs.shared]


def _inputs_of(flat: Sequence[Any], num_experts: int) -> Inputs:
    """Return what `_flat` took apart."""
    matrices, after = flat[5:], 2 * num_experts
    groups = matrices[:num_experts], matrices[num_experts:after], matrices[after:]
    return Inputs(*flat[:5], *(list(group) for group in groups))


def _differentiate(ctx: Any, *grads: torch.Tensor) -> Any:
    packed, common, *flat = ctx.saved_tensors
    grad_x, grad_weights, *grad_matrices = _grouped_mlp_backward(
        grads[0], *_inputs_of(flat, ctx.num_experts), packed, common
    )
    return grad_x, grad_weights, None, None, None, *grad_matrices, None


_grouped_mlp = register(OP, _forward, _forward_fake)
_grouped_mlp_backward = register_backward("grouped_mlp_backward", _backward, _backward_fake)
torch.library.register_autograd("megatron_qwen::grouped_mlp", _differentiate, setup_context=_save, lib=LIBRARY)


class _Eager(torch.autograd.Function):
    """The same outside torch.compile, which also adds to Megatron's gradient buffers (`main_grad`) where there are any.

    Lists of tensors are invisible to an autograd.Function, so the matrices come one by one.
    """

    @staticmethod
    def forward(ctx: Any, num_experts: int, recompute: bool, *flat: Any) -> torch.Tensor:
        arguments = (*_inputs_of(flat, num_experts), recompute)
        output = _forward(*arguments)
        _save(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            refuse("grouped_mlp_backward")
        packed, common, *flat = ctx.saved_tensors  # once: recomputation hands them out a single time
        inputs, matrices = _inputs_of(flat, ctx.num_experts), flat[5:]
        sinks = _sinks(matrices, ctx.num_experts, grads[0])
        grad = grads[0].contiguous()
        module = _computing(inputs, grad, sinks)
        grad_x, grad_weights, *grad_matrices = module.backward(grad, inputs, packed, common, sinks)
        for matrix, sink in zip(matrices, sinks, strict=True):
            if sink is not None:
                matrix.grad_added_to_main_grad = True
        return None, None, grad_x, grad_weights, *[None] * 3, *(each for group in grad_matrices for each in group)


def _sinks(matrices: Sequence[torch.Tensor], num_experts: int, grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Megatron's gradient buffers that its hook expects to be filled: those of all W1, of all W2, and of the gate.

    One launch fills all of a kind, so they are taken together or not at all, and Megatron's hook adds the gradients.
    torch adds a product only to its own dtype; kernels add to any.
    """
    buffers = [
        getattr(each, "main_grad", None) if hasattr(each, "grad_added_to_main_grad") else None for each in matrices
    ]
    after = 2 * num_experts
    kinds = [
        [*range(num_experts), *range(after, len(matrices))[:1]],
        [*range(num_experts, after), *range(after, len(matrices))[1:2]],
        list(range(after, len(matrices))[2:]),
    ]
    for kind in kinds:
        dtypes = {None if buffers[index] is None else buffers[index].dtype for index in kind}
        fits = len(dtypes) == 1 and None not in dtypes
        if not fits or (backend_for(OP, grad) == "reference" and dtypes != {grad.dtype}):
            for index in kind:
                buffers[index] = None
    return buffers


def _apply(inputs: Inputs, recompute: bool) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _grouped_mlp(*inputs, recompute)[0]  # type: ignore[no-any-return]
    return _Eager.apply(len(inputs.fc1), recompute, *_flat(inputs))  # type: ignore[no-untyped-call,no-any-return]


def moe_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    order: ExpertOrder,
    fc1: Sequence[torch.Tensor],
    fc2: Sequence[torch.Tensor],
    *,
    shared: SharedExpert | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """Return sum_j weights[t, j] MLP_{e_j}(x_t), plus the shared expert's output, for experts that are all here.

    Rows are gathered, weighted and summed inside: no [T k, H] outlives the call. Kept for backward: x, weights, order
    and the outputs [T k, 2F] and [T, 2Fs] of the first matrices; with `recompute` not even those. Backward computes
    activations again, and adds to a parameter's `main_grad` itself where Megatron-Core's gradient fusion would.

    Args:
        x: [T, H], contiguous.
        weights: [T, k], fp32 (fp64 for fp64), of `moe_routing`.
        order: of `expert_order` for these experts.
        fc1: E times [2F, H], gate then up, in the dtype of x, contiguous.
        fc2: E times [H, F], as fc1.
        shared: a further expert for every token, computed in the same launches.
        recompute: compute the outputs of the first matrices again in backward.

    Returns:
        [T, H], contiguous, in the dtype of x. No gradient of the gradient.

    Raises:
        ConfigError: a bad shape, dtype, device or strides, or a backend that cannot run.
    """
    matrices = _check(x, fc1, fc2, shared)
    checks.require_dtype(OP, "order.source", order.source, torch.int64)
    checks.require_dtype(OP, "order.positions", order.positions, torch.int64)
    checks.require_shape(OP, "order.offsets", order.offsets, (len(fc1) + 1,))
    if order.positions.dim() != 2 or order.positions.shape[0] != x.shape[0]:
        raise ConfigError(
            f"{OP}: order.positions has shape {tuple(order.positions.shape)}; expected [{x.shape[0]}, topk], as x has "
            f"{x.shape[0]} rows"
        )
    _check_weights(weights, tuple(order.positions.shape), x)
    checks.require_device(OP, "order", order.source, x, "x")
    inputs = Inputs(x, weights.contiguous(), order.offsets, order.source, order.positions, *matrices)
    return _apply(inputs, recompute)


def grouped_mlp(
    x: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    fc1: Sequence[torch.Tensor],
    fc2: Sequence[torch.Tensor],
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Return weights[r] MLP_e(x_r) for rows that are in expert order already, as a dispatcher hands them over.

    Args:
        x: [R, H], contiguous, sorted by expert.
        weights: [R], fp32 (fp64 for fp64).
        offsets: [E + 1] int64 on the device of x, where each expert's rows begin, and R.
        fc1: see `moe_mlp`, also for what is kept.
        fc2: see `moe_mlp`.
        recompute: see `moe_mlp`.

    Returns:
        [R, H], contiguous, in the dtype of x.

    Raises:
        ConfigError: see `moe_mlp`.
    """
    matrices = _check(x, fc1, fc2, None)
    checks.require_dtype(OP, "offsets", offsets, torch.int64)
    checks.require_shape(OP, "offsets", offsets, (len(fc1) + 1,))
    checks.require_device(OP, "offsets", offsets, x, "x")
    _check_weights(weights, (x.shape[0],), x)
    return _apply(Inputs(x, weights.contiguous(), offsets, None, None, *matrices), recompute)


def _check_weights(weights: torch.Tensor, shape: tuple[int, ...], x: torch.Tensor) -> None:
    checks.require_shape(OP, "weights", weights, shape)
    checks.require_dtype(OP, "weights", weights, torch.promote_types(x.dtype, torch.float32))
    checks.require_device(OP, "weights", weights, x, "x")


def _check(
    x: torch.Tensor, fc1: Sequence[torch.Tensor], fc2: Sequence[torch.Tensor], shared: SharedExpert | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Check x and the matrices; return the latter as lists."""
    checks.require_floating(OP, "x", x)
    if x.dim() != 2 or not x.is_contiguous():
        raise ConfigError(f"{OP}: x has shape {tuple(x.shape)}, strides {x.stride()}; expected [tokens, H], contiguous")
    if not fc1 or len(fc1) != len(fc2):
        raise ConfigError(f"{OP}: got {len(fc1)} matrices fc1 and {len(fc2)} fc2; expected one of each per expert")
    _check_expert("fc1[0]", "fc2[0]", fc1[0], fc2[0], x)
    for name, matrices in (("fc1", fc1), ("fc2", fc2)):
        for index, matrix in enumerate(matrices):
            if index and not (matrix.shape == matrices[0].shape and _fits(matrix, x)):
                raise ConfigError(f"{OP}: {name}[{index}] is {_words(matrix)}; expected {_words(matrices[0])}")
    if shared is None:
        return list(fc1), list(fc2), []
    _check_expert("shared.fc1", "shared.fc2", shared.fc1, shared.fc2, x)
    if shared.gate is None:
        return list(fc1), list(fc2), [shared.fc1, shared.fc2]
    checks.require_shape(OP, "shared.gate", shared.gate, (1, x.shape[1]))
    if not _fits(shared.gate, x):
        raise ConfigError(f"{OP}: shared.gate is {_words(shared.gate)}; expected {x.dtype} on {x.device}, contiguous")
    return list(fc1), list(fc2), [shared.fc1, shared.fc2, shared.gate]


def _check_expert(name1: str, name2: str, fc1: torch.Tensor, fc2: torch.Tensor, x: torch.Tensor) -> None:
    if fc1.dim() != 2 or fc1.shape[0] % 2 or fc1.shape[0] == 0 or fc1.shape[1] != x.shape[1]:
        raise ConfigError(f"{OP}: {name1} has shape {tuple(fc1.shape)}; expected [2F, {x.shape[1]}], gate then up")
    checks.require_shape(OP, name2, fc2, (x.shape[1], fc1.shape[0] // 2))
    for name, matrix in ((name1, fc1), (name2, fc2)):
        if not _fits(matrix, x):
            raise ConfigError(f"{OP}: {name} is {_words(matrix)}; expected {x.dtype} on {x.device}, contiguous")


def _fits(matrix: torch.Tensor, x: torch.Tensor) -> bool:
    return matrix.dtype == x.dtype and matrix.device == x.device and matrix.is_contiguous()


def _words(matrix: torch.Tensor) -> str:
    return f"{tuple(matrix.shape)}, {matrix.dtype}, on {matrix.device}, strides {matrix.stride()}"
