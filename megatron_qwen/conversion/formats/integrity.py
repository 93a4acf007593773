"""Whether the files of a checkpoint are what they were: by the manifest beside them, and while they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from megatron_qwen.checkpoint import manifest
from megatron_qwen.errors import CorruptInputError

logger = logging.getLogger(__name__)


def compare_manifest(path: Path, suffix: str = "") -> None:
    """Compare the sizes of a folder's files with its manifest; one without is taken, with a logged line.

    Args:
        path: the folder.
        suffix: of the files that count; all by default.

    Raises:
        CorruptInputError: files are missing or of another size.
    """
    if not (path / manifest.MANIFEST_NAME).is_file():
        logger.info("%s: no %s, so the content is not verified against digests", path, manifest.MANIFEST_NAME)
        return
    names = [name for name in manifest.read_manifest(path) if name.endswith(suffix)] if suffix else None
    problems = manifest.verify(path, "sizes", names)
    if problems:
        raise CorruptInputError(f"{path}: not as its {manifest.MANIFEST_NAME} says: {'; '.join(problems)}")


class FileStamps:
    """Sizes and times of files, to see later that nobody wrote to them."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._stamps = {file: _stamp(file) for file in files}

    def add(self, files: Iterable[Path]) -> None:
        """Watch further files too."""
        self._stamps |= {file: _stamp(file) for file in files if file not in self._stamps}

    def check(self, where: Path) -> None:
        """Raise CorruptInputError if a file was replaced, deleted or written to."""
        changed = sorted(file.name for file, stamp in self._stamps.items() if _stamp_if_there(file) != stamp)
        if changed:
            raise CorruptInputError(f"{where}: changed while it was read: {', '.join(changed)}; run again")


def _stamp_if_there(file: Path) -> tuple[int, int, int] | None:
    try:
        return _stamp(file)
    except FileNotFoundError:
        return None


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
