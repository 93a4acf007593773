"""Fault 12: pickles that run code when they are opened, in every file that a conversion could come upon."""

from __future__ import annotations

import io
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Payload, command, contents, exporting, forge_manifest, fuzzed, importing, opens, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from megatron_qwen.errors import CorruptInputError, UnsafeInputError


def plain_pickle(payload: Payload) -> bytes:
    return pickle.dumps(payload)


def torch_zip(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": payload}, buffer)
    return buffer.getvalue()


def torch_legacy(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model.norm.weight": payload}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def npy(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    return buffer.getvalue()


WAYS: dict[str, Callable[[Payload], bytes]] = {
    "plain": plain_pickle,
    "torch zip": torch_zip,
    "torch before 1.6": torch_legacy,
    "npy": npy,
}
WEIGHT_FILES = ("pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin", "weights.npy", "model.ckpt")


@pytest.mark.parametrize("way", WAYS)
def test_12_the_payloads_run_where_nobody_looks(tmp_path: Path, way: str) -> None:
    """Without this, none of the tests below would prove anything."""
    sentinel = tmp_path / "ran"
    raw = io.BytesIO(WAYS[way](Payload(sentinel)))
    if way == "npy":
        np.load(raw, allow_pickle=True)
    elif way == "plain":
        pickle.load(raw)
    else:
        torch.load(raw, weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("way", WAYS)
def test_12_folder_of_pickled_weights_is_refused_unopened(single: Path, tmp_path: Path, name: str, way: str) -> None:
    (single / "model.safetensors").unlink()
    (single / name).write_bytes(WAYS[way](Payload(tmp_path / "ran")))
    with opens() as seen:
        ended = command(*importing(single))
    assert ended.code == 3, ended
    assert "Error: " in ended.err
    assert not [path for path in seen if path.endswith(name)]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*WEIGHT_FILES, "optimizer.pt", "training_args.bin", "scheduler.pt", "tokenizer.pkl"])
def test_12_pickles_beside_safetensors_are_neither_opened_nor_copied(single: Path, tmp_path: Path, name: str) -> None:
    (single / name).write_bytes(plain_pickle(Payload(tmp_path / "ran")))
    with opens() as seen:
        assert command(*importing(single)).code == 0
    assert not [path for path in seen if path.endswith(name)]
    assert not list((tmp_path / "out").rglob(name))
    assert not (tmp_path / "ran").exists()


def read_index(step: Path) -> Any:
    return pickle.loads((step / ".metadata").read_bytes())


def poison(step: Path, where: str, payload: Payload) -> None:
    """Put the payload into one of the pickles of a torch_dist folder."""
    index_file = step / ".metadata"
    index = read_index(step)
    places = {place.fqn: (place, storage) for place, storage in index.storage_data.items()}
    if where == ".metadata":
        index_file.write_bytes(pickle.dumps(payload))
    elif where == ".metadata, planner data":
        index.planner_data = {"x": payload}
        index_file.write_bytes(pickle.dumps(index))
    elif where == ".metadata, a dtype":
        tensor = index.state_dict_metadata["embedding.word_embeddings.weight"]
        object.__setattr__(tensor.properties, "dtype", payload)
        index_file.write_bytes(pickle.dumps(index))
    elif where == ".metadata, behind a good pickle":
        index_file.write_bytes(pickle.dumps(payload) + index_file.read_bytes())
    elif where == "common.pt":
        torch.save({"args": payload}, step / "common.pt")
    elif where == "common.pt, plain":
        (step / "common.pt").write_bytes(pickle.dumps(payload))
    else:
        key = "embedding.word_embeddings.weight" if where == "a tensor" else next(k for k in places if "extra" in k)
        _, storage = places[key]
        raw = torch_zip(payload)
        file = step / storage.relative_path
        storage.offset, storage.length = file.stat().st_size, len(raw)
        file.write_bytes(file.read_bytes() + raw)
        index_file.write_bytes(pickle.dumps(index))
    forge_manifest(step)


PLACES = (
    ".metadata",
    ".metadata, planner data",
    ".metadata, a dtype",
    ".metadata, behind a good pickle",
    "a tensor",
    "an object",
    "common.pt",
    "common.pt, plain",
)
NOT_NEEDED = ("an object", "common.pt", "common.pt, plain")  # the weights are all there without


@pytest.mark.parametrize("verb", ["export", "verify"])
@pytest.mark.parametrize("where", PLACES)
def test_12_malicious_pickle_in_a_torch_dist_folder_never_runs(
    megatron: Path, templates: Path, tmp_path: Path, where: str, verb: str
) -> None:
    poison(megatron / "release", where, Payload(tmp_path / "ran"))
    arguments = exporting(megatron) if verb == "export" else ("convert", "verify", megatron, templates / "single")
    if where in NOT_NEEDED:
        assert command(*arguments).code in (0, UnsafeInputError.exit_code)
    else:
        message = refused(UnsafeInputError, *arguments, within=tmp_path)
        assert str(megatron / "release") in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../single/model.safetensors", "/etc/passwd", "..", "a/b", "\\\\host\\x", "x\0"])
def test_12_index_of_a_torch_dist_folder_cannot_lead_out(megatron: Path, tmp_path: Path, name: str) -> None:
    index = read_index(megatron / "release")
    for storage in index.storage_data.values():
        storage.relative_path = name
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(index))
    forge_manifest(megatron / "release")
    with opens() as seen:
        refused(UnsafeInputError, *exporting(megatron), within=tmp_path)
    assert not [path for path in seen if path.endswith((name, "passwd"))]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_12_links_out_of_a_torch_dist_folder_are_not_followed(megatron: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "elsewhere"
    (megatron / "release" / name).rename(outside)
    (megatron / "release" / name).symlink_to(outside)
    assert str(outside) in refused(UnsafeInputError, *exporting(megatron), within=tmp_path)


BOMBS: dict[str, bytes] = {
    "exabyte of bytes": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",
    "exabyte of text": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.",
    "exabyte of bytearray": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b"x.",
    "frame of an exabyte": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "far memo": b"\x80\x04Nr" + (2**31).to_bytes(4, "little") + b".",
    "deep list": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "empty": b"",
    "one byte": b"\x80",
    "text": b"hello",
    "no stop": b"\x80\x04N",
    "stack underflow": b"\x80\x04a.",
    "unknown opcode": b"\x80\x04\xff.",
    "persistent id": b"\x80\x04X\x01\0\0\0xQ.",
    "extension": b"\x80\x02\x82\x01.",
    "not an index": pickle.dumps({"a": 1}),
    "class for an index": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n.",
    "index without fields": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81.",
    "index of nonsense": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(}}N}NtR.",
    "tensors of nonsense": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(}K\x01K\x02s}NtR.",
    "storage of nonsense": b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(}N}K\x01K\x02sNtR.",
}


def check_index(megatron: Path, raw: bytes, expected: dict[str, bytes]) -> int:
    """Export with these bytes as `.metadata`: an error of ours, or the weights as they are."""
    release, target = megatron / "release", megatron.parent / "out"
    (release / ".metadata").write_bytes(raw)
    forge_manifest(release)
    ended = command(*exporting(megatron), "--allow-nonfinite")
    if ended.code:
        assert ended.err.startswith("megatron-qwen: "), ended
        assert ended.code in (2, 3), ended
        assert not target.exists()
        return ended.code
    found = contents(target)["model.safetensors"]  # an edited index can name another chunk of the same shape
    assert len(found) == len(expected["model.safetensors"])
    shutil.rmtree(target)
    return 0


@pytest.fixture(scope="module")
def exported(megatron_template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("exported") / "hf"
    assert command("convert", "export", megatron_template, target).code == 0
    return contents(target)


@pytest.mark.parametrize("name", BOMBS)
def test_12_damaged_index_of_a_torch_dist_folder_is_one_error(
    megatron: Path, exported: dict[str, bytes], name: str
) -> None:
    assert check_index(megatron, BOMBS[name], exported) == 3


def test_12_memo_far_away_takes_no_memory(megatron: Path, tmp_path: Path) -> None:
    """Five bytes that make the unpickler in C fill 32 GB are read for what they are: a None."""
    (megatron / "release" / ".metadata").write_bytes(BOMBS["far memo"])
    forge_manifest(megatron / "release")
    assert "holds a NoneType" in refused(CorruptInputError, *exporting(megatron), within=tmp_path)


@pytest.mark.parametrize(("local", "central", "value"), [(6, 8, 1), (8, 10, 8), (8, 10, 99)])
def test_12_chunk_encrypted_or_compressed_is_one_error(
    megatron: Path, tmp_path: Path, local: int, central: int, value: int
) -> None:
    shard = megatron / "release" / "__0_0.distcp"
    raw = bytearray(shard.read_bytes())
    for mark, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = raw.find(mark)
        while at >= 0:
            raw[at + place] = value
            at = raw.find(mark, at + 4)
    shard.write_bytes(raw)
    forge_manifest(megatron / "release")
    assert str(shard) in refused(CorruptInputError, *exporting(megatron), within=tmp_path)


def other_kinds(index: Any) -> dict[str, Callable[[], object]]:
    """Ways in which an index of the right classes can hold values of the wrong kind."""
    key = "embedding.word_embeddings.weight"
    entry = index.state_dict_metadata[key]
    storage = next(storage for place, storage in index.storage_data.items() if place.fqn == key)
    return {
        "negative offset in the file": lambda: setattr(storage, "offset", -1),
        "length of text": lambda: setattr(storage, "length", "9"),
        "fraction of a length": lambda: setattr(storage, "length", 1e9),
        "chunk of another rank": lambda: setattr(entry.chunks[0], "sizes", torch.Size((131,))),
        "chunk of floats": lambda: setattr(entry.chunks[0], "sizes", (131.0, 64.0)),
        "size of text": lambda: setattr(entry, "size", ("131", "64")),
        "dtype of text": lambda: object.__setattr__(entry.properties, "dtype", "float32"),
        "no chunks": lambda: setattr(entry, "chunks", None),
        "name of bytes": lambda: index.state_dict_metadata.update({b"x": entry}),
    }


KINDS = 9


@pytest.mark.parametrize("number", range(KINDS))
def test_12_index_with_values_of_other_kinds_is_refused(megatron: Path, tmp_path: Path, number: int) -> None:
    index = read_index(megatron / "release")
    ways = other_kinds(index)
    assert len(ways) == KINDS
    list(ways.values())[number]()
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(index))
    forge_manifest(megatron / "release")
    message = refused(CorruptInputError, *exporting(megatron), within=tmp_path)
    assert "not a checkpoint index" in message, list(ways)[number]


def test_12_pickle_cannot_set_an_attribute_of_a_class(megatron: Path, tmp_path: Path) -> None:
    """BUILD on a class instead of an object would change the class for the rest of the process."""
    content = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x07\0\0\0changedK\x01s\x86b."
    (megatron / "release" / ".metadata").write_bytes(content)
    forge_manifest(megatron / "release")
    message = refused(UnsafeInputError, *exporting(megatron), within=tmp_path)
    assert "a change of Metadata" in message
    assert not hasattr(Metadata, "changed")


edits = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3)


def edited(raw: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    result = bytearray(raw)
    for place, insert, removed in changes:
        at = int(place * len(raw))
        result[at : at + removed] = insert
    return bytes(result)


@fuzzed(30)
@given(changes=edits)
def test_12_mutated_index_is_refused_or_read_right(
    megatron: Path, megatron_template: Path, exported: dict[str, bytes], changes: list[tuple[float, bytes, int]]
) -> None:
    raw = (megatron_template / "release" / ".metadata").read_bytes()
    check_index(megatron, edited(raw, changes), exported)


@pytest.mark.exhaustive
@fuzzed(4000)
@given(changes=edits)
def test_12_many_mutated_indexes(
    megatron: Path, megatron_template: Path, exported: dict[str, bytes], changes: list[tuple[float, bytes, int]]
) -> None:
    raw = (megatron_template / "release" / ".metadata").read_bytes()
    check_index(megatron, edited(raw, changes), exported)


def test_12_damaged_shards_are_one_error(megatron: Path, megatron_template: Path) -> None:
    """Bytes of the zip framing and pickle of a chunk changed at random: an error of ours, never a traceback."""
    generator = random.Random(0)
    shards = sorted(path.name for path in (megatron_template / "release").glob("*.distcp"))
    codes = set()
    for _ in range(15):
        shard = generator.choice(shards)
        raw = bytearray((megatron_template / "release" / shard).read_bytes())
        signs = [at for at in range(len(raw) - 4) if raw[at : at + 2] == b"PK"]
        for _ in range(4):
            raw[min(len(raw) - 1, generator.choice(signs) + generator.randrange(200))] = generator.randrange(256)
        (megatron / "release" / shard).write_bytes(raw)
        forge_manifest(megatron / "release")
        ended = command(*exporting(megatron), "--allow-nonfinite", "--overwrite")
        codes.add(ended.code)
        if ended.code:
            assert ended.err.startswith("megatron-qwen: "), ended
            assert ended.code == 3, ended
        shutil.copyfile(megatron_template / "release" / shard, megatron / "release" / shard)
    assert 3 in codes
