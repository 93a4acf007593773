"""The CUDA kernels that passed the device checks, by operation and architecture.

The list of record is the table in docs/kernels.md, with the date and the report of each run; a wheel carries no
documents, so it is repeated here, and a test holds the two together.
"""

from __future__ import annotations

VALIDATED: frozenset[tuple[str, str]] = frozenset()
