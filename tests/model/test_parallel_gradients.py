from __future__ import annotations

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
}
LAYOUTS = {
    "tp2": (ParallelLayout(tp=2), ["dense", "tied"]),  # Megatron refuses to train a MoE with TP but without SP
    "tp2-sp": (ParallelLayout(tp=2, sequence_parallel=True), ["dense", "tied", "moe"]),
}


@pytest.fixture(scope="module")
def alone():
    return {name: model_ranks.gradients(config, ParallelLayout(), None) for name, config in MODELS.items()}


@pytest.mark.multirank
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_gradient_under_tensor_parallelism_is_that_of_one_rank(name, alone):
    layout, models = LAYOUTS[name]
    cases = [(MODELS[model], alone[model]["weights"]) for model in models]
    for results in run_ranks(model_ranks.gradients_of_all, 2, cases, layout):
        for model, result in zip(models, results, strict=True):
            assert_relative(result["loss"], alone[model]["loss"], 1e-5, name=f"{model}: loss")
            for parameter, expected in alone[model]["grads"].items():
                assert_relative(result["grads"][parameter], expected, 1e-4, name=f"{model}: {parameter}")
