"""Whether the Megatron-LM arguments in a checkpoint describe the arithmetic that its config.json does.

Megatron-LM builds the model from the arguments (--use-checkpoint-args), not from `hf/config.json`. Shapes that
contradict the weights are found elsewhere; these fields leave no trace in them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_qwen.checkpoint.common_state import read_common
from megatron_qwen.checkpoint.pickles import read_metadata
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.errors import IncompleteInputError, UnsafeInputError

# Field of config.json, the argument, and how the one follows from the other. Older releases save norm_epsilon, newer
# ones layernorm_epsilon, and our own checkpoints hold both.
_FIELDS: Sequence[tuple[str, str, Callable[[Any], Any]]] = (
    ("rms_norm_eps", "norm_epsilon", float),
    ("rms_norm_eps", "layernorm_epsilon", float),
    ("rope_theta", "rotary_base", float),
    ("norm_topk_prob", "moe_router_pre_softmax", lambda value: not value),
    ("num_experts_per_tok", "moe_router_topk", int),
)
_MOE_FIELDS = ("norm_topk_prob", "num_experts_per_tok")


@dataclass(frozen=True, kw_only=True)
class Contradiction:
    """A field that config.json and the stored arguments give differently."""

    field: str
    argument: str
    configured: Any
    stored: Any

    def __str__(self) -> str:
        return f"{self.field} is {self.configured} in hf/config.json, {self.stored} by {self.argument} of its arguments"


def contradictions(source: WeightSource) -> list[Contradiction]:
    """Return where the arguments in a checkpoint contradict its config.json, once per field; none without arguments.

    Raises:
        CorruptInputError: the file that holds them is damaged.
    """
    arguments = stored_arguments(source)
    found: dict[str, Contradiction] = {}
    for field, name, convert in _FIELDS:
        value, configured = getattr(arguments, name, None), getattr(source.config, field)
        if value is None or (field in _MOE_FIELDS and not source.config.is_moe) or not isinstance(value, (int, float)):
            continue
        # Megatron-LM takes whole rotary bases only, and config.json may hold an epsilon that went through fp32.
        expected = int(configured) if name == "rotary_base" else configured
        if not math.isclose(convert(value), expected, rel_tol=1e-6):
            item = Contradiction(field=field, argument=name, configured=configured, stored=convert(value))
            found.setdefault(field, item)
    return list(found.values())


def stored_arguments(source: WeightSource) -> argparse.Namespace | None:
    """Return Megatron-LM's arguments in a checkpoint; None if there are none, or they need more than plain data."""
    if isinstance(source, HfFolder):
        return None
    if isinstance(source, LegacyFolder):
        return next(iter(source.contents.values())).arguments
    try:
        arguments = read_common(source.path, read_metadata(source.path)).get("args")
    except (IncompleteInputError, UnsafeInputError):
        return None
    return arguments if isinstance(arguments, argparse.Namespace) else None
