"""Optimizer state of another expert-parallel size: Megatron has one optimizer at EP 1, and two above.

With EP > 1 the experts' parameters are reduced over other ranks than the rest, so Megatron chains an optimizer for
them behind that of the dense parameters. The tensors of a checkpoint are named by parameter and do not care; the
small part beside them (hyper-parameters and step of each parameter group) is stored per optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

State = Mapping[Any, Any]  # by name, or by the optimizer's number in the chain


def fit_to_optimizers(loaded: State, optimizer: Any) -> dict[Any, Any]:
    """Return `loaded` in the form the present optimizer's `load_state_dict` takes.

    Args:
        loaded: what `CheckpointStore.load` returned for the optimizer: the tensors in the present form, and the rest
            in the form of the run that saved.
        optimizer: Megatron optimizer, chained or not.
    """
    by_optimizer = {key: part for key, part in loaded.items() if isinstance(key, int)}
    alone = {key: part for key, part in loaded.items() if not isinstance(key, int)}
    if not by_optimizer or not alone:
        return dict(loaded)
    if len(getattr(optimizer, "chained_optimizers", [optimizer])) == 1:
        # Saved by two, wanted by one: its groups are those of the dense optimizer, which now hold the experts too.
        return _merge(by_optimizer[0], alone)
    return {key: _merge(_for_experts(alone) if key else alone, part) for key, part in by_optimizer.items()}


def _for_experts(state: State) -> dict[Any, Any]:
    """Return the state with its parameter groups marked as the expert optimizer's, which finds them by that mark."""
    inner = state.get("optimizer", state)  # a plain float32 optimizer's state is not wrapped
    groups = [{**group, "is_expert_parallel": True} for group in inner["param_groups"]]
    marked = {**inner, "param_groups": groups}
    return {**state, "optimizer": marked} if "optimizer" in state else marked


def _merge(base: State, over: State) -> dict[Any, Any]:
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            merged[key] = _merge(base[key], over[key])
    if "param_groups" in base and "param_groups" in over:
        # `over` numbers the present optimizer's parameters, group by group in the order of `base`; experts lack biases.
        merged["param_groups"] = [
            {**known, **numbers} for known, numbers in zip(base["param_groups"], over["param_groups"], strict=False)
        ]
    return merged
