"""A small tokenizer trained on real text, and data sets made with it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from megatron_qwen.data.prepare import prepare
from megatron_qwen.data.tokenizer import QwenTokenizer

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    return [path.read_text("utf-8") for path in sorted((LIBRARY / "json").glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer(library_texts) -> QwenTokenizer:
    return QwenTokenizer.train(library_texts, 600)


@pytest.fixture(scope="session")
def data_set(tmp_path_factory, tokenizer) -> Path:
    """Prefix of a data set of 20 documents of different lengths."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(f"document {number}: " + "some words and 12 digits " * (3 + number))
    prefix = folder / "set"
    prepare([folder], tokenizer, prefix, workers=1)
    return prefix
