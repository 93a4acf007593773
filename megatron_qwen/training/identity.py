"""What makes two runs the same run: the part of a recipe that a resume must not find changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_qwen.errors import IncompleteInputError
from megatron_qwen.training.overrides import recipe_to_dict
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.source import ModelSource

_BATCH_FIELDS = ("micro_batch_size", "global_batch_size")
# Enough of a file to tell corpora apart without reading terabytes at each start.
_DIGEST_BYTES = 1 << 20


def run_identity(recipe: Recipe, source: ModelSource) -> dict[str, Any]:
    """Return the run's identity by the names that --allow-changed takes, as JSON-compatible values.

    Not part of it: layout and performance switches (they change bits, not meaning; a resume logs them), logging,
    checkpointing and the paths of files whose content is the same.
    """
    values = recipe_to_dict(recipe)
    schedule = values["schedule"]
    return {
        "model": {
            **{name: value for name, value in values["model"].items() if name not in _NOT_MODEL},
            "config": source.config.to_hf(),
        },
        "tokenizer": source.tokenizer.fingerprint(),
        "data": {
            "split": recipe.data.split,
            "blend": [[weight, _corpus_fingerprint(prefix)] for weight, prefix in recipe.data.blend],
        },
        "batch": {name: schedule[name] for name in _BATCH_FIELDS},
        "seed": recipe.seed,
        "optimizer": {name: value for name, value in values["optimizer"].items() if name not in _NOT_IDENTITY},
        "schedule": {name: value for name, value in schedule.items() if name not in _BATCH_FIELDS},
    }


# Of those that are missing here, the configuration says what they have done to the model.
_NOT_MODEL = ("source", "backend", "dca_chunk_size", "dca_local_size", "dca_cap", "dca_original_length")
_NOT_IDENTITY = ("distributed", "max_bad_steps")


def _corpus_fingerprint(prefix: str) -> dict[str, Any]:
    fingerprint: dict[str, Any] = {}
    for suffix in ("bin", "idx"):
        path = Path(f"{prefix}.{suffix}")
        if not path.is_file():
            raise IncompleteInputError(f"{path}: no such file; data is given as the prefix of a .bin/.idx pair")
        with path.open("rb") as stream:
            head = stream.read(_DIGEST_BYTES)
        fingerprint[suffix] = {"bytes": path.stat().st_size, "sha256_of_head": hashlib.sha256(head).hexdigest()}
    return fingerprint
