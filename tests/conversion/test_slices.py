"""Whatever the size of the slices and the number of threads: the same bytes, the same checks, little memory."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qwen.conversion import export_hf, import_hf, run
from megatron_qwen.conversion.formats import byte_ranges
from megatron_qwen.conversion.run import prepare_export, prepare_import
from megatron_qwen.errors import ConfigError, CorruptInputError, MismatchError, NumericsError, QwenError, StorageError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tensor_shapes, tiny_dense, tiny_moe, write_tiny_hf

# Slices of one to some rows of the tiny models.
SMALL = 8_000


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_tiny_hf(tmp_path / "hf", tiny_dense(layers=2, vocab=131))


def edit(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("config", [tiny_dense(layers=2, vocab=131), tiny_moe(layers=2)], ids=["dense", "moe"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_bytes_do_not_depend_on_slices_or_threads(tmp_path, config, dtype):
    write_tiny_hf(tmp_path / "hf", config)
    reports = []
    for name, options in {
        "default": {},
        "small": {"max_memory": SMALL, "threads": 3},
        "one": {"max_memory": 50_000, "threads": 1},
    }.items():
        report = import_hf(tmp_path / "hf", tmp_path / name / "mg", dtype=dtype, progress=False, verify=True, **options)
        export_hf(tmp_path / name / "mg", tmp_path / name / "back", progress=False, verify=True, **options)
        layout = {"ckpt_format": "torch", "layout": ParallelLayout(tp=2)}
        import_hf(tmp_path / "hf", tmp_path / name / "rank", progress=False, verify=True, **layout, **options)
        reports.append((report.tensors, report.weight_bytes, report.max_cast_error, report.notes))
        assert report.verify_seconds > 0
        assert tree(tmp_path / name) == tree(tmp_path / "default")
    assert reports[0] == reports[1] == reports[2]
    assert (reports[0][2] > 0) == (dtype is not None)


def test_a_budget_that_no_row_fits_is_refused_with_the_smallest_that_works(hf, tmp_path):
    with pytest.raises(ConfigError, match=r"--max-memory 100: .* needs [\d,]+ bytes at once; the smallest") as caught:
        prepare_import(hf, tmp_path / "mg", max_memory=100)
    smallest = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    with pytest.raises(ConfigError):
        prepare_import(hf, tmp_path / "mg", max_memory=smallest - 1)
    import_hf(hf, tmp_path / "mg", max_memory=smallest, progress=False)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_bad_values_are_counted_over_the_whole_tensor(hf, tmp_path, name):
    def change(state):
        for row in (3, 11, 30):
            state[name][row, 5:7] = float("nan")

    edit(hf, change)
    total = load_file(hf / "model.safetensors")[name].numel()
    with pytest.raises(NumericsError, match=rf"{name}: 6 of {total} values are NaN .* first at \(3, 5\)"):
        import_hf(hf, tmp_path / "mg", max_memory=SMALL, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_overflow_is_counted_over_the_whole_tensor(hf, tmp_path):
    def change(state):
        for row in (2, 40, 111):
            state["model.layers.1.mlp.gate_proj.weight"][row, 1] = -1e5 - row

    edit(hf, change)
    expected = r"gate_proj.weight: 3 of 7168 values overflow torch.float16 \(largest 1.001e\+05, limit 6.55e\+04\)"
    with pytest.raises(NumericsError, match=expected):
        import_hf(hf, tmp_path / "mg", dtype="float16", max_memory=SMALL, progress=False)


def test_allowed_nan_is_logged_once_and_does_not_hide_an_overflow(hf, tmp_path, caplog):
    def change(state):
        state["lm_head.weight"][::7] = float("nan")

    edit(hf, change)
    with caplog.at_level(logging.WARNING):
        import_hf(hf, tmp_path / "mg", allow_nonfinite=True, max_memory=SMALL, progress=False)
    assert [record.message for record in caplog.records] == [
        "lm_head.weight: 1216 of 8384 values are NaN or infinite, the first at (0, 0)"
    ]
    edit(hf, lambda state: state["lm_head.weight"][7].fill_(1e5))
    with pytest.raises(NumericsError, match=r"lm_head.weight: 64 of 8384 values overflow"):
        import_hf(hf, tmp_path / "half", allow_nonfinite=True, dtype="float16", max_memory=SMALL, progress=False)


def test_verification_finds_a_byte_that_the_disk_changed(hf, tmp_path, monkeypatch):
    import_hf(hf, tmp_path / "mg", progress=False)
    real = run.verify_output

    def flip_and_verify(folder: Path, *arguments, **options) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-70] ^= 4
        path.write_bytes(content)
        real(folder, *arguments, **options)

    monkeypatch.setattr(run, "verify_output", flip_and_verify)
    export_hf(tmp_path / "mg", tmp_path / "unseen", progress=False)
    with pytest.raises(CorruptInputError, match=r"rows \d+ to \d+ of the output are not those of the source"):
        export_hf(tmp_path / "mg", tmp_path / "back", progress=False, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mg", "unseen"]


def test_a_dry_run_reads_no_weight_and_writes_nothing(hf, tmp_path, monkeypatch):
    import_hf(hf, tmp_path / "mg", progress=False)
    monkeypatch.setattr(byte_ranges.os, "preadv", None)
    before = tree(tmp_path)
    for conversion in (prepare_import(hf, tmp_path / "out"), prepare_export(tmp_path / "mg", tmp_path / "out")):
        plan = conversion.dry_run()
        assert plan.tensors == 27
        assert plan.total_bytes == sum(file.bytes for file in plan.files) > plan.weight_bytes
        assert plan.free_bytes > plan.total_bytes
        assert 0 < plan.peak_memory_bytes < 20 * 10**6
        assert plan.expected_seconds > 0
        json.dumps(plan.to_json())
    assert tree(tmp_path) == before


def test_the_sizes_of_a_dry_run_are_those_that_are_written(hf, tmp_path):
    conversion = prepare_import(hf, tmp_path / "mg", dtype="bfloat16")
    planned = {file.name: file.bytes for file in conversion.dry_run().files}
    conversion.run()
    written = {name: len(content) for name, content in tree(tmp_path / "mg").items()}
    assert written.pop("release/manifest.json")
    assert planned == written


def sparse_hf(folder: Path, preset: str) -> Path:
    """A folder of the preset's shape: real headers, holes for data."""
    config = QwenConfig.from_preset(preset)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensor_shapes(config):
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + end)
    return folder


def test_a_14b_shaped_checkpoint_is_planned_at_once(tmp_path, monkeypatch):
    folder = sparse_hf(tmp_path / "hf", "qwen2.5-14b")
    monkeypatch.setattr(run, "check_disk", lambda *_, **__: None)
    started = time.process_time()
    conversion = prepare_import(folder, tmp_path / "mg")
    assert time.process_time() - started < 5
    assert conversion.plan.target_bytes == 29_540_067_328
    assert conversion.threads * 4 * 2**20 < 100 * 10**6


def test_every_contradiction_comes_at_once_also_those_of_target_and_disk(hf, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("megatron_qwen.conversion.engine.target.shutil.disk_usage", lambda _: usage)
    with pytest.raises(QwenError) as caught:
        prepare_import(hf, tmp_path / "out", max_memory=10)
    message = str(caught.value)
    assert isinstance(caught.value, StorageError)
    for text in ("is not empty", "--max-memory 10", "1,000 are free on that disk"):
        assert text in message, message
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "vocab_size": 99}))
    with pytest.raises(MismatchError) as caught:
        prepare_import(hf, tmp_path / "out")
    for text in ("num_hidden_layers", "vocab_size", "is not empty"):
        assert text in str(caught.value), caught.value


PEAK = """
import sys
from pathlib import Path
from megatron_qwen.conversion.run import export_hf, import_hf
def memory(field):
    # Not ru_maxrss, which a process inherits from the one that started it.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
base = memory("VmRSS")
import_hf(sys.argv[1], sys.argv[2], progress=False, verify=True)
export_hf(sys.argv[2], sys.argv[3], progress=False)
print(memory("VmHWM") - base)
"""


def test_memory_stays_small_whatever_the_largest_tensor(tmp_path):
    config = tiny_dense(layers=1, hidden=256, vocab=300_000, tied=True)
    write_tiny_hf(tmp_path / "hf", config, dtype=torch.bfloat16)
    folders = [str(tmp_path / name) for name in ("hf", "mg", "back")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *folders], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    largest = 300_000 * 256 * 2
    assert int(done.stdout) < largest / 2 + 40 * 10**6
    assert tree(tmp_path / "hf")["model.safetensors"] == tree(tmp_path / "back")["model.safetensors"]
