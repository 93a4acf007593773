"""Tiny Hugging Face folders that the fault tests damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile import command

from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as one file and as three shards; not to be written to."""
    folder = tmp_path_factory.mktemp("templates")
    config = tiny_dense(layers=2, vocab=131)
    write_tiny_hf(folder / "single", config)
    write_tiny_hf(folder / "sharded", config, max_shard_bytes=120_000)
    return folder


@pytest.fixture
def single(templates: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates / "single", tmp_path / "hf"))


@pytest.fixture
def sharded(templates: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(templates / "sharded", tmp_path / "hf"))


@pytest.fixture(scope="session")
def megatron_template(templates: Path) -> Path:
    """The model of `templates` as a torch_dist checkpoint; not to be written to."""
    assert command("convert", "import", templates / "single", templates / "megatron").code == 0
    return templates / "megatron"


@pytest.fixture
def megatron(megatron_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(megatron_template, tmp_path / "mg"))
