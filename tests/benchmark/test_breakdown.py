"""Attribution of profiler events to kinds of operation: made-up events, and torch's own."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from megatron_qwen import ops
from megatron_qwen.benchmark.breakdown import PREFIX, REST, STEP, Breakdown, Event, Part, _event, attribute, record
from megatron_qwen.benchmark.breakdown_report import append_breakdown_csv, breakdown_table, draw_breakdown
from megatron_qwen.benchmark.step_ranges import module_kind, named_ranges

NODE = "autograd::engine::evaluate_function: "


def event(name: str, start: float, end: float, thread: int = 1, **fields: float) -> Event:
    return Event(name=name, start=start, end=end, thread=thread, **fields)


def times(breakdown: Breakdown) -> dict[str, tuple[float, float, float]]:
    return {part.kind: (part.forward, part.backward, part.update) for part in breakdown.parts}


# A step of 100 s: forward until 40, backward until 80, update.
FORWARD = [
    event(STEP, 0, 100),
    event(PREFIX + "norm", 0, 10),
    event("aten::arange", 1, 2, sequence=7),  # sees the number, but makes no node
    event(PREFIX + "qkv GEMM", 10, 30),
    event("aten::linear", 12, 28, sequence=7),
    event("aten::addmm", 13, 27, sequence=7),
    event("megatron_qwen::swiglu", 30, 38, sequence=8),
]
BACKWARD = [
    event(NODE + "SwigluBackward", 40, 50, sequence=8, forward_thread=1),
    event(NODE + "AddmmBackward0", 50, 70, sequence=7, forward_thread=1),
    event("AddmmBackward0", 51, 69, sequence=7, forward_thread=1),
    event("aten::mm", 52, 60),
    event("c10d::allreduce_", 60, 65),
    event(NODE + "torch::autograd::AccumulateGrad", 70, 76),
]
AFTER = [event(PREFIX + "optimizer", 80, 95), event("aten::_fused_adamw_", 81, 94)]


def test_backward_belongs_to_the_range_whose_forward_made_the_node_and_all_adds_up() -> None:
    found = attribute([*AFTER, *BACKWARD, *FORWARD], {"qkv GEMM": 6.0}, plain_seconds=80.0)
    assert times(found) == {
        "qkv GEMM": (20, 15, 0),
        "swiglu": (8, 10, 0),
        "optimizer": (0, 0, 15),
        "norm": (10, 0, 0),
        "gradient accumulation": (0, 6, 0),
        "communication": (0, 5, 0),
        REST: (11, 0, 0),
    }
    assert [part.kind for part in found.parts[:2]] == ["qkv GEMM", "swiglu"]
    assert found.parts[-1].kind == REST
    assert sum(part.seconds for part in found.parts) == found.seconds == 100
    assert (found.clock, found.overhead) == ("host", pytest.approx(0.25))
    assert found.parts[0].flops == 6.0


def test_steps_are_averaged_and_what_lies_between_them_is_left_out() -> None:
    shifted = [event(STEP, 200, 220), event(PREFIX + "norm", 205, 215), event("aten::mm", 150, 160)]
    found = attribute([*FORWARD, *shifted], {}, plain_seconds=60.0)
    assert (found.steps, found.seconds) == (2, 60)
    assert times(found)["norm"] == (10, 0, 0)
    assert sum(part.seconds for part in found.parts) == 60


def test_a_module_that_backward_recomputes_counts_as_backward() -> None:
    events = [
        event(STEP, 0, 100),
        event("CheckpointFunction", 0, 10, sequence=1),
        event(NODE + "CheckpointFunctionBackward", 20, 90, sequence=1, forward_thread=1),
        event(PREFIX + "attention", 30, 50),
        event("aten::mm", 31, 49, sequence=2),
        event(NODE + "MmBackward0", 60, 80, sequence=2, forward_thread=1),
    ]
    assert times(attribute(events, {}, plain_seconds=100.0))["attention"] == (0, 40, 0)


def test_on_a_device_kernels_count_wherever_they_are_started_and_the_rest_is_idle_time() -> None:
    events = [
        event(STEP, 0, 100),
        event(PREFIX + "qkv GEMM", 10, 30),
        event("aten::addmm", 12, 28, sequence=7, device_seconds=25.0),
        # The device's backward runs in a thread of its own.
        event(NODE + "AddmmBackward0", 50, 70, thread=9, sequence=7, forward_thread=1),
        event("aten::mm", 52, 60, thread=9, device_seconds=45.0),
        event("aten::mm", 120, 121, device_seconds=5.0),
    ]
    found = attribute(events, {}, plain_seconds=100.0)
    assert found.clock == "device"
    assert times(found) == {"qkv GEMM": (25, 45, 0), REST: (0, 0, 30)}


def test_kernels_are_read_from_the_call_that_started_them_and_not_from_the_range_around() -> None:
    def kernel(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, duration=30)

    def raw(name: str, *kernels: str) -> SimpleNamespace:
        span = SimpleNamespace(start=5, end=9)
        return SimpleNamespace(
            name=name, time_range=span, thread=3, sequence_nr=4, fwd_thread=None, kernels=list(map(kernel, kernels))
        )

    assert _event(raw(PREFIX + "norm", PREFIX + "norm")).device_seconds == 0
    assert _event(raw("aten::mm", "sgemm", "splitk")) == Event(
        name="aten::mm", start=5e-6, end=9e-6, thread=3, sequence=4, forward_thread=0, device_seconds=6e-5
    )


def test_torch_and_our_operations_are_attributed_as_they_run() -> None:
    x, weight = torch.randn(64, 256, requires_grad=True), torch.ones(256, requires_grad=True)
    matrix = torch.randn(256, 256, requires_grad=True)

    def step() -> None:
        with record_function(PREFIX + "qkv GEMM"):
            y = x @ matrix
        ops.rms_norm(y, weight, eps=1e-6).sum().backward()

    found = attribute(record(step, 3), {}, plain_seconds=1.0)
    parts = times(found)
    assert set(parts) == {"qkv GEMM", "norm", "gradient accumulation", REST}
    for kind in ("qkv GEMM", "norm"):
        assert min(parts[kind][:2]) > 0
    assert parts[REST][1] < 0.1 * found.seconds, "backward of the sum alone belongs to nobody"
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds, rel=1e-9)
    assert found.steps == 3


class Modules(torch.nn.Module):
    """The names of Megatron-Core's GPTModel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(4, 4)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.decoder.layers[0].mlp = mlp = torch.nn.Module()
        mlp.router, mlp.experts, mlp.shared_experts = (torch.nn.Module() for _ in range(3))
        mlp.shared_experts.linear_fc1 = torch.nn.Linear(4, 4)

    def compute_fused_loss(self) -> None:
        """Stands for the loss without logits."""

    def compute_language_model_loss(self) -> None:
        raise ValueError("no loss")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(x)


def test_modules_have_the_kind_of_their_place() -> None:
    kinds = {path: module_kind(path, module) for path, module in Modules().named_modules()}
    layer = "decoder.layers.0"
    assert {path: kind for path, kind in kinds.items() if kind} == {
        "embedding": "embedding",
        layer: "residual",
        f"{layer}.mlp": "dispatch",
        f"{layer}.mlp.router": "router",
        f"{layer}.mlp.experts": "experts",
        f"{layer}.mlp.shared_experts": "shared expert",
    }
    assert module_kind(f"{layer}.mlp", torch.nn.Module()) == "swiglu"
    assert module_kind(f"{layer}.mlp.linear_fc1", torch.nn.Module()) == "fc1 GEMM"


def test_ranges_are_gone_after_the_block_even_after_an_error() -> None:
    from megatron_qwen.training import step as step_module

    def nothing(*_: object) -> None:
        """Stands for whatever the step calls."""

    names = ("zero_grad", "prepare_grads", "get_grad_norm", "step_with_ready_grads")
    model = Modules()
    optimizer = SimpleNamespace(**dict.fromkeys(names, nothing))
    config = SimpleNamespace(finalize_model_grads_func=nothing)
    chunk = SimpleNamespace(module=model, config=config, zero_grad_buffer=nothing)
    step = SimpleNamespace(chunks=[chunk], optimizer=optimizer, _reduce=nothing)
    loss = step_module.lm_loss
    with contextlib.suppress(ValueError), named_ranges(step):
        assert step_module.lm_loss is not loss
        assert all(vars(optimizer)[name] is not nothing for name in names)
        model(torch.zeros(2, 4))
        model.compute_language_model_loss()
        pytest.fail("the loss raises")
    assert step_module.lm_loss is loss
    assert all(vars(optimizer)[name] is nothing for name in names)
    assert config.finalize_model_grads_func is chunk.zero_grad_buffer is step._reduce is nothing
    assert "compute_language_model_loss" not in vars(model)
    assert "compute_fused_loss" not in vars(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


def test_report_shows_every_part_its_share_and_its_rate(tmp_path: Path) -> None:
    parts = (
        Part(kind="fc1 GEMM", forward=0.2, backward=0.4, update=0.0, flops=1.2e12),
        Part(kind=REST, forward=0.0, backward=0.0, update=-0.1, flops=0.0),
    )
    breakdown = Breakdown(clock="device", seconds=0.5, steps=3, plain_seconds=0.4, parts=parts)
    table = breakdown_table(breakdown)
    assert [next(iter(column.cells)) for column in table.columns] == [
        "fc1 GEMM", "200.00", "400.00", "-", "600.00", "120.0%", "2.000",
    ]  # fmt: skip
    assert "+25%" in str(table.title)
    for _ in range(2):
        append_breakdown_csv(breakdown, {"device": "d", "setting": {"model": "m"}}, tmp_path / "b.csv")
    with (tmp_path / "b.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["operation"] for line in lines] == ["fc1 GEMM", REST] * 2
    assert (lines[0]["setting"], lines[0]["fraction"], lines[1]["update_s"]) == ('{"model": "m"}', "1.2000", "-0.1")
    draw_breakdown(breakdown, "a title", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
