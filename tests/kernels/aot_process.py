"""Runs a program of launches (aot_*launches.py) and returns what ptxas made of its kernels.

In a process of its own, as the compiler takes the place of a device for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Shared memory of a block: 227 KiB on sm_90, 163 KiB on sm_80.
SHARED = {90: 227 * 1024, 80: 163 * 1024}


def compiled(program: str, architecture: int, *labels: str) -> list[dict[str, Any]]:
    """Return the kernels of these launches; of all, without labels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / program), str(architecture), *labels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550 if labels else 2400)
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert rows
    return rows
