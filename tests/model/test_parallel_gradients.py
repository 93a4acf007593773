from __future__ import annotations

import dataclasses

import model_ranks
import pytest

from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.compare import assert_relative
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

MODELS = {
    "dense": tiny_dense(layers=2),
    "tied": tiny_dense(layers=2, tied=True),
    # One MoE layer, with a dense one before it, so that the router's input depends on parallel layers.
    "moe": tiny_moe(layers=2, mlp_only_layers=(0,)),
    "one expert": tiny_moe(layers=2, mlp_only_layers=(0,), topk=1, experts=2),
}
SP = ParallelLayout(tp=2, sequence_parallel=True)
CASES = [
    # Megatron refuses to train a MoE with TP but without SP.
    *((name, ParallelLayout(tp=2), {}) for name in ("dense", "tied")),
    *((name, SP, {}) for name in ("dense", "tied", "moe")),
    ("moe", dataclasses.replace(SP, etp=1), {}),
    ("moe", dataclasses.replace(SP, etp=1, ep=2), {}),
    ("moe", dataclasses.replace(SP, etp=1, ep=2), {"moe_token_dispatcher_type": "allgather"}),
    ("moe", SP, {"moe_shared_expert_overlap": True}),
    ("moe", dataclasses.replace(SP, etp=1), {"moe_shared_expert_overlap": True}),
    ("moe", dataclasses.replace(SP, etp=1, ep=2), {"moe_shared_expert_overlap": True}),
    ("one expert", dataclasses.replace(SP, etp=1, ep=2), {"moe_shared_expert_overlap": True}),
]


@pytest.fixture(scope="module")
def alone():
    found = {name: model_ranks.gradients(config, ParallelLayout(), None) for name, config in MODELS.items()}
    # Experts as likely as each other: all tokens go to the first, and the rank of the other gets none.
    weights = found["one expert"]["weights"]
    weights["decoder.layers.1.mlp.router.weight"][1] = weights["decoder.layers.1.mlp.router.weight"][0]
    found["one expert"] = model_ranks.gradients(MODELS["one expert"], ParallelLayout(), weights)
    grads = found["one expert"]["grads"]
    assert [bool(grads[f"decoder.layers.1.mlp.experts.local_experts.{i}.linear_fc2.weight"].any()) for i in (0, 1)] == [
        True,
        False,
    ]
    return found


@pytest.mark.multirank
def test_every_gradient_under_tensor_parallelism_is_that_of_one_rank(alone):
    """Those of router and shared expert's gate too, which every rank holds and computes for a part of the tokens."""
    cases = [(MODELS[name], alone[name]["weights"], layout, overrides) for name, layout, overrides in CASES]
    for results in zip(*run_ranks(model_ranks.gradients_of_all, 2, cases), CASES, strict=True):
        *ranks, (name, layout, overrides) = results
        case = f"{name}, {layout}, {overrides}"
        assert {parameter for rank in ranks for parameter in rank["grads"]} == alone[name]["grads"].keys()
        for rank in ranks:
            assert_relative(rank["loss"], alone[name]["loss"], 1e-5, name=f"{case}: loss")
            for parameter, grad in rank["grads"].items():
                assert_relative(grad, alone[name]["grads"][parameter], 1e-4, name=f"{case}: {parameter}")
