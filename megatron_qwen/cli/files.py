"""Files and folders that options name."""

from __future__ import annotations

from pathlib import Path

from megatron_qwen.errors import CorruptInputError, IncompleteInputError


def read_text(option: str, file: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        IncompleteInputError: it is not there, not a file, or not readable.
        CorruptInputError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IncompleteInputError(f"{option} {file}: no such file") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise IncompleteInputError(f"{option} {file}: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError as error:
        raise CorruptInputError(f"{option} {file}: not UTF-8 text: {error}") from error


def make_folder(folder: Path | None) -> None:
    """Make the folder of an option before work whose results go there: better refused now than after it.

    Raises:
        StorageError: it cannot be made.
    """
    from megatron_qwen.checkpoint.atomic import storage_errors

    if folder is not None:
        with storage_errors(f"cannot create {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
