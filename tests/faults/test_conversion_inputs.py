"""Faults 3 to 7, 9 and 11: damaged and incomplete Hugging Face folders, given to `convert import` as a user would."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import INDEX, SINGLE, command, edit_weights, fuzzed, header_bytes, importing, opens, refuse
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError, UnsafeInputError


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def cut_points(file: Path) -> dict[str, int]:
    """Every class of place at which a file can end: the first and last byte of each part."""
    header, size = header_bytes(file), file.stat().st_size
    return {
        "empty": 0,
        "one byte short of the length": 7,
        "after the length": 8,
        "first byte of the header": 9,
        "mid header": 8 + header // 2,
        "one byte short of the header": 8 + header - 1,
        "after the header": 8 + header,
        "first byte of the data": 8 + header + 1,
        "mid data": (8 + header + size) // 2,
        "last byte": size - 1,
    }


CUTS = tuple(range(10))


@pytest.mark.parametrize("which", CUTS)
def test_3_shard_cut_anywhere_is_refused_with_its_size_and_the_expected_one(sharded: Path, which: int) -> None:
    shard = shards(sharded)[1]
    assert len(cut_points(shard)) == len(CUTS)
    name, cut = list(cut_points(shard).items())[which]
    whole, header = shard.stat().st_size, header_bytes(shard)
    os.truncate(shard, cut)
    message = refuse(CorruptInputError, sharded)
    assert str(shard) in message, name
    expected = "at least 10" if cut < 8 else f"at least {8 + header}" if cut < 8 + header else f"describes {whole}"
    assert f"{cut} bytes" in message or f"found {cut}" in message, message
    assert expected in message, message


def check_cut(folder: Path, cut: int) -> None:
    weights = folder / SINGLE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:cut])
    try:
        assert f"{weights}: " in refuse(CorruptInputError, folder)
    finally:
        weights.write_bytes(whole)


@fuzzed(40)
@given(st.data())
def test_3_any_cut_is_refused(single: Path, data: st.DataObject) -> None:
    check_cut(single, data.draw(st.integers(0, (single / SINGLE).stat().st_size - 1)))


@pytest.mark.exhaustive
def test_3_every_cut_up_to_the_data_is_refused(single: Path) -> None:
    for cut in range(0, header_bytes(single / SINGLE) + 20):
        check_cut(single, cut)


@pytest.mark.parametrize("tail", ["zero", "newline", "zip"])
def test_4_bytes_after_the_last_tensor_are_refused(single: Path, tmp_path: Path, tail: str) -> None:
    weights = single / SINGLE
    size = weights.stat().st_size
    if tail == "zip":
        with zipfile.ZipFile(weights, "a") as archive:  # a polyglot: both readers take the file for theirs
            archive.writestr("data.pkl", b"payload")
        assert zipfile.is_zipfile(weights)
    else:
        with weights.open("ab") as stream:
            stream.write({"zero": b"\0", "newline": b"\n"}[tail])
    message = refuse(CorruptInputError, single)
    assert f"followed by {weights.stat().st_size - size} bytes that belong to no tensor" in message


def test_5_all_missing_shards_are_listed_with_the_tensors_they_hold(sharded: Path) -> None:
    gone = [shards(sharded)[0], shards(sharded)[2]]
    counts = {path.name: len(load_file(path)) for path in gone}
    for path in gone:
        path.unlink()
    with opens() as seen:
        message = refuse(IncompleteInputError, sharded)
    assert "2 of 3 shards are missing" in message
    for name, count in counts.items():
        assert f"{name} ({count} tensors)" in message
    assert not [path for path in seen if path.endswith(".safetensors")]


def disagree(folder: Path, how: str) -> tuple[str, str]:
    """Make index and shards disagree about one tensor whose values stay right; return its name and the other place."""
    index = json.loads((folder / INDEX).read_text())
    places: dict[str, str] = index["weight_map"]
    name = "model.layers.0.self_attn.q_proj.weight"
    home = places[name]
    other = next(path for path in shards(folder) if path.name != home)
    if how == "in the index only":
        places["model.layers.0.extra.weight"] = home
        name = "model.layers.0.extra.weight"
    elif how == "in a shard only":
        del places[name]
    elif how == "index names another shard":
        places[name] = other.name
    else:
        tensor = load_file(folder / home)[name]
        edit_weights(other, lambda state: state.update({name: tensor}))
    (folder / INDEX).write_text(json.dumps(index))
    return name, other.name


@pytest.mark.parametrize("how", ["in the index only", "in a shard only", "index names another shard", "in two shards"])
def test_6_index_and_shards_that_disagree_are_refused_naming_both_places(sharded: Path, how: str) -> None:
    home = json.loads((sharded / INDEX).read_text())["weight_map"]["model.layers.0.self_attn.q_proj.weight"]
    name, other = disagree(sharded, how)
    message = refuse(IncompleteInputError if how == "in the index only" else MismatchError, sharded)
    assert name in message
    assert home in message
    if how in ("index names another shard", "in two shards"):
        assert other in message


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_7_tensor_missing_from_its_shard_is_refused_before_any_weight_is_read(
    templates: Path, tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(templates / kind, tmp_path / "hf"))
    name = "model.layers.1.mlp.up_proj.weight"
    file = (
        folder / SINGLE if kind == "single" else folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    )
    edit_weights(file, lambda state: state.pop(name))
    with opens() as seen:
        message = refuse(MismatchError if kind == "single" else IncompleteInputError, folder)
    assert "up_proj.weight" in message
    assert max(Counter(path for path in seen if path.endswith(".safetensors")).values()) == 1, "more than the header"


def valid_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


OUTSIDE = {
    "parent": "../evil.safetensors",
    "two parents": "../../evil.safetensors",
    "down and up": "a/../../evil.safetensors",
    "absolute": "/etc/evil.safetensors",
    "subfolder": "sub/evil.safetensors",
    "drive": "C:\\evil.safetensors",
    "drive without a slash": "C:evil.safetensors",
    "share": "\\\\host\\evil.safetensors",
    "long path of Windows": "\\\\?\\C:\\evil.safetensors",
    "backslash parent": "..\\evil.safetensors",
    "stream of NTFS": "model.safetensors:evil.safetensors",
    "NUL": "evil.safetensors\0.safetensors",
    "newline": "evil\n.safetensors",
    "right-to-left": "evil\u202e.safetensors",
    "dot dot": "..",
    "dot": ".",
    "empty": "",
    "hidden": ".evil.safetensors",
    "pickle": "pytorch_model.bin",
    "pickle in capitals": "pytorch_model.BIN",
    "extension only at first": "model.safetensors.bin",
    "URL": "file:///etc/passwd.safetensors",
}


def opened_elsewhere(seen: list[str], folder: Path) -> list[str]:
    """Return what was opened outside the folder; our own code and its interpreter's files are not meant."""
    code = (str(Path(__file__).parents[2]), os.path.realpath(os.path.dirname(os.__file__)), "/proc/", "/usr/", "/dev/")
    inside = (f"{folder}/", *code)
    return [path for path in seen if not path.startswith(inside)]


@pytest.mark.parametrize("name", OUTSIDE)
def test_9_index_cannot_lead_out_of_the_folder(sharded: Path, name: str) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, sharded.parent / "evil.safetensors")
    index = valid_index(sharded)
    index["weight_map"]["model.norm.weight"] = OUTSIDE[name]
    (sharded / INDEX).write_text(json.dumps(index))
    with opens() as seen:
        message = refuse(UnsafeInputError, sharded)
    assert "model.norm.weight" in message
    assert str(sharded / INDEX) in seen
    assert opened_elsewhere(seen, sharded) == []


def test_9_a_listed_pickle_is_not_opened_though_it_is_there(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    index = valid_index(sharded)
    index["weight_map"]["model.norm.weight"] = "pytorch_model.bin"
    (sharded / INDEX).write_text(json.dumps(index))
    with opens() as seen:
        refuse(UnsafeInputError, sharded)
    assert not [path for path in seen if path.endswith(".bin")]


LINKED = ("config.json", INDEX, "model-00002-of-00003.safetensors", "tokenizer.json", "generation_config.json")


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("through", ["file", "chain"])
def test_9_link_out_of_the_folder_is_not_followed(sharded: Path, name: str, through: str) -> None:
    outside = sharded.parent / "elsewhere" / name
    outside.parent.mkdir()
    if (sharded / name).exists():
        (sharded / name).rename(outside)
    else:
        outside.write_text("{}")
    if through == "chain":
        (sharded / "step").symlink_to(outside)
        (sharded / name).symlink_to("step")
    else:
        (sharded / name).symlink_to(f"../elsewhere/{name}")
    with opens() as seen:
        message = refuse(UnsafeInputError, sharded)
    assert name in message
    assert str(outside) in message
    assert not [path for path in seen if path.endswith(f"/{name}")], "opened through the link"


def test_9_link_inside_the_folder_is_followed(sharded: Path) -> None:
    (sharded / "config.json").rename(sharded / "the-config.json")
    (sharded / "config.json").symlink_to("the-config.json")
    assert command(*importing(sharded)).code == 0


def test_9_hub_cache_layout_is_read(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--Qwen--Tiny"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", SINGLE)):
        (single / name).rename(repository / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert command("convert", "import", snapshot, tmp_path / "out").code == 0


def flip(file: Path, seed: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    place = 8 + header_bytes(file) + random.Random(seed).randrange(len(raw) - 8 - header_bytes(file))
    raw[place] ^= 1
    file.write_bytes(raw)
