"""Writes the files of an output: pieces over threads within a memory budget, each file hashed while it is written.

Writer threads take the pieces in order. Hasher threads follow each file up to the first byte that is not yet final
and read it back from the page cache, so SHA-256 costs no pass of its own and covers what the file really holds.
A file whose last byte is hashed is forced to the disk and entered into the journal.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_qwen.checkpoint.atomic import begin_writeback
from megatron_qwen.checkpoint.manifest import FileRecord, hash_files
from megatron_qwen.conversion.interfaces import OutputFile
from megatron_qwen.errors import ConfigError, Interrupted
from megatron_qwen.testing import failpoints

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_qwen.conversion.engine.staging import Journal

failpoints.register("convert.skeleton", "a file has its size and its header, no tensor bytes yet")
failpoints.register("convert.piece", "a piece is written, in the middle of a file")
failpoints.register("convert.file", "a file of tensors is whole and forced to the disk; the journal does not know it")
failpoints.register("convert.journal", "a file of tensors is whole and in the journal")

HASH_BYTES = 2 * 2**20
# A hasher that follows each slice sleeps and wakes for every one, which on a busy machine costs more than the hashing.
BATCH_BYTES = 16 * 2**20
WRITEBACK_BYTES = 32 * 2**20

Advance = Callable[[int, int], None]


def default_threads() -> int:
    """Return the number of writer threads: the processor cores this process may use, 2 to 8."""
    return max(2, min(8, len(os.sched_getaffinity(0))))


def peak_memory(files: Iterable[OutputFile], threads: int, max_memory: int | None = None) -> int:
    """Return the most bytes that writing `files` holds at once: the largest pieces side by side, and hash buffers."""
    peaks = sorted((piece.peak_bytes for file in files for piece in file.pieces), reverse=True)
    pieces = sum(peaks[:threads])
    return (pieces if max_memory is None else min(pieces, max_memory)) + _hashers(threads) * HASH_BYTES


def check_memory(files: Iterable[OutputFile], max_memory: int | None) -> None:
    """Check that every piece fits into the budget by itself.

    Raises:
        ConfigError: naming the largest that does not, and the smallest budget that works.
    """
    pieces = (piece for file in files for piece in file.pieces)
    largest = max(pieces, key=lambda piece: piece.peak_bytes, default=None)
    if max_memory is not None and largest is not None and largest.peak_bytes > max_memory:
        raise ConfigError(
            f"--max-memory {max_memory:,}: {largest.label} needs {largest.peak_bytes:,} bytes at once; the smallest "
            f"budget that works is {largest.peak_bytes:,}"
        )


def write_output(
    files: Sequence[OutputFile],
    folder: Path,
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    advance: Advance = lambda tensors, num_bytes: None,
    journal: Journal | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, FileRecord]:
    """Write `files` below the existing `folder` and return size and SHA-256 of each by name.

    Args:
        files: names are unique; the pieces of a file and its skeleton cover it exactly.
        folder: other files in it are left alone.
        threads: that write; None takes `default_threads`. Half as many hash beside them.
        max_memory: bytes that the pieces under way may hold together; None for no limit.
        advance: told (tensors, bytes) done, from one thread at a time.
        journal: remembers finished files. Those it knows already are hashed; where the hash fits they are kept.
        is_stopped: asked before each piece; once true, no further piece begins.

    Raises:
        ConfigError: a piece does not fit into `max_memory`.
        Interrupted: `is_stopped` said so; finished files are in the journal.
        OSError: the disk is full, or the like.
        Whatever a piece raises.
    """
    check_memory(files, max_memory)
    threads = threads or default_threads()
    records = {} if journal is None else _reusable(files, folder, journal, threads)
    for file in files:
        if file.name in records:
            advance(sum(piece.num_tensors for piece in file.pieces), sum(piece.num_bytes for piece in file.pieces))
    job = _Job([file for file in files if file.name not in records], folder, max_memory, advance, journal, is_stopped)
    with _one_torch_thread_each():
        records |= job.run(threads)
    return records


def _reusable(files: Sequence[OutputFile], folder: Path, journal: Journal, threads: int) -> dict[str, FileRecord]:
    known = {
        file.name: journal.finished[file.name]
        for file in files
        if file.name in journal.finished
        and (folder / file.name).is_file()
        and (folder / file.name).stat().st_size == file.num_bytes
    }
    found = hash_files(folder, known, threads=threads)
    journal.finished = {name: record for name, record in found.items() if record == known[name]}
    journal.num_reused = len(journal.finished)
    return dict(journal.finished)


class _OpenFile:
    """A file that is being written, and how far it can be hashed."""

    def __init__(self, spec: OutputFile, folder: Path) -> None:
        self.spec = spec
        self.digest = hashlib.sha256()
        self.hashed = 0
        self._sent = 0
        self.is_being_hashed = False
        self._pending = set(range(len(spec.pieces)))
        self._has_spans = all(piece.spans for piece in spec.pieces)
        self._spans = sorted((*span, i) for i, piece in enumerate(spec.pieces) for span in piece.spans)
        self._next = 0
        path = folder / spec.name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        spec.skeleton(self.descriptor)
        size = os.fstat(self.descriptor).st_size
        assert size == spec.num_bytes, (spec.name, size, spec.num_bytes)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def finish_piece(self, index: int) -> None:
        self._pending.discard(index)

    @property
    def is_written(self) -> bool:
        return not self._pending

    def final_bytes(self) -> int:
        """Return how many bytes from the start will not change any more."""
        if not self._pending:
            return self.spec.num_bytes
        if not self._has_spans:
            return 0
        while self._spans[self._next][2] not in self._pending:
            self._next += 1
        return self._spans[self._next][0]

    def hash_to(self, end: int) -> None:
        buffer = memoryview(bytearray(min(HASH_BYTES, end - self.hashed)))
        while self.hashed < end:
            count = os.preadv(self.descriptor, [buffer[: end - self.hashed]], self.hashed)
            assert count, (self.spec.name, self.hashed, end)
            self.digest.update(buffer[:count])
            self.hashed += count
            if self.hashed - self._sent >= WRITEBACK_BYTES:
                begin_writeback(self.descriptor, self._sent, self.hashed - self._sent)
                self._sent = self.hashed


class _Job:
    def __init__(
        self,
        files: Sequence[OutputFile],
        folder: Path,
        max_memory: int | None,
        advance: Advance,
        journal: Journal | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._folder, self._max_memory, self._advance = folder, max_memory, advance
        self._journal, self._is_stopped = journal, is_stopped
        self._waiting = deque(files)
        self._tasks: deque[tuple[_OpenFile, int]] = deque()
        self._open: list[_OpenFile] = []
        self._records: dict[str, FileRecord] = {}
        self._changed = threading.Condition()
        self._memory = 0
        self._writers = 0
        self._error: BaseException | None = None

    def run(self, threads: int) -> dict[str, FileRecord]:
        total = len(self._waiting)
        self._writers = threads
        loops = [self._write] * threads + [self._hash] * _hashers(threads)
        workers = [threading.Thread(target=self._guard, args=(loop,), name="convert") for loop in loops]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                # With a timeout, so that a signal finds the main thread in Python code.
                while worker.is_alive():
                    worker.join(0.2)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            for worker in workers:
                worker.join()
            for file in self._open:
                file.close()
        if self._error is not None:
            raise self._error
        if len(self._records) < total or self._is_stopped():
            raise Interrupted("interrupted")
        return self._records

    def _guard(self, loop: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        try:
            loop()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._writers -= loop == self._write
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _write(self) -> None:
        while (task := self._take_piece()) is not None:
            file, index = task
            piece = file.spec.pieces[index]
            piece.write(file.descriptor)
            failpoints.hit("convert.piece")
            with self._changed:
                file.finish_piece(index)
                self._memory -= piece.peak_bytes
                self._advance(piece.num_tensors, piece.num_bytes)
                self._changed.notify_all()

    def _take_piece(self) -> tuple[_OpenFile, int] | None:
        with self._changed:
            while not self._tasks and self._waiting and not self._is_ending():
                self._open_next()
            if not self._tasks:
                return None
            while not self._is_ending() and self._tasks:
                peak = self._tasks[0][0].spec.pieces[self._tasks[0][1]].peak_bytes
                if self._max_memory is None or self._memory + peak <= self._max_memory:
                    self._memory += peak
                    return self._tasks.popleft()
                self._changed.wait()
            return None if self._is_ending() else self._take_piece()

    def _is_ending(self) -> bool:
        return self._error is not None or self._is_stopped()

    def _open_next(self) -> None:
        file = _OpenFile(self._waiting.popleft(), self._folder)
        self._open.append(file)
        failpoints.hit("convert.skeleton")
        self._tasks.extend((file, index) for index in range(len(file.spec.pieces)))
        self._changed.notify_all()

    def _hash(self) -> None:
        while (task := self._take_bytes()) is not None:
            file, end = task
            file.hash_to(end)
            is_done = file.is_written and end == file.spec.num_bytes
            if is_done:
                self._complete(file)
            with self._changed:
                file.is_being_hashed = False
                if is_done:
                    self._open.remove(file)
                self._changed.notify_all()

    def _take_bytes(self) -> tuple[_OpenFile, int] | None:
        with self._changed:
            while self._error is None:
                for file in self._open:
                    end = file.final_bytes()
                    if not file.is_being_hashed and (end - file.hashed >= BATCH_BYTES or file.is_written):
                        file.is_being_hashed = True
                        return file, end
                if self._writers == 0 and not any(file.is_being_hashed for file in self._open):
                    return None
                self._changed.wait()
            return None

    def _complete(self, file: _OpenFile) -> None:
        # A file without pieces is small and made anew in no time: what is done before the rename makes it durable.
        is_worth_it = bool(file.spec.pieces)
        if is_worth_it:
            os.fsync(file.descriptor)
            failpoints.hit("convert.file")
        file.close()
        record = FileRecord(file.spec.num_bytes, file.digest.hexdigest())
        with self._changed:
            self._records[file.spec.name] = record
            if self._journal is not None:
                self._journal.add(file.spec.name, record, is_saved=is_worth_it)
        if is_worth_it:
            failpoints.hit("convert.journal")


def _hashers(threads: int) -> int:
    return max(1, threads // 2)


@contextmanager
def _one_torch_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_in_parallel(work: Sequence[Callable[[], None]], threads: int) -> None:
    """Call every function from a few threads; the first error ends it."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        futures = [pool.submit(function) for function in work]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
