"""Files that go away between two looks at them: a missing input, whatever look it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_qwen.conversion.formats.integrity import FileStamps
from megatron_qwen.conversion.formats.torch_dist import chunks
from megatron_qwen.errors import CorruptInputError, IncompleteInputError


def test_a_chunk_that_was_there_a_moment_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    with pytest.raises(IncompleteInputError, match=r"__0_0\.distcp: missing"):
        chunks._open_chunk(tmp_path / "__0_0.distcp", 0, 8, ((4,), torch.float32), "weight")


def test_a_watched_file_that_was_there_a_moment_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    stamps = FileStamps([file])
    file.unlink()
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    with pytest.raises(CorruptInputError, match=r"changed while it was read: model\.safetensors"):
        stamps.check(tmp_path)
