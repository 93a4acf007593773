"""Files of torch.save: laid out before their tensors exist, opened as plain data with the tensors left on disk."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import random
import resource
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.checkpoint.torch_bin import PICKLED
from megatron_qwen.checkpoint.torch_file import Inert, locate, open_torch_file
from megatron_qwen.checkpoint.torch_layout import lay_out
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, InputError, UnsafeInputError

SHAPES = {"matrix": (3, 5), "odd": (77,), "scalar": (), "empty": (0, 4), "cube": (7, 2, 3)}


def write(path: Path, content: object, values: list[torch.Tensor]) -> None:
    """Write a laid-out file, its tensors last to first."""
    layout = lay_out(content)
    with path.open("wb") as stream:
        stream.truncate(layout.num_bytes)
        for offset, data in layout.fixed:
            stream.seek(offset)
            stream.write(data)
        for offset, value in reversed(list(zip(layout.offsets, values, strict=True))):
            assert offset % 64 == 0
            stream.seek(offset)
            stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert path.stat().st_size == layout.num_bytes


def example(dtype: torch.dtype) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    values = {
        name: (torch.arange(max(1, int(np.prod(shape))))[: int(np.prod(shape))] % 100).to(dtype).view(shape)
        for name, shape in SHAPES.items()
    }
    holes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in SHAPES.items()}
    content = {
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, data_path=None),
        "model": {**holes, "linear._extra_state": None},
        "steps": torch.arange(5),
        "checkpoint_version": 3.0,
    }
    return content, values


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_opens_what_was_laid_out(dtype, mmap, tmp_path):
    content, values = example(dtype)
    write(tmp_path / "a.pt", content, list(values.values()))
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    for name, value in values.items():
        assert found["model"][name].dtype == dtype
        assert torch.equal(found["model"][name], value)
        assert found["model"][name].is_contiguous()
    assert found["model"]["linear._extra_state"] is None
    assert torch.equal(found["steps"], torch.arange(5))
    assert found["args"] == content["args"]
    assert found["checkpoint_version"] == 3.0


def test_the_same_content_gives_the_same_bytes(tmp_path):
    content, values = example(torch.float32)
    for name in ("a.pt", "b.pt"):
        write(tmp_path / name, content, list(values.values()))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_files_and_tensors_beyond_four_gigabytes(tmp_path):
    """Sizes and offsets that need the 64-bit records of a zip; the file is a hole but for a few values."""
    large, small = 5 * 2**30 // 2, 3
    content = {
        "large": torch.empty(large, dtype=torch.bfloat16, device="meta"),
        "small": torch.empty(small, device="meta"),
    }
    layout = lay_out(content)
    path = tmp_path / "a.pt"
    with path.open("wb") as stream:
        stream.truncate(layout.num_bytes)
        for offset, data in layout.fixed:
            stream.seek(offset)
            stream.write(data)
        for place, value in (
            (layout.offsets[0] + 2 * (large - 1), torch.full((1,), 1.5, dtype=torch.bfloat16)),
            (layout.offsets[1], torch.tensor([1.0, 2.0, 3.0])),
        ):
            stream.seek(place)
            stream.write(value.view(torch.uint8).numpy().tobytes())
    found = torch.load(path, mmap=True, weights_only=True)
    assert found["large"].shape == (large,)
    assert found["large"][-1] == 1.5
    assert torch.equal(found["small"], torch.tensor([1.0, 2.0, 3.0]))
    place = locate(path, open_torch_file(path)["small"], "small")
    assert place.offset == layout.offsets[1]


def test_tensors_stay_on_disk_and_are_found_there(tmp_path):
    base = torch.arange(100.0)
    saved = {"view": base[10:30].view(4, 5), "turned": base[:12].view(3, 4).t(), "alone": torch.arange(6)}
    torch.save(saved, tmp_path / "a.pt")
    found = open_torch_file(tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    for name, tensor in saved.items():
        assert found[name].device.type == "meta"
        place = locate(tmp_path / "a.pt", found[name], name)
        assert (place.shape, place.strides, place.dtype) == (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        count = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))
        values = torch.frombuffer(bytearray(raw), dtype=place.dtype, count=count, offset=place.offset)
        assert torch.equal(values.as_strided(place.shape, place.strides), tensor)


def test_opening_reads_no_tensor_bytes(tmp_path):
    """An 8 GB file, nearly all of it a hole, in a process that has no room for it."""
    layout = lay_out({"model": {"w": torch.empty(2**31, dtype=torch.float32, device="meta")}})
    with (tmp_path / "a.pt").open("wb") as stream:
        stream.truncate(layout.num_bytes)
        for offset, data in layout.fixed:
            stream.seek(offset)
            stream.write(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = open_torch_file(tmp_path / "a.pt")
    assert found["model"]["w"].shape == (2**31,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


class Stranger:
    """A class that a checkpoint has no business with."""


def test_what_a_megatron_checkpoint_names_is_not_imported(tmp_path):
    module = type(sys)("megatron.core.made_up")
    sys.modules["megatron.core.made_up"] = module
    kind = type("Backend", (), {"__module__": "megatron.core.made_up", "__reduce__": lambda self: (kind, ())})
    module.Backend = kind
    arguments = argparse.Namespace(backend=kind(), signal=signal.SIGTERM, path=pathlib.Path("/x"), lr=np.float64(3.0))
    states = [{"np": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()}]
    try:
        torch.save({"args": arguments, "rng_state": states, "fp8": io.BytesIO(b"abc")}, tmp_path / "a.pt")
    finally:
        del sys.modules["megatron.core.made_up"]
    before = set(sys.modules)
    found = open_torch_file(tmp_path / "a.pt")
    assert {name for name in set(sys.modules) - before if name.startswith("megatron")} == set()
    assert isinstance(found["args"].backend, Inert)
    assert found["args"].path.arguments == ("/", "x")
    assert isinstance(found["args"].lr, Inert)
    assert found["fp8"].getvalue() == b"abc"


def test_what_others_allow_torch_to_open_is_not_allowed_here(tmp_path):
    torch.save({"model": Stranger()}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([Stranger]):
        assert isinstance(torch.load(tmp_path / "a.pt", weights_only=True)["model"], Stranger)
        with pytest.raises(UnsafeInputError, match="Stranger"):
            open_torch_file(tmp_path / "a.pt")
        assert Stranger in torch.serialization.get_safe_globals()


class Payload:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, os.unlink])
def test_a_payload_is_refused_by_name_and_does_not_run(function, tmp_path):
    sentinel = tmp_path / "ran"
    torch.save({"model": {"w": Payload(function, f"touch {sentinel}")}}, tmp_path / "a.pt")
    with pytest.raises(UnsafeInputError, match=function.__name__):
        open_torch_file(tmp_path / "a.pt")
    assert not sentinel.exists()


def test_a_file_that_is_not_there():
    with pytest.raises(IncompleteInputError, match="no such file"):
        open_torch_file(Path("/nowhere/a.pt"))


def test_the_format_before_torch_1_6_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptInputError, match=r"1\.6"):
        open_torch_file(tmp_path / "a.pt")


def test_compressed_records_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for name in source.namelist():
            copy.writestr(name, source.read(name))
    with pytest.raises(CorruptInputError, match="compressed"):
        open_torch_file(tmp_path / "b.pt")


def test_a_tensor_that_reaches_beyond_the_file_is_refused(tmp_path):
    layout = lay_out({"w": torch.empty(1000, device="meta")})
    # The tensor is the last but for a few hundred bytes; without it the directory lies where its values should be.
    with (tmp_path / "a.pt").open("wb") as stream:
        for offset, data in layout.fixed:
            stream.seek(offset - 4000 if offset > layout.offsets[0] else offset)
            stream.write(data)
    with pytest.raises(CorruptInputError):
        locate(tmp_path / "a.pt", open_torch_file(tmp_path / "a.pt")["w"], "w")


def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"w": torch.eye(4).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(InputError):
        locate(tmp_path / "a.pt", open_torch_file(tmp_path / "a.pt")["w"], "w")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_our_errors_or_open(data):
    import tempfile

    content, _ = example(torch.float32)
    buffer = io.BytesIO()
    torch.save({**content, "model": {"w": torch.arange(20.0)}}, buffer)
    raw = bytearray(buffer.getvalue())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(raw)
        try:
            found = open_torch_file(path)
            if isinstance(found, dict) and isinstance(found.get("model"), dict) and "w" in found["model"]:
                locate(path, found["model"]["w"], "w")
        except InputError:
            pass


def test_headers_of_pickled_weights(tmp_path):
    embedding = torch.randn(6, 4).to(torch.bfloat16)
    torch.save({"a": embedding, "b": embedding, "c": torch.ones(3)[1:]}, tmp_path / "pytorch_model.bin")
    entries = PICKLED.read_header(tmp_path / "pytorch_model.bin")
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a": ("BF16", (6, 4)),
        "b": ("BF16", (6, 4)),
        "c": ("F32", (2,)),
    }
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    for name in ("a", "b"):
        values = raw[entries[name].begin : entries[name].end]
        assert values == embedding.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": "text"}, {"a": torch.ones(3, 4).t()}, {1: torch.ones(2)}])
def test_pickled_weights_of_another_kind_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CorruptInputError):
        PICKLED.read_header(tmp_path / "pytorch_model.bin")
