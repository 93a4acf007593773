"""What a worker process does with a unit: read its documents, encode them, hand back ids and lengths.

Imports neither torch nor megatron, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from megatron_qwen.data.documents import BadRecord, BlankLine, Document, ReadOptions, read_documents
from megatron_qwen.data.sources import Unit

PIECE_CHARACTERS = 1 << 18
BATCH_CHARACTERS = 1 << 21

# Where Qwen's pre-tokenizer always ends a word, whatever stands around: before a space that follows a visible
# character, and between a letter and a full-width comma or stop. NFC changes nothing across these either, so
# encoding the two sides apart gives the same ids. The characters before are few and plain on purpose.
SAFE_CUT = re.compile(r"(?<=[!-~\u4e00-\u9fa5])(?= )|(?<=[A-Za-z\u4e00-\u9fa5])(?=[\u3002\uff0c])")


@dataclass(frozen=True)
class EncodeOptions:
    """What a worker needs to know.

    Attributes:
        eod_id: id put after each document.
        may_cut: long documents may be cut at `SAFE_CUT` (the tokenizer splits like Qwen's).
        read: how documents are read.
    """

    eod_id: int
    may_cut: bool
    read: ReadOptions


@dataclass
class EncodedUnit:
    """The documents of one unit.

    Attributes:
        ids: int32 [sum of lengths], `eod_id` after each document.
        lengths: int64 [documents].
        bad: records left out, in order, line numbers counted from the begin of the unit.
        num_lines: lines that begin in the unit (0 for other kinds).
        num_blank: empty lines or files passed over.
        text_bytes: UTF-8 size of the documents.
        num_embedded_eod: `<|endoftext|>` written inside documents.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    bad: list[BadRecord] = field(default_factory=list)
    num_lines: int = 0
    num_blank: int = 0
    text_bytes: int = 0
    num_embedded_eod: int = 0


def encode_unit(backend: Tokenizer, unit: Unit, options: EncodeOptions) -> EncodedUnit:
    """Read and encode `unit`; ids are those of `backend.encode(text, add_special_tokens=False)` of each document."""
    texts: list[str] = []
    result = EncodedUnit(np.empty(0, np.int32), np.empty(0, np.int64))
    for record in read_documents(unit, options.read):
        result.num_lines += 1
        if isinstance(record, Document):
            texts.append(record.text)
            result.text_bytes += len(record.text) if record.text.isascii() else len(record.text.encode())
        elif isinstance(record, BlankLine):
            result.num_blank += 1
        else:
            result.bad.append(record)
    result.ids, result.lengths = encode_texts(backend, texts, options)
    result.num_embedded_eod = int(np.count_nonzero(result.ids == options.eod_id)) - len(texts)
    return result


def encode_texts(
    backend: Tokenizer, texts: list[str], options: EncodeOptions
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Encode documents, `eod_id` after each.

    Returns:
        ids: int32 [tokens].
        lengths: int64 [documents], separator included.
    """
    eod = np.array([options.eod_id], np.int32)
    lengths = np.zeros(len(texts), np.int64)
    parts: list[npt.NDArray[np.int32]] = []
    for batch in _batches(texts, options.may_cut):
        encoded = backend.encode_batch_fast([piece for _, piece, _ in batch], add_special_tokens=False)
        for (document, _, is_last), item in zip(batch, encoded, strict=True):
            ids = np.array(item.ids, np.int32)
            parts.append(ids)
            lengths[document] += len(ids)
            if is_last:
                parts.append(eod)
                lengths[document] += 1
    return (np.concatenate(parts) if parts else np.empty(0, np.int32)), lengths


def _batches(texts: list[str], may_cut: bool) -> Iterator[list[tuple[int, str, bool]]]:
    """Group (document index, piece, is the document's last piece) so that a batch bounds the encoder's memory."""
    batch: list[tuple[int, str, bool]] = []
    size = 0
    for document, text in enumerate(texts):
        pieces = cut_text(text) if may_cut and len(text) > PIECE_CHARACTERS else [text]
        for number, piece in enumerate(pieces, start=1):
            batch.append((document, piece, number == len(pieces)))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def cut_text(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Cut `text` at `SAFE_CUT` into pieces of about `size` characters or more; one piece where no cut is safe."""
    pieces = []
    start = 0
    while len(text) - start > size and (cut := SAFE_CUT.search(text, start + size)):
        pieces.append(text[start : cut.start()])
        start = cut.start()
    pieces.append(text[start:])
    return pieces


@contextmanager
def single_threaded_encoding() -> Iterator[None]:
    """Keep the tokenizers library in one thread: its threads contend for the word cache.

    Measured on 2 cores with Qwen's vocabulary: 2 threads reach 1.1 MB/s, one thread 2.8 MB/s, 2 processes 5.6 MB/s.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_worker: tuple[Tokenizer, EncodeOptions] | None = None


def start_worker(tokenizer_json: str, options: EncodeOptions) -> None:
    """Set up a worker process; give it to the pool as initializer."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (Tokenizer.from_str(tokenizer_json), options)


def encode_in_worker(unit: Unit) -> EncodedUnit:
    """`encode_unit` with the tokenizer that `start_worker` has set up."""
    assert _worker is not None
    return encode_unit(_worker[0], unit, _worker[1])
