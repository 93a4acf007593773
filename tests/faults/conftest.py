"""Tiny Hugging Face folders that the fault tests damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_server import CommandServer
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


@pytest.fixture(scope="session")
def legacy_template(templates: Path) -> Path:
    """The model of `templates` as a per-rank checkpoint of two tensor and two pipeline ranks; not to be written to."""
    options = ("--ckpt-format", "torch", "--tp", 2, "--pp", 2)
    assert command("convert", "import", templates / "single", templates / "legacy", *options).code == 0
    return templates / "legacy"


@pytest.fixture
def legacy(legacy_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(legacy_template, tmp_path / "legacy"))


@pytest.fixture
def megatron(megatron_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(megatron_template, tmp_path / "mg"))


@pytest.fixture(scope="session")
def server() -> Iterator[CommandServer]:
    with CommandServer() as running:
        yield running
