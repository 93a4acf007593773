"""Faults 3 to 11 as far as headers and indexes show them: refused with the file and the tensor, or read right."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_qwen.checkpoint.safetensors_header import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    TensorEntry,
    read_folder,
    read_header,
    read_index,
)
from megatron_qwen.errors import (
    CorruptInputError,
    IncompleteInputError,
    InputError,
    MismatchError,
    UnsafeInputError,
)

TENSORS = {
    "model.embed_tokens.weight": np.arange(21, dtype=np.float32).reshape(7, 3),
    "model.empty": np.zeros((0, 5), np.float16),
    "model.norm.weight": np.ones(3, np.int8),
    "scalar": np.array(2.5, np.float64),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_entries_point_at_the_bytes_of_each_tensor(good: Path) -> None:
    entries = read_header(good)
    raw = good.read_bytes()
    assert set(entries) == set(TENSORS)
    for name, value in TENSORS.items():
        found = entries[name]
        assert found.shape == value.shape
        assert found.num_bytes == value.nbytes
        assert raw[found.begin : found.end] == value.tobytes()
    with safe_open(good, "np") as referee:
        assert set(referee.keys()) == set(entries)


def cuts(path: Path) -> list[int]:
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    size = path.stat().st_size
    return [0, 7, 8, 8 + header // 2, 8 + header, 8 + header + 5, size - 1]


@pytest.mark.parametrize("which", range(7))
def test_truncated_file_is_refused_with_its_name_and_sizes(good: Path, which: int) -> None:
    cut = cuts(good)[which]
    good.write_bytes(good.read_bytes()[:cut])
    with pytest.raises(CorruptInputError, match=rf"model\.safetensors.*\b{cut}\b"):
        read_header(good)


@pytest.mark.parametrize("tail", [b"\0", b"PK\x05\x06" + b"\0" * 18])
def test_trailing_bytes_are_refused(good: Path, tail: bytes) -> None:
    good.write_bytes(good.read_bytes() + tail)
    with pytest.raises(CorruptInputError, match=rf"followed by {len(tail)} bytes"):
        read_header(good)


HEADER_FAULTS = {
    "not JSON": (b"{'a'", b"", "not valid JSON"),
    "array": ([], b"", "expected a JSON object"),
    "bad utf-8": (b'{"\xff":1}', b"", "UTF-8"),
    "lone surrogate": (rb'{"\ud800":1}', b"", "UTF-8"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "deep|JSON"),
    "huge integer": (b'{"a":' + b"9" * 10_000 + b"}", b"", "JSON"),
    "NaN": (b'{"a":NaN}', b"", "NaN is not JSON"),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        "more than once: a",
    ),
    "field twice": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
        "more than once: dtype",
    ),
    "unknown dtype": ({"a": entry("F7")}, b"1234", "'a': unknown dtype 'F7'"),
    "dtype not text": ({"a": entry(["U8"])}, b"1234", "'a': unknown dtype"),
    "negative size": ({"a": entry(shape=[-4])}, b"1234", r"'a': shape \[-4\]"),
    "bool size": ({"a": entry(shape=[True], end=1)}, b"1", r"'a': shape \[True\]"),
    "float size": ({"a": entry(shape=[4.0])}, b"1234", r"'a': shape \[4.0\]"),
    "negative zero": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', b"1234", "'a': data_offsets"),
    "shape overflow": ({"a": entry(shape=[2**40, 2**40])}, b"1234", "'a': .* more than 2\\^63-1"),
    "reversed": ({"a": entry(begin=4, end=0)}, b"1234", "'a': data_offsets"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, b"1234", "two integers"),
    "wrong span": ({"a": entry(shape=[5])}, b"1234", "'a': .* span 4 bytes.*needs 5"),
    "overlap": ({"a": entry(), "b": entry(begin=2, end=6)}, b"123456", "'b' at byte .* overlaps 'a'"),
    "gap": ({"a": entry(), "b": entry(begin=6, end=10)}, b"1234567890", "'b' at byte .* gap of 2 bytes after 'a'"),
    "beyond the end": ({"a": entry(shape=[9], end=9)}, b"1234", "truncated"),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", "'a': fields"),
    "tensor not an object": ({"a": 3}, b"", "'a': fields"),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
    "metadata a list": ({"__metadata__": []}, b"", "__metadata__"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_broken_header_is_refused_naming_the_fault(tmp_path: Path, fault: str) -> None:
    header, data, message = HEADER_FAULTS[fault]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CorruptInputError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 10_000])
def test_header_length_beyond_the_limit_or_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(CorruptInputError, match=str(length)):
        read_header(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=0, max_size=3), st.integers(0, 3)), max_size=4))
def test_mutated_file_is_refused_or_read_as_safetensors_reads_it(tmp_path: Path, edits: list) -> None:
    path = tmp_path / "fuzz.safetensors"
    save_file(TENSORS, path)
    raw = bytearray(path.read_bytes())
    for place, insert, removed in edits:
        raw[place : place + removed] = insert
    path.write_bytes(raw)
    try:
        ours = read_header(path)
    except InputError:
        return
    with safe_open(path, "np") as referee:  # raises if it refuses what we accept
        assert set(referee.keys()) == set(ours)
        for name, found in ours.items():
            assert tuple(referee.get_slice(name).get_shape()) == found.shape
            assert referee.get_slice(name).get_dtype() == found.dtype


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**65) | st.floats() | st.sampled_from(["U8", "F32", "a", ""]),
    lambda children: st.lists(children, max_size=3),
    max_leaves=6,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]),
        st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})
        | st.builds(
            entry,
            st.sampled_from(["U8", "I16"]),
            st.lists(st.integers(0, 3), max_size=2),
            st.integers(0, 8),
            st.integers(0, 8),
        )
        | json_values,
        max_size=3,
    ),
    size=st.integers(0, 8),
)
def test_structured_header_is_refused_or_read_as_safetensors_reads_it(tmp_path: Path, header: dict, size: int) -> None:
    path = write(tmp_path / "fuzz.safetensors", header, b"\1" * size)
    try:
        ours = read_header(path)
    except InputError:
        return
    try:
        with safe_open(path, "np") as referee:
            assert set(referee.keys()) == set(ours)
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")


def make_sharded(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": np.ones(5, np.float32)}, folder / "model-00002-of-00002.safetensors")
    shards = {"a": 1, "b": 1, "c": 2}
    write_index(folder, {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_sharded(tmp_path / "hf")


def test_sharded_and_single_folders_give_the_same_kind_of_map(sharded: Path, good: Path) -> None:
    entries = read_folder(sharded)
    assert {name: found.file.name[:11] for name, found in entries.items()} == {
        "a": "model-00001",
        "b": "model-00001",
        "c": "model-00002",
    }
    single = read_folder(good.parent)
    assert isinstance(single["scalar"], TensorEntry)
    assert single["scalar"].shape == ()


def test_every_missing_shard_is_listed_with_its_tensors(sharded: Path) -> None:
    for shard in sharded.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(
        IncompleteInputError, match=r"2 of 2 shards.*00001-of-00002.safetensors \(2 tensors\).*\(1 tensors\)"
    ):
        read_folder(sharded)


def test_tensor_missing_from_its_shard_is_refused(sharded: Path) -> None:
    save_file({"a": np.ones(3, np.float32)}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(IncompleteInputError, match=r"missing.*b \(model-00001-of-00002.safetensors\)"):
        read_folder(sharded)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"c": 5, "a": 3}, "a is in model-00001-of-00002.safetensors and model-00002-of-00002.safetensors"),
        ({"c": 5, "z": 3}, "z is in model-00002-of-00002.safetensors, the index says nothing"),
    ],
)
def test_shard_that_disagrees_with_the_index_is_refused(sharded: Path, tensors: dict[str, int], message: str) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    save_file({name: np.ones(size, np.float32) for name, size in tensors.items()}, shard)
    with pytest.raises(MismatchError, match=message):
        read_folder(sharded)


def test_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    weight_map = read_index(sharded / INDEX_NAME)
    write_index(sharded, {**weight_map, "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(MismatchError, match=r"b is in model-00001.*the index says model-00002"):
        read_folder(sharded)


UNSAFE_NAMES = [
    "../evil.safetensors",
    "/etc/passwd.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\host\\x.safetensors",
    "a/../../x.safetensors",
    "sub/x.safetensors",
    "x\0.safetensors",
    "x\n.safetensors",
    "..",
    "",
    ".hidden.safetensors",
    "pytorch_model.bin",
]

_opened: list[str] = []
_watching = False


def _record_opens(event: str, arguments: tuple) -> None:
    if _watching and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_record_opens)


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_index_cannot_lead_out_of_the_folder(sharded: Path, name: str) -> None:
    global _watching
    save_file({"c": np.ones(5, np.float32)}, sharded.parent / "evil.safetensors")
    write_index(sharded, {"a": name})
    _opened.clear()
    _watching = True
    try:
        with pytest.raises(UnsafeInputError, match="tensor 'a': shard"):
            read_folder(sharded)
    finally:
        _watching = False
    assert all(path.startswith(str(sharded) + os.sep) for path in _opened), _opened


def test_link_out_of_the_folder_is_refused_but_the_hub_cache_layout_is_read(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(UnsafeInputError, match=r"is a link to .*outside.safetensors"):
        read_folder(sharded)
    repository = tmp_path / "models--Qwen--Tiny"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    outside.rename(repository / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert set(read_folder(snapshot)) == {"c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "'weight_map' is missing"),
        (b'{"weight_map": []}', "'weight_map' is of type list"),
        (b'{"weight_map": {}}', "'weight_map'"),
        (b'{"weight_map": {"a": 3}}', "'a': shard is of type int"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "more than once: a"),
        (b"\x80\x02", "UTF-8|JSON"),
        (b"[" * 100_000, "deep|JSON"),
    ],
)
def test_broken_index_is_refused(sharded: Path, content: bytes, message: str) -> None:
    (sharded / INDEX_NAME).write_bytes(content)
    with pytest.raises(CorruptInputError, match=message):
        read_folder(sharded)


def test_huge_index_is_refused_unread(sharded: Path) -> None:
    with (sharded / INDEX_NAME).open("r+b") as stream:
        stream.truncate(2**30)  # sparse: takes no space, and reading it would take seconds
    with pytest.raises(CorruptInputError, match=str(2**30)):
        read_folder(sharded)


def test_folder_without_weights_says_what_it_found(tmp_path: Path) -> None:
    with pytest.raises(IncompleteInputError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(IncompleteInputError, match="neither"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsafeInputError, match=r"pytorch_model\.bin"):
        read_folder(tmp_path)
    save_file({"a": np.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(IncompleteInputError, match=r"no model\.safetensors\.index\.json"):
        read_folder(tmp_path)


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    save_file({"a": np.ones(1)}, sharded / "model.safetensors")
    with pytest.raises(MismatchError, match="both"):
        read_folder(sharded)
