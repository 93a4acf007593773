"""What both Megatron formats share: the folder of a run or an import, and one step in it as a source of weights.

DIR/latest_checkpointed_iteration.txt    "release" or a step
DIR/hf/                                  config.json, tokenizer and generation files (ours; not Megatron-LM's)
DIR/release/ or DIR/iter_0000010/        torch_dist files, or a folder for each rank
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.checkpoint.pickles import METADATA_NAME
from megatron_qwen.checkpoint.store import RELEASE, TRACKER_NAME
from megatron_qwen.conversion.formats.integrity import FileStamps
from megatron_qwen.conversion.formats.legacy.files import is_legacy_step
from megatron_qwen.conversion.parameters import Parameter
from megatron_qwen.conversion.plan import ConversionPlan, StoredTensor, plan_export
from megatron_qwen.conversion.rows import gather_hf_rows, head_sizes
from megatron_qwen.conversion.transforms import TRANSFORMS
from megatron_qwen.errors import CorruptInputError, IncompleteInputError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.strict_json import listing

HF_FOLDER = "hf"


class MegatronStep:
    """One step of a run or an import, of either format: a source whose `rows` the format defines.

    Attributes:
        path: the step's folder.
        config: the model.
        stored: header of every weight tensor under its key in a torch_dist checkpoint, layers stacked or one by one.
        stamps: of the files that are read.
    """

    path: Path
    config: QwenConfig
    stored: Mapping[str, StoredTensor]
    stamps: FileStamps

    def plan(self, dtype: torch.dtype | None = None) -> ConversionPlan:
        """Prove from the headers that the folder holds its model, and plan the conversion to `dtype`.

        Raises:
            MismatchError: config.json and weights contradict each other; the message lists everything found.
        """
        return plan_export(self.config, self.stored, where=str(self.path), dtype=dtype)

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out."""
        raise TypeError(f"{type(self).__name__} has to define rows")

    def hf_rows(self, parameter: Parameter, index: int, begin: int, end: int) -> Tensor:
        """Return rows of the parameter's Hugging Face tensor number `index`."""

        def read(low: int, high: int) -> Tensor:
            return self.rows(parameter, low, high)

        return gather_hf_rows(parameter, self.config, index, begin, end, read)

    def hf_tensors(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors; vocabulary padding is removed.

        Raises:
            MismatchError: the padding is not zero.
        """
        transform = TRANSFORMS[parameter.family.transform]
        return transform.megatron_to_hf(self.rows(parameter, 0, parameter.shape[0]), head_sizes(self.config))

    def side_folders(self) -> tuple[Path, ...]:
        """Return where config and tokenizer of the checkpoint may lie."""
        return self.path.parent / HF_FOLDER, self.path / HF_FOLDER

    def check_unchanged(self) -> None:
        """Raise CorruptInputError if a file was replaced or written to since it was opened."""
        self.stamps.check(self.path)

    def watch(self, files: Iterable[Path]) -> None:
        """Let `check_unchanged` look at further files too."""
        self.stamps.add(files)


def find_step_folder(path: Path, step: int | None = None) -> Path:
    """Return the folder of the step asked for, or of the one that the tracker names.

    Raises:
        IncompleteInputError: there is none; what is there is listed.
    """
    path = Path(path)
    if is_step(path):
        return path
    there = sorted(folder.name for folder in path.iterdir() if is_step(folder)) if path.is_dir() else []
    choices = f"complete checkpoints in it: {listing(there) or 'none'}"
    if step is not None:
        name = f"iter_{step:07d}"
    else:
        tracker = path / TRACKER_NAME
        if not tracker.is_file():
            raise IncompleteInputError(f"{path}: no {TRACKER_NAME}, so not a Megatron checkpoint folder; {choices}")
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        name = RELEASE if text == RELEASE else f"iter_{int(text):07d}" if text.isdecimal() else ""
        if not name:
            raise CorruptInputError(
                f"{tracker}: holds {text[:40]!r}, expected a step or {RELEASE!r}; {choices}; use --step"
            )
    if name not in there:
        raise IncompleteInputError(f"{path}: no complete checkpoint {name}; {choices}")
    return path / name


def is_step(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, `torch_dist` or per-rank."""
    return (folder / METADATA_NAME).is_file() or is_legacy_step(folder)
