"""Faults 3, 12 and 20 on per-rank checkpoints and pytorch_model.bin; doubly owned tensors of torch_dist folders."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Payload, command, exporting, forge_manifest, opens, refused
from safetensors.torch import load_file

from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError, UnsafeInputError

RANK_FILE = "model_optim_rng.pt"


def rank_file(folder: Path, tensor: int, pipeline: int) -> Path:
    return folder / "release" / f"mp_rank_{tensor:02d}_{pipeline:03d}" / RANK_FILE


def edit_rank(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the weights in a rank file, and the manifest with them."""
    content = torch.load(file, weights_only=False)
    change(content["model"])
    torch.save(content, file)
    forge_manifest(file.parents[1])


def export(folder: Path) -> tuple[object, ...]:
    return (*exporting(folder), "--allow-pickle")


def test_20_equal_replicas_pass(legacy: Path, templates: Path, tmp_path: Path) -> None:
    edit_rank(rank_file(legacy, 1, 0), lambda model: None)
    assert command(*export(legacy)).code == 0
    assert command("convert", "verify", templates / "single", tmp_path / "out").code == 0


REPLICATED = {
    "norm": ("decoder.layers.0.input_layernorm.weight", 0),
    "another norm": ("decoder.layers.0.pre_mlp_layernorm.weight", 1),
    "last norm": ("decoder.final_layernorm.weight", 1),
}


@pytest.mark.parametrize("what", REPLICATED)
@pytest.mark.parametrize("value", ["one bit", "sign of zero", "not a number"])
def test_20_replicas_that_differ_are_refused_naming_both_rank_files(
    legacy: Path, tmp_path: Path, what: str, value: str
) -> None:
    wanted, stage = REPLICATED[what]

    def change(model: dict[str, Any]) -> None:
        name = next(each for each in model if each == wanted or each.endswith(wanted.partition("layers.0.")[2] or "#"))
        tensor = model[name].clone()
        if value == "one bit":
            tensor.view(torch.int32)[3] ^= 1
        else:
            tensor[3] = float("nan") if value == "not a number" else -0.0
        model[name] = tensor

    if value == "sign of zero":
        edit_rank(rank_file(legacy, 0, stage), lambda model: zero(model, wanted))
    edit_rank(rank_file(legacy, 1, stage), change)
    message = refused(MismatchError, *export(legacy), "--allow-nonfinite", within=tmp_path)
    assert str(rank_file(legacy, 0, stage)) in message
    assert str(rank_file(legacy, 1, stage)) in message


def zero(model: dict[str, Any], wanted: str) -> None:
    name = next(each for each in model if each == wanted or each.endswith(wanted.partition("layers.0.")[2] or "#"))
    model[name][3] = 0.0


def test_20_layer_in_two_pipeline_ranks_is_refused(legacy: Path, tmp_path: Path) -> None:
    layer = {
        name.replace("layers.0.", "layers.1."): tensor
        for name, tensor in torch.load(rank_file(legacy, 0, 0), weights_only=False)["model"].items()
        if "layers.0." in name
    }
    edit_rank(rank_file(legacy, 0, 1), lambda model: model.update(layer))
    message = refused(MismatchError, *export(legacy), within=tmp_path)
    assert "num_hidden_layers: expected 2" in message or "mp_rank_00_001" in message


def test_20_matrix_that_another_rank_owns_is_refused(legacy: Path, tmp_path: Path) -> None:
    embedding = torch.load(rank_file(legacy, 0, 0), weights_only=False)["model"]["embedding.word_embeddings.weight"]
    edit_rank(rank_file(legacy, 0, 1), lambda model: model.update({"embedding.word_embeddings.weight": embedding}))
    message = refused(MismatchError, *export(legacy), within=tmp_path)
    assert "embedding.word_embeddings.weight: not a tensor of this model" in message
    assert "mp_rank_00_001" in message


def test_20_missing_rank_file_is_named(legacy: Path, tmp_path: Path) -> None:
    shutil.rmtree(rank_file(legacy, 1, 1).parent)
    (legacy / "release" / "manifest.json").unlink()
    assert "mp_rank_01_001" in refused(IncompleteInputError, *export(legacy), within=tmp_path)


def duplicate_chunk(step: Path, how: str) -> None:
    """Let a second file of a torch_dist folder hold a part of a tensor once more, with other values."""
    index = pickle.loads((step / ".metadata").read_bytes())
    key = "embedding.word_embeddings.weight"
    entry = index.state_dict_metadata[key]
    (place,) = (each for each in index.storage_data if each.fqn == key)
    storage = index.storage_data[place]
    raw = bytearray((step / storage.relative_path).read_bytes())
    (step / "__9_0.distcp").write_bytes(raw)
    other = type(storage)("__9_0.distcp", storage.offset, storage.length)
    if how == "twice":
        index.storage_data[type(place)(key, place.offset, 7)] = other
        entry.chunks.append(entry.chunks[0])
    else:
        chunk = entry.chunks[0]
        entry.chunks.append(type(chunk)(torch.Size((5, 0)), torch.Size((3, chunk.sizes[1]))))
        index.storage_data[type(place)(key, torch.Size((5, 0)), 7)] = other
    (step / ".metadata").write_bytes(pickle.dumps(index))
    forge_manifest(step)


@pytest.mark.parametrize("how", ["twice", "overlapping"])
def test_20_tensor_that_two_files_own_is_refused_naming_them(megatron: Path, tmp_path: Path, how: str) -> None:
    duplicate_chunk(megatron / "release", how)
    message = refused(MismatchError, *exporting(megatron), within=tmp_path)
    assert "embedding.word_embeddings.weight" in message
    assert "__9_0.distcp" in message
    # Of two entries for the same offset torch's index keeps one; of an overlap, both files are there to be named.
    assert how == "twice" or "_0.distcp" in message.replace("__9_0.distcp", "")


def test_20_gap_between_chunks_is_refused(megatron: Path, tmp_path: Path) -> None:
    index = pickle.loads((megatron / "release" / ".metadata").read_bytes())
    entry = index.state_dict_metadata["embedding.word_embeddings.weight"]
    entry.size = torch.Size((entry.size[0] + 1, *entry.size[1:]))
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(index))
    forge_manifest(megatron / "release")
    message = refused(IncompleteInputError, *exporting(megatron), within=tmp_path)
    assert "embedding.word_embeddings.weight" in message


def poisoned(content: Any, where: str, payload: Payload) -> Any:
    if where == "instead":
        return payload
    if where == "in the arguments":
        content["args"].tokenizer = payload
    elif where == "in the random state":
        content["rng_state"] = [payload]
    else:
        content["model"]["decoder.final_layernorm.weight"] = payload
    return content


@pytest.mark.parametrize("where", ["instead", "in the arguments", "in the random state", "in a weight"])
@pytest.mark.parametrize("zipped", [True, False])
def test_12_malicious_rank_file_is_refused_and_never_runs(
    legacy: Path, tmp_path: Path, where: str, zipped: bool
) -> None:
    file = rank_file(legacy, 0, 1)
    content = poisoned(torch.load(file, weights_only=False), where, Payload(tmp_path / "ran"))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    forge_manifest(legacy / "release")
    with opens() as seen:
        message = refused(UnsafeInputError, *exporting(legacy), within=tmp_path)
    assert "--allow-pickle" in message
    assert not [path for path in seen if path.endswith(RANK_FILE)], "opened without being asked to"
    for verb in (export(legacy), ("convert", "reshard", legacy, tmp_path / "out", "--allow-pickle")):
        refused(UnsafeInputError if zipped else CorruptInputError, *verb, within=tmp_path)
    assert not (tmp_path / "ran").exists()


def pickled_folder(single: Path, change: Callable[[dict[str, Any]], Any] = lambda state: state) -> Path:
    state = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    torch.save(change(state), single / "pytorch_model.bin")
    return single


def test_12_pickled_weights_are_converted_when_asked_for(single: Path, templates: Path, tmp_path: Path) -> None:
    pickled_folder(single)
    message = refused(UnsafeInputError, "convert", "import", single, tmp_path / "out", within=tmp_path)
    assert "--allow-pickle" in message
    assert command("convert", "import", single, tmp_path / "out", "--allow-pickle").code == 0
    assert command("convert", "verify", templates / "single", tmp_path / "out").code == 0


@pytest.mark.parametrize("where", ["instead", "beside", "in a tensor"])
def test_12_malicious_pytorch_model_bin_never_runs(single: Path, tmp_path: Path, where: str) -> None:
    payload = Payload(tmp_path / "ran")
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "instead": lambda state: payload,
        "beside": lambda state: {**state, "extra": payload},
        "in a tensor": lambda state: {**state, "model.norm.weight": payload},
    }
    pickled_folder(single, changes[where])
    arguments = ("convert", "import", single, tmp_path / "out", "--allow-pickle")
    assert str(single / "pytorch_model.bin") in refused(UnsafeInputError, *arguments, within=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../evil.bin", "/etc/evil.bin", "C:\\evil.bin", "evil.pkl", "x\0.bin"])
def test_12_index_of_pickled_weights_cannot_lead_out(single: Path, tmp_path: Path, name: str) -> None:
    pickled_folder(single)
    weight_map = dict.fromkeys(torch.load(single / "pytorch_model.bin"), name)
    (single / "pytorch_model.bin").rename(tmp_path / "evil.bin")
    (single / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with opens() as seen:
        refused(UnsafeInputError, "convert", "import", single, tmp_path / "out", "--allow-pickle", within=tmp_path)
    assert not [path for path in seen if "evil" in path]


def check_damaged(file: Path, raw: bytes, arguments: tuple[object, ...], target: Path) -> int:
    """Convert with these bytes as `file`: done, or refused with an error of ours and nothing left."""
    whole = file.read_bytes()
    file.write_bytes(raw)
    try:
        ended = command(*arguments)
    finally:
        file.write_bytes(whole)
    if ended.code:
        assert ended.err.lstrip().startswith("megatron-qwen: "), ended
        assert ended.code in (3, 5), ended
        assert not target.exists()
    else:
        shutil.rmtree(target)
    return ended.code


@pytest.mark.parametrize("kind", ["per-rank", "bin"])
def test_3_torch_file_cut_anywhere_is_refused(legacy: Path, single: Path, tmp_path: Path, kind: str) -> None:
    for manifest in legacy.rglob("manifest.json"):
        manifest.unlink()
    file = rank_file(legacy, 0, 0) if kind == "per-rank" else pickled_folder(single) / "pytorch_model.bin"
    arguments = export(legacy)
    if kind == "bin":
        arguments = ("convert", "import", single, tmp_path / "out", "--allow-pickle")
    raw = file.read_bytes()
    cuts = {0, 1, 4, 30, 100, len(raw) // 2, len(raw) - 1, len(raw) - 22, len(raw) - 60, len(raw) - 500}
    for cut in sorted(cuts):
        assert check_damaged(file, raw[:cut], arguments, tmp_path / "out") == 3, cut


@pytest.mark.parametrize("kind", ["per-rank", "bin"])
def test_12_damaged_torch_file_is_one_error(legacy: Path, single: Path, tmp_path: Path, kind: str) -> None:
    """Bytes of framing and pickle changed at random: an error of ours, never a traceback."""
    for manifest in legacy.rglob("manifest.json"):
        manifest.unlink()
    file = rank_file(legacy, 0, 0) if kind == "per-rank" else pickled_folder(single) / "pytorch_model.bin"
    arguments = export(legacy)
    if kind == "bin":
        arguments = ("convert", "import", single, tmp_path / "out", "--allow-pickle")
    raw = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        sizes = {item.filename: (item.header_offset, item.file_size) for item in archive.infolist()}
    begin, size = next(place for name, place in sizes.items() if name.endswith("data.pkl"))
    generator, codes = random.Random(1), set()
    for number in range(25):
        damaged = bytearray(raw)
        low, high = [(begin, begin + size + 60), (len(raw) - 2500, len(raw))][number % 2]
        for _ in range(generator.randrange(1, 6)):
            damaged[generator.randrange(low, high)] = generator.randrange(256)
        codes.add(check_damaged(file, bytes(damaged), (*arguments, "--allow-nonfinite"), tmp_path / "out"))
    assert 3 in codes


def test_53_names_in_a_torch_file_are_not_written_to(legacy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(rank_file(legacy, 0, 0), "a") as archive:
        archive.writestr("../../../evil.txt", "x")
    (legacy / "release" / "manifest.json").unlink()
    command(*export(legacy))
    assert not list(tmp_path.rglob("evil.txt"))


def test_15_infinity_is_found_in_rank_files_too(legacy: Path, tmp_path: Path) -> None:
    edit_rank(
        rank_file(legacy, 0, 0), lambda model: model["embedding.word_embeddings.weight"][3, 5].fill_(float("inf"))
    )
    before = sorted(os.listdir(tmp_path))
    ended = command(*export(legacy))
    assert ended.code == 5
    assert "model.embed_tokens.weight" in ended.err or "embedding.word_embeddings.weight" in ended.err
    assert "(3, 5)" in ended.err
    assert sorted(os.listdir(tmp_path)) == before
