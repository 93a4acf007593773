from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_qwen.benchmark.cases import convert
from megatron_qwen.benchmark.cases.convert import CEILINGS, PLAIN, ConvertBench
from megatron_qwen.benchmark.cases.convert_contestants import Convert, Copy, DryRun
from megatron_qwen.benchmark.cases.convert_folders import (
    folder_bytes,
    largest_tensor_bytes,
    require_equal_tensors,
    require_room,
    write_shaped_hf,
)
from megatron_qwen.benchmark.cases.convert_report import ConversionBenchmark, ConversionRow, write_conversion_report
from megatron_qwen.benchmark.timing import summarise
from megatron_qwen.errors import ConfigError, MismatchError, StorageError
from megatron_qwen.model.presets import find_preset
from megatron_qwen.testing.tiny import tensor_shapes, tiny_dense


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_qwen", "bench", "convert", *arguments],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip


def test_the_command_converts_there_and_back_beside_ceilings_and_peer(tmp_path: Path) -> None:
    lines = ("import", "export", "copy", "copy+fsync", "transformers")
    only = [word for line in lines for word in ("--only", line)]
    (tmp_path / "scratch").mkdir()
    result = run("--model", "tiny", "--layers", "3", "--rounds", "1", "--threads", "2",
                 "--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "out"), "--json", *only)  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    rows = {row["contestant"]: row for row in report["rows"]}
    assert tuple(rows) == lines
    assert len({row["copied_bytes"] for row in rows.values()}) == 1
    for name in ("import", "export"):
        row = rows[name]
        assert row["checkpoint"] == "tiny (3 layers, generated)"
        assert row["bytes_per_second"] == pytest.approx(row["copied_bytes"] / row["seconds"]["median"])
        assert row["copy_fraction"] == pytest.approx(row["bytes_per_second"] / rows["copy"]["bytes_per_second"])
        assert row["synced_copy_fraction"] * rows["copy+fsync"]["bytes_per_second"] == pytest.approx(
            row["bytes_per_second"]
        )
        # Two rows of 512 x 64 and of 3 x 112 x 64 in bfloat16: nothing beside fixed costs, and the interpreter is more.
        assert row["largest_tensor_bytes"] == 512 * 64 * 2
        assert 0 < row["peak_bytes"] < row["memory_bar_bytes"] == 200_000_000 + 3 * 512 * 64 * 2
        assert row["interpreter_bytes"] > 50e6
        assert row["cpu_seconds"] > 0
        assert "torch" in row["versions"]
        assert "transformers" not in row["versions"]
    assert rows["copy"]["interpreter_bytes"] < 50e6
    assert "transformers" in rows["transformers"]["versions"]
    assert list((tmp_path / "scratch").iterdir()) == []
    with (tmp_path / "out" / "convert.csv").open() as stream:
        assert [line["contestant"] for line in csv.DictReader(stream)] == list(lines)
    assert (tmp_path / "out" / "convert.png").read_bytes().startswith(b"\x89PNG")


def test_contestants_do_what_their_lines_say(tmp_path: Path) -> None:
    source = write_shaped_hf(tmp_path / "source", tiny_dense(), limit=200_000)
    assert len(list(source.glob("*.safetensors"))) > 1
    Convert(source=str(source), target=str(tmp_path / "ranks"), direction="import", layout=(2, 2)).step()
    assert len(list((tmp_path / "ranks").rglob("model_optim_rng.pt"))) == 4
    ranks, back = str(tmp_path / "ranks"), str(tmp_path / "back")
    assert Convert(source=ranks, target=back, direction="export", layout=(2, 2), verify=True).step() > 0
    require_equal_tensors(source, tmp_path / "back", "export")
    assert Copy(source=str(source), target=str(tmp_path / "copy"), fsync=True).step() == folder_bytes(source)
    require_equal_tensors(source, tmp_path / "copy", "copy")
    assert DryRun(source=str(source), target=str(tmp_path / "none")).step() == len(list(tensor_shapes(tiny_dense())))
    assert not (tmp_path / "none").exists()


def test_generated_values_are_finite_and_differ_and_sparse_ones_take_no_room(tmp_path: Path) -> None:
    config = tiny_dense(vocab=515)
    full = write_shaped_hf(tmp_path / "full", config)
    tensors = load_file(full / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(tensor_shapes(config))
    for tensor in tensors.values():
        size = tensor.abs().float()
        assert 2**-7 <= size.min() <= size.max() < 2
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    assert 0.45 < (flat > 0).float().mean() < 0.55
    assert len(set(flat.view(torch.int16).tolist())) == 2 * 8 * 128
    big = write_shaped_hf(tmp_path / "sparse", find_preset("qwen2.5-14b"), is_sparse=True)
    files = list(big.glob("*.safetensors"))
    assert folder_bytes(big) > 29e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 2e6
    assert largest_tensor_bytes(big) == 152_064 * 5120 * 2
    with safe_open(files[0], "pt") as stream:
        assert len(list(stream.keys())) > 50


def test_a_conversion_that_changes_a_bit_or_loses_a_tensor_is_not_reported(tmp_path: Path) -> None:
    source = write_shaped_hf(tmp_path / "a", tiny_dense())
    for change in ("bit", "shape", "lost"):
        tensors = load_file(source / "model.safetensors")
        norm = tensors["model.norm.weight"]
        if change == "bit":
            norm.view(torch.int16)[-1] ^= 1
        elif change == "shape":
            tensors["model.norm.weight"] = norm.view(2, -1)
        else:
            del tensors["model.norm.weight"]
        (tmp_path / change).mkdir()
        save_file(tensors, tmp_path / change / "model.safetensors")
        with pytest.raises(MismatchError, match=r"export: .*model\.norm\.weight"):
            require_equal_tensors(source, tmp_path / change, "export")


def test_what_a_round_makes_is_compared_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shaped_hf(tmp_path / "source", tiny_dense())
    held: list[set[str]] = []

    def converted(entrant: convert.Entrant, read: Path, target: Path) -> convert._Sample:
        assert read.is_dir()
        held.append({path.name for path in (tmp_path / "made").iterdir()})
        Copy(source=str(source), target=str(target), fsync=False).step()
        seconds = {"import": 2.0, "export": 4.0, "copy": 1.0, "copy+fsync": 3.0}[entrant.name] * (1 + len(held) // 5)
        return convert._Sample(
            seconds=seconds,
            cpu_seconds=0.5 * seconds,
            value=0.5,
            start_seconds=1,
            interpreter_bytes=7,
            peak_bytes=len(held),
            versions={},
        )

    monkeypatch.setattr(convert, "_convert", converted)
    rows = convert.measure("toy", source, (*PLAIN, *CEILINGS), 3, tmp_path, lambda what: None)
    assert held == [set(), {"0"}, set(), set()] * 3
    assert list((tmp_path / "made").iterdir()) == []
    assert [row.copy_fraction for row in rows[:3]] == [0.5, 0.25, 0.0]
    # In its own round: a slower machine slows both.
    assert rows[0].synced_copy_fraction == 1.5
    assert [row.peak_bytes for row in rows] == [9, 10, 11, 12]
    assert [row.has_rate_bar for row in rows] == [True, True, False, False]
    assert [row.has_memory_bar for row in rows] == [True, True, False, False]


def row(**fields: object) -> ConversionRow:
    known = {
        "checkpoint": "a", "contestant": "import", "seconds": summarise([1.0]), "cpu_seconds": 2.0,
        "verify_seconds": 0.0, "start_seconds": 0.0, "checkpoint_bytes": 10, "copied_bytes": 10, "copy_fraction": 0.6,
        "synced_copy_fraction": 0.7, "peak_bytes": 203_000_000, "interpreter_bytes": 1,
        "largest_tensor_bytes": 1_000_000, "has_rate_bar": True, "has_memory_bar": True, "versions": {},
    }  # fmt: skip
    return ConversionRow(**{**known, **fields})  # type: ignore[arg-type]


def test_bars_are_judged_by_the_harder_copy_and_to_the_byte(tmp_path: Path) -> None:
    assert row().meets_rate_bar
    assert not row(copy_fraction=0.599).meets_rate_bar
    assert not row(synced_copy_fraction=0.599).meets_rate_bar
    assert row().meets_memory_bar
    assert not row(peak_bytes=203_000_001).meets_memory_bar
    report = ConversionBenchmark(device="d", commit="c", taken="t", setting={}, notes=(), rows=(row(), row()))
    for _ in range(2):
        files = write_conversion_report(report, tmp_path)
    with files[1].open() as stream:
        assert len(list(csv.DictReader(stream))) == 4


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="making it needs 1,000,000,000,000,000,000 bytes"):
        require_room(tmp_path, 10**18, "making it")
    monkeypatch.setattr(convert, "has_room", lambda folder, num_bytes: False)
    rows, notes = ConvertBench(model="tiny", dry_run_model="small")._dry_run(tmp_path, lambda what: None)
    assert rows == []
    assert "import --dry-run of small: left out" in notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a Hugging Face folder, or --model"),
        ({"model": "tiny", "source": Path()}, "and not both"),
        ({"source": Path(), "layers": 2}, "--layers"),
        ({"model": "tiny", "rounds": 0}, "--rounds: got 0"),
        ({"model": "tiny", "threads": 0}, "--threads: got 0"),
        ({"model": "tiny", "scratch": Path("/no/such")}, "--scratch: /no/such"),
        ({"model": "tiny", "only": ("expert",)}, "--only 'expert': expected one of .*'import', 'export'"),
        ({"model": "tiny", "only": ("export",)}, "--only 'export': nothing makes what it reads"),
        ({"model": "tiny", "only": ("import --dry-run", "export")}, "nothing makes"),
        ({"model": "tiny", "only": ("import TP2xPP2",)}, "--legacy"),
    ],
)
def test_bad_requests_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertBench(**fields)  # type: ignore[arg-type]
