from __future__ import annotations

import dataclasses
import json
import logging

import pytest

from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.model.presets import PRESETS
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

YARN = YarnScaling(factor=4.0, original_max_position_embeddings=32_768)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_config_json(name):
    assert QwenConfig.from_hf(json.loads(json.dumps(PRESETS[name].to_hf()))) == PRESETS[name]


@pytest.mark.parametrize(
    "config",
    [
        tiny_dense(rope_scaling=YARN, eos_token_id=(1, 2), bos_token_id=None),
        tiny_dense(rope_scaling=dataclasses.replace(YARN, attention_factor=1.3, beta_fast=24.0, truncate=False)),
        tiny_dense(rope_scaling=dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=0.9)),
        tiny_dense(dual_chunk_attention=DualChunkAttention(chunk_size=64, local_size=8, sparse_attention_enabled=True)),
        tiny_moe(mlp_only_layers=(0, 3), norm_topk_prob=True, decoder_sparse_step=1),
    ],
)
def test_optional_settings_survive_config_json(config):
    assert QwenConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_transformers_4_and_5_spellings_read_the_same():
    content = tiny_dense(rope_scaling=YARN, rope_theta=1e6).to_hf()
    old = {name: value for name, value in content.items() if name not in ("rope_parameters", "dtype")}
    new = {name: value for name, value in content.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert QwenConfig.from_hf(old) == QwenConfig.from_hf(new) == QwenConfig.from_hf(content)
    legacy = old | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}}
    assert QwenConfig.from_hf(legacy) == QwenConfig.from_hf(content)


def test_exported_config_serves_both_transformers_generations():
    content = tiny_moe().to_hf()
    assert content["architectures"] == ["Qwen2MoeForCausalLM"]
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"]
    assert content["dtype"] == content["torch_dtype"] == "float32"


def test_inert_fields_are_kept_for_export_and_do_not_count_for_equality(caplog):
    content = tiny_dense().to_hf() | {"sliding_window": 131_072, "max_window_layers": 28, "use_cache": False}
    with caplog.at_level(logging.INFO):
        config = QwenConfig.from_hf(content)
    assert config == tiny_dense()
    assert config.to_hf()["sliding_window"] == 131_072
    assert config.to_hf()["use_cache"] is False
    assert "sliding_window" in caplog.text


def test_unknown_field_is_logged_and_a_misspelt_one_refused(caplog):
    QwenConfig.from_hf(tiny_dense().to_hf() | {"flux_capacitor": 1})
    assert "flux_capacitor" in caplog.text
    with pytest.raises(ConfigError, match=r"rms_norm_epsilon.*Did you mean 'rms_norm_eps'"):
        QwenConfig.from_hf(tiny_dense().to_hf() | {"rms_norm_epsilon": 1e-5})


def test_all_missing_fields_are_named_at_once():
    content = tiny_dense().to_hf()
    for name in ("rms_norm_eps", "hidden_size", "rope_theta", "rope_parameters"):
        del content[name]
    with pytest.raises(ConfigError, match=r"rms_norm_eps|hidden_size") as error:
        QwenConfig.from_hf(content)
    assert all(name in str(error.value) for name in ("rms_norm_eps", "hidden_size", "rope_theta"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "Qwen2ForCausalLM"]),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, ["Qwen3ForCausalLM", "qwen2_moe"]),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, ["contradicts"]),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, ["Qwen2ForSequenceClassification"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised", "gptq"]),
        ({"use_sliding_window": True}, ["sliding-window"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu"]),
        ({"layer_types": ["sliding_attention"] * 4}, ["sliding_attention"]),
        ({"head_dim": 32}, ["head_dim"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": None}, ["linear", "yarn"]),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, ["factor is missing"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["contradicts"]),
        ({"rope_theta": 1e6}, ["rope_theta", "10000.0", "1000000.0"]),
        ({"dtype": "float16"}, ["contradicts"]),
        ({"torch_dtype": "float64", "dtype": None}, ["float64"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, words):
    with pytest.raises(ConfigError) as error:
        QwenConfig.from_hf(tiny_dense().to_hf() | changes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_contradictions_are_listed_together():
    with pytest.raises(ConfigError) as error:
        tiny_moe(hidden=65, heads=6, kv_heads=4, experts=4, topk=5, mlp_only_layers=(9,))
    for words in ("hidden_size 65", "num_key_value_heads 4", "num_experts_per_tok 5", "[9]"):
        assert words in str(error.value)


def test_config_json_that_is_absent_or_broken_is_refused(tmp_path):
    with pytest.raises(IncompleteInputError, match=r"config\.json"):
        QwenConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(CorruptInputError, match="not valid JSON"):
        QwenConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptInputError, match="list"):
        QwenConfig.from_hf(str(tmp_path))


def test_preset_traps_by_checkpoint():
    assert QwenConfig.from_preset("Qwen/Qwen2.5-14B").rms_norm_eps == 1e-5
    assert QwenConfig.from_preset("qwen2.5-14b-instruct").rms_norm_eps == 1e-6
    million = QwenConfig.from_preset("Qwen/Qwen2.5-7B-Instruct-1M")
    assert (million.rms_norm_eps, million.rope_theta, million.max_position_embeddings) == (1e-5, 1e7, 1_010_000)
    assert million.dual_chunk_attention.chunk_size == 262_144
    with pytest.raises(ConfigError, match=r"Did you mean 'qwen2\.5-7b'"):
        QwenConfig.from_preset("qwen2.5-8b")


RELEASED_CHUNKS = {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}


def with_chunks(**entries):
    return tiny_dense().to_hf() | {"dual_chunk_attention_config": RELEASED_CHUNKS | entries}


def test_dual_chunk_attention_is_read_and_written_as_released(caplog):
    config = QwenConfig.from_hf(with_chunks())
    assert config.dual_chunk_attention == DualChunkAttention(**RELEASED_CHUNKS)
    assert config.dual_chunk_attention.chunk_length == 253_952
    assert config.to_hf()["dual_chunk_attention_config"] == RELEASED_CHUNKS
    assert QwenConfig.from_preset("qwen2.5-14b-instruct-1m").to_hf()["dual_chunk_attention_config"] == RELEASED_CHUNKS
    sparse = {
        "sparse_attention_config": [{"0": ["vertical_and_slash", 30, 800, 0.9]}],
        "sparse_attention_enabled": True,
    }
    with caplog.at_level(logging.INFO):
        config = QwenConfig.from_hf(with_chunks(**sparse, sparse_attention_extra=1))
    assert config.to_hf()["dual_chunk_attention_config"] == RELEASED_CHUNKS | sparse | {"sparse_attention_extra": 1}
    assert config.dual_chunk_attention.sparse_attention_config == sparse["sparse_attention_config"]
    assert [
        record for record in caplog.messages if record.endswith("kept for export, not used: sparse_attention_extra")
    ]
    paper = QwenConfig.from_hf(with_chunks(cap="paper"))
    assert paper != QwenConfig.from_hf(with_chunks())
    assert paper.to_hf()["dual_chunk_attention_config"] == RELEASED_CHUNKS | {"cap": "paper"}


def test_a_null_in_dual_chunk_attention_is_an_absent_entry():
    config = QwenConfig.from_hf(with_chunks(original_max_position_embeddings=None, sparse_attention_last_q=None))
    assert config.dual_chunk_attention.original_max_position_embeddings == 0
    assert QwenConfig.from_hf(tiny_dense().to_hf() | {"dual_chunk_attention_config": None}) == tiny_dense()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (RELEASED_CHUNKS | {"local_sise": 3}, "unknown field 'local_sise'. Did you mean 'local_size'"),
        ({"chunk_size": 8}, "missing: local_size"),
        ([8, 3], "expected an object or null"),
        (RELEASED_CHUNKS | {"local_size": 262_144}, "expected local_size < chunk_size"),
        (RELEASED_CHUNKS | {"chunk_size": "8"}, "chunk_size: got '8', expected a whole number"),
        (RELEASED_CHUNKS | {"cap": "8"}, "cap: got '8', expected one of released, paper"),
        (RELEASED_CHUNKS | {"sparse_attention_enabled": "no"}, "sparse_attention_enabled: got 'no', expected true or"),
        (RELEASED_CHUNKS | {"sparse_attention_threshold": -1}, "sparse_attention_threshold: got -1, expected a whole"),
        (
            RELEASED_CHUNKS | {"sparse_attention_last_q": 0},
            "sparse_attention_last_q: got 0, expected a whole number >= 1",
        ),
    ],
)
def test_a_bad_dual_chunk_attention_config_is_named(block, message):
    with pytest.raises(ConfigError, match=message):
        QwenConfig.from_hf(tiny_dense().to_hf() | {"dual_chunk_attention_config": block})


def test_moe_layers_follow_the_sparse_step_and_the_list():
    assert tiny_moe(decoder_sparse_step=2).moe_layers() == (False, True, False, True)
    assert tiny_moe(mlp_only_layers=(0, 2)).moe_layers() == (False, True, False, True)
    assert tiny_dense().moe_layers() == (False,) * 4
