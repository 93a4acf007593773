"""docs/faults.md promises tests; each of them has to exist, and the faults of conversion have theirs in this folder."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = (*range(1, 25), *range(49, 55))
"""Faults of conversion and of the supply side: shown through the command, by a test in tests/faults/."""


def named_tests() -> dict[int, set[tuple[str, str]]]:
    """Return (file, test) of every row by its number; `::test` belongs to the file named before it."""
    found: dict[int, set[tuple[str, str]]] = {}
    file = ""
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| (\d+) \|", line)
        for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", line):
            file = path or file
            if row and (path or name):
                found.setdefault(int(row.group(1)), set()).add((file, name))
    return found


def test_every_test_named_in_the_table_exists() -> None:
    named = {place for places in named_tests().values() for place in places}
    assert len(named) > 120
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file, _ in named if (ROOT / file).is_file()}
    assert sorted({file for file, _ in named} - sources.keys()) == []
    assert sorted(place for place in named if place[1] and f"def {place[1]}(" not in sources[place[0]]) == []


def test_every_fault_of_conversion_has_a_test_here() -> None:
    rows = named_tests()
    assert [number for number in HERE if not any(file.startswith("tests/faults/") for file, _ in rows[number])] == []


def test_every_numbered_test_is_in_the_row_of_its_number_or_beside_one_that_is() -> None:
    rows = named_tests()
    for path in Path(__file__).parent.glob("test_*.py"):
        numbers = {int(number) for number in re.findall(r"^def test_(\d+)_", path.read_text(encoding="utf-8"), re.M)}
        for number in numbers:
            assert number in rows, (path.name, number)
            assert any(file == f"tests/faults/{path.name}" for file, _ in rows[number]), (path.name, number)
