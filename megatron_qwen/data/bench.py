"""How fast `prepare` is, against the tokenizers library alone on the same text with as many processes."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_qwen.data.documents import Document, ReadOptions, read_documents
from megatron_qwen.data.prepare import prepare
from megatron_qwen.data.sources import Unit, find_files, plan_units
from megatron_qwen.data.tokenizer import QwenTokenizer


@dataclass(frozen=True)
class PrepareBenchmark:
    """Seconds of each repetition, run in turn; `ratio` is median bare time over median prepare time.

    `bare_seconds` is `encode_batch` alone: texts read, tokenizer loaded and processes warm before the clock starts.
    `prepare_seconds` is everything: starting processes, reading, encoding, checking, hashing, writing, fsync.
    """

    text_bytes: int
    tokens: int
    workers: int
    bare_seconds: tuple[float, ...]
    prepare_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Throughput of prepare over that of bare encode_batch."""
        return statistics.median(self.bare_seconds) / statistics.median(self.prepare_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {**asdict(self), "ratio": self.ratio}


def benchmark_prepare(
    sources: Sequence[str | Path],
    tokenizer: QwenTokenizer,
    *,
    workers: int = 2,
    repeats: int = 3,
    patterns: Sequence[str] | None = None,
) -> PrepareBenchmark:
    """Time `prepare` and bare `encode_batch` in turn on the text of `sources`; bad records are left out of both.

    Raises:
        QwenError: what `prepare` raises.
    """
    units = list(plan_units(find_files(sources, patterns)))
    bare: list[float] = []
    full: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            bare.append(_time_bare(units, tokenizer, workers))
            report = prepare(
                sources, tokenizer, Path(folder, str(repeat)), workers=workers, patterns=patterns, skip_bad=True
            )
            full.append(report.seconds)
    return PrepareBenchmark(report.text_bytes, report.tokens, workers, tuple(bare), tuple(full))


def _time_bare(units: Sequence[Unit], tokenizer: QwenTokenizer, workers: int) -> float:
    options = ReadOptions()
    texts = [[r.text for r in read_documents(unit, options) if isinstance(r, Document)] for unit in units]
    # Every process holds all texts before the clock starts; a task is the number of a unit, so that none idles.
    with ProcessPoolExecutor(
        workers,
        get_context("spawn"),
        initializer=_start_bare_worker,
        initargs=(tokenizer.backend.to_str(), texts),
    ) as pool:
        # A barrier of sleeping tasks makes sure that every process is up.
        list(pool.map(time.sleep, [0.5] * workers))
        start = time.monotonic()
        list(pool.map(_encode_one_unit, range(len(units))))
        return time.monotonic() - start


_backend: Tokenizer | None = None
_texts: list[list[str]] = []


def _start_bare_worker(tokenizer_json: str, texts: list[list[str]]) -> None:
    global _backend, _texts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _backend, _texts = Tokenizer.from_str(tokenizer_json), texts


def _encode_one_unit(number: int) -> int:
    assert _backend is not None
    return len(_backend.encode_batch(_texts[number], add_special_tokens=False))
