"""JSON from outside, read without the leniency of `json.loads`, in bounded time and memory."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from megatron_qwen.errors import CorruptInputError, IncompleteInputError

MAX_VALUES = 1_000_000  # the index of the largest public models has under 100,000
MAX_NAME_LENGTH = 1000  # characters
_MAX_LISTED = 20  # names printed in one error message
_MAX_SHOWN = 200  # characters of a value printed in one error message
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_strict_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read and parse a file as `parse_strict_json` does; of one above `max_bytes` no more is read.

    Raises:
        IncompleteInputError: there is no such file.
        CorruptInputError: too large, or not a strict JSON object.
    """
    if not path.is_file():
        raise IncompleteInputError(f"{path}: no such file")
    with path.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise CorruptInputError(f"{path}: {path.stat().st_size} bytes, the limit for such a file is {max_bytes}")
    return parse_strict_json(raw, path)


def parse_strict_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in UTF-8 without duplicate names, NaN, lone surrogates, excessive depth or excessive number.

    Raises:
        CorruptInputError: naming `path` and the reason.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        longest = max(mapping, key=len, default="")
        if len(longest) > MAX_NAME_LENGTH:
            raise CorruptInputError(f"{path}: JSON name of {len(longest)} characters: {shown(longest)}")
        if len(mapping) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = [name for name, count in counts.items() if count > 1]
            raise CorruptInputError(f"{path}: JSON names given more than once: {listing(twice)}")
        return mapping

    def refuse_constant(text: str) -> NoReturn:
        raise CorruptInputError(f"{path}: {text} is not JSON")

    # Twenty bytes of JSON can become two hundred in memory: counted before anything is built.
    num_values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if num_values > MAX_VALUES:
        raise CorruptInputError(f"{path}: about {num_values} JSON values, the limit is {MAX_VALUES}")
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant, parse_int=_parse_integer
        )
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except CorruptInputError:
        raise
    except UnicodeError as error:
        raise CorruptInputError(f"{path}: not valid UTF-8: {error}") from None
    except RecursionError:
        raise CorruptInputError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:
        raise CorruptInputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CorruptInputError(f"{path}: JSON is {kind(parsed)}, expected an object")
    return parsed


def _parse_integer(text: str) -> int | float:
    # JSON readers in other languages read -0 as a floating point number; so do we, and sizes refuse it.
    return -0.0 if text == "-0" else int(text)


def kind(value: object) -> str:
    """Return how an error message calls the type of a JSON value."""
    return "missing" if value is None else f"of type {type(value).__name__}"


def shown(value: object) -> str:
    """Return `repr(value)` for an error message, cut where a hostile value would flood it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"


def listing(names: list[str]) -> str:
    """Return the names as one line of an error message, the first twenty and a count of the others."""
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
