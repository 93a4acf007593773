"""The base of a recipe's groups of fields."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_qwen.errors import ConfigError


class RecipeGroup:
    """Base of the groups: collects every problem of `problems()` into one ConfigError."""

    def __post_init__(self) -> None:
        found = list(self.problems())
        if found:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(found))

    def problems(self) -> Iterator[str]:
        """Yield one line for each field that cannot be used."""
        yield from ()

    def _at_least(self, minimum: float, *names: str) -> Iterator[str]:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (value >= minimum and math.isfinite(value)):
                yield f"{name}: got {value}, expected a finite number >= {minimum}"

    def _one_of(self, name: str, choices: tuple[str, ...]) -> Iterator[str]:
        if getattr(self, name) not in choices:
            yield f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}"
