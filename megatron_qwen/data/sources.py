"""Where documents come from: text files, JSONL, Parquet and source-code folders, cut into units of work.

A unit is small enough to be encoded in about a second and is read by the worker that encodes it. The order of
units, and of documents in a unit, depends on the sources alone, so the result does not depend on the workers.
"""

from __future__ import annotations

import fnmatch
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError

UNIT_BYTES = 2 << 20
DEFAULT_PATTERNS = (
    *("*.txt", "*.md", "*.rst", "*.tex", "*.jsonl", "*.ndjson", "*.jsonl.gz", "*.parquet"),
    *("*.py", "*.pyi", "*.c", "*.h", "*.cc", "*.cpp", "*.hpp", "*.cu", "*.cuh", "*.java", "*.js", "*.ts", "*.go"),
    *("*.rs", "*.rb", "*.sh", "*.sql", "*.html", "*.css", "*.toml", "*.yaml", "*.yml", "*.cmake"),
)
"""File names taken from a folder when no pattern is given."""


@dataclass(frozen=True)
class SourceFile:
    """One input file. `listed` tells a file named by the user from one found in a folder."""

    path: Path
    num_bytes: int
    listed: bool

    @property
    def kind(self) -> str:
        """By the name: one of "jsonl", "jsonl.gz", "parquet" and "text"."""
        name = self.path.name.lower()
        if name.endswith((".jsonl", ".ndjson")):
            return "jsonl"
        if name.endswith((".jsonl.gz", ".ndjson.gz")):
            return "jsonl.gz"
        return "parquet" if name.endswith(".parquet") else "text"


@dataclass(frozen=True)
class Files:
    """Whole text files, one document each. An empty one is a fault only where the user named it."""

    paths: tuple[str, ...]
    listed: bool
    num_bytes: int


@dataclass(frozen=True)
class LineRange:
    """The lines of a JSONL file that begin in the bytes [start, end)."""

    path: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the range in the file."""
        return self.end - self.start


@dataclass(frozen=True)
class Lines:
    """Lines of a compressed JSONL file, decompressed already; `num_bytes` are those read from the file for them."""

    path: str
    data: bytes
    num_bytes: int


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file."""

    path: str
    index: int
    first_row: int
    num_bytes: int


Unit = Files | LineRange | Lines | RowGroup


def unit_path(unit: Unit) -> str:
    """Return the file of a unit, the first if it has several."""
    return unit.paths[0] if isinstance(unit, Files) else unit.path


def find_files(sources: Sequence[str | Path], patterns: Sequence[str] | None = None) -> list[SourceFile]:
    """List the input files: named ones as given, folders searched recursively in the order of their names.

    Hidden files and folders and `__pycache__` are left out, links to folders are not followed.

    Args:
        sources: files and folders.
        patterns: shell patterns for the names of files in folders; None takes `DEFAULT_PATTERNS`.

    Raises:
        ConfigError: no source at all.
        IncompleteInputError: a source does not exist, or a folder holds no matching file.
    """
    if not sources:
        raise ConfigError("no source given; expected files or folders with text")
    found: list[SourceFile] = []
    for source in map(Path, sources):
        if source.is_file():
            found.append(SourceFile(source, source.stat().st_size, listed=True))
        elif source.is_dir():
            matching = list(_walk(source, patterns or DEFAULT_PATTERNS))
            if not matching:
                wanted = " ".join(patterns) if patterns else "the usual text and source-code endings (see --pattern)"
                raise IncompleteInputError(f"{source}: no file in this folder matches {wanted}")
            found.extend(matching)
        else:
            raise IncompleteInputError(f"{source}: no such file or folder")
    return found


def _walk(folder: Path, patterns: Sequence[str]) -> Iterator[SourceFile]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(root, name)
            hidden = name.startswith(".")
            if not hidden and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and path.is_file():
                yield SourceFile(path, path.stat().st_size, listed=False)


def plan_units(files: Sequence[SourceFile], field: str = "text") -> Iterator[Unit]:
    """Cut the files into units of about `UNIT_BYTES`, lazily, in order.

    Raises:
        ConfigError: a Parquet file without pyarrow installed.
        CorruptInputError: a Parquet or gzip file that cannot be read, or without the column `field`.
    """
    waiting: list[SourceFile] = []
    for file in files:
        if waiting and (file.kind != "text" or file.listed != waiting[0].listed or _size(waiting) >= UNIT_BYTES):
            yield _files_unit(waiting)
            waiting = []
        if file.kind == "text":
            waiting.append(file)
        elif file.kind == "jsonl":
            for start in range(0, file.num_bytes, UNIT_BYTES):
                yield LineRange(str(file.path), start, min(start + UNIT_BYTES, file.num_bytes))
        elif file.kind == "jsonl.gz":
            yield from _decompress(file)
        else:
            yield from _row_groups(file, field)
    if waiting:
        yield _files_unit(waiting)


def _size(files: Sequence[SourceFile]) -> int:
    return sum(file.num_bytes for file in files)


def _files_unit(files: Sequence[SourceFile]) -> Files:
    return Files(tuple(str(file.path) for file in files), files[0].listed, _size(files))


def _decompress(file: SourceFile) -> Iterator[Lines]:
    """Decompress here and hand out whole lines: gzip cannot be read from the middle."""
    try:
        with file.path.open("rb") as raw, gzip.open(raw) as stream:
            before = 0
            while lines := stream.readlines(UNIT_BYTES):
                position = raw.tell()
                yield Lines(str(file.path), b"".join(lines), position - before)
                before = position
    except (OSError, EOFError, zlib.error) as error:
        raise CorruptInputError(f"{file.path}: cannot decompress: {error}") from error


def _row_groups(file: SourceFile, field: str) -> Iterator[RowGroup]:
    table = open_parquet(str(file.path))
    if field not in table.schema_arrow.names:
        raise CorruptInputError(
            f"{file.path}: no column {field!r}; it has {', '.join(table.schema_arrow.names)} (see --jsonl-field)"
        )
    first_row = 0
    for index in range(table.num_row_groups):
        yield RowGroup(str(file.path), index, first_row, file.num_bytes // table.num_row_groups)
        first_row += table.metadata.row_group(index).num_rows


def open_parquet(path: str) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`.

    Raises:
        ConfigError: pyarrow is not installed.
        CorruptInputError: not a Parquet file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow; run: pip install 'megatron-qwen[data]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CorruptInputError(f"{path}: not a readable Parquet file: {error}") from error
