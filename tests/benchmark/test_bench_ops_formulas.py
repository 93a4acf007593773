"""Bytes and operations against counts by hand, and against the tensors themselves."""

from __future__ import annotations

import pytest
import torch

from megatron_qwen.benchmark.ops.case import OpCase, results
from megatron_qwen.benchmark.ops.registry import all_cases
from megatron_qwen.benchmark.ops.rope_cases import sequence_lengths
from megatron_qwen.benchmark.ops.run import preset_of
from megatron_qwen.model.presets import find_preset

CASES = {case.name: case for case in all_cases()}
CPU = torch.device("cpu")
MOE = ("moe_permute", "moe_unpermute")
DECODE = ("paged_decode", "paged_decode_16", "sparse_index")  # tokens mix


def counts(name: str, model: str, tokens: int, direction: str) -> tuple[int, int]:
    case = CASES[name]
    sizes = case.sizes(find_preset(preset_of(model)), tokens)
    return case.bytes_moved(sizes, direction, 2), case.flops(sizes, direction)


# 7B: hidden 3584, 28 heads and 4 groups of 128, MLP 18,944. 72B: hidden 8192, 64 heads, 8 groups, MLP 29,568.
@pytest.mark.parametrize(
    ("name", "model", "direction", "num_bytes", "flops"),
    [
        # rows of 36 heads in and out, the bias, and two fp32 tables of 64 columns
        ("qkv_rope", "7b", "forward", 2 * (2 * 32768 * 4608 + 4608) + 8 * 32768 * 64, 32768 * (3 * 32 * 128 + 4608)),
        ("qkv_rope", "72b", "backward", 2 * (2 * 32768 * 10240 + 10240) + 8 * 32768 * 64,
         32768 * (3 * 72 * 128 + 10240)),
        ("qkv_rope_no_bias", "7b", "forward", 2 * 2 * 32768 * 4608 + 8 * 32768 * 64, 32768 * 3 * 32 * 128),
        ("rope", "7b", "forward", 2 * 2 * 32768 * 32 * 128 + 8 * 32768 * 64, 32768 * 3 * 32 * 128),
        ("rms_norm", "7b", "forward", 2 * (2 * 32768 * 3584 + 3584), 4 * 32768 * 3584),
        ("rms_norm", "7b", "backward", 2 * (3 * 32768 * 3584 + 2 * 3584), 9 * 32768 * 3584),
        ("add_rms_norm", "72b", "forward", 2 * (4 * 32768 * 8192 + 8192), 5 * 32768 * 8192),
        ("add_rms_norm", "72b", "backward", 2 * (4 * 32768 * 8192 + 2 * 8192), 10 * 32768 * 8192),
        ("swiglu", "7b", "forward", 2 * 3 * 32768 * 18944, 5 * 32768 * 18944),
        ("swiglu", "72b", "backward", 2 * 5 * 32768 * 29568, 11 * 32768 * 29568),
        # 8 of 64 experts per token, hidden 3584; an int64 per row of experts
        ("moe_permute", "57b", "forward", 2 * 9 * 32768 * 3584 + 8 * 8 * 32768, 0),
        ("moe_permute", "57b", "backward", 2 * 9 * 32768 * 3584 + 8 * 8 * 32768, 8 * 32768 * 3584),
        ("moe_unpermute", "57b", "forward", 2 * 9 * 32768 * 3584 + (4 + 8) * 8 * 32768, 2 * 8 * 32768 * 3584),
        ("moe_unpermute", "57b", "backward", 2 * 17 * 32768 * 3584 + (4 + 4 + 8) * 8 * 32768, 3 * 8 * 32768 * 3584),
        # 57B: 64 experts of width 2560, shared 20,480 = 8 x 2560, so that routed and shared experts do the same
        ("moe_mlp", "57b", "forward", 2 * (2 * 32768 * 3584 + 3 * 64 * 3584 * 2560) + 12 * 8 * 32768,
         6 * 8 * 32768 * 3584 * 2560),
        ("moe_mlp", "57b", "both", 2 * (5 * 32768 * 3584 + 9 * 64 * 3584 * 2560) + 12 * 8 * 32768,
         18 * 8 * 32768 * 3584 * 2560),
        ("moe_layer", "57b", "forward",
         2 * (2 * 32768 * 3584 + 3 * 64 * 3584 * 2560 + 3584 * (3 * 20480 + 65)) + 12 * 8 * 32768,
         12 * 8 * 32768 * 3584 * 2560 + 2 * 32768 * 3584 * 65),
        ("moe_routing", "57b", "backward", 2 * 2 * 32768 * 64 + 12 * 8 * 32768, 5 * 32768 * 64),
        ("linear_cross_entropy", "7b", "both", 2 * 2 * (32768 + 152064) * 3584 + 8 * 32768,
         6 * 32768 * 3584 * 152064),
        # 28 heads of queries and outputs, 4 of keys and values, an fp32 lse per row and head; the causal triangle
        ("dca_prefill", "7b", "forward", 2 * 32768 * (2 * 28 + 2 * 4) * 128 + 4 * 32768 * 28,
         4 * 28 * 128 * (32768 * 32769 // 2)),
        ("dca_train", "7b", "backward", 2 * 32768 * (4 * 28 + 4 * 4) * 128 + 4 * 32768 * 28,
         10 * 28 * 128 * (32768 * 32769 // 2)),
        ("paged_decode_16", "7b", "forward", 16 * 2 * (2 * 32768 * 4 + 2 * 28) * 128, 16 * 4 * 32768 * 28 * 128),
    ],
)  # fmt: skip
def test_counts_by_hand(name: str, model: str, direction: str, num_bytes: int, flops: int) -> None:
    assert counts(name, model, 32_768, direction) == (num_bytes, flops)


@pytest.mark.parametrize(
    ("name", "direction", "megabytes"),
    [("qkv_rope", "forward", 621), ("rope", "forward", 554), ("rms_norm", "forward", 470),
     ("add_rms_norm", "forward", 940), ("rms_norm", "backward", 705), ("swiglu", "forward", 3725),
     ("swiglu", "backward", 6208)],
)  # fmt: skip
def test_sizes_of_a_7b_layer_at_32k_tokens(name: str, direction: str, megabytes: int) -> None:
    assert round(counts(name, "7b", 32_768, direction)[0] / 1e6) == megabytes


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].family not in ("loss", "experts", "attention")])
def test_bytes_are_those_of_the_tensors_that_go_in_and_out(name: str) -> None:
    case = CASES[name]
    sizes = case.odd_sizes[1]
    workload = case.workload(sizes, torch.bfloat16, CPU, 0)
    found = results(case, workload, case.ours)
    leaves = sum(leaf.nbytes for leaf in workload.leaves.values())
    outputs = sum(found[output].nbytes for output in case.outputs)
    tables = sum(workload.others[each].nbytes for each in ("cos", "sin") if each in workload.others)
    tables += workload.others["positions"].nbytes if name in ("qkv_rope_packed", *MOE) else 0
    assert case.bytes_moved(sizes, "forward", 2) == leaves + outputs + tables
    if case.in_place:
        return
    gradients = sum(each.nbytes for key, each in found.items() if key.startswith("d "))
    # What backward reads beside the gradients of the outputs: the input, or s for both addends of a sum.
    reads = tables + (leaves if name in ("rms_norm", "add_rms_norm", "swiglu", "moe_unpermute") else 0)
    if name == "add_rms_norm":
        one = workload.leaves["x"].nbytes
        reads, gradients = reads - one, gradients - one  # s is read once, dx written once
    assert case.bytes_moved(sizes, "backward", 2) == reads + gradients + sum(each.nbytes for each in workload.grads)


def test_ragged_sequences_fill_the_batch_and_are_always_the_same() -> None:
    sizes = CASES["qkv_rope_packed"].sizes(find_preset("qwen2.5-7b"), 32_768)
    lengths = sequence_lengths(sizes)
    assert (len(lengths), sum(lengths), min(lengths) > 0) == (64, 32_768, True)
    assert lengths == sequence_lengths(sizes)
    assert len(set(lengths)) > 32
    assert sequence_lengths({"tokens": 7}) == [7]


@pytest.mark.parametrize(
    "case", [CASES[name] for name in CASES if name not in (*MOE, "moe_routing", *DECODE)], ids=lambda case: case.name
)
def test_a_slice_of_a_workload_computes_a_slice_of_the_results(case: OpCase) -> None:
    workload = case.workload(case.odd_sizes[1], torch.float32, CPU, 0)
    tokens = workload.num_tokens()
    whole = results(case, workload.wide(), case.plain)
    parts = [results(case, workload.slice(*ends).wide(), case.plain) for ends in ((0, 3), (3, tokens))]
    for name, expected in whole.items():
        first, second = (part[name] for part in parts)
        is_sum = name.removeprefix("d ") in workload.shared
        torch.testing.assert_close(first + second if is_sum else torch.cat([first, second]), expected)


def test_the_reference_is_computed_from_the_same_tables_as_ours() -> None:
    case = CASES["qkv_rope"]
    workload = case.workload(case.odd_sizes[1], torch.bfloat16, CPU, 0)
    exact = results(case, workload.wide(), case.plain)
    ours = results(case, workload.wide(), lambda **given: case.ours(**{**given, "cos": given["cos"].double(),
                                                                       "sin": given["sin"].double()}))  # fmt: skip
    for name, expected in exact.items():
        torch.testing.assert_close(ours[name], expected)


def test_where_tokens_mix_there_is_one_slice_with_everything() -> None:
    workload = CASES["moe_permute"].workload(CASES["moe_permute"].odd_sizes[1], torch.float32, CPU, 0)
    assert workload.num_tokens() == 1
    assert workload.slice(0, 1) is workload


def test_a_dense_model_has_no_experts_to_measure() -> None:
    assert CASES["moe_permute"].sizes(find_preset("qwen2.5-7b"), 64) == {}


def test_short_names_of_presets() -> None:
    assert preset_of("7b") == "qwen2.5-7b"
    assert preset_of("A2.7B") == "qwen1.5-moe-a2.7b"
    assert preset_of("57b") == "qwen2-57b-a14b"
    assert preset_of("qwen2.5-7b-instruct-1m") == "qwen2.5-7b-instruct-1m"
