"""A switch that cannot work here is refused with its reason; the others reach Megatron's configuration."""

from __future__ import annotations

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe
from megatron_qwen.training.overrides import apply_overrides
from megatron_qwen.training.performance import check_performance, overlaps_p2p, transformer_overrides
from megatron_qwen.training.rank import check_recipe
from megatron_qwen.training.recipe import Recipe

NEED_CUDA = [
    "performance.fp8=hybrid",
    "performance.cuda_graphs=true",
    "performance.tp_comm_overlap=true",
    "performance.precision_aware_optimizer=true",
    "performance.optimizer_cpu_offload=true",
    "performance.defer_embedding_wgrad_compute=true",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without a GPU refuses")
@pytest.mark.parametrize("switch", NEED_CUDA)
def test_switches_for_gpus_are_refused_without_one(switch):
    with pytest.raises(ConfigError, match=rf"{switch.split('.')[1].split('=')[0]} needs a CUDA device"):
        check_performance(apply_overrides(Recipe(), [switch]), tiny_dense())


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        (["overlap_param_gather=true"], "overlap_param_gather needs overlap_grad_reduce"),
        (["align_param_gather=true"], "align_param_gather needs overlap_param_gather"),
        (["bucket_size=1000"], "no effect without overlap_grad_reduce"),
        (["fp8_param_gather=true"], "fp8_param_gather needs fp8"),
        (["moe_grouped_gemm=true"], "needs a mixture-of-experts model"),
        (["overlap_param_gather_with_optimizer_step=true"], r"parallel\.vpp > 1"),
        (
            ["defer_embedding_wgrad_compute=true", "gradient_accumulation_fusion=false"],
            "needs gradient_accumulation_fusion",
        ),
        (
            ["defer_embedding_wgrad_compute=true", "fuse_linear_cross_entropy=true"],
            "fuse_linear_cross_entropy and defer_embedding_wgrad_compute exclude each other",
        ),
    ],
)
def test_switches_that_need_each_other(switches, reason):
    with pytest.raises(ConfigError, match=reason):
        check_performance(apply_overrides(Recipe(), [f"performance.{each}" for each in switches]), tiny_dense())


def test_every_refused_switch_is_named_at_once():
    with pytest.raises(ConfigError, match=r"align_param_gather.*bucket_size"):
        check_performance(
            apply_overrides(Recipe(), ["performance.align_param_gather=true", "performance.bucket_size=5"]),
            tiny_dense(),
        )


def test_switches_reach_the_transformer_config():
    recipe = apply_overrides(
        Recipe(),
        [
            "performance.recompute=selective",
            "performance.recompute_modules=core_attn,mlp",
            "performance.moe_token_dispatcher=allgather",
            "model.hidden_dropout=0.25",
        ],
    )
    config = tiny_moe()
    built = config.to_transformer_config(**transformer_overrides(recipe, config))
    assert (built.recompute_granularity, built.recompute_modules) == ("selective", ["core_attn", "mlp"])
    assert built.moe_token_dispatcher_type == "allgather"
    assert built.hidden_dropout == 0.25
    assert built.calculate_per_token_loss


def test_sends_overlap_exactly_in_interleaved_pipelines():
    assert not overlaps_p2p(apply_overrides(Recipe(), ["parallel.pp=2"]))
    assert overlaps_p2p(apply_overrides(Recipe(), ["parallel.pp=2", "parallel.vpp=2"]))
    recipe = apply_overrides(
        Recipe(),
        [
            "parallel.pp=2",
            "parallel.vpp=2",
            "performance.overlap_p2p_comm=false",
            "schedule.global_batch_size=4",
            "data.blend=[[1, x]]",
        ],
    )
    with pytest.raises(ConfigError, match="trains wrongly"):
        check_recipe(recipe, tiny_dense(), world_size=2)
