"""What a training run leaves in a step beside tensors, carried over so that the run can go on from the converted step.

Our runs keep step.json (identity, layout, progress) and recipe.yaml in a step; Megatron-LM keeps what it counts in the
arguments (`args`). A converted step has both, as far as its source knows them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.conversion.interfaces import OutputFile, bytes_file
from megatron_qwen.conversion.optimizer.state import OptimizerState
from megatron_qwen.errors import CorruptInputError
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.strict_json import read_strict_json

logger = logging.getLogger(__name__)

RECORD_NAME, RECIPE_NAME = "step.json", "recipe.yaml"
_MAX_RECORD_BYTES = 16 * 2**20
_NOT_CARRIED = "not carried over by convert reshard"
# Arguments of Megatron-LM that say how far a run is and in which steps it goes; its loader reads the first three.
_COUNTS = (
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "global_batch_size",
    "micro_batch_size",
    "train_iters",
    "train_samples",
    "seq_length",
)


@dataclass(frozen=True)
class RunRecord:
    """Progress of a run at a step.

    Attributes:
        step: number of optimizer steps done.
        record: the content of our step.json, or None if another program trained.
        arguments: Megatron-LM's that count, by name.
        recipe: the content of recipe.yaml, or None.
    """

    step: int
    record: Mapping[str, Any] | None
    arguments: Mapping[str, Any]
    recipe: bytes | None

    def files(self, folder: str, layout: ParallelLayout | None, *, carries_random_states: bool) -> list[OutputFile]:
        """Return step.json and recipe.yaml of the converted step.

        Args:
            folder: of the step, with a trailing slash.
            layout: of per-rank files; None keeps that of the source.
            carries_random_states: the target has the random states of all ranks, as only torch_dist can.
        """
        record = self.record if self.record is not None else self._foreign_record()
        common = dict(record["common"])
        if layout is not None:
            common["layout"] = dataclasses.asdict(layout)
        if not carries_random_states:
            # Differs from any running layout, so that a resume seeds anew and says why.
            common["layout"] = {**common["layout"], "random_streams": _NOT_CARRIED}
        common["optimizer_format"] = "fully_reshardable"
        text = json.dumps({**record, "common": common}, indent=1, allow_nan=False)
        files = [bytes_file(folder + RECORD_NAME, text.encode())]
        return files + ([bytes_file(folder + RECIPE_NAME, self.recipe)] if self.recipe is not None else [])

    def _foreign_record(self) -> dict[str, Any]:
        """Return a record for a run whose identity is not known: a resume has to allow every part of it."""
        samples = self.arguments.get("consumed_train_samples") or 0
        progress = {
            "tokens": samples * (self.arguments.get("seq_length") or 0),
            "skipped_steps": 0,
            "bad_steps_in_a_row": 0,
        }
        common = {"identity": {}, "layout": {}, "versions": {}, "device": "unknown", "progress": progress}
        return {"format": "megatron-qwen-step", "version": 1, "step": self.step, "serial": 1, "common": common}


def read_run_record(step_folder: Path, state: OptimizerState, arguments: object) -> RunRecord:
    """Return what a step's folder says about the progress of its run.

    Args:
        step_folder: of the source.
        state: its optimizer's.
        arguments: Megatron-LM's in the checkpoint, or None.

    Raises:
        CorruptInputError: step.json is damaged, or of another step than the checkpoint.
    """
    path = step_folder / RECORD_NAME
    record = read_strict_json(path, max_bytes=_MAX_RECORD_BYTES) if path.is_file() else None
    known = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    counts = {name: known[name] for name in _COUNTS if type(known.get(name)) is int}
    if record is not None:
        if record.get("step") != state.iteration or not isinstance(record.get("common"), dict):
            raise CorruptInputError(
                f"{path}: of step {record.get('step')!r}, the checkpoint is of iteration {state.iteration}; expected "
                "the step.json that was saved with it"
            )
        counts |= _own_counts(record["common"], state.iteration)
    recipe = step_folder / RECIPE_NAME
    return RunRecord(state.iteration, record, counts, recipe.read_bytes() if recipe.is_file() else None)


def _own_counts(common: Mapping[str, Any], step: int) -> dict[str, int]:
    """Return Megatron-LM's counts for one of our runs."""
    identity = common.get("identity", {})
    batch, model = identity.get("batch", {}), identity.get("model", {})
    counts = {
        "global_batch_size": batch.get("global_batch_size"),
        "micro_batch_size": batch.get("micro_batch_size"),
        "train_iters": identity.get("schedule", {}).get("steps"),
        "seq_length": model.get("seq_length"),
    }
    if counts["global_batch_size"]:
        counts |= {"consumed_train_samples": step * counts["global_batch_size"], "consumed_valid_samples": 0}
    return {name: count for name, count in counts.items() if type(count) is int}
