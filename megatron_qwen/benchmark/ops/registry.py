"""All cases of `bench ops`. A new one is an entry in the file of its family, a new family a line here."""

from __future__ import annotations

import importlib

from megatron_qwen.benchmark.ops.case import OpCase
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import did_you_mean

_HERE = "megatron_qwen.benchmark.ops"

# family: the modules whose CASES belong to it
FAMILIES = {
    "rope": (f"{_HERE}.rope_cases",),
    "norm": (f"{_HERE}.norm_cases",),
    "swiglu": (f"{_HERE}.swiglu_cases",),
    "loss": (f"{_HERE}.loss_cases",),
    "moe": (f"{_HERE}.moe_cases",),
    "experts": (f"{_HERE}.expert_cases",),
    "attention": (f"{_HERE}.attention_cases", f"{_HERE}.sparse_cases"),
}


def all_cases() -> tuple[OpCase, ...]:
    """Return every case, family by family."""
    return tuple(
        case for modules in FAMILIES.values() for module in modules for case in importlib.import_module(module).CASES
    )


def choose_cases(families: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> tuple[OpCase, ...]:
    """Return the cases of these families and names; all of them if neither is given.

    Raises:
        ConfigError: an unknown family or name.
    """
    cases = all_cases()
    for family in families:
        if family not in FAMILIES:
            raise ConfigError(f"--family {family!r}: expected one of {', '.join(FAMILIES)}")
    known = [case.name for case in cases]
    for name in names:
        if name not in known:
            raise ConfigError(f"--op {name!r}: expected one of {', '.join(known)}.{did_you_mean(name, known)}")
    if not families and not names:
        return cases
    return tuple(case for case in cases if case.family in families or case.name in names)
