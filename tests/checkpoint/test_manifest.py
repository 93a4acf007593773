"""The manifest finds each way in which a finished folder can be damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_qwen.checkpoint.manifest import (
    MANIFEST_NAME,
    hash_files,
    list_files,
    read_manifest,
    verify,
    write_manifest,
)
from megatron_qwen.errors import CorruptInputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 10_000_019)  # more than one chunk
    (tmp_path / "empty").touch()
    (tmp_path / "hf" / "config.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_lists_every_file_with_size_and_digest(folder: Path) -> None:
    assert list_files(folder) == ["a.bin", "empty", "hf/config.json"]
    records = read_manifest(folder)
    assert records["a.bin"].bytes == 10_000_019
    assert records["a.bin"].sha256 == hashlib.sha256(b"x" * 10_000_019).hexdigest()
    assert records == hash_files(folder, list_files(folder), threads=1)
    assert verify(folder) == verify(folder, "full") == []


def test_bit_flip_is_found_by_the_digest_and_both_are_named(folder: Path) -> None:
    digest = read_manifest(folder)["a.bin"].sha256
    with (folder / "a.bin").open("r+b") as stream:
        stream.seek(9_000_000)
        stream.write(b"y")
    assert verify(folder, "sizes") == []
    (problem,) = verify(folder, "full")
    assert problem.startswith("a.bin: SHA-256 ")
    assert digest in problem
    assert verify(folder, "full", ["empty"]) == []


def test_missing_and_resized_files_are_found_by_size(folder: Path) -> None:
    (folder / "hf" / "config.json").unlink()
    (folder / "empty").write_bytes(b"1")
    assert verify(folder) == ["empty: 1 bytes, the manifest says 0", "hf/config.json: missing"]


def test_unlisted_file_is_no_fault(folder: Path) -> None:
    (folder / "note.txt").write_text("kept by hand")
    assert verify(folder, "full") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "JSON"),
        ("{}", "format and version"),
        ('{"format": "megatron-qwen-manifest", "version": 2, "files": {}}', "format and version"),
        ('{"format": "megatron-qwen-manifest", "version": 1}', "'files'"),
        ('{"format": "megatron-qwen-manifest", "version": 1, "files": {"a": 1}}', "a: expected"),
        (
            '{"format": "megatron-qwen-manifest", "version": 1, "files": {"a": {"bytes": -1, "sha256": ""}}}',
            "a: bytes -1",
        ),
    ],
)
def test_damaged_manifest_is_a_problem_not_a_crash(folder: Path, content: str, message: str) -> None:
    (folder / MANIFEST_NAME).write_text(content)
    (problem,) = verify(folder)
    assert message in problem
    with pytest.raises(CorruptInputError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x", ""])
def test_manifest_cannot_lead_out_of_the_folder(folder: Path, name: str) -> None:
    record = {"bytes": 0, "sha256": "0" * 64}
    text = json.dumps({"format": "megatron-qwen-manifest", "version": 1, "files": {name: record}})
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(CorruptInputError, match="not the name of a file in this folder"):
        read_manifest(folder)


def test_no_manifest_means_never_completed(tmp_path: Path) -> None:
    (problem,) = verify(tmp_path)
    assert "never completed" in problem
