"""How numbers are compared in this project: against fp64, relative to what plain torch achieves.

A fixed tolerance is either loose enough to hide a bug or tight enough to fail on another machine. The
rule here scales by itself: our error against an fp64 reference may be at most twice the error of plain
torch in the same dtype against that reference, plus one rounding of the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found.

    Attributes:
        error: largest absolute difference between ours and the reference.
        bound: largest difference allowed.
        worst: coordinate of `error`; empty for a scalar.
        ours: our value there.
        expected: the reference's value there.
        mismatched: coordinates (at most five) where NaN, +inf or -inf are not in both.
    """

    error: float
    bound: float
    worst: tuple[int, ...]
    ours: float
    expected: float
    mismatched: tuple[tuple[int, ...], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing exceeds the bound and non-finite values are in the same places."""
        return not self.mismatched and self.error <= self.bound

    def __str__(self) -> str:
        lines = [
            f"error {self.error:.3e}, allowed {self.bound:.3e}; worst at {self.worst}: "
            f"{self.ours!r}, expected {self.expected!r}"
        ]
        if self.mismatched:
            lines.append(f"NaN or infinity in one of the two only, at {', '.join(map(str, self.mismatched))}")
        return "; ".join(lines)


def compare(ours: torch.Tensor, expected: torch.Tensor, bound: float) -> Comparison:
    """Compare two tensors of one shape elementwise in fp64, on the device of the first.

    Args:
        ours: any dtype.
        expected: any dtype.
        bound: largest absolute difference allowed.

    Raises:
        AssertionError: the shapes differ, or the tensors are empty.
    """
    assert ours.shape == expected.shape, f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    assert ours.numel(), "nothing to compare: the tensors are empty"
    a, b = ours.detach().double(), expected.detach().to(ours.device).double()
    special = ~(torch.isfinite(a) & torch.isfinite(b))
    same = (a == b) | (a.isnan() & b.isnan())
    mismatched = (special & ~same).nonzero()
    difference = torch.where(special, 0.0, (a - b).abs())
    worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return Comparison(
        error=float(difference[worst]),
        bound=bound,
        worst=worst,
        ours=float(a[worst]),
        expected=float(b[worst]),
        mismatched=tuple(tuple(row) for row in mismatched[:5].tolist()),
    )


def compare_with_fp64(
    ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, *, factor: float = 2.0, roundings: float = 1.0
) -> Comparison:
    """Compare a result with its fp64 reference by the error plain torch makes in the same dtype.

    Args:
        ours: the result under test; its dtype decides the size of a rounding.
        plain: the same computation by plain torch operations in the same dtype.
        exact: the same computation in fp64, same shape.
        factor: how many times plain torch's error is allowed.
        roundings: how many roundings (half a unit in the last place) of the largest |exact| come on top.

    Raises:
        AssertionError: shapes differ, `ours` and `plain` differ in dtype, or `exact` is not fp64.
    """
    assert ours.dtype == plain.dtype, f"ours is {ours.dtype}, plain is {plain.dtype}: compare like with like"
    assert exact.dtype == torch.float64, f"exact is {exact.dtype}, expected torch.float64"
    bound = fp64_bound(
        compare(plain, exact, 0.0).error, largest_finite(exact), ours.dtype, factor=factor, roundings=roundings
    )
    return compare(ours, exact, bound)


def fp64_bound(
    plain_error: float, largest: float, dtype: torch.dtype, *, factor: float = 2.0, roundings: float = 1.0
) -> float:
    """Return the error allowed to a result of `dtype`; see `compare_with_fp64`.

    Args:
        plain_error: largest error of plain torch in that dtype.
        largest: largest finite magnitude of the fp64 result.
        dtype: decides the size of a rounding.
        factor: how many times plain torch's error is allowed.
        roundings: how many roundings of `largest` come on top.
    """
    return factor * plain_error + roundings * torch.finfo(dtype).eps / 2 * largest


def largest_finite(tensor: torch.Tensor) -> float:
    """Return the largest finite magnitude; 0 if there is none."""
    finite = tensor.detach()[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def assert_close_to_fp64(
    ours: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    *,
    factor: float = 2.0,
    roundings: float = 1.0,
    name: str = "result",
) -> Comparison:
    """Assert `compare_with_fp64`; the message names the worst coordinate, both values and stray NaN or infinities."""
    result = compare_with_fp64(ours, plain, exact, factor=factor, roundings=roundings)
    assert result.ok, f"{name}: {result} (fp64 rule: {factor} x plain torch's error + {roundings} rounding)"
    return result


def assert_logits_close(ours: torch.Tensor, reference: torch.Tensor, fraction_of_range: float = 1e-4) -> float:
    """Assert that no logit is off by more than a fraction of the reference's range (max - min).

    Returns:
        The largest difference as a fraction of the range.
    """
    spread = float(reference.max() - reference.min())
    result = compare(ours, reference, fraction_of_range * spread)
    assert result.ok, f"logits: {result} ({fraction_of_range} of the range {spread:.4g})"
    return result.error / spread


def assert_relative(ours: torch.Tensor, reference: torch.Tensor, tolerance: float, *, name: str = "tensor") -> float:
    """Assert that no element is off by more than `tolerance` times the largest magnitude of the reference.

    Returns:
        The largest difference over the largest magnitude; 0 where both tensors are zero.
    """
    largest = float(reference.detach().abs().max())
    result = compare(ours, reference, tolerance * largest)
    assert result.ok, f"{name}: {result} ({tolerance} of the largest magnitude {largest:.4g})"
    return result.error / largest if largest else 0.0
