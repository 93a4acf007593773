"""The texts of sources as one stream, for training a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_qwen.data.documents import BlankLine, Document, ReadOptions, read_documents
from megatron_qwen.data.prepare import Progress
from megatron_qwen.data.sources import find_files, plan_units, unit_path
from megatron_qwen.errors import CorruptInputError, IncompleteInputError


class Corpus:
    """Iterate over the documents of `sources` once; `documents`, `text_bytes` and `skipped` tell what was read.

    Raises while iterating:
        CorruptInputError: a bad record and not `skip_bad`.
        IncompleteInputError: a source does not exist.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        options: ReadOptions,
        *,
        patterns: Sequence[str] | None = None,
        skip_bad: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """List the files; nothing is read before the iteration."""
        self._files = find_files(sources, patterns)
        self._options = options
        self._skip_bad = skip_bad
        self._on_progress = on_progress or (lambda _: None)
        self.documents = 0
        self.text_bytes = 0
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[str]:
        total = sum(file.num_bytes for file in self._files)
        done = 0
        lines_before: Counter[str] = Counter()
        for unit in plan_units(self._files, self._options.field):
            path = unit_path(unit)
            num_lines = 0
            for record in read_documents(unit, self._options):
                num_lines += 1
                if isinstance(record, Document):
                    self.documents += 1
                    self.text_bytes += len(record.text.encode())
                    yield record.text
                elif not isinstance(record, BlankLine):
                    self._leave_out(str(record.located(lines_before[path])))
            lines_before[path] += num_lines
            done += unit.num_bytes
            self._on_progress(Progress(done, total, self.documents, 0))
        if not self.documents:
            raise IncompleteInputError(f"{len(self._files)} files hold no document to train on")

    def _leave_out(self, record: str) -> None:
        if not self._skip_bad:
            raise CorruptInputError(f"{record}; --skip-bad leaves such records out and lists them")
        self.skipped.append(record)
