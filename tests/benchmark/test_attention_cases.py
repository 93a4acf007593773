from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_qwen.benchmark.ops import attention_cases, attention_definition, bars, run
from megatron_qwen.benchmark.ops.attention_cases import CASES as DENSE
from megatron_qwen.benchmark.ops.case import results
from megatron_qwen.benchmark.ops.check import check_contestants
from megatron_qwen.benchmark.ops.contestants import PEERS, OpContestant, take_part
from megatron_qwen.benchmark.ops.odd_sizes import check_odd_sizes
from megatron_qwen.benchmark.ops.result import OpRow
from megatron_qwen.benchmark.ops.sparse_cases import CASES as SPARSE
from megatron_qwen.benchmark.ops.sparse_cases import head_lists, kept_pairs
from megatron_qwen.benchmark.roofline import Ceiling, Roofline
from megatron_qwen.benchmark.timing import Summary
from megatron_qwen.model.presets import find_preset

CPU = torch.device("cpu")
CASES = DENSE + SPARSE
BY_NAME = {case.name: case for case in CASES}
PROMPT = {"tokens": 131, "groups": 2, "queries": 7, "head": 64, "chunk": 48, "local": 16}
SIZES = {
    "dca_prefill": PROMPT,
    "dca_train": PROMPT,
    "causal_prefill": {name: PROMPT[name] for name in ("tokens", "groups", "queries", "head")},
    "paged_decode": {**PROMPT, "tokens": 144, "batch": 1},
    "paged_decode_16": {**PROMPT, "tokens": 48, "batch": 3},
    "sparse_prefill": PROMPT,
    "sparse_index": PROMPT,
}
RIGHT = {
    "dca_prefill": {"reference", "three_call", "per_head"},
    "dca_train": {"reference", "three_call"},
    "causal_prefill": {"reference", "flash"},
    "paged_decode": {"reference", "three_call"},
    "paged_decode_16": {"reference", "three_call"},
    "sparse_prefill": {"reference"},
    "sparse_index": {"reference"},
}


def test_ours_is_right_at_odd_sizes() -> None:
    found = list(check_odd_sizes(CASES, CPU, ("reference",)))
    assert {each.case for each in found} == set(BY_NAME)
    assert not [each for each in found if not each.is_right]


@pytest.mark.parametrize("name", SIZES)
def test_peers_that_can_run_are_right_and_others_say_why(name: str) -> None:
    case = BY_NAME[name]
    contestants = take_part(case, CPU, torch.float32, ("reference",), PEERS)
    verdicts = check_contestants(case, case.workload(SIZES[name], torch.float32, CPU, 0), contestants)
    assert {who: each.is_right for who, each in verdicts.items()} == dict.fromkeys(RIGHT[name], True)
    missing = {each.name: each.missing for each in contestants if each.function is None}
    assert missing.keys() == {"reference", *PEERS} - RIGHT[name]
    assert missing["torch"] == missing["compile"] == "plain torch is the definition here, and not timed"
    if name == "causal_prefill":
        assert missing["cudnn"] == "its kernels run on a GPU only"
        assert missing["fa3"] == "not installed (pip install fa3-fwd)"


def other_window(**given: Any) -> Any:
    return BY_NAME["dca_prefill"].ours(**{**given, "local": 15})


def verdict_of(function: Any, workload: Any) -> bool:
    case = BY_NAME["dca_prefill"]
    wrong = OpContestant(name="reference", is_ours=True, function=function)
    return check_contestants(case, workload, [wrong])["reference"].is_right


def test_another_layout_is_found() -> None:
    workload = BY_NAME["dca_prefill"].workload(PROMPT, torch.float32, CPU, 0)
    assert not verdict_of(other_window, workload)


def test_long_prompts_are_compared_at_the_edges_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cases, "_LONG", 100)
    case = BY_NAME["dca_prefill"]
    workload = case.workload(PROMPT, torch.float32, CPU, 0)
    assert workload.compared == ((0, 16), (16, 48), (48, 80), (80, 112), (115, 131))
    assert not verdict_of(other_window, workload)

    def shifted_at(row: int) -> Any:
        def run(**given: Any) -> torch.Tensor:
            output = case.ours(**given)
            output[row] += 1.0
            return output  # type: ignore[no-any-return]

        return run

    assert verdict_of(case.ours, workload)
    assert verdict_of(shifted_at(113), workload)
    assert not any(verdict_of(shifted_at(row), workload) for row in (0, 47, 111, 115, 130))
    assert not BY_NAME["dca_train"].workload(PROMPT, torch.float32, CPU, 0).compared


def test_yardsticks_of_recomputed_logits_are_the_definition_but_for_roundings() -> None:
    case = BY_NAME["dca_train"]
    workload = case.workload(PROMPT, torch.float32, CPU, 0)
    exact = results(case, workload.wide(), case.plain)
    errors = []
    for yardstick in case.fp32_yardsticks:
        for name, result in results(case, workload.wide(), yardstick).items():
            torch.testing.assert_close(result, exact[name], rtol=1e-12, atol=1e-12)
        errors.append((results(case, workload, yardstick)["d q"].double() - exact["d q"]).abs().max().item())
    assert len(set(errors)) > 1, "the order of a head's numbers makes no difference"


def test_the_definition_in_pieces_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["dca_train"]
    workload = case.workload(PROMPT, torch.float32, CPU, 0).wide()
    whole = results(case, workload, case.plain)
    monkeypatch.setattr(attention_definition, "LOGITS", 14 * 131 * 10)
    for name, piece in results(case, workload, case.plain).items():
        torch.testing.assert_close(piece, whole[name], rtol=1e-12, atol=1e-12)


def test_sizes_of_the_bars() -> None:
    config = find_preset("qwen2.5-7b")
    prefill, decode = BY_NAME["dca_prefill"], BY_NAME["paged_decode_16"]
    heads = {"groups": 4, "queries": 7, "head": 128}
    assert prefill.sizes(config, 32_768) == {"tokens": 32_768, **heads, "chunk": 8192, "local": 1024}
    assert prefill.sizes(config, 131_072) == {"tokens": 131_072, **heads, "chunk": 32_768, "local": 2048}
    sizes = decode.sizes(config, 131_072)
    assert sizes == {"tokens": 131_072, **heads, "batch": 16, "chunk": 32_768, "local": 2048}
    assert prefill.flops(prefill.sizes(config, 32_768), "forward") == pytest.approx(7.70e12, rel=1e-3)
    assert decode.bytes_moved({**sizes, "batch": 1}, "forward", 2) == pytest.approx(268e6, rel=2e-3)
    for bar in bars.BARS:
        if bar.case in BY_NAME:
            case = BY_NAME[bar.case]
            assert bar.direction in case.directions
            assert set(bar.tokens) <= set(case.lengths["cuda"])
            assert set(bar.models) <= set(case.models["cuda"])
            assert {peer for names, _ in bar.ahead for peer in names} <= case.peers.keys()


def test_a_tenth_of_the_pairs_is_kept() -> None:
    """Counted one by one, and at the size of the bar, where heads differ."""
    columns, slashes = head_lists(400, 3)
    kept = [
        (row, key)
        for row in range(400)
        for key in range(row + 1)
        if key in columns or any(first <= row - key < last for first, last in slashes)
    ]
    assert kept_pairs(400, columns, slashes) == len(kept)
    assert head_lists(400, 3) != head_lists(400, 2)
    case = BY_NAME["sparse_prefill"]
    sizes = case.sizes(find_preset("qwen2.5-7b"), 131_072)
    share = case.flops(sizes, "forward") / BY_NAME["dca_prefill"].flops(sizes, "forward")
    assert 0.1 <= share < 0.101


@pytest.mark.parametrize(
    ("sparse", "dense", "index", "found"),
    [(25.0, 180.0, 0.2, ["pass", "pass"]), (70.0, 180.0, 0.8, ["fail", "fail"]), (30.0, 180.0, 0.2, ["fail", "pass"])],
)
def test_bars_of_sparse_prefill(sparse: float, dense: float, index: float, found: list[str]) -> None:
    """A third of the time of dense attention, 0.7 of its rate (7 times as fast for a tenth), an index of 1%."""
    times = {"sparse_prefill": (sparse, 0.1), "dca_prefill": (dense, 1.0), "sparse_index": (index, 0.0)}
    rows = [
        replace(row("triton", milliseconds), case=case, sizes={"tokens": 131_072}, flops=int(share * 1e14))
        for case, (milliseconds, share) in times.items()
    ]
    wanted = [bar for bar in bars.BARS if bar.name.startswith("A5")]
    assert [each.status for each in bars.judge(rows, wanted)] == found
    assert [each.status for each in bars.judge(rows[:1], wanted)] == ["not judged", "not judged"]


def row(contestant: str, milliseconds: float, **rest: Any) -> OpRow:
    flops = BY_NAME["dca_prefill"].flops(PROMPT | {"tokens": 32_768, "groups": 4, "head": 128}, "forward")
    return OpRow(
        case="dca_prefill", family="attention", direction="forward", model="7b", sizes={"tokens": 32_768},
        dtype="bf16", contestant=contestant, is_ours=contestant == "triton", status="timed", detail="",
        bound="compute", seconds=Summary(*[milliseconds / 1e3] * 3, 50), flops=flops, **rest,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "calls", "heads", "status"),
    [(12.0, 13.2, 20.0, "pass"), (12.0, 12.5, 20.0, "fail"), (12.0, 13.2, 17.0, "fail"), (13.0, 20.0, 30.0, "fail")],
)
def test_bar_of_prompts(ours: float, calls: float, heads: float, status: str) -> None:
    (bar,) = (bar for bar in bars.BARS if bar.name == "A1")
    rows = [row("triton", ours), row("three_call", calls), row("per_head", heads)]
    assert bars.judge(rows, [bar])[0].status == status
    assert bars.judge([], [bar])[0].status == "not judged"


def test_long_runs_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Summary(1.0, 1.0, 1.0, 1)
    ceilings = tuple(Ceiling(name="", unit=unit, rate=1.0, seconds=second) for unit in ("B/s", "FLOP/s"))
    monkeypatch.setattr(run, "measure_roofline", lambda *rest: Roofline(ceilings=ceilings))
    case = replace(BY_NAME["causal_prefill"], most_rounds=lambda sizes: 200 // sizes["tokens"])
    bench = run.OpsBench(
        cases=(case,), device=CPU, models=("7b",), seq_lengths=(50, 100), dtypes=("fp32",), backends=("reference",),
        versus=(), rounds=3,
    )  # fmt: skip
    rows = bench.run(lambda text: None, lambda report: None).rows
    assert [each.seconds and each.seconds.count for each in rows] == [3, 2]


def test_pieces_of_the_definition_add_up_gradients_without_rounding_every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["dca_train"]
    sizes = {**PROMPT, "tokens": 67, "groups": 1, "queries": 1}
    workload = case.workload(sizes, torch.bfloat16, CPU, 0)
    exact = results(case, workload.wide(), case.plain)

    def error(pieces: int) -> float:
        monkeypatch.setattr(attention_definition, "LOGITS", 67 * -(-67 // pieces))
        found = results(case, workload, case.plain)
        return max((found[name].double() - exact[name]).abs().max().item() for name in ("d k", "d v"))

    assert error(67) <= 1.25 * error(1)
