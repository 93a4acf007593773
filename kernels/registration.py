"""Operations with a gradient, registered with torch.library in the namespace `megatron_qwen`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

LIBRARY = torch.library.Library("megatron_qwen", "FRAGMENT")  # type: ignore[no-untyped-call]


class Differentiate(Protocol):
    """The gradient of an operation."""

    def __call__(self, ctx: Any, backward: Callable[..., Any], *grads: Any) -> Any:
        """Return the gradient of every input from those of the results, by calling `backward`."""


def register(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `megatron_qwen::name` with the schema of `run`'s annotations, and return the operation.

    Args:
        name: of the operation.
        run: computes it, on any device.
        fake: returns empty results of the right shapes, dtypes and strides.
    """
    LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"megatron_qwen::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.megatron_qwen, name).default  # type: ignore[no-any-return]


def register_backward(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`register` the gradient of an operation; differentiating it again is an error, not a missing term."""

    def refuse_again(ctx: Any, *grads: Any) -> Any:
        refuse(name)

    operation = register(name, run, fake)
    torch.library.register_autograd(f"megatron_qwen::{name}", refuse_again, lib=LIBRARY)
    return operation


def refuse(name: str) -> None:
    """Raise what a second derivative gets."""
    raise RuntimeError(f"megatron_qwen::{name} has no gradient: differentiate once, without create_graph=True")


def register_differentiable(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: tuple[str, Callable[..., Any], Callable[..., Any]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Differentiate,
) -> Callable[..., Any]:
    """Register an operation and its gradient; return the function to call it by.

    On a CPU outside torch.compile that function is an autograd.Function of the same `run`, `save` and `differentiate`:
    torch.library's way through Python costs more there than many calls compute. Forward and backward of a norm of
    64 values took 90 us so, 225 us as an operation (torch 2.13, one thread of a busy machine).

    Args:
        name: of the operation.
        run: see `register`.
        fake: see `register`.
        backward: name, `run` and `fake` of the operation that computes the gradient; may be shared.
        save: (ctx, inputs, output), keeps what the gradient needs.
        differentiate: see `Differentiate`.
    """
    operation = register(name, run, fake)
    backward_name, backward_run, backward_fake = backward
    if not hasattr(torch.ops.megatron_qwen, backward_name):
        register_backward(backward_name, backward_run, backward_fake)
    backward_operation = getattr(torch.ops.megatron_qwen, backward_name).default

    def by_operation(ctx: Any, *grads: Any) -> Any:
        return differentiate(ctx, backward_operation, *grads)

    torch.library.register_autograd(f"megatron_qwen::{name}", by_operation, setup_context=save, lib=LIBRARY)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                refuse(backward_name)
            return differentiate(ctx, backward_run, *grads)

    # What a profiler shows, as of the operation itself.
    Eager.__name__ = f"megatron_qwen::{name}"

    def call(x: torch.Tensor, *others: Any) -> Any:
        if not x.is_cpu or torch.compiler.is_compiling():
            return operation(x, *others)
        return Eager.apply(x, *others)  # type: ignore[no-untyped-call]

    return call
