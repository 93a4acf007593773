"""Reading the documents of one unit, each checked; what is wrong comes back as a `BadRecord`, not as text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_qwen.data.sources import Files, LineRange, Lines, RowGroup, Unit, open_parquet

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read.

    Attributes:
        field: JSON field or Parquet column with the text.
        max_document_bytes: a longer line or file is a bad record; it also bounds the memory of a worker.
    """

    field: str = "text"
    max_document_bytes: int = 64 << 20


@dataclass(frozen=True)
class Document:
    """One text; `number` counts lines (from 1) or rows (from 0) of `path`, None where the file is the document."""

    path: str
    number: int | None
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used. A line number counts from the begin of the unit until `located` moves it."""

    path: str
    number: int | None
    reason: str
    unit: str = "line"

    def located(self, lines_before: int) -> BadRecord:
        """Return the record with a line number of the whole file."""
        if self.number is None or self.unit != "line":
            return self
        return BadRecord(self.path, self.number + lines_before, self.reason)

    def __str__(self) -> str:
        return f"{self.path}{f', {self.unit} {self.number}' if self.number is not None else ''}: {self.reason}"


class BlankLine:
    """An empty line or file that is passed over and counted, not a fault."""


Record = Document | BadRecord | BlankLine


def read_documents(unit: Unit, options: ReadOptions) -> Iterator[Record]:
    """Yield one record for each line, row or file of `unit`, in order."""
    if isinstance(unit, Files):
        for path in unit.paths:
            yield _read_text_file(path, unit.listed, options)
    elif isinstance(unit, LineRange):
        with Path(unit.path).open("rb") as stream:
            if unit.start > 0:
                # A line belongs to the range its first byte lies in: go past the one that began before.
                stream.seek(unit.start - 1)
                _skip_line(stream, unit.end)
            yield from _read_lines(stream, unit.path, unit.end, options, at_start=unit.start == 0)
    elif isinstance(unit, Lines):
        yield from _read_lines(io.BytesIO(unit.data), unit.path, len(unit.data), options, at_start=False)
    else:
        yield from _read_rows(unit, options)


def _read_text_file(path: str, listed: bool, options: ReadOptions) -> Record:
    size = Path(path).stat().st_size
    if size > options.max_document_bytes:
        return BadRecord(path, None, _too_long(size, options))
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRecord(path, None, f"not UTF-8: {error.reason} at byte {error.start}")
    if text:
        return Document(path, None, text)
    return BadRecord(path, None, "empty file") if listed else BlankLine()


def _skip_line(stream: IO[bytes], end: int) -> int:
    """Read past the next newline, at most to about `end`; return the number of bytes passed."""
    passed = 0
    while stream.tell() < end and (block := stream.readline(BLOCK_BYTES)):
        passed += len(block)
        if block.endswith(b"\n"):
            break
    return passed


def _read_lines(stream: IO[bytes], path: str, end: int, options: ReadOptions, *, at_start: bool) -> Iterator[Record]:
    number = 0
    while stream.tell() < end and (line := stream.readline(options.max_document_bytes + 1)):
        number += 1
        if len(line) > options.max_document_bytes and not line.endswith(b"\n"):
            size = len(line) + _skip_line(stream, 1 << 62)
            yield BadRecord(path, number, _too_long(size, options))
            continue
        if at_start and number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield BlankLine() if not line.strip() else _parse_line(line, path, number, options.field)


def _parse_line(line: bytes, path: str, number: int, field: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(path, number, f"not UTF-8: {error.reason} at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadRecord(path, number, f"not JSON: {error}")
    if not isinstance(record, dict):
        return BadRecord(path, number, f"expected a JSON object, got {type(record).__name__}")
    if field not in record:
        return BadRecord(path, number, f"no field {field!r}; it has {', '.join(map(repr, list(record)[:8])) or 'none'}")
    return _check_text(record[field], path, number, field, "line")


def _read_rows(unit: RowGroup, options: ReadOptions) -> Iterator[Record]:
    row = unit.first_row
    table = open_parquet(unit.path)
    for batch in table.iter_batches(batch_size=256, row_groups=[unit.index], columns=[options.field]):
        for value in batch.column(0).to_pylist():
            record = _check_text(value, unit.path, row, options.field, "row")
            if isinstance(record, Document) and len(record.text) > options.max_document_bytes:
                record = BadRecord(unit.path, row, _too_long(len(record.text), options), "row")
            yield record
            row += 1


def _check_text(value: object, path: str, number: int, field: str, unit: str) -> Record:
    if not isinstance(value, str):
        return BadRecord(path, number, f"field {field!r} is {type(value).__name__}, expected a string", unit)
    if not value:
        return BadRecord(path, number, f"field {field!r} is empty", unit)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            reason = f"lone surrogate U+{code:04X} at character {error.start} of field {field!r}"
            return BadRecord(path, number, reason, unit)
    return Document(path, number, value)


def _too_long(size: int, options: ReadOptions) -> str:
    return (
        f"{size:,} bytes, more than the limit of {options.max_document_bytes:,} for one document "
        "(--max-document-bytes raises it)"
    )
