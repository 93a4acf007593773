from __future__ import annotations

import math
from collections import Counter

import pytest

from megatron_qwen.conversion.names import FAMILIES, SYMBOL_FIELDS
from megatron_qwen.conversion.parameters import (
    global_name,
    hf_file_order,
    is_homogeneous,
    local_layer,
    parameters,
    stored_place,
    tied_output,
)
from megatron_qwen.conversion.transforms import TRANSFORMS
from megatron_qwen.model.presets import PRESETS
from megatron_qwen.testing.tiny import tensor_shapes, tiny_dense, tiny_moe

CONFIGS = [
    tiny_dense(),
    tiny_dense(tied=True, layers=3),
    tiny_moe(),
    tiny_moe(mlp_only_layers=(0, 2), layers=5),
    tiny_moe(decoder_sparse_step=2, tied=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_hugging_face_tensor_is_in_the_table_once_with_its_shape(config):
    found = hf_file_order(parameters(config))
    assert len(found) == len(dict(found))
    assert dict(found) == dict(tensor_shapes(config))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stacked", [True, False])
def test_no_two_parameters_share_a_name_or_a_place(config, stacked):
    items = parameters(config)
    assert not [name for name, n in Counter(item.megatron_name for item in items).items() if n > 1]
    assert not [name for name, n in Counter(item.engine_name for item in items).items() if n > 1]
    assert len({stored_place(item, config, stacked=stacked) for item in items}) == len(items)


@pytest.mark.parametrize("config", CONFIGS)
def test_both_sides_of_a_parameter_hold_the_same_number_of_values(config):
    for item in parameters(config):
        assert sum(map(math.prod, item.hf_shapes)) == math.prod(item.shape), item.megatron_name


@pytest.mark.parametrize(("name", "count"), [("qwen2.5-0.5b", 494_032_768), ("qwen1.5-moe-a2.7b", 14_315_784_192)])
def test_the_table_counts_the_published_models_exactly(name, count):
    assert sum(math.prod(item.shape) for item in parameters(PRESETS[name])) == count


def test_rows_are_well_formed():
    for family in FAMILIES:
        assert len(family.hf) == len(family.hf_shapes)
        assert family.transform in TRANSFORMS
        symbols = {symbol for shape in (*family.hf_shapes, family.shape) for symbol in shape.split()}
        assert symbols <= SYMBOL_FIELDS.keys()
        assert family.shard_axis is None or family.shard_axis < len(family.shape.split())


def test_norms_have_the_names_of_both_layer_specs():
    by_hf = {item.hf_names[0]: item for item in parameters(tiny_moe(mlp_only_layers=(1,)))}
    dense, moe = (by_hf[f"model.layers.{layer}.post_attention_layernorm.weight"] for layer in (1, 0))
    assert dense.megatron_name == "decoder.layers.1.pre_mlp_layernorm.weight"
    assert dense.engine_name == "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    assert moe.megatron_name == moe.engine_name == "decoder.layers.0.pre_mlp_layernorm.weight"


def test_experts_have_the_names_of_both_expert_kinds_and_one_stacked_place():
    config = tiny_moe(layers=3, experts=4)
    (item,) = (p for p in parameters(config) if (p.layer, p.expert) == (2, 3) and "gate_proj" in p.hf_names[0])
    assert item.megatron_name == "decoder.layers.2.mlp.experts.local_experts.3.linear_fc1.weight"
    assert item.engine_name == "decoder.layers.2.mlp.experts.linear_fc1.weight3"
    place = stored_place(item, config, stacked=is_homogeneous(config))
    assert place.key == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert (place.index, place.leading) == ((2, 3), (3, 4))


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("1.mlp.linear_fc1.weight", "9.mlp.linear_fc1.weight"),
        ("1.mlp.experts.local_experts.0.linear_fc2.weight", "9.mlp.experts.local_experts.6.linear_fc2.weight"),
        ("1.mlp.experts.linear_fc1.weight1", "9.mlp.experts.linear_fc1.weight7"),
        ("1.mlp.shared_experts.linear_fc1.weight", "9.mlp.shared_experts.linear_fc1.weight"),
    ],
)
def test_local_numbers_become_global_ones(local, expected):
    name = f"decoder.layers.{local}"
    assert local_layer(name) == 1
    assert global_name(name, layer=9, expert_offset=6) == f"decoder.layers.{expected}"


def test_a_tied_model_has_one_vocabulary_matrix():
    config = tiny_dense(tied=True)
    assert [item.hf_names for item in parameters(config) if item.has_vocabulary_rows] == [
        ("model.embed_tokens.weight",)
    ]
    assert tied_output(config).megatron_name == "output_layer.weight"
