"""Values out of a byte range of a file, copied: no mapping, so no page counts as ours and a truncation is an error."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwen.errors import CorruptInputError, IncompleteInputError


def read_values(path: Path, offset: int, dtype: torch.dtype, count: int) -> Tensor:
    """Return `count` values of `dtype` that begin `offset` bytes into the file, as a new flat tensor.

    Raises:
        IncompleteInputError: there is no such file.
        CorruptInputError: it is too short.
    """
    values = torch.empty(count, dtype=dtype)
    view = memoryview(values.view(torch.uint8).numpy().data) if count else memoryview(b"")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise IncompleteInputError(f"{path}: missing; it was there when the headers were read") from None
    except OSError as error:
        raise CorruptInputError(f"{path}: cannot be opened: {error}") from error
    try:
        done = 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], offset + done)
            if got == 0:
                size = os.fstat(descriptor).st_size
                raise CorruptInputError(f"{path}: {size:,} bytes, at least {offset + len(view):,} needed: truncated")
            done += got
    except OSError as error:
        raise CorruptInputError(f"{path}: cannot be read at byte {offset + done:,}: {error}") from error
    finally:
        os.close(descriptor)
    return values
