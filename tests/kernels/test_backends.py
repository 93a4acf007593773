from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels import backends, validated

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operation with both kernels, on an imagined H100 with Triton and a CUDA build."""
    backends._choose.cache_clear()
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(backends.OPERATIONS, "imagined", ("cuda", "triton"))
    monkeypatch.setattr(backends, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "_cuda_obstacle", lambda device: "" if device.type == "cuda" else "no CUDA device")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    yield "imagined"
    backends._choose.cache_clear()


def test_on_a_cpu_auto_is_the_reference(op: str) -> None:
    choice = backends.explain_choice(op, CPU)
    assert (choice.backend, choice.reason) == ("reference", "tensors on cpu: torch")
    assert backends.backend_for(op, torch.zeros(1)) == "reference"


def test_auto_takes_cuda_only_where_it_was_validated(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = backends.explain_choice(op, CUDA)
    assert (choice.backend, choice.reason) == ("triton", "its CUDA kernel is not yet validated on sm_90")
    backends._choose.cache_clear()
    monkeypatch.setattr(backends, "VALIDATED", frozenset({(op, "sm_90")}))
    assert backends.explain_choice(op, CUDA).backend == "cuda"


def test_inputs_that_only_the_cuda_kernel_cannot_take_go_to_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        device, dtype = CUDA, torch.bfloat16

    monkeypatch.setattr(backends, "VALIDATED", frozenset({(op, "sm_90")}))
    for obstacle, expected in (("", "cuda"), ("it takes multiples of 8", "triton")):
        assert backends.backend_for(op, OnDevice(), unfit_for_cuda=lambda words=obstacle: words) == expected
    with ops.use_backend("cuda"), pytest.raises(ConfigError, match="requested, but it takes multiples of 8"):
        backends.backend_for(op, OnDevice(), unfit_for_cuda=lambda: "it takes multiples of 8")
    with ops.use_backend("triton"):
        assert backends.backend_for(op, OnDevice(), unfit_for_cuda=lambda: pytest.fail("asked in vain")) == "triton"


def test_auto_without_triton_says_so_in_the_log(op: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.explain_choice(op, CUDA).backend == "reference"
    assert "imagined runs on torch" in caplog.text
    assert "Triton is not installed" in caplog.text


def test_fp64_goes_to_the_reference(op: str) -> None:
    assert backends.explain_choice(op, CUDA, torch.float64).backend == "reference"


@pytest.mark.parametrize(
    ("request_", "device", "dtype", "words"),
    [
        ("triton", CPU, torch.float32, "Triton runs only in its interpreter"),
        ("cuda", CPU, torch.float32, "no CUDA device"),
        ("triton", CUDA, torch.float64, "not torch.float64"),
    ],
)
def test_a_request_that_cannot_be_met_is_an_error_with_the_reason(op, request_, device, dtype, words) -> None:
    with backends.use_backend(request_), pytest.raises(ConfigError, match=words):
        backends.explain_choice(op, device, dtype)


def test_a_size_that_no_kernel_takes_refuses_the_request_and_moves_auto_to_torch(op: str) -> None:
    assert backends._choose(op, "auto", CUDA, torch.float32, "the axis is too long").backend == "reference"
    with pytest.raises(ConfigError, match="the axis is too long"):
        backends._choose(op, "triton", CUDA, torch.float32, "the axis is too long")


def test_the_block_beats_the_environment_and_ends(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.VARIABLE, "triton")
    assert ops.requested_backend() == "triton"
    with ops.use_backend("reference"):
        assert backends.explain_choice(op, CUDA).backend == "reference"
    with pytest.raises(RuntimeError, match="inside"), ops.use_backend("reference"):
        raise RuntimeError("inside")
    assert ops.requested_backend() == "triton"


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match="use_backend: got 'tritton', expected one of auto"),
        ops.use_backend("tritton"),
    ):
        pass
    monkeypatch.setenv(backends.VARIABLE, "tritton")
    with pytest.raises(ConfigError, match=f"{backends.VARIABLE}: got 'tritton'"):
        ops.requested_backend()


def test_every_operation_has_a_choice_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    choices = ops.choices()
    assert [choice.op for choice in choices] == sorted(backends.OPERATIONS)
    assert all(choice.reason for choice in choices)
    with ops.use_backend("cuda"):
        assert {choice.backend for choice in ops.choices()} == {"none"}


def test_the_table_of_the_document_is_the_list_that_counts() -> None:
    section = re.search(r"## Validated on a device\n(.*?)(\n## |\Z)", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    rows = [line.strip("|").split("|") for line in section[1].splitlines() if line.startswith("|")]
    listed = {(row[0].strip(" `"), row[1].strip()) for row in rows[2:]}
    assert listed == validated.VALIDATED
    assert {op for op, _ in listed} <= set(backends.OPERATIONS)
