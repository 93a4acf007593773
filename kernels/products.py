"""Matrix products of ragged groups of rows on a CPU.

MKL, which torch.mm calls in fp32, keeps to AVX2 on processors that are not Intel's; oneDNN, which torch has too, uses
AVX-512. One thread of an AMD EPYC of Zen 5, [136, 256] by [256, 352]: 101 and 206 GFLOP/s.

oneDNN compiles code for every new shape (0.45 ms, kept for the last 1024 shapes), and groups have another number of
rows in every step. So it gets numbers of rows from a coarse grid, and torch.mm the few rows that are left. And oneDNN
adds up a sum in one go, where MKL takes it in parts: over 2048 terms its error is 3.2 times MKL's. So it gets parts.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

# Steps of the grid: 16 rows, or from 256 on a sixteenth to a thirty-second of the number.
FINEST_STEP = 16
STEPS_PER_OCTAVE = 16
# Below this many multiplications oneDNN's 10 us per call cost more than it saves.
FEWEST_MULTIPLICATIONS = 2**21
# Terms of a sum that are added in one go: with 256 one layer of experts came to 0.99 of what testing/compare.py allows,
# with 192 to 0.62.
MOST_TERMS = 192
PROCESSORS = Path("/proc/cpuinfo")


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a b of a [M, K] and b [K, N], in `out` [M, N] if given; a and b at any strides."""
    rows = _rows_for_onednn(a, b.shape[1])
    if not rows:
        return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)
    if rows == a.shape[0] and out is None:
        return _onednn(a, b.t())
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    out[:rows] = _onednn(a[:rows], b.t())
    if rows < a.shape[0]:
        torch.mm(a[rows:], b, out=out[rows:])
    return out


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a b of a [M, K] and b [K, N] to total [M, N]."""
    if _rows_for_onednn(a, b.shape[1]):
        total += product(a, b)
    else:
        total.addmm_(a, b)


def product_over_rows(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """Return a^T b [N, K] of a [M, N] and b [M, K], contiguous; or `total` with that added.

    torch turns the first operand of oneDNN's around, slower than oneDNN the second: so it is the narrower one.
    """
    rows = _rows_for_onednn(a, b.shape[1])
    if not rows:
        return torch.mm(a.t(), b) if total is None else total.addmm_(a.t(), b)
    is_turned = a.shape[1] > b.shape[1]
    first, second = (b, a) if is_turned else (a, b)
    found = _onednn(first[:rows].t(), second[:rows].t())
    found = found.t() if is_turned else found
    total = found.contiguous() if total is None else total.add_(found)
    return total.addmm_(a[rows:].t(), b[rows:]) if rows < a.shape[0] else total


def _rows_for_onednn(a: torch.Tensor, width: int) -> int:
    """How many of the first rows of a [M, K] oneDNN multiplies by a [K, width]."""
    if a.dtype != torch.float32 or not a.is_cpu or not has_faster_onednn():
        return 0
    step = max(FINEST_STEP, (1 << a.shape[0].bit_length()) // (2 * STEPS_PER_OCTAVE))
    rows = a.shape[0] // step * step
    return rows if rows * a.shape[1] * width >= FEWEST_MULTIPLICATIONS else 0


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b^T of a [M, K] and b [N, K], in parts of MOST_TERMS."""
    parts = -(-a.shape[1] // MOST_TERMS)
    if parts <= 1:
        return _multiply(a, b)
    pairs = zip(a.tensor_split(parts, dim=1), b.tensor_split(parts, dim=1), strict=True)
    total = _multiply(*next(pairs))
    for pair in pairs:
        total += _multiply(*pair)
    return total


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b^T by the operation that torch.compile's CPU code calls for linear layers.

    Rows of b at a distance of more than their length take a hundred times as long, so they are copied.
    """
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # type: ignore[no-any-return]


@functools.cache
def has_faster_onednn() -> bool:
    """Whether oneDNN multiplies fp32 faster than MKL here: AVX-512 on a processor that is not Intel's."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def _is_intel() -> bool:
    """Whether this is one of Intel's processors, or not known to be another."""
    try:
        vendors = re.findall(r"^vendor_id\s*:\s*(\S+)", PROCESSORS.read_text(), re.MULTILINE)
    except OSError:  # there is none on macOS and Windows, and a sandbox may forbid it
        return True
    return not vendors or "GenuineIntel" in vendors
