"""A copy of the project's sources, so that no test builds inside the tree that others import from."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", "quickstart_out"
)


def copy_sources(target: Path) -> Path:
    """Copy everything a build reads to `target` (links stay links) and return it."""
    shutil.copytree(ROOT, target, symlinks=True, ignore=BUILT)
    return target
