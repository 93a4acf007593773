from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import LayerType

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig, YarnScaling
from megatron_qwen.model.flops import train_flops_per_token
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe


def test_architecture_of_the_7b():
    result = QwenConfig.from_preset("qwen2.5-7b").to_transformer_config(ParallelLayout(tp=4, pp=2))
    assert (result.num_layers, result.hidden_size, result.ffn_hidden_size, result.kv_channels) == (
        28,
        3584,
        18_944,
        128,
    )
    assert (result.num_attention_heads, result.num_query_groups) == (28, 4)
    assert result.add_qkv_bias
    assert not result.add_bias_linear
    assert (result.normalization, result.layernorm_epsilon, result.gated_linear_unit) == ("RMSNorm", 1e-6, True)
    assert (result.params_dtype, result.bf16, result.pipeline_dtype) == (torch.bfloat16, True, torch.bfloat16)
    assert (result.tensor_model_parallel_size, result.pipeline_model_parallel_size) == (4, 2)
    assert (result.attention_dropout, result.hidden_dropout) == (0.0, 0.0)


def test_moe_fields_and_the_loss_coefficient():
    config = QwenConfig.from_preset("qwen2-57b-a14b")
    result = config.to_transformer_config()
    assert (result.num_moe_experts, result.moe_router_topk, result.moe_ffn_hidden_size) == (64, 8, 2560)
    assert (result.moe_shared_expert_intermediate_size, result.moe_shared_expert_gate) == (20_480, True)
    assert result.moe_router_pre_softmax
    assert result.moe_layer_freq == 1
    assert result.moe_aux_loss_coeff == pytest.approx(0.001 * 8 / 28)
    assert not tiny_moe(norm_topk_prob=True).to_transformer_config().moe_router_pre_softmax
    assert tiny_moe(mlp_only_layers=(1,)).to_transformer_config().moe_layer_freq == [1, 0, 1, 1]


def test_uneven_pipeline_reaches_megatron():
    layout = ParallelLayout(pp=2, pp_layout=(1, 3))
    split = tiny_dense().to_transformer_config(layout).pipeline_model_parallel_layout
    layers = [split.get_layer_id_list(LayerType.decoder, vp_stage=None, pp_rank=rank) for rank in (0, 1)]
    assert layers == [[0], [1, 2, 3]]


def test_overrides_are_passed_on_checked_and_refused_where_the_model_decides():
    result = tiny_dense().to_transformer_config(recompute_granularity="selective", attention_dropout=0.1)
    assert (result.recompute_granularity, result.attention_dropout) == ("selective", 0.1)
    with pytest.raises(ConfigError, match="Did you mean 'recompute_granularity'"):
        tiny_dense().to_transformer_config(recompute_granularitiy="full")
    with pytest.raises(ConfigError, match="hidden_size"):
        tiny_dense().to_transformer_config(hidden_size=128)
    with pytest.raises(ConfigError, match="megatron-core refuses"):
        tiny_dense().to_transformer_config(recompute_granularity="full", recompute_method="sideways")


def test_yarn_attention_factor_becomes_megatrons_concentration():
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config as concentration,
    )

    for scaling in (
        YarnScaling(factor=4.0, original_max_position_embeddings=32),
        YarnScaling(factor=4.0, original_max_position_embeddings=32, attention_factor=0.5),
        YarnScaling(factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.2),
    ):
        result = tiny_dense(rope_scaling=scaling).to_transformer_config()
        assert concentration(result) == pytest.approx(scaling.concentration(), rel=1e-12)
    scaling = YarnScaling(factor=1.0, original_max_position_embeddings=32, attention_factor=2.0)
    with pytest.raises(ConfigError, match="factor above 1"):
        tiny_dense(rope_scaling=scaling).to_transformer_config()


def test_flops_of_the_7b_by_hand():
    # 6 x (7,615,616,512 - embedding - biases - norms) + 12 L n d s
    config = QwenConfig.from_preset("qwen2.5-7b")
    matrices = 7_615_616_512 - 152_064 * 3584 - 28 * (3584 + 2 * 512) - 57 * 3584
    assert train_flops_per_token(config, 4096, causal=False) == 6 * matrices + 12 * 28 * 3584 * 4096
    assert train_flops_per_token(config, 4096, causal=True) == 6 * matrices + 12 * 28 * 3584 * 2048.5


def test_flops_of_a_moe_count_the_chosen_experts_only():
    few, many = (train_flops_per_token(tiny_moe(experts=n), 64, causal=True) for n in (4, 8))
    assert many - few == 6 * 4 * 64 * 4  # four more router rows in each of four layers
