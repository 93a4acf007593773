from __future__ import annotations

import pytest
import torch

from megatron_qwen.testing.compare import assert_close_to_fp64, assert_logits_close, assert_relative, compare


def test_twice_plain_torchs_error_and_one_rounding_are_allowed_and_no_more():
    exact = torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64)
    plain = exact.float() + torch.tensor([0.0, 1e-3, 0.0])
    assert_close_to_fp64(exact.float() + torch.tensor([0.0, 0.0, 1.9e-3]), plain, exact)
    with pytest.raises(AssertionError, match=r"worst at \(0,\)"):
        assert_close_to_fp64(exact.float() + torch.tensor([2.1e-3, 0.0, 0.0]), plain, exact)


def test_nan_and_infinity_must_be_in_the_same_places():
    expected = torch.tensor([[1.0, float("inf")], [float("nan"), 2.0]])
    assert compare(expected.clone(), expected, 0.0).ok
    for wrong in (
        torch.tensor([[1.0, float("-inf")], [float("nan"), 2.0]]),
        torch.tensor([[1.0, float("inf")], [0.0, 2.0]]),
    ):
        result = compare(wrong, expected, 1.0)
        assert not result.ok
        assert "NaN or infinity" in str(result)


def test_logits_and_relative_report_the_fraction_they_found():
    reference = torch.linspace(-5, 5, 11)
    assert assert_logits_close(reference + 5e-4, reference) == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(AssertionError, match="of the range 10"):
        assert_logits_close(reference + 5e-3, reference)
    with pytest.raises(AssertionError, match="linear_fc1"):
        assert_relative(reference * 1.01, reference, 1e-4, name="linear_fc1")


def test_shapes_must_agree_and_empty_is_not_equal():
    with pytest.raises(AssertionError, match="shape"):
        compare(torch.zeros(2), torch.zeros(3), 0.0)
    with pytest.raises(AssertionError, match="empty"):
        compare(torch.zeros(0), torch.zeros(0), 0.0)
