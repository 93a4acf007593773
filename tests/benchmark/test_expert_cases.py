from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_qwen.benchmark.ops import bars, router_loads
from megatron_qwen.benchmark.ops.case import Call, OpCase, Workload, takes_lists
from megatron_qwen.benchmark.ops.check import check_contestants
from megatron_qwen.benchmark.ops.contestants import take_part
from megatron_qwen.benchmark.ops.expert_cases import CASES, choose_experts, popularity
from megatron_qwen.benchmark.ops.odd_sizes import check_odd_sizes
from megatron_qwen.benchmark.ops.result import OpRow
from megatron_qwen.benchmark.timing import Summary

CPU = torch.device("cpu")
SIZES = {"tokens": 67, "hidden": 136, "experts": 7, "topk": 3, "ffn": 40, "shared": 120}
BY_NAME = {case.name: case for case in CASES}


def test_ours_is_right_at_odd_sizes() -> None:
    found = list(check_odd_sizes(CASES, CPU, ("reference",)))
    assert {each.case for each in found} == set(BY_NAME)
    assert not [each for each in found if not each.is_right]


@pytest.mark.parametrize("case", [case for case in CASES if case.peers], ids=lambda case: case.name)
def test_the_peer_of_torch_computes_the_same_and_keeps_more(case: OpCase) -> None:
    workload = case.workload(SIZES, torch.float32, CPU, 0)
    contestants = take_part(case, CPU, torch.float32, ("reference",), ("torch", "compile", "grouped_mm", "liger"))
    verdicts = check_contestants(case, workload, contestants)
    assert {name: each.is_right for name, each in verdicts.items()} == dict.fromkeys(
        ("reference", "torch", "grouped_mm"), True
    )
    assert {each.name for each in contestants if each.missing} == {"compile", "liger"}
    kept = {each.name: Call(workload, each.function).saved_bytes() for each in contestants if each.function}
    # Ours: the outputs of the first matrices (of all experts), the order, and where they are made of x the weights.
    rows = SIZES["tokens"] * SIZES["topk"]
    shared = SIZES["tokens"] * 2 * SIZES["shared"] if case.name == "moe_layer" else 0
    first = 4 * (rows * 2 * SIZES["ffn"] + shared)
    assert first <= kept["reference"] <= first + 8 * (4 * rows + SIZES["tokens"] * SIZES["experts"])
    assert kept["reference"] < min(kept["torch"], kept["grouped_mm"])


def test_a_wrong_layer_is_found() -> None:
    case = BY_NAME["moe_layer"]
    workload = case.workload(SIZES, torch.float32, CPU, 0)
    ours = take_part(case, CPU, torch.float32, ("reference",), ())[0]

    @takes_lists
    def without_gate(**given: Any) -> Any:
        return case.ours(**{**given, "shared_gate": given["shared_gate"] * 0.0})

    wrong = type(ours)(name="reference", is_ours=True, function=without_gate)
    assert not check_contestants(case, workload, [wrong])["reference"].is_right


@pytest.mark.parametrize("experts", [60, 64, 8])
def test_choices_follow_their_popularity(experts: int) -> None:
    sizes = {"tokens": 4096, "experts": experts, "topk": 4}
    heaviest = {}
    for spread in ("uniform", "skewed", "real"):
        shares = popularity(experts, spread)
        assert sum(shares) == pytest.approx(1.0)
        assert shares == sorted(shares, reverse=True)
        choice = choose_experts(sizes, spread, CPU, 0)
        assert torch.equal(choice, choose_experts(sizes, spread, CPU, 0))
        counts = choice.flatten().bincount(minlength=experts)
        assert all(row.unique().numel() == 4 for row in choice[:64])
        heaviest[spread] = float(counts.max() / counts.sum()) * experts
    assert heaviest["uniform"] < 1.2 < heaviest["real"]
    assert heaviest["uniform"] + 0.3 < heaviest["skewed"]


def test_loads_are_made_by_a_trained_router(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_loads, "BATCH", 1)
    monkeypatch.setattr(router_loads, "SEQ_LENGTH", 16)
    shares, loss = router_loads.train_and_count(5, 2, 2)
    assert len(shares) == 5
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) <= 0.5  # no expert twice for a token
    assert 0 < loss < 10


def test_lists_are_leaves_of_their_own_and_one_tensor_in_results() -> None:
    leaf = torch.arange(6.0).view(3, 2)
    workload = Workload(
        leaves={"w": leaf}, others={}, grads=(torch.ones(2),), shared=frozenset({"w"}), listed=frozenset({"w"})
    )
    seen: list[int] = []

    @takes_lists
    def weighted(w: list[torch.Tensor]) -> torch.Tensor:
        seen.extend(each.data_ptr() for each in w)
        return w[0] + 2 * w[1] + 3 * w[2]

    call = Call(workload, weighted)
    gradients = call.gradients(call.backward(call.forward()))
    assert seen == [leaf[index].data_ptr() for index in range(3)]
    assert torch.equal(gradients["w"], torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    whole = Call(workload, lambda w: w.sum(0))
    assert torch.equal(whole.gradients(whole.backward(whole.forward()))["w"], torch.ones(3, 2))


def row(contestant: str, milliseconds: float, saved: int, direction: str = "both") -> OpRow:
    seconds = Summary(milliseconds / 1e3, milliseconds / 1e3, milliseconds / 1e3, 50)
    return OpRow(
        case="moe_mlp", family="experts", direction=direction, model="57b", sizes={"tokens": 8192}, dtype="bf16",
        contestant=contestant, is_ours=contestant == "cuda", status="timed", detail="", bound="compute",
        seconds=seconds, flops=18 * 8192 * 8 * 3584 * 2560, saved_bytes=saved,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "peer", "second"),
    [(19.0, 21.0, "pass"), (19.0, 19.5, "fail"), (21.0, 30.0, "fail")],
)
def test_bars_of_experts(ours: float, peer: float, second: str) -> None:
    rows = [row("cuda", ours, 700), row("liger", peer, 900), row("grouped_mm", peer + 1, 1400)]
    two, five = (next(bar for bar in bars.BARS if bar.name == name) for name in ("M2", "M5"))
    assert bars.judge(rows, [two])[0].status == second
    found = bars.judge(rows, [five])[0]
    assert found.status == "incomplete"  # A2.7B is not there
    assert "57b 8192: 0.500 of the memory of grouped_mm, 0.778 of the memory of liger" in found.detail
    assert bars.judge([row("cuda", ours, 1000), *rows[1:]], [five])[0].status == "fail"
    assert bars.judge([], [two])[0].status == "not judged"
