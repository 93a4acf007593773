"""Write the pins of this interpreter: `python requirements/lock.py` (or `make lock PYTHON=python3.12`).

Asks pip what it would install for `.[dev]` and torch, without installing it, and writes the exact versions to
`requirements/py3XX.txt`. `make` passes that file to pip as a constraint: a pin of something not needed costs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# torch of the day for development; the package itself accepts any torch >= 2.6.
TORCH = "torch==2.13.0"
# torch pins its own CUDA libraries, and which of them it wants depends on the build it comes from.
LEFT_TO_TORCH = ("nvidia-", "cuda-")
OURS = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")


def resolve(requirements: list[str]) -> dict[str, str]:
    """Return {name: version} of all that pip would install for `requirements`, public versions only (no `+cpu`)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *requirements], check=True)
        entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {entry["metadata"]["name"].lower().replace("_", "-"): entry["metadata"]["version"] for entry in entries}
    return {name: version.partition("+")[0] for name, version in sorted(versions.items())}


def main() -> None:
    """Write the constraint file of the running interpreter next to this script."""
    root = Path(__file__).resolve().parent.parent
    pins = resolve([TORCH, f"{root}[dev]"])
    pins.pop("megatron-qwen")
    kept = {name: version for name, version in pins.items() if name in OURS or not name.startswith(LEFT_TO_TORCH)}
    tag = f"{sys.version_info.major}{sys.version_info.minor}"
    lines = ["# Written by `make lock`; do not edit by hand."]
    lines += [f"{name}=={version}" for name, version in kept.items()]
    target = Path(__file__).resolve().parent / f"py{tag}.txt"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{target}: {len(kept)} pins")


if __name__ == "__main__":
    main()
