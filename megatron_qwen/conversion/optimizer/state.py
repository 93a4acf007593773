"""Optimizer state of a run, independent of any layout: read from one checkpoint, written into another.

    optimizer = open_torch_dist_optimizer(folder, config)   # or open_legacy_optimizer; None: there is none
    reader = OptimizerReader(optimizer, source)             # proves master weights against the weights
    torch_dist_optimizer(reader, ...)                       # chunks and common state of a torch_dist checkpoint
    LegacyOptimizerOutput(reader, ...)                      # what belongs into the rank files of a per-rank one

Adam keeps two moments per parameter, each of the parameter's shape, and in mixed precision a float32 master weight. The
names here are those of the distributed optimizer's files: "param", "exp_avg", "exp_avg_sq". Everything else (step,
rates, weight decay, scheduler) is small and the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.parameters import Parameter
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError, MismatchError

Role = Literal["param", "exp_avg", "exp_avg_sq"]
Kind = Literal["distributed", "mixed", "float32"]
ROLES: tuple[Role, ...] = ("param", "exp_avg", "exp_avg_sq")

# What tells Megatron's parameter groups apart, beside `wd_mult`; Qwen runs differ in none of them.
_NEUTRAL: Mapping[str, Any] = {"lr_mult": 1.0, "is_decoupled_lr": False}
WITHOUT_OPTIMIZER = "or give --no-optimizer to convert the weights alone"


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """What an optimizer's checkpoint holds beside its tensors.

    Attributes:
        kind: "distributed" is Megatron's DistributedOptimizer; the others are replicated over data-parallel ranks, with
            ("mixed") or without ("float32") master weights beside the model's.
        decay, no_decay: hyper-parameters and step of the matrices' group, and of the group of biases and norms.
        scheduler: state of OptimizerParamScheduler, or None.
        grad_scaler: state of float16's loss scaler, or None.
        is_chained: it was saved by two optimizers, one of them for experts.
        iteration: of the checkpoint.
    """

    kind: Kind
    decay: Mapping[str, Any]
    no_decay: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    grad_scaler: Mapping[str, Any] | None
    is_chained: bool
    iteration: int

    def group(self, *, decays: bool, is_expert: bool) -> dict[str, Any]:
        """Return the hyper-parameters of one of Megatron's parameter groups."""
        return {**(self.decay if decays else self.no_decay), "is_expert_parallel": is_expert}


class OptimizerSource(Protocol):
    """The optimizer in a checkpoint folder of any format.

    Attributes:
        path: the folder, for messages.
        state: all but the tensors.
    """

    path: Path
    state: OptimizerState

    def dtype_of(self, parameter: Parameter, role: Role) -> torch.dtype:
        """Return the dtype in which it is stored."""

    def rows(self, parameter: Parameter, role: Role, begin: int, end: int) -> Tensor:
        """Return rows (axis 0) as Megatron lays them out, unsharded, without vocabulary padding."""

    def place_name(self, parameter: Parameter, index: Sequence[int] = ()) -> str:
        """Return where the value at `index` (the first by default) is kept: a key, or a rank file and a name in it."""


def parse_groups(groups: Sequence[Mapping[str, Any]], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hyper-parameters of the group that decays and of the one that does not.

    Args:
        groups: of all chained optimizers; `params` in them is left out.
        where: for messages.

    Raises:
        CorruptInputError: they are not Megatron's parameter groups.
        MismatchError: they tell parameters apart by more than weight decay.
        IncompleteInputError: one of the two is missing, or the step.
    """
    found: dict[bool, dict[str, Any]] = {}
    for group in groups:
        taken = {key: value for key, value in group.items() if key not in ("params", "is_expert_parallel")}
        plain = require_plain(taken, f"{where}: a parameter group") or {}
        multiplier = plain.get("wd_mult", plain.get("pre_wd_mult"))
        odd = [key for key, value in _NEUTRAL.items() if plain.get(key, plain.get(f"pre_{key}", value)) != value]
        if multiplier not in (0.0, 1.0) or odd:
            raise MismatchError(
                f"{where}: a parameter group with wd_mult {multiplier} {', '.join(f'{k} {plain[k]}' for k in odd)}; "
                f"expected one that decays (wd_mult 1) and one that does not (0), {WITHOUT_OPTIMIZER}"
            )
        before = found.setdefault(bool(multiplier), plain)
        different = sorted(key for key in before.keys() | plain.keys() if before.get(key) != plain.get(key))
        if different:
            raise MismatchError(
                f"{where}: the experts' parameter group differs from the other in {', '.join(different)}; expected the "
                f"same hyper-parameters, {WITHOUT_OPTIMIZER}"
            )
    for decays in (True, False):
        if decays not in found:
            raise IncompleteInputError(f"{where}: no parameter group with wd_mult {float(decays)}, {WITHOUT_OPTIMIZER}")
    return found[True], found[False]


def with_step(group: Mapping[str, Any], step: object, where: str) -> dict[str, Any]:
    """Return the group with its number of steps, which plain torch optimizers keep with each parameter instead.

    Raises:
        IncompleteInputError: neither has it.
    """
    found = group.get("step", step)
    number = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if not isinstance(number, int | float) or isinstance(number, bool) or number != int(number):
        raise IncompleteInputError(
            f"{where}: no step in the parameter group (got {number!r}): saved before the first optimizer step? "
            f"Convert a later checkpoint, {WITHOUT_OPTIMIZER}"
        )
    return {**group, "step": int(number)}


class OptimizerReader:
    """Optimizer tensors for a target; master weights are compared with the weights on the way.

    Attributes:
        source: the optimizer.
        kind: of the target.
        roles: that the target stores.
    """

    def __init__(self, source: OptimizerSource, weights: WeightSource, *, distributed: bool | None = None) -> None:
        """Prepare to read.

        Args:
            source: the optimizer.
            weights: of the same checkpoint.
            distributed: the target's optimizer is the distributed one; None keeps the source's kind.

        Raises:
            ConfigError: the weights' dtypes are mixed, so that no Megatron optimizer fits them.
        """
        self.source, self._weights = source, weights
        is_distributed = source.state.kind == "distributed" if distributed is None else distributed
        self.kind: Kind = "distributed" if is_distributed else "mixed" if self._is_mixed() else "float32"
        self.roles: tuple[Role, ...] = ROLES if self.kind != "float32" else ROLES[1:]

    def dtype_of(self, parameter: Parameter, role: Role) -> torch.dtype:
        """Return the dtype that `rows` returns."""
        if self._is_weight(role):
            return self._weights.dtype_of(parameter)
        return self.source.dtype_of(parameter, role)

    def rows(self, parameter: Parameter, role: Role, begin: int, end: int) -> Tensor:
        """Return rows `begin` to `end` of the whole parameter.

        Raises:
            MismatchError: a master weight rounds to another value than the weight, or vocabulary padding is not zero.
        """
        if self._is_weight(role):
            return self._weights.rows(parameter, begin, end)
        values = self.source.rows(parameter, role, begin, end)
        if role == "param":
            self._check_master(parameter, values, begin, end)
        return values

    def _is_mixed(self) -> bool:
        plan = self._weights.plan()
        dtypes = {item.source_dtype for item in plan.parameters}
        if len(dtypes) > 1:
            raise ConfigError(
                f"{self._weights.path}: weights of {len(dtypes)} dtypes, expected one: no Megatron optimizer keeps "
                f"state for such a model; {WITHOUT_OPTIMIZER[3:]}"
            )
        return dtypes != {torch.float32}

    def _is_weight(self, role: Role) -> bool:
        return role == "param" and self.source.state.kind == "float32"

    def _check_master(self, parameter: Parameter, master: Tensor, begin: int, end: int) -> None:
        weight = self._weights.rows(parameter, begin, end)
        differs = (_bytes(master.to(weight.dtype)) != _bytes(weight)).any(dim=-1)
        if not differs.any():
            return
        row, *rest = (int(number) for number in differs.nonzero()[0])
        index = (begin + row, *rest)
        raise MismatchError(
            f"{self.source.place_name(parameter, index)}: the master weight does not round to the model's weight "
            f"(first at {index} of {parameter.megatron_name}): the optimizer state is damaged or of another model. Up "
            "to 0.19, Megatron-Core saves it at shifted offsets where gradients have several buckets (tied embeddings "
            f"with pp > 1, overlap_grad_reduce). Use another checkpoint, {WITHOUT_OPTIMIZER}"
        )


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of each value along a last axis of their own."""
    return tensor.contiguous().view(torch.uint8).reshape(*tensor.shape, tensor.element_size())


def iteration_of(content: Mapping[str, Any], where: str) -> int:
    """Return the iteration that a checkpoint says it is of.

    Raises:
        CorruptInputError: it says none.
    """
    iteration = content.get("iteration")
    if type(iteration) is not int or iteration < 0:
        raise CorruptInputError(f"{where}: iteration is {iteration!r}, expected a number of steps")
    return iteration


def require_plain(value: object, what: str) -> dict[str, Any] | None:
    """Return `value` if it is a dictionary of numbers, texts and tensors, or None.

    Raises:
        CorruptInputError: it is something else.
    """
    if value is None:
        return None
    leaves = [value]
    while leaves:
        leaf = leaves.pop()
        if isinstance(leaf, Mapping):
            leaves += leaf.values()
        elif isinstance(leaf, list | tuple):
            leaves += leaf
        elif not isinstance(leaf, str | int | float | bool | Tensor | torch.dtype | None):
            raise CorruptInputError(f"{what}: holds a {type(leaf).__name__}, expected plain data; {WITHOUT_OPTIMIZER}")
    if not isinstance(value, dict):
        raise CorruptInputError(f"{what}: {type(value).__name__}, expected a dictionary; {WITHOUT_OPTIMIZER}")
    return value


def require_tensor(value: object, shape: Sequence[int], what: str) -> Tensor:
    """Return `value` if it is a float tensor of the shape.

    Raises:
        IncompleteInputError: it is missing.
        CorruptInputError: it is something else.
    """
    if value is None:
        raise IncompleteInputError(
            f"{what}: missing in the optimizer state; use another checkpoint, {WITHOUT_OPTIMIZER}"
        )
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != tuple(shape):
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CorruptInputError(f"{what}: {found}, expected a float tensor {tuple(shape)}")
    return value
