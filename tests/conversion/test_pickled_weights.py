"""Hugging Face folders whose weights are `pytorch_model.bin`: opened by flag, as plain data, under the same checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.errors import (
    IncompleteInputError,
    UnsafeInputError,
)
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny_hf(tmp_path_factory.mktemp("hf"), tiny_dense(layers=2, vocab=131))


def pickle_folder(source: Path, target: Path, *, shards: int = 1) -> None:
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_convert_with_the_flag_only(original, shards, tmp_path):
    pickle_folder(original, tmp_path / "bin", shards=shards)
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        import_hf(tmp_path / "bin", tmp_path / "mg", progress=False)
    import_hf(tmp_path / "bin", tmp_path / "mg", progress=False, allow_pickle=True)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    left, right = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_pickled_weights_are_checked_like_safetensors(original, tmp_path):
    pickle_folder(original, tmp_path / "bin", shards=3)
    index = tmp_path / "bin" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for value, error in (("../x.bin", UnsafeInputError), ("model.safetensors", UnsafeInputError)):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], first: value}}))
        with pytest.raises(error):
            HfFolder(tmp_path / "bin", allow_pickle=True)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": content["weight_map"][first]}}))
    with pytest.raises(IncompleteInputError, match="more"):
        HfFolder(tmp_path / "bin", allow_pickle=True)


def test_safetensors_are_taken_where_both_are_there(original, tmp_path):
    shutil.copytree(original, tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"not opened")
    assert HfFolder(tmp_path / "both", allow_pickle=True).plan().target_bytes > 0
