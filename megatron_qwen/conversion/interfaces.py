"""What a conversion is made of: a source gives parameters, an output is files whose pieces are written in any order.

    source (HfFolder | MegatronFolder | LegacyFolder)  ->  plan  ->  [OutputFile, ...]  ->  engine.write.write_output

Every format is a file skeleton (header, pickle, zip framing) of known size with tensor bytes at known offsets, so one
engine schedules the pieces of all formats over threads within a memory budget, hashes, resumes and reports progress.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_qwen.conversion.parameters import Parameter, Shard
    from megatron_qwen.conversion.plan import ConversionPlan
    from megatron_qwen.model.config import QwenConfig


class WeightSource(Protocol):
    """A checkpoint folder of any format as a source of Megatron and Hugging Face tensors.

    Attributes:
        path: the folder, for messages.
        config: the model in it.
    """

    path: Path
    config: QwenConfig

    def plan(self, dtype: torch.dtype | None = None) -> ConversionPlan:
        """Prove from the headers that the folder holds its model, or list every contradiction; plan the conversion."""

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        """Return the dtype in which the parameter is stored."""

    def read(self, parameter: Parameter, shard: Shard = ..., *, vocabulary_rows: int | None = None) -> Tensor:
        """Return the parameter as Megatron lays it out, or one tensor-parallel shard of it."""

    def hf_tensors(self, parameter: Parameter) -> tuple[Tensor, ...]:
        """Return the parameter's Hugging Face tensors; vocabulary padding is removed."""

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows (axis 0) of the parameter as Megatron lays it out, unsharded; only their bytes are read."""

    def hf_rows(self, parameter: Parameter, index: int, begin: int, end: int) -> Tensor:
        """Return rows of the parameter's Hugging Face tensor number `index`; only their bytes are read.

        Where Megatron's layout is stored, it is derived from `rows`.
        """

    def side_folders(self) -> tuple[Path, ...]:
        """Return where config.json, tokenizer and generation files of the checkpoint may lie."""

    def check_unchanged(self) -> None:
        """Raise CorruptInputError if a file was replaced or written to since it was opened."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some bytes of one output file that one thread makes and writes on its own.

    Attributes:
        num_tensors: Hugging Face tensors that are done with it, for the progress bar.
        num_bytes: bytes it puts into the file.
        peak_bytes: memory that it holds at once while it works.
        write: given the file opened for writing, puts the bytes at their offsets (`os.pwrite`).
        label: what it converts, for messages: the tensor's name.
        spans: (begin, end) in the file of the bytes it writes, so that the file can be hashed up to them while later
            pieces are still written; empty if they are not known or too scattered, then the file is hashed at its end.
    """

    num_tensors: int
    num_bytes: int
    peak_bytes: int
    write: Callable[[int], None]
    label: str = ""
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One file of an output.

    Attributes:
        name: path relative to the output folder, such as "release/__0_0.distcp".
        num_bytes: its exact size.
        skeleton: given the new file opened for writing, sets its size and writes all that is not in the pieces.
        pieces: the rest, in any order.
    """

    name: str
    num_bytes: int
    skeleton: Callable[[int], None]
    pieces: tuple[Piece, ...] = ()


def bytes_file(name: str, content: bytes) -> OutputFile:
    """Return a small file whose content is known."""
    return OutputFile(name=name, num_bytes=len(content), skeleton=lambda descriptor: pwrite_all(descriptor, content, 0))


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`: one `os.pwrite` may write less than it was given (2 GiB at most)."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
