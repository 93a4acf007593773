"""Measurements as lines of a CSV file that grows from run to run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append_csv(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Append lines of equal keys to a file; a new one begins with the names."""
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(lines)
