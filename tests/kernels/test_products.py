"""Products of ragged rows: through oneDNN and torch.mm alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_qwen.kernels import products
from megatron_qwen.testing.compare import assert_close_to_fp64


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that went to oneDNN, which takes anything; and no products of torch's beside the rest of the rows."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "has_faster_onednn", lambda: True)
    monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", 1)
    onednn, made = products._onednn, []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        made.append(a.shape[0])
        return onednn(a, b)

    monkeypatch.setattr(products, "_onednn", counted)
    return made


def check(ours: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    assert ours.is_contiguous()
    assert_close_to_fp64(ours, a @ b, a.double() @ b.double(), roundings=2.0)


def test_onednn_gets_no_rows_that_are_apart(calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies those, but a hundred times as slowly."""
    given: list[torch.Tensor] = []

    def multiply(a: torch.Tensor, b: torch.Tensor, *options: object) -> torch.Tensor:
        given.append(b)
        return a @ b.t()

    monkeypatch.setattr(products.torch.ops.mkldnn, "_linear_pointwise", multiply)
    a, b = torch.randn(32, 500), torch.randn(8, 500)
    for transposed in (b.t(), b.t().contiguous()):
        torch.testing.assert_close(products.product(a, transposed), a @ transposed, rtol=1e-4, atol=1e-4)
    assert len(given) == 2 * -(-500 // products.MOST_TERMS)
    assert all(each.is_contiguous() or each.t().is_contiguous() for each in given)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 67, 600])
@pytest.mark.parametrize(("inner", "width"), [(7, 13), (33, 8), (450, 40)])
def test_products_are_as_exact_as_torch(calls, rows: int, inner: int, width: int) -> None:
    torch.manual_seed(rows * inner)
    a, b = torch.randn(rows, inner), torch.randn(width, inner)
    check(products.product(a, b.t()), a, b.t())
    in_rows = b.t().contiguous()
    check(products.product(a, in_rows), a, in_rows)
    out = torch.full((rows + 2, width), 7.0)
    assert products.product(a, b.t(), out=out[1:-1]) is not None
    check(out[1:-1], a, b.t())
    assert (out[[0, -1]] == 7.0).all()
    other = torch.randn(rows, width)
    check(products.product_over_rows(a, other), a.t(), other)
    check(products.product_over_rows(other, a), other.t(), a)
    for left, right in ((a, other), (other, a)):
        total = torch.full((left.shape[1], right.shape[1]), 3.0)
        assert products.product_over_rows(left, right, total) is total
        torch.testing.assert_close(total, 3.0 + left.t() @ right, rtol=1e-5, atol=1e-4)
    total = torch.full((rows, width), 3.0)
    products.add_product(total, a, b.t())
    torch.testing.assert_close(total, 3.0 + a @ b.t(), rtol=1e-5, atol=1e-4)
    assert bool(calls) == (rows >= 16)


def test_few_shapes_cover_all_numbers_of_rows(calls) -> None:
    """oneDNN compiles code for each."""
    rows = {products._rows_for_onednn(torch.empty(number, 1), 1) for number in range(1, 8193)}
    assert len(rows) < 120
    assert all(number - products._rows_for_onednn(torch.empty(number, 1), 1) < max(16, number / 15) for number in rows)


def test_small_products_other_dtypes_and_other_processors_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_faster_onednn", lambda: True)
    large = torch.empty(256, 256)
    assert products._rows_for_onednn(large, 256) == 256
    assert products._rows_for_onednn(large[:16], 64) == 0
    assert products._rows_for_onednn(large.double(), 256) == 0
    monkeypatch.setattr(products, "has_faster_onednn", lambda: False)
    assert products._rows_for_onednn(large, 256) == 0


X86 = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: a GenuineIntel-like processor\n"


@pytest.mark.parametrize(
    ("capability", "processors", "expected"),
    [
        ("AVX512", X86.format("AuthenticAMD"), True),
        ("AVX512", X86.format("HygonGenuine"), True),
        ("AVX512", X86.format("GenuineIntel"), False),
        ("AVX2", X86.format("AuthenticAMD"), False),
        ("SVE256", "processor\t: 0\nCPU implementer\t: 0x41\n", False),
        ("DEFAULT", "processor\t: 0\nCPU implementer\t: 0x41\n", False),
        ("AVX512", "processor\t: 0\n", False),
        ("AVX512", None, False),
    ],
)
def test_onednn_is_for_avx512_of_processors_known_not_to_be_intels(
    capability: str, processors: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None: no list of processors, as on macOS. On arm64 that names no vendor."""
    if processors is not None:
        (tmp_path / "cpuinfo").write_text(processors)
    monkeypatch.setattr(products, "PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products.torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    assert products.has_faster_onednn.__wrapped__() == expected


def test_a_torch_without_onednn_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "_is_intel", lambda: False)
    assert not products.has_faster_onednn.__wrapped__()
