"""Text to Megatron's `.bin/.idx`: plan units, encode them in worker processes, write them in order."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_qwen.data.documents import ReadOptions
from megatron_qwen.data.encode import (
    EncodedUnit,
    EncodeOptions,
    encode_in_worker,
    encode_unit,
    single_threaded_encoding,
    start_worker,
)
from megatron_qwen.data.sources import Unit, find_files, plan_units, unit_path
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.data.writer import DatasetWriter
from megatron_qwen.errors import ConfigError, CorruptInputError, RankFailure

logger = logging.getLogger(__name__)

UNITS_PER_WORKER = 3


@dataclass(frozen=True)
class Progress:
    """State of a running `prepare`; bytes are those of the input files."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        prefix: of the data set.
        files, documents, tokens: counts; tokens include one `<|endoftext|>` for each document.
        text_bytes: UTF-8 size of the documents.
        dtype: of the ids in the `.bin`.
        blank: empty lines and empty files of folders, passed over.
        embedded_eod: `<|endoftext|>` that was written inside documents and ends them early for a model.
        skipped: bad records left out ("FILE, line N: reason").
        sha256: digests of `.bin` and `.idx`.
        seconds: wall-clock time.
    """

    prefix: str
    files: int
    documents: int
    tokens: int
    text_bytes: int
    dtype: str
    blank: int
    embedded_eod: int
    skipped: tuple[str, ...]
    sha256: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self)


def prepare(
    sources: Sequence[str | Path],
    tokenizer: QwenTokenizer,
    out_prefix: str | Path,
    *,
    workers: int | None = None,
    field: str = "text",
    patterns: Sequence[str] | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    max_document_bytes: int = ReadOptions.max_document_bytes,
    on_progress: Callable[[Progress], None] | None = None,
) -> PrepareReport:
    """Encode all documents of `sources` into `OUT_PREFIX.bin/.idx`, one `<|endoftext|>` after each.

    The files are the same, byte for byte, for any number of workers. They take their names when all is written
    and durable; an interrupted run leaves only `*.incomplete-*` files, which no reader accepts.

    Args:
        sources: text, `.jsonl[.gz]`, `.parquet` files and folders of them, in this order.
        tokenizer: decides ids, dtype (uint16 below 65,500 tokens, else int32) and separator.
        out_prefix: path without `.bin`.
        workers: encoding processes; None takes one per available core, 1 encodes in this process.
        field: JSON field or Parquet column with the text.
        patterns: shell patterns for names of files in folders; None takes the usual text and source-code endings.
        skip_bad: leave out bad records and list them in the report, instead of stopping at the first.
        overwrite: replace an existing data set.
        max_document_bytes: longer lines and files are bad records.
        on_progress: called after each unit (about 2 MiB of input).

    Raises:
        ConfigError: bad option, or Parquet without pyarrow.
        IncompleteInputError: a source does not exist.
        CorruptInputError: a bad record, with file and line; or no document at all.
        StorageError: the target exists, or the disk refuses.
        RankFailure: a worker process died.
    """
    start = time.monotonic()
    workers = _available_cores() if workers is None else workers
    if workers < 1 or max_document_bytes < 1:
        raise ConfigError(f"workers {workers}, max_document_bytes {max_document_bytes}: expected at least 1")
    files = find_files(sources, patterns)
    bytes_total = sum(file.num_bytes for file in files)
    options = EncodeOptions(tokenizer.eod_id, tokenizer.splits_like_qwen, ReadOptions(field, max_document_bytes))
    tally = _Tally()
    with DatasetWriter(out_prefix, vocab_size=tokenizer.vocab_size, overwrite=overwrite) as writer:
        for unit, encoded in _encode_all(plan_units(files, field), tokenizer, options, workers):
            tally.add(unit, encoded, skip_bad=skip_bad)
            writer.add(encoded.ids, encoded.lengths)
            if on_progress:
                on_progress(Progress(tally.bytes_done, bytes_total, writer.num_documents, writer.num_tokens))
        if writer.num_documents == 0:
            raise CorruptInputError(f"{len(files)} files hold no document to encode; nothing was written")
        record = writer.commit(
            {
                "tokenizer": {
                    "fingerprint": tokenizer.fingerprint(),
                    "vocab_size": tokenizer.vocab_size,
                    "eod_id": tokenizer.eod_id,
                },
                **tally.description(),
            }
        )
    return PrepareReport(
        prefix=str(out_prefix),
        files=len(files),
        documents=record["documents"],
        tokens=record["tokens"],
        dtype=record["dtype"],
        sha256=record["sha256"],
        seconds=time.monotonic() - start,
        skipped=tuple(tally.skipped),
        text_bytes=tally.text_bytes,
        blank=tally.blank,
        embedded_eod=tally.embedded_eod,
    )


class _Tally:
    """Counts over all units, and line numbers of units turned into those of files."""

    def __init__(self) -> None:
        self.bytes_done = 0
        self.text_bytes = 0
        self.blank = 0
        self.embedded_eod = 0
        self.skipped: list[str] = []
        self._lines_before: Counter[str] = Counter()

    def add(self, unit: Unit, encoded: EncodedUnit, *, skip_bad: bool) -> None:
        """Take in a unit; units must come in the order of the plan."""
        path = unit_path(unit)
        bad = [str(record.located(self._lines_before[path])) for record in encoded.bad]
        if bad and not skip_bad:
            raise CorruptInputError(f"{bad[0]}; --skip-bad leaves such records out and lists them")
        self.skipped += bad
        self._lines_before[path] += encoded.num_lines
        self.bytes_done += unit.num_bytes
        self.text_bytes += encoded.text_bytes
        self.blank += encoded.num_blank
        self.embedded_eod += encoded.num_embedded_eod

    def description(self) -> dict[str, Any]:
        """Return what the side file says about the source text."""
        return {
            "text_bytes": self.text_bytes,
            "blank": self.blank,
            "embedded_eod": self.embedded_eod,
            "skipped": self.skipped,
        }


def _encode_all(
    units: Iterable[Unit], tokenizer: QwenTokenizer, options: EncodeOptions, workers: int
) -> Iterator[tuple[Unit, EncodedUnit]]:
    """Yield each unit with its ids, in the order of `units`, whatever the number of workers."""
    if workers == 1:
        with single_threaded_encoding():
            for unit in units:
                yield unit, encode_unit(tokenizer.backend, unit, options)
        return
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=start_worker, initargs=(tokenizer.backend.to_str(), options)
    )
    running: deque[tuple[Unit, Future[EncodedUnit]]] = deque()
    try:
        for unit in units:
            running.append((unit, pool.submit(encode_in_worker, unit)))
            if len(running) >= UNITS_PER_WORKER * workers:
                yield _finished(*running.popleft())
        while running:
            yield _finished(*running.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(unit: Unit, future: Future[EncodedUnit]) -> tuple[Unit, EncodedUnit]:
    try:
        return unit, future.result()
    except BrokenProcessPool as error:
        raise RankFailure(
            f"a worker process died near {unit_path(unit)}; most often it ran out of memory: use fewer --workers, "
            "or a smaller --max-document-bytes"
        ) from error


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
