"""The engine that writes every output: threads, memory, hashing, journal; on files made up here."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_qwen.checkpoint.manifest import FileRecord, hash_files
from megatron_qwen.conversion import interfaces
from megatron_qwen.conversion.engine.pieces import TensorRows, block_bytes, row_pieces
from megatron_qwen.conversion.engine.staging import Journal
from megatron_qwen.conversion.engine.write import HASH_BYTES, peak_memory, write_output
from megatron_qwen.conversion.interfaces import OutputFile, Piece, bytes_file, pwrite_all
from megatron_qwen.errors import ConfigError, Interrupted


def make_file(name: str, content: bytes, cuts: list[int], *, spans: bool = True, write=None) -> OutputFile:
    """A file of `content`: the skeleton writes every third part, pieces the others."""
    parts = [(a, b) for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True) if a < b]
    fixed = parts[::3]

    def skeleton(descriptor: int) -> None:
        os.ftruncate(descriptor, len(content))
        for begin, end in fixed:
            pwrite_all(descriptor, content[begin:end], begin)

    def put(begin: int, end: int, descriptor: int) -> None:
        if write is not None:
            write(begin)
        pwrite_all(descriptor, content[begin:end], begin)

    pieces = [
        Piece(
            label=f"{name}@{begin}",
            num_tensors=1,
            num_bytes=end - begin,
            peak_bytes=end - begin,
            write=partial(put, begin, end),
            spans=((begin, end),) if spans else (),
        )
        for begin, end in parts
        if (begin, end) not in fixed
    ]
    return OutputFile(name=name, num_bytes=len(content), skeleton=skeleton, pieces=tuple(pieces))


def random_file(name: str, size: int, seed: int, **options) -> tuple[OutputFile, bytes]:
    generator = random.Random(seed)
    content = generator.randbytes(size)
    cuts = sorted(generator.randrange(size) for _ in range(17)) if size else []
    return make_file(name, content, cuts, **options), content


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("spans", [True, False])
def test_files_hold_what_the_pieces_wrote_and_records_are_their_hashes(tmp_path, threads, spans):
    delays = random.Random(threads)

    def write(_: int) -> None:
        time.sleep(delays.random() * 0.004)

    made = [
        random_file(f"a/{i}.bin", 5 * HASH_BYTES // 2 if i == 1 else 3001 * i, i, spans=spans, write=write)
        for i in range(5)
    ]
    made.append((bytes_file("note.txt", b"hello"), b"hello"))
    done: list[tuple[int, int]] = []
    records = write_output(
        [file for file, _ in made], tmp_path, threads=threads, advance=lambda *step: done.append(step)
    )
    for file, content in made:
        assert (tmp_path / file.name).read_bytes() == content, file.name
        assert records[file.name] == FileRecord(len(content), hashlib.sha256(content).hexdigest())
    pieces = [piece for file, _ in made for piece in file.pieces]
    assert (len(done), sum(n for _, n in done)) == (len(pieces), sum(piece.num_bytes for piece in pieces))


def test_pieces_under_way_stay_within_the_memory_budget(tmp_path):
    lock, now, most, together = threading.Lock(), [0], [0], [0]
    running = [0]

    def write(begin: int) -> None:
        with lock:
            now[0] += 1000
            running[0] += 1
            most[0], together[0] = max(most[0], now[0]), max(together[0], running[0])
        time.sleep(0.003)
        with lock:
            now[0] -= 1000
            running[0] -= 1

    content = random.Random(1).randbytes(60_000)
    file = make_file("x", content, list(range(1000, 60_000, 1000)), write=write)
    write_output([file], tmp_path, threads=4, max_memory=2500)
    assert (tmp_path / "x").read_bytes() == content
    assert most[0] == 2000
    assert together[0] == 2


def test_a_piece_larger_than_the_budget_is_refused_with_the_smallest_that_works(tmp_path):
    file = make_file("x", bytes(9000), [1000, 2000, 8000])
    with pytest.raises(ConfigError, match=r"--max-memory 5,999: x@2000 needs 6,000 bytes.*works is 6,000"):
        write_output([file], tmp_path, max_memory=5999)
    assert not (tmp_path / "x").exists()
    write_output([file], tmp_path, max_memory=6000)


def test_peak_memory_is_that_of_the_largest_pieces_side_by_side():
    files = [make_file("x", bytes(9000), [1000, 2000, 8000]), make_file("y", bytes(100), [10, 20])]
    assert peak_memory(files, 2) - peak_memory([], 2) == 7000
    assert peak_memory(files, 2, 6500) - peak_memory([], 2) == 6500


def test_the_first_error_ends_all_threads_and_comes_out(tmp_path):
    started: list[int] = []

    def write(begin: int) -> None:
        started.append(begin)
        if begin >= 20_000:
            raise OSError(28, "No space left on device")

    file = make_file("x", bytes(60_000), list(range(500, 60_000, 500)), write=write)
    with pytest.raises(OSError, match="No space left"):
        write_output([file], tmp_path, threads=3)
    assert max(started) < 30_000
    assert threading.active_count() < 3 or not any(t.name == "convert" for t in threading.enumerate())


def test_a_stop_leaves_whole_files_in_the_journal_and_a_later_run_keeps_exactly_those(tmp_path):
    made = [random_file(f"{i}.bin", 20_000, i) for i in range(4)]
    files = [file for file, _ in made]
    count = [0]

    def advance(tensors: int, num_bytes: int) -> None:
        count[0] += 1

    total = len(files[0].pieces) + len(files[1].pieces)
    journal = Journal(tmp_path / "progress.json", {})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Interrupted):
        write_output(files, out, threads=2, advance=advance, journal=journal, is_stopped=lambda: count[0] > total)
    loaded = Journal.load(tmp_path / "progress.json")
    assert loaded is not None
    assert loaded.finished == journal.finished
    assert {"0.bin", "1.bin"} <= loaded.finished.keys() < {file.name for file in files}
    assert loaded.finished == hash_files(out, loaded.finished)
    (out / "1.bin").write_bytes(made[1][1][:-1] + b"?")
    stamps = {name: os.stat(out / name) for name in loaded.finished}
    records = write_output(files, out, journal=loaded)
    for file, content in made:
        assert (out / file.name).read_bytes() == content
        assert records[file.name].sha256 == hashlib.sha256(content).hexdigest()
    kept = {name for name, stamp in stamps.items() if os.stat(out / name).st_mtime_ns == stamp.st_mtime_ns}
    assert kept == loaded.finished.keys() - {"1.bin", "2.bin", "3.bin"}


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(interfaces.os, "pwrite", lambda fd, data, offset: real(fd, data[:700], offset))
    file, content = random_file("x", 5000, 3)
    write_output([file], tmp_path)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("shape", [(7, 5), (1, 300), (13,), (4, 3, 2), (), (0, 4), (5, 0)])
@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_row_pieces_cover_a_tensor_once(tmp_path, shape, block):
    values = torch.randn(shape, dtype=torch.float32)

    def read(begin: int, end: int) -> torch.Tensor:
        return values[begin:end] if shape else values

    rows = TensorRows(label="t", shape=shape, dtype=torch.float32, source_dtype=torch.float32, num_tensors=2, read=read)
    pieces = tuple(row_pieces(rows, 3, block))
    spans = [span for piece in pieces for span in piece.spans]
    assert [begin for begin, _ in spans] == [3, *(end for _, end in spans)][: len(spans)]
    assert all(piece.peak_bytes <= block for piece in pieces) or len(pieces) == rows.num_rows
    assert sum(piece.num_tensors for piece in pieces) == (2 if values.numel() else 0)
    file = OutputFile(
        name="t", num_bytes=3 + values.nbytes, skeleton=lambda fd: os.ftruncate(fd, 3 + values.nbytes), pieces=pieces
    )
    write_output([file], tmp_path)
    assert (tmp_path / "t").read_bytes()[3:] == values.numpy().tobytes()


def test_slices_are_small_enough_for_all_threads_to_work_within_the_budget():
    assert block_bytes(None, 8) == block_bytes(10**12, 8)
    assert 8 * block_bytes(1_000_000, 8) <= 1_000_000


def test_a_file_that_the_skeleton_leaves_too_short_is_our_own_fault(tmp_path):
    file = OutputFile(name="x", num_bytes=10, skeleton=lambda fd: os.ftruncate(fd, 9))
    with pytest.raises(AssertionError):
        write_output([file], tmp_path)


def test_nothing_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    write_output([random_file(f"{i}", 999, i)[0] for i in range(20)], tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_output([make_file("bad", bytes(100), [10, 20], write=lambda begin: 1 // 0)], Path(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before
