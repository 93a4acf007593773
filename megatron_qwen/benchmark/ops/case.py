"""What is measured of an operation, as data: real shapes, inputs, who takes part, bytes and operations by formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_qwen.model.config import QwenConfig

Function = Callable[..., Any]
Sizes = Mapping[str, int]
Results = dict[str, torch.Tensor]

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The tensors of one measurement; every contestant is called as `function(**leaves, **others, **constants)`.

    Attributes:
        leaves: floating-point inputs, with a gradient where the case has one.
        others: inputs without one: tables, positions, targets.
        grads: one per output.
        shared: names of leaves, others and outputs that have no token axis (such an output is a sum over the tokens);
            the first axis of all others counts tokens. Where tokens mix, every name is here.
        constants: arguments that are no tensors.
        listed: leaves [E, ...] that stand for E matrices. A function marked by `takes_lists` gets each as a list of
            leaves of their own, as a model has them; others get the one tensor.
        width: numbers per token of the widest tensor inside, where no leaf is as wide.
        compared: ranges of tokens whose results are compared; all of them if empty. Only for cases without a gradient,
            where the definition of all tokens would take longer than all that is timed.
    """

    leaves: Mapping[str, torch.Tensor]
    others: Mapping[str, torch.Tensor]
    grads: tuple[torch.Tensor, ...]
    shared: frozenset[str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    listed: frozenset[str] = frozenset()
    width: int = 0
    compared: tuple[tuple[int, int], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Return everything a contestant is called with."""
        return {**self.leaves, **self.others, **self.constants}

    def num_tokens(self) -> int:
        """Return the length of the token axis; 1 where no leaf has one, so that there is nothing to slice."""
        lengths = [leaf.shape[0] for name, leaf in self.leaves.items() if name not in self.shared]
        return lengths[0] if lengths else 1

    def slice(self, begin: int, end: int) -> Workload:
        """Return the tokens from `begin` to `end`, as views."""
        if self.leaves.keys() <= self.shared:
            return self

        def cut(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: each if name in self.shared else each[begin:end] for name, each in tensors.items()}

        return replace(
            self,
            leaves=cut(self.leaves),
            others=cut(self.others),
            grads=tuple(grad[begin:end] if grad.dim() else grad for grad in self.grads),
        )

    def wide(self) -> Workload:
        """Return the same values with leaves and gradients in fp64; what is no leaf stays as it is."""
        return replace(
            self,
            leaves={name: each.detach().double() for name, each in self.leaves.items()},
            grads=tuple(grad.double() for grad in self.grads),
        )


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One operation that is measured.

    Attributes:
        name: as typed after `--op`.
        family: as typed after `--family`.
        operation: the entry of `ops.OPERATIONS` whose kernels compute it.
        about: one line.
        outputs: names of the results, in order.
        directions: of `DIRECTIONS`; "both" is forward and backward timed together.
        bound: "memory" if bytes over copy bandwidth is the floor, "compute" if operations over the GEMM rate is.
        sizes: (configuration, sequence length) to named sizes, "tokens" first; empty if the model has no such layer.
        workload: (sizes, dtype, device, seed) to tensors, random.
        ours: through `megatron_qwen.ops`.
        plain: torch operations as a model without kernels has them; the fp64 reference too, so it must not round
            anything to a dtype of its own.
        peers: name to a function that imports the peer and returns its contestant.
        bytes_moved: (sizes, direction, bytes per element): each input read once, each output written once.
        flops: (sizes, direction): floating-point operations, without any that are done again.
        odd_sizes: sizes for `--check`: primes, one token, one more than a block.
        lengths: default sequence lengths per device type.
        models: default presets per device type, those that bars are judged at first.
        in_place: results overwrite the leaves; there is no gradient.
        is_inference: there is no gradient, for another reason.
        is_graphed: on a GPU a CUDA graph of the call is timed, as engines decode; only without a gradient.
        is_compilable: False if plain torch must know numbers of rows on the host: torch.compile does not take part.
        is_plain_timed: False if plain torch is the definition only, with work that nobody would do.
        fp32_yardsticks: more functions in plain torch, whose errors are allowed to fp32 gradients as `plain`'s is.
        most_rounds: sizes to a number of rounds above which none are measured: long runs vary less.
        on_cpu: sizes to those that a CPU is given, where a model's own are too large for one.
    """

    name: str
    family: str
    operation: str
    about: str
    outputs: tuple[str, ...]
    directions: tuple[str, ...] = ("forward", "backward")
    bound: str = "memory"
    sizes: Callable[[QwenConfig, int], dict[str, int]]
    workload: Callable[[Sizes, torch.dtype, torch.device, int], Workload]
    ours: Function
    plain: Function
    peers: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    bytes_moved: Callable[[Sizes, str, int], int]
    flops: Callable[[Sizes, str], int]
    odd_sizes: tuple[Sizes, ...]
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"cuda": (16_384, 32_768), "cpu": (256,)})
    models: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cuda": ("7b", "72b", "0.5b"), "cpu": ("0.5b",)}
    )
    in_place: bool = False
    is_inference: bool = False
    is_graphed: bool = False
    is_compilable: bool = True
    is_plain_timed: bool = True
    fp32_yardsticks: tuple[Function, ...] = ()
    most_rounds: Callable[[Sizes], int] | None = None
    on_cpu: Callable[[dict[str, int]], dict[str, int]] | None = None

    def __post_init__(self) -> None:
        assert self.bound in ("memory", "compute"), self.bound
        assert set(self.directions) <= set(DIRECTIONS), self.directions
        assert self.has_gradient or self.directions == ("forward",), self.directions
        assert not (self.has_gradient and self.is_graphed), self.name

    @property
    def has_gradient(self) -> bool:
        """Whether results include the gradients of the leaves."""
        return not (self.in_place or self.is_inference)

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile of plain torch takes part."""
        return self.is_plain_timed and self.is_compilable


def results(case: OpCase, workload: Workload, function: Function) -> Results:
    """Return outputs by their names, and gradients of the leaves as "d " + name.

    The workload's tensors are left as they are: what works in place gets copies.
    """
    if not case.has_gradient:
        with torch.no_grad():
            outputs = as_tuple(function(**{**workload.arguments(), **copies(workload.leaves)}))
        return dict(zip(case.outputs, outputs, strict=True))
    call = Call(workload, function)
    outputs = call.forward()
    gradients = call.gradients(call.backward(outputs))
    found = dict(zip(case.outputs, (each.detach() for each in outputs), strict=True))
    return found | {f"d {name}": grad for name, grad in gradients.items()}


def takes_lists(function: Function) -> Function:
    """Mark a function that gets leaves in `Workload.listed` as lists."""
    function.takes_lists = True  # type: ignore[attr-defined]
    return function


class Call:
    """A function with the arguments of a workload, whose leaves collect gradients."""

    def __init__(self, workload: Workload, function: Function) -> None:
        """Make the leaves; they share memory with the workload's."""
        listed = workload.listed if getattr(function, "takes_lists", False) else frozenset[str]()
        self._function, self._grads = function, list(workload.grads)
        self._leaves = {
            name: [each.detach().requires_grad_() for each in (leaf.unbind() if name in listed else (leaf,))]
            for name, leaf in workload.leaves.items()
        }
        given = {name: leaves if name in listed else leaves[0] for name, leaves in self._leaves.items()}
        self._arguments = {**workload.arguments(), **given}
        self._listed = listed

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Return the outputs."""
        return as_tuple(self._function(**self._arguments))

    def backward(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return the gradients of all leaves, one by one."""
        leaves = [leaf for leaves in self._leaves.values() for leaf in leaves]
        return torch.autograd.grad(outputs, leaves, self._grads)

    def gradients(self, found: tuple[torch.Tensor, ...]) -> Results:
        """Return what `backward` returned by the names of the workload's leaves."""
        rest = iter(found)
        return {
            name: torch.stack([next(rest) for _ in leaves]) if name in self._listed else next(rest)
            for name, leaves in self._leaves.items()
        }

    def saved_bytes(self) -> int:
        """Return the memory that forward keeps for backward beside the arguments and the outputs."""
        given = [each for leaves in self._leaves.values() for each in leaves]
        given += [each for each in self._arguments.values() if isinstance(each, torch.Tensor)]
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = self.forward()
        for each in (*given, *outputs):
            kept.pop(each.untyped_storage().data_ptr(), None)
        return sum(kept.values())


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a copy of each tensor."""
    return {name: each.detach().clone() for name, each in tensors.items()}


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return one tensor or several as a tuple."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def random_normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> torch.Tensor:
    """Return normal random numbers; the same for the same seed, device type and shape."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
