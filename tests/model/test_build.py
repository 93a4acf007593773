from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.build import build_model, build_model_chunks, padded_vocab_size
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.model.presets import PRESETS
from megatron_qwen.model.spec import QWEN_LAYER_SPEC, get_qwen_layer_spec
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

EXACT = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
}
NON_EMBEDDING = {
    "qwen2.5-0.5b": 357_898_112,
    "qwen2.5-1.5b": 1_310_340_608,
    "qwen2.5-3b": 2_774_773_760,
    "qwen2.5-7b": 6_525_621_760,
    "qwen2.5-14b": 13_212_898_304,
    "qwen2.5-32b": 31_206_740_992,
    "qwen2.5-72b": 70_214_787_072,
}


def released_size(name: str) -> str:
    for suffix in ("-instruct-1m", "-instruct", "-chat"):
        name = name.removesuffix(suffix)
    return name


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_counted_from_the_built_model_are_the_published_integers(name):
    model = build_model(PRESETS[name], device="meta")
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(sizes.values()) == EXACT[released_size(name)]
    if released_size(name) in NON_EMBEDDING:
        embeddings = sizes["embedding.word_embeddings.weight"] + sizes.get("output_layer.weight", 0)
        assert sum(sizes.values()) - embeddings == NON_EMBEDDING[released_size(name)]


def test_presets_cover_every_released_checkpoint():
    assert len(PRESETS) == 7 * 2 + 2 + 4
    assert {released_size(name) for name in PRESETS} == set(EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [tiny_dense(tied=True), tiny_moe()], ids=["dense", "moe"])
def test_every_parameter_has_the_asked_dtype(config, dtype):
    assert {parameter.dtype for parameter in build_model(config, dtype=dtype).parameters()} == {dtype}


def stock_model(config: QwenConfig, spec=None) -> GPTModel:
    transformer_config = config.to_transformer_config(dtype=torch.float32, transformer_impl="local")
    return GPTModel(
        config=transformer_config,
        transformer_layer_spec=spec
        or get_gpt_decoder_block_spec(transformer_config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
    )


CONFIGS = {
    "dense": tiny_dense(),
    "tied": tiny_dense(tied=True),
    "moe": tiny_moe(),
    "mixed": tiny_moe(mlp_only_layers=(1, 2)),
}


def logits(model: GPTModel, vocab: int, with_mask: bool = False) -> torch.Tensor:
    tokens = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None] if with_mask else None
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(9).expand(2, 9), mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dicts_are_exchanged_with_stock_megatron(name):
    ours, stock = build_model(CONFIGS[name], dtype=torch.float32), stock_model(CONFIGS[name])
    assert {k: v.shape for k, v in ours.named_parameters()} == {k: v.shape for k, v in stock.named_parameters()}
    stock.load_state_dict(ours.state_dict())
    expected = logits(ours, 512)
    torch.testing.assert_close(logits(stock, 512, with_mask=True), expected, rtol=1e-5, atol=1e-5)
    fresh = build_model(CONFIGS[name], dtype=torch.float32)
    fresh.load_state_dict(stock.state_dict())
    assert torch.equal(logits(fresh, 512), expected)


def test_dense_model_takes_the_state_of_the_plain_layer_spec():
    ours = build_model(tiny_dense(), dtype=torch.float32)
    stock = stock_model(tiny_dense(), get_gpt_layer_local_spec(normalization="RMSNorm"))
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(logits(ours, 512), logits(stock, 512, with_mask=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_ready_object_and_callable_build_the_same_model(name):
    config = CONFIGS[name]
    transformer_config = config.to_transformer_config(dtype=torch.float32, transformer_impl="local")
    ours = build_model(config, dtype=torch.float32)
    specs = {
        "object": QWEN_LAYER_SPEC,
        "no arguments": get_qwen_layer_spec(),
        "config": get_qwen_layer_spec(transformer_config),
        "config, vp_stage": get_qwen_layer_spec(transformer_config, vp_stage=None),
        "args, config, vp_stage": get_qwen_layer_spec(object(), transformer_config, None),
        "carrier": get_qwen_layer_spec(type("GPTModelConfig", (), {"transformer": transformer_config})()),
    }
    for how, spec in specs.items():
        model = stock_model(config, spec)
        model.load_state_dict(ours.state_dict())
        assert torch.equal(logits(model, 512), logits(ours, 512)), how


def test_callable_without_a_configuration_among_its_arguments_is_refused():
    with pytest.raises(ConfigError, match="no TransformerConfig"):
        get_qwen_layer_spec(object())


@pytest.mark.skipif(compat.has_transformer_engine(), reason="Transformer Engine is installed")
def test_transformer_engine_asked_for_without_it_is_a_clear_error():
    with pytest.raises(ConfigError, match="transformer-engine"):
        build_model(tiny_dense(), backend="te")
    with pytest.raises(ConfigError, match="expected one of"):
        build_model(tiny_dense(), backend="apex")


def test_layout_other_than_the_running_one_is_refused():
    with pytest.raises(ConfigError, match="'tp': 2"):
        build_model(tiny_dense(), layout=ParallelLayout(tp=2))


def test_one_chunk_without_interleaving_and_padded_rows_by_tensor_parallel_size():
    assert len(build_model_chunks(tiny_dense())) == 1
    assert padded_vocab_size(tiny_dense(vocab=131), ParallelLayout(tp=4)) == 132


def test_importing_the_spec_installs_no_cpu_platform():
    code = (
        "import torch; before = torch.Tensor.cuda; import megatron_qwen.model.spec; import sys; "
        "sys.exit(torch.Tensor.cuda is not before or any('_Megatron' in type(f).__name__ for f in sys.meta_path))"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120).returncode == 0
