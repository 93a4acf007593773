"""Faults 35 to 38 of the data path: a damaged index, ids out of range, offsets beyond int32, bad records."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_qwen.data.index_format import HEADER, index_bytes, read_index
from megatron_qwen.data.indexed import open_indexed
from megatron_qwen.data.prepare import prepare
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.data.writer import DatasetWriter
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, InputError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def tokenizer() -> QwenTokenizer:
    return QwenTokenizer.train(["a few words for a tiny tokenizer"], 280)


@pytest.fixture
def prefix(tmp_path) -> Path:
    return write_set(tmp_path / "set")


def write_set(prefix: Path, vocab_size: int = 100) -> Path:
    with DatasetWriter(prefix, vocab_size=vocab_size) as writer:
        writer.add(np.concatenate(DOCUMENTS), np.array([len(document) for document in DOCUMENTS]))
        writer.commit({})
    return prefix


# --- 35: .idx and .bin that do not say what Megatron's writer says -------------------------------------------------

LENGTHS, POINTERS, BOUNDARIES = HEADER.size, HEADER.size + 12, HEADER.size + 12 + 24


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"MMIDIDY", "starts with b'MMIDIDY"),
        (9, struct.pack("<Q", 2), "version 2, expected 1"),
        (17, b"\x09", "dtype code 9"),
        (17, b"\x07", "dtype code 7, expected an integer type"),
        (17, b"\x04", r"set\.bin: 16 bytes, expected 32|points to byte"),
        (18, struct.pack("<Q", 4), "bytes, expected"),
        (18, struct.pack("<Q", 1 << 62), "bytes, expected"),
        (26, struct.pack("<Q", 5), "bytes, expected"),
        (LENGTHS, struct.pack("<i", -3), "sequence 0 has length -3"),
        (LENGTHS + 8, struct.pack("<i", 5), r"set\.bin: 16 bytes, expected 18"),
        (LENGTHS + 8, struct.pack("<i", 3), r"set\.bin: 16 bytes, expected 14"),
        (POINTERS + 8, struct.pack("<q", 8), "sequence 1 points to byte 8, expected 6"),
        (POINTERS + 16, struct.pack("<q", 1 << 40), "sequence 2 points to byte 1099511627776, expected 8"),
        (POINTERS, struct.pack("<q", -2), "sequence 0 points to byte -2"),
        (BOUNDARIES, struct.pack("<q", 1), "boundaries run from 1 to 3, expected 0 to 3"),
        (BOUNDARIES + 24, struct.pack("<q", 2), "boundaries run from 0 to 2, expected 0 to 3"),
        (BOUNDARIES + 8, struct.pack("<q", 3), "document boundary 2 is 2, below the 3"),
    ],
)
def test_damaged_index_is_refused_with_got_and_expected(prefix, at, value, message):
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(CorruptInputError, match=message):
        open_indexed(prefix)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncated_longer_empty_or_missing_files_are_refused(prefix, suffix, mmap):
    path = Path(f"{prefix}{suffix}")
    whole = path.read_bytes()
    for size in (0, 1, 9, HEADER.size - 1, HEADER.size, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        if size < len(whole):
            with pytest.raises(CorruptInputError, match=rf"set\{suffix}: {min(size, len(whole))} bytes, expected"):
                open_indexed(prefix, mmap=mmap)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CorruptInputError, match="bytes, expected"):
        open_indexed(prefix, mmap=mmap)
    path.unlink()
    with pytest.raises(IncompleteInputError, match="no such file"):
        open_indexed(prefix, mmap=mmap)


def test_no_documents_and_only_empty_ones_are_refused(tmp_path):
    for lengths, message in (([], "holds no document"), ([0, 0], "all 2 sequences are empty")):
        (tmp_path / "e.idx").write_bytes(index_bytes(np.array(lengths, np.int64), np.dtype(np.uint16)))
        (tmp_path / "e.bin").write_bytes(b"")
        with pytest.raises(CorruptInputError, match=message):
            open_indexed(tmp_path / "e")


def test_empty_documents_between_others_are_read_as_megatron_reads_them(tmp_path):
    (tmp_path / "e.idx").write_bytes(index_bytes(np.array([0, 2, 0, 1, 0]), np.dtype(np.uint16)))
    np.array([7, 8, 9], np.uint16).tofile(tmp_path / "e.bin")
    data = open_indexed(tmp_path / "e", vocab_size=10)
    assert [data[i].tolist() for i in range(5)] == [[], [7, 8], [], [9], []]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 200),
    words=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, -(2**63)])), max_size=2),
)
@example(edits=[(0, 0x4D)], cut=0, words=[])  # nothing changed
@example(edits=[(17, 3)], cut=0, words=[])  # int16, as large as the uint16 that was written
def test_whatever_is_in_the_index_we_refuse_it_or_agree_with_megatron(tmp_path, edits, cut, words):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = tmp_path / "set"
    if not Path(f"{prefix}.idx").exists():
        write_set(prefix)
        shutil.copy(f"{prefix}.idx", tmp_path / "whole")
    data = bytearray((tmp_path / "whole").read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    for word, value in words:
        struct.pack_into("<q", data, min(18 + 4 * word, len(data) - 8), value)
    Path(f"{prefix}.idx").write_bytes(data[: len(data) - max(0, cut - 190)])
    try:
        ours = open_indexed(prefix)
    except InputError:
        return
    theirs = IndexedDataset(str(prefix), mmap=False)
    tokens = np.fromfile(f"{prefix}.bin", ours.index.dtype)
    assert np.array_equal(np.concatenate([ours[i] for i in range(len(ours))]), tokens)
    assert np.array_equal(np.concatenate([theirs[i] for i in range(len(theirs))]), tokens)


# --- 36: token ids out of range ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 100, 65536, 1 << 40])
def test_writing_an_id_out_of_range_names_document_and_position(tmp_path, bad):
    with DatasetWriter(tmp_path / "set", vocab_size=100) as writer:
        writer.add(np.array([1, 2, 3]), np.array([2, 1]))
        with pytest.raises(CorruptInputError, match=rf"document 3, position 1: token id {bad}, expected 0 to 99"):
            writer.add(np.array([4, 5, bad, 6]), np.array([1, 3]))
    assert list(tmp_path.iterdir()) == []


def test_reading_ids_beyond_the_vocabulary_names_document_and_position(prefix):
    assert len(open_indexed(prefix, vocab_size=13)) == 3
    with pytest.raises(CorruptInputError, match=r"set\.bin: document 2, position 2: token id 11, expected 0 to 10"):
        open_indexed(prefix, vocab_size=11)


def test_negative_ids_in_an_int32_file_are_found(tmp_path):
    prefix = write_set(tmp_path / "set", vocab_size=70000)
    tokens = np.fromfile(f"{prefix}.bin", np.int32)
    tokens[4] = -5
    tokens.tofile(f"{prefix}.bin")
    with pytest.raises(CorruptInputError, match=r"document 2, position 0: token id -5"):
        open_indexed(prefix, vocab_size=70000)


def test_the_range_is_kept_and_found_anew_when_the_file_changes(prefix):
    record = Path(f"{prefix}.range.json")
    record.unlink()
    open_indexed(prefix, vocab_size=100)
    assert json.loads(record.read_text())["largest"] == 12
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    tokens[0] = 200
    tokens.tofile(f"{prefix}.bin")
    with pytest.raises(CorruptInputError, match="document 0, position 0: token id 200"):
        open_indexed(prefix, vocab_size=100)
    record.write_text("{broken")
    with pytest.raises(CorruptInputError, match="token id 200"):
        open_indexed(prefix, vocab_size=100)


def test_a_folder_that_cannot_be_written_is_opened_all_the_same(prefix):
    record = Path(f"{prefix}.range.json")
    record.unlink()
    record.mkdir()  # stands for a read-only folder: tests may run as root
    assert len(open_indexed(prefix, vocab_size=100)) == 3


# --- 37: more than 2^31 bytes --------------------------------------------------------------------------------------


def test_documents_beyond_two_gibibytes_are_read_at_their_place(tmp_path):
    prefix = tmp_path / "big"
    num_tokens = 3 << 28  # 3 GiB of int32
    lengths = np.array([num_tokens // 3] * 3)
    Path(f"{prefix}.idx").write_bytes(index_bytes(lengths, np.dtype(np.int32)))
    with Path(f"{prefix}.bin").open("wb") as stream:
        stream.seek(4 * num_tokens - 8)
        stream.write(struct.pack("<ii", 77, 78))
    assert read_index(prefix).num_tokens == num_tokens
    for mmap in (True, False):
        data = open_indexed(prefix, mmap=mmap)
        assert data.get(2, offset=int(lengths[2]) - 3, length=3).tolist() == [0, 77, 78]


def test_pointers_of_many_small_documents_do_not_overflow():
    lengths = np.full(3_000_000, 1000, np.int32)
    data = index_bytes(lengths, np.dtype(np.int32))
    pointers = np.frombuffer(data, "<i8", len(lengths), HEADER.size + 4 * len(lengths))
    assert int(pointers[-1]) == (len(lengths) - 1) * 4000 > 1 << 33


def test_a_document_longer_than_the_format_holds_is_refused():
    with pytest.raises(CorruptInputError, match="document 1 has 2147483648 tokens"):
        index_bytes(np.array([1, 1 << 31]), np.dtype(np.int32))


# --- 38: bad records -----------------------------------------------------------------------------------------------

BAD_LINES = {
    b'{"text": "unfinished': "not JSON",
    b'{"title": "no text"}': r"no field 'text'; it has 'title'",
    b'{"text": ""}': "field 'text' is empty",
    b'{"text": null}': "field 'text' is NoneType",
    b'{"text": 5}': "field 'text' is int",
    b'["text"]': "expected a JSON object, got list",
    b'{"text": "a\\ud800b"}': r"lone surrogate U\+D800 at character 1",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": ' + b"[" * 100_000: "not JSON",
    b'{"text": "' + b"x" * 5000 + b'"}': "5,013 bytes, more than the limit of 4,000|more than the limit",
}
LIMIT = 200_000


@pytest.mark.parametrize("bad", BAD_LINES, ids=[message[:20] for message in BAD_LINES.values()])
def test_a_bad_line_is_an_error_with_file_and_line_or_skipped_and_listed(tmp_path, tokenizer, bad):
    limit = 4000 if b"xxx" in bad else LIMIT
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + bad + b'\n{"text": "four"}\n' + bad)
    with pytest.raises(CorruptInputError, match=rf"data\.jsonl, line 3: .*({BAD_LINES[bad]}).*--skip-bad"):
        prepare([path], tokenizer, tmp_path / "set", workers=1, max_document_bytes=limit)
    assert not list(tmp_path.glob("set*"))
    report = prepare([path], tokenizer, tmp_path / "set", workers=1, max_document_bytes=limit, skip_bad=True)
    assert (report.documents, report.blank, len(report.skipped)) == (2, 1, 2)
    assert ", line 3: " in report.skipped[0]
    assert ", line 5: " in report.skipped[1]


def test_line_numbers_hold_across_units_and_workers(tmp_path, tokenizer, monkeypatch):
    from megatron_qwen.data import sources

    path = tmp_path / "data.jsonl"
    lines = [b'{"text": "%d"}' % i for i in range(1000)]
    lines[4] = lines[777] = lines[999] = b"{"
    path.write_bytes(b"\n".join(lines))
    for unit_bytes in (7, 100, 1 << 20):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        workers = 2 if unit_bytes == 100 else 1
        report = prepare([path], tokenizer, tmp_path / "set", workers=workers, skip_bad=True, overwrite=True)
        assert [line.split(":")[0].split()[-1] for line in report.skipped] == ["5", "778", "1000"]
        assert report.documents == 997


def test_a_line_of_100_megabytes_is_refused_without_being_read_whole(tmp_path, tokenizer):
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        stream.write(b"words and " * 10_000_000)
        stream.write(b'"}\n{"text": "after"}\n')
    with pytest.raises(CorruptInputError, match=r"line 2: 100,000,013 bytes, more than the limit of 67,108,864"):
        prepare([path], tokenizer, tmp_path / "set", workers=1)
    report = prepare([path], tokenizer, tmp_path / "set", workers=2, skip_bad=True)
    assert (report.documents, len(report.skipped)) == (2, 1)


def test_bad_text_files_and_rows_are_named(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    pa.parquet.write_table(pa.table({"text": ["a", None, "", "b"]}), tmp_path / "t.parquet")
    sources = [tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "t.parquet"]
    with pytest.raises(CorruptInputError, match=r"latin\.txt: not UTF-8: .* at byte 3"):
        prepare(sources, tokenizer, tmp_path / "set", workers=1)
    report = prepare(sources, tokenizer, tmp_path / "set", workers=1, skip_bad=True)
    assert report.documents == 2
    assert [line.split(": ", 1)[1][:13] for line in report.skipped] == [
        "not UTF-8: un",
        "empty file",
        "field 'text' ",
        "field 'text' ",
    ]
    assert "t.parquet, row 1: " in report.skipped[2]
    for name, data in (("broken.parquet", b"PAR1nothing"), ("broken.jsonl.gz", b"\x1f\x8bnothing")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptInputError, match=name):
            prepare([tmp_path / name], tokenizer, tmp_path / "other", workers=1)


def test_sources_without_a_usable_document_are_refused(tmp_path, tokenizer):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(CorruptInputError, match="hold no document"):
        prepare([tmp_path / "blank.jsonl"], tokenizer, tmp_path / "set", workers=1)
    assert not list(tmp_path.glob("set*"))
