"""docs/faults.md promises tests; each of them has to exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_named_in_the_table_exists() -> None:
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = set(re.findall(r"::(test_\w+)", table))
    files = set(re.findall(r"tests/[\w/]+\.py", table))
    assert len(named) > 20
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert sorted(name for name in named if f"def {name}(" not in sources) == []
    assert sorted(name for name in files if not (ROOT / name).is_file()) == []
