"""Budgets of vertical-slash sparse attention by layer and head: `sparse_attention_config.json` of Qwen2.5-1M and vLLM.

The file is a list over layers of {"0": ["vertical_and_slash", columns, diagonals, score], ...}, one entry
per query head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError

PATTERN = "vertical_and_slash"
MAX_BYTES = 1 << 24  # 80 layers of 64 heads take 0.3 MB
FIELDS = 4


@dataclass(frozen=True)
class HeadBudget:
    """How much of the attention of one query head is kept.

    Attributes:
        verticals: key columns, seen by every later row; the file's second entry.
        slashes: diagonals, that is distances between row and key; the third.
        score: what the search or the calibration found for these, such as the recall; the fourth.

    Raises:
        ConfigError: a size is not a positive integer, or the score is not finite.
    """

    verticals: int
    slashes: int
    score: float = 1.0

    def __post_init__(self) -> None:
        for name, size in (("verticals", self.verticals), ("slashes", self.slashes)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ConfigError(f"sparse attention: {name} is {size!r}; expected a positive integer")
        if isinstance(self.score, bool) or not isinstance(self.score, (int, float)) or not math.isfinite(self.score):
            raise ConfigError(f"sparse attention: score is {self.score!r}; expected a finite number")


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Budgets of all layers.

    Attributes:
        layers: of each layer, the budgets of its query heads.

    Raises:
        ConfigError: no layers or heads, or layers with unequal numbers of heads.
    """

    layers: tuple[tuple[HeadBudget, ...], ...]

    def __post_init__(self) -> None:
        if not self.layers or not self.layers[0]:
            raise ConfigError("sparse attention: no layers or no heads; expected at least one of each")
        for index, layer in enumerate(self.layers):
            if len(layer) != len(self.layers[0]):
                raise ConfigError(
                    f"sparse attention: layer {index} has {len(layer)} heads; expected {len(self.layers[0])}, as layer "
                    "0 has"
                )

    @classmethod
    def from_json(
        cls, content: Any, *, num_layers: int | None = None, num_heads: int | None = None
    ) -> SparseAttentionConfig:
        """Return the budgets of a parsed file.

        Args:
            content: what `json.loads` made of it.
            num_layers: of the model; None for any.
            num_heads: query heads of a layer of the model; None for any.

        Raises:
            ConfigError: naming the layer and the head.
        """
        if not isinstance(content, list):
            raise ConfigError(f"sparse attention: the file holds {_shown(content)}; expected a list over layers")
        if num_layers is not None and len(content) != num_layers:
            raise ConfigError(
                f"sparse attention: the file has {len(content)} layers; expected {num_layers}, of the model"
            )
        return cls(tuple(_layer(index, layer, num_heads) for index, layer in enumerate(content)))

    @classmethod
    def read(cls, path: Path, *, num_layers: int | None = None, num_heads: int | None = None) -> SparseAttentionConfig:
        """Return the budgets in a file; arguments as in `from_json`.

        Raises:
            ConfigError: no such file, not JSON, above 16 MiB, or as `from_json`; naming the path.
        """
        try:
            with path.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; expected a sparse_attention_config.json") from error
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path}: above {MAX_BYTES} bytes; expected a sparse_attention_config.json")
        try:
            content = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repetition)
            return cls.from_json(content, num_layers=num_layers, num_heads=num_heads)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON in UTF-8 ({error}); expected a list over layers") from error

    def to_json(self) -> list[dict[str, list[str | int | float]]]:
        """Return what the file holds."""
        return [
            {str(head): [PATTERN, each.verticals, each.slashes, each.score] for head, each in enumerate(layer)}
            for layer in self.layers
        ]

    def write(self, path: Path) -> None:
        """Write the file, one layer per line; of an existing file nothing is lost if that fails.

        Raises:
            OSError: the folder cannot be written to.
        """
        lines = ",\n".join(json.dumps(layer) for layer in self.to_json())
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        unfinished.replace(path)


def _layer(index: int, layer: Any, num_heads: int | None) -> tuple[HeadBudget, ...]:
    where = f"sparse attention: layer {index}"
    if not isinstance(layer, dict):
        raise ConfigError(
            f'{where} is {_shown(layer)}; expected {{"0": ["{PATTERN}", columns, diagonals, score], ...}}'
        )
    count = len(layer) if num_heads is None else num_heads
    names = [str(head) for head in range(count)]
    if set(layer) != set(names):
        missing, stray = ([*map(_shown, each)][:8] for each in (set(names) - set(layer), set(layer) - set(names)))
        raise ConfigError(
            f'{where} has {len(layer)} heads; expected "0" to "{count - 1}": missing {sorted(missing)}, '
            f"not expected {sorted(stray)}"
        )
    return tuple(_head(f"{where}, head {name}", layer[name]) for name in names)


def _head(where: str, entry: Any) -> HeadBudget:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != FIELDS:
        raise ConfigError(f'{where} is {_shown(entry)}; expected ["{PATTERN}", columns, diagonals, score]')
    if entry[0] != PATTERN:
        raise ConfigError(
            f'{where} has pattern {_shown(entry[0])}; expected "{PATTERN}": MInference takes (1000, 6096) of it for '
            "heads whose best pattern is another"
        )
    try:
        return HeadBudget(*entry[1:])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ConfigError("sparse attention: a layer names a head more than once; expected every head once")
    return mapping


def _shown(value: Any) -> str:
    return repr(value)[:80]
