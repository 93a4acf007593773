from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.data import encode, sources
from megatron_qwen.data.documents import ReadOptions
from megatron_qwen.data.encode import EncodeOptions, cut_text, encode_texts
from megatron_qwen.data.index_format import idx_path, read_index
from megatron_qwen.data.indexed import map_tokens, open_indexed
from megatron_qwen.data.prepare import prepare
from megatron_qwen.errors import ConfigError, IncompleteInputError, StorageError

SIDE_FILES = (".bin", ".idx", ".json")


def documents_of(prefix) -> list[list[int]]:
    index = read_index(prefix)
    ends = np.cumsum(index.lengths)
    return [part.tolist() for part in np.split(map_tokens(prefix, index), ends[:-1])]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"id": 1, field: text}, ensure_ascii=len(text) % 2 == 0) + "\n")
    return path


@pytest.fixture
def mixed_sources(tmp_path, library_texts) -> list[Path]:
    """JSONL (plain and gzip), a Parquet file, a single text and a folder of code, in odd sizes."""
    import pyarrow as pa
    import pyarrow.parquet

    folder = tmp_path / "code"
    (folder / "b" / "__pycache__").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, text in (("z.py", library_texts[0]), ("b/a.py", "x = 1\n"), ("b/empty.py", ""), ("b/picture.png", "no")):
        (folder / name).write_text(text)
    (folder / ".git" / "config.py").write_text("hidden")
    (folder / "b" / "__pycache__" / "a.py").write_text("hidden")
    pa.parquet.write_table(
        pa.table({"text": [f"row {i} é" for i in range(700)], "n": range(700)}),
        tmp_path / "t.parquet",
        row_group_size=300,
    )
    (tmp_path / "one.txt").write_bytes("\ufeffbyte order mark\r\n汉字".encode())
    lines = [f"line {i} " * (1 + i % 7) for i in range(501)]
    return [
        write_jsonl(tmp_path / "a.jsonl", lines),
        write_jsonl(tmp_path / "b.jsonl.gz", lines[:77]),
        tmp_path / "t.parquet",
        tmp_path / "one.txt",
        folder,
    ]


def test_every_document_is_its_ids_and_one_separator(mixed_sources, tokenizer, tmp_path, library_texts):
    report = prepare(mixed_sources, tokenizer, tmp_path / "out" / "set", workers=1)
    lines = [f"line {i} " * (1 + i % 7) for i in range(501)]
    expected = [
        *lines, *lines[:77], *[f"row {i} é" for i in range(700)], "byte order mark\r\n汉字", library_texts[0], "x = 1\n"
    ]  # fmt: skip
    # Files of a folder come in the order of the walk: those of a folder before those of its sub-folders.
    assert documents_of(tmp_path / "out" / "set") == [[*tokenizer.encode(text), tokenizer.eod_id] for text in expected]
    assert (report.documents, report.files, report.blank, report.embedded_eod) == (len(expected), 7, 1, 0)
    assert report.text_bytes == sum(len(text.encode()) for text in expected)
    assert report.dtype == "uint16"
    side = json.loads((tmp_path / "out" / "set.json").read_text())
    assert side["tokenizer"]["fingerprint"] == tokenizer.fingerprint()
    assert side["sha256"] == report.sha256
    assert not list((tmp_path / "out").glob("*incomplete*"))


def test_result_is_the_same_for_any_number_of_workers(mixed_sources, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)  # many units, lines across their borders
    digests = set()
    for workers in (1, 2, 3):
        prefix = tmp_path / f"w{workers}"
        prepare(mixed_sources, tokenizer, prefix, workers=workers)
        digests.add(tuple(Path(f"{prefix}{suffix}").read_bytes() for suffix in SIDE_FILES))
    monkeypatch.setattr(sources, "UNIT_BYTES", 1 << 30)
    prepare(mixed_sources, tokenizer, tmp_path / "one-unit", workers=1)
    digests.add(tuple((tmp_path / f"one-unit{suffix}").read_bytes() for suffix in SIDE_FILES))
    assert len(digests) == 1


@pytest.mark.parametrize("vocab", ["small", "large"])
def test_files_are_those_of_megatrons_builder(tmp_path, vocab):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_qwen.data.writer import DatasetWriter

    size = {"small": 65499, "large": 65500}[vocab]
    documents = [[1, 2, size - 1], [0], list(range(50))]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with DatasetWriter(tmp_path / "ours", vocab_size=size) as writer:
        writer.add(np.array([*documents[0], *documents[1]], np.int32), np.array([3, 1]))
        writer.add(np.array(documents[2], np.int64), np.array([50]))
        writer.commit({})
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        st.sampled_from(list("ab'sS1 2 .,!  \n\r\t\u3000\u00a0汉字。\uff0cé\u0301\u0300가\u11a8<|im_end|>_-")),
        min_size=1,
        max_size=80,
    ),
    size=st.integers(1, 9),
)
def test_cutting_long_documents_does_not_change_their_ids(tokenizer, text, size):
    pieces = cut_text(text, size)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_long_document_is_encoded_in_pieces_as_if_whole(tokenizer, library_texts, monkeypatch):
    assert tokenizer.splits_like_qwen
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 1000)
    ids, lengths = encode_texts(
        tokenizer.backend, library_texts[:3], EncodeOptions(tokenizer.eod_id, may_cut=True, read=ReadOptions())
    )
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in library_texts[:3]]
    assert lengths.tolist() == [len(document) for document in expected]
    assert ids.tolist() == [i for document in expected for i in document]


def test_separators_written_inside_documents_are_counted(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a<|endoftext|>b", "c"])
    assert prepare([path], tokenizer, tmp_path / "set", workers=1).embedded_eod == 1


def test_other_fields_and_patterns(tokenizer, tmp_path):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "a.jsonl", ["x"], field="content")
    (tmp_path / "d" / "b.py").write_text("skipped by pattern")
    report = prepare([tmp_path / "d"], tokenizer, tmp_path / "s", workers=1, field="content", patterns=["*.jsonl"])
    assert report.documents == 1
    with pytest.raises(IncompleteInputError, match=r"no file in this folder matches \*\.rs"):
        prepare([tmp_path / "d"], tokenizer, tmp_path / "s2", workers=1, patterns=["*.rs"])
    with pytest.raises(IncompleteInputError, match="no such file or folder"):
        prepare([tmp_path / "nothing"], tokenizer, tmp_path / "s2", workers=1)
    with pytest.raises(ConfigError, match="no source"):
        prepare([], tokenizer, tmp_path / "s2", workers=1)


def test_an_existing_data_set_is_kept_unless_asked(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    prepare([path], tokenizer, tmp_path / "s", workers=1)
    before = (tmp_path / "s.bin").read_bytes()
    write_jsonl(path, ["longer text", "more"])
    with pytest.raises(StorageError, match=r"s\.bin.* exist already"):
        prepare([path], tokenizer, tmp_path / "s", workers=1)
    assert (tmp_path / "s.bin").read_bytes() == before
    prepare([path], tokenizer, tmp_path / "s", workers=1, overwrite=True)
    assert len(open_indexed(tmp_path / "s", vocab_size=tokenizer.vocab_size)) == 2


def test_parquet_without_pyarrow_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-qwen\[data\]'"):
        prepare([tmp_path / "t.parquet"], tokenizer, tmp_path / "s", workers=1)


PREPARE_SCRIPT = """
import sys
from megatron_qwen.data.prepare import prepare
from megatron_qwen.data.tokenizer import QwenTokenizer
if __name__ == "__main__":
    prepare([sys.argv[1]], QwenTokenizer.load(sys.argv[2]), sys.argv[3], workers=int(sys.argv[4]), overwrite=True)
"""


def start_prepare(folder: Path, tokenizer, source: Path, workers: int, **environment: str) -> subprocess.Popen[bytes]:
    tokenizer.save(folder / "tokenizer")
    (folder / "run.py").write_text(PREPARE_SCRIPT)
    root = str(Path(__file__).parents[2])
    arguments = [str(folder / "run.py"), str(source), str(folder / "tokenizer"), str(folder / "set"), str(workers)]
    return subprocess.Popen([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": root, **environment})


@pytest.mark.parametrize(("point", "old_survives"), [("data.staged:1:kill", True), ("data.bin_renamed:1:kill", False)])
def test_killed_at_the_end_leaves_the_old_data_set_or_none(tokenizer, tmp_path, point, old_survives):
    old = write_jsonl(tmp_path / "old.jsonl", ["old text"])
    prepare([old], tokenizer, tmp_path / "set", workers=1)
    new = write_jsonl(tmp_path / "new.jsonl", ["new text", "and more"])
    process = start_prepare(tmp_path, tokenizer, new, 1, MEGATRON_QWEN_FAILPOINT=point)
    assert process.wait(60) == -signal.SIGKILL
    if old_survives:
        assert len(read_index(tmp_path / "set").lengths) == 1
    else:
        with pytest.raises(IncompleteInputError, match=r"set\.idx"):
            read_index(tmp_path / "set")
    prepare([new], tokenizer, tmp_path / "set", workers=1, overwrite=True)
    assert len(read_index(tmp_path / "set").lengths) == 2


def test_killed_in_the_middle_leaves_nothing_a_reader_takes(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "big.jsonl", ["some words to encode, again and again. " * 2000] * 400)
    process = start_prepare(tmp_path, tokenizer, source, 2)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob("set.incomplete-*.bin")):
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not idx_path(tmp_path / "set").exists()
    with pytest.raises(IncompleteInputError):
        open_indexed(tmp_path / "set")


def test_interrupt_removes_what_was_begun(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["text"] * 10)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tokenizer, tmp_path / "out" / "set", workers=2, on_progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_a_storage_error_that_leaves_nothing(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    process = start_prepare(tmp_path, tokenizer, source, 1, MEGATRON_QWEN_FAILPOINT="data.staged:1:enospc")
    assert process.wait(60) == 1
    assert not list(tmp_path.glob("set*"))


def test_worker_death_is_reported_not_waited_for(tokenizer, tmp_path, monkeypatch):
    from megatron_qwen.data import prepare as module
    from megatron_qwen.errors import RankFailure

    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    monkeypatch.setattr(module, "encode_in_worker", _die)
    with pytest.raises(RankFailure, match=r"worker process died near .*a\.jsonl"):
        prepare([source], tokenizer, tmp_path / "set", workers=2)
    assert not list(tmp_path.glob("set*"))


def _die(_: object) -> None:
    os._exit(9)
