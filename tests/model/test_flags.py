"""`megatron-qwen flags` against Megatron-LM's own argument parser."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_qwen.errors import ConfigError
from megatron_qwen.model import dual_chunk
from megatron_qwen.model.config import QwenConfig, YarnScaling
from megatron_qwen.model.flags import LaunchSettings, layer_pattern, megatron_lm_flags, split_flags
from megatron_qwen.model.presets import PRESETS
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

HAS_PARSER = importlib.util.find_spec("megatron.training") is not None
needs_parser = pytest.mark.skipif(
    not HAS_PARSER, reason="this megatron-core does not ship megatron.training (0.19 does)"
)


def parse(words: tuple[str, ...], world_size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Megatron-LM makes of the flags: (arguments, TransformerConfig)."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    # Megatron-LM asks the GPU for its generation; every layout here is for an H100.
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)
    monkeypatch.setattr("megatron.training.arguments.torch.cuda.get_device_capability", lambda *_: (9, 0))
    arguments = parse_args()
    validate_args(arguments)
    return arguments, core_transformer_config_from_args(arguments)


def comparable(name: str, value: Any) -> Any:
    """A value that can be compared: initialisers by function and arguments, pipeline layouts by their text."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if name == "pipeline_model_parallel_layout" and value is not None:
        return value.layout
    if name == "use_cpu_initialization":
        # A flag that is not given is None after parsing; Megatron-Core asks for its truth only.
        return bool(value)
    return value


def differences(parsed: Any, ours: Any) -> dict[str, tuple[Any, Any]]:
    names = {field.name for field in dataclasses.fields(ours)} | set(vars(ours)) | set(vars(parsed))
    names -= {dual_chunk.ATTRIBUTE}  # Megatron-LM has none, as the flags' notes say
    pairs = {name: (comparable(name, vars(parsed).get(name)), comparable(name, vars(ours).get(name))) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def assert_equal_configs(config: QwenConfig, settings: LaunchSettings, monkeypatch: pytest.MonkeyPatch) -> Any:
    words = megatron_lm_flags(config, settings).words()
    arguments, parsed = parse(words, settings.world_size, monkeypatch)
    dtype = getattr(torch, settings.dtype)
    ours = config.to_transformer_config(settings.layout, dtype=dtype, **settings.transformer_overrides(config))
    assert len(dataclasses.fields(ours)) > 200
    assert differences(parsed, ours) == {}
    return arguments


LOCAL = LaunchSettings(transformer_impl="local", fusions=False)


@needs_parser
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_to_the_configuration_we_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS[name]
    arguments = assert_equal_configs(config, LOCAL, monkeypatch)
    assert arguments.padded_vocab_size == config.vocab_size
    assert arguments.rotary_base == config.rope_theta
    assert arguments.untie_embeddings_and_output_weights != config.tie_word_embeddings
    assert arguments.position_embedding_type == "rope"


@needs_parser
@pytest.mark.skipif(torch.cuda.is_available(), reason="the defaults of a machine with CUDA are the fused ones")
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "qwen2-57b-a14b"])
def test_plain_defaults_need_no_override(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, parsed = parse(megatron_lm_flags(PRESETS[name], LOCAL).words(), 1, monkeypatch)
    assert differences(parsed, PRESETS[name].to_transformer_config()) == {}


LAYOUTS = {
    "tp8-sp": ("qwen2.5-32b", 64, ParallelLayout(tp=8, sequence_parallel=True)),
    "tp4-pp2": ("qwen2.5-72b", 64, ParallelLayout(tp=4, pp=2, sequence_parallel=True)),
    "pp4-vpp5": ("qwen2.5-72b", 64, ParallelLayout(tp=8, pp=4, vpp=5, sequence_parallel=True)),
    "uneven": ("qwen2.5-7b", 8, ParallelLayout(pp=4, pp_layout=(6, 8, 8, 6))),
    "uneven-vpp": ("qwen2.5-7b", 8, ParallelLayout(pp=2, vpp=2, pp_layout=(6, 8, 8, 6))),
    "cp2": ("qwen2.5-14b", 16, ParallelLayout(tp=4, cp=2, sequence_parallel=True)),
    "ep4": ("qwen1.5-moe-a2.7b", 8, ParallelLayout(ep=4)),
    "ep8-pp4": ("qwen2-57b-a14b", 32, ParallelLayout(pp=4, ep=8)),
    "ep4-tp2-etp1": ("qwen2-57b-a14b", 32, ParallelLayout(tp=2, ep=4, etp=1, sequence_parallel=True)),
}


@needs_parser
@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("fusions", [True, False])
def test_every_kind_of_layout_parses_to_the_configuration_we_build(
    case: str, fusions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, world_size, layout = LAYOUTS[case]
    settings = replace(LOCAL, layout=layout, world_size=world_size, global_batch_size=4 * world_size, fusions=fusions)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert_equal_configs(PRESETS[name], settings, monkeypatch)


@needs_parser
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_dtype_and_recompute_reach_the_configuration(
    dtype: str, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal_configs(PRESETS["qwen2.5-1.5b"], replace(LOCAL, dtype=dtype, recompute=recompute), monkeypatch)


@needs_parser
@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2-57b-a14b"])
@pytest.mark.parametrize("fusions", [True, False])
def test_transformer_engine_flags_parse_to_the_configuration_we_build(
    name: str, fusions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fusions and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Megatron-Core refuses the fused rotary embedding where Transformer Engine is not installed")
    assert_equal_configs(PRESETS[name], LaunchSettings(fusions=fusions), monkeypatch)


@needs_parser
@pytest.mark.parametrize("dropped", ["--add-qkv-bias", "--norm-epsilon", "--attention-softmax-in-fp32"])
def test_the_comparison_notices_a_missing_flag(dropped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = split_flags(megatron_lm_flags(PRESETS["qwen2.5-7b"], LOCAL).words())
    words = tuple(word for flag in flags if flag[0] != dropped for word in flag)
    _, parsed = parse(words, 1, monkeypatch)
    assert differences(
        parsed, PRESETS["qwen2.5-7b"].to_transformer_config(**LOCAL.transformer_overrides(PRESETS["qwen2.5-7b"]))
    )


@needs_parser
def test_mixed_dense_and_moe_layers_survive_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_moe(layers=5, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert_equal_configs(config, replace(LOCAL, seq_length=64), monkeypatch)


@needs_parser
def test_yarn_reaches_the_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=32_768, attention_factor=1.25, truncate=False)
    config = replace(PRESETS["qwen2.5-7b-instruct"], rope_scaling=scaling)
    arguments = assert_equal_configs(config, LOCAL, monkeypatch)
    assert arguments.position_embedding_type == "yarn"


@needs_parser
@pytest.mark.parametrize("contract", ["function", "object"])
def test_both_spec_contracts_can_be_imported_as_megatron_lm_imports_them(
    contract: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec, import_module

    words = megatron_lm_flags(PRESETS["qwen2.5-0.5b"], replace(LOCAL, spec=contract)).words()
    arguments, _ = parse(words, 1, monkeypatch)
    imported = import_module(arguments.spec)
    assert callable(imported) if contract == "function" else isinstance(imported, ModuleSpec)


def test_transformer_engine_is_what_a_cluster_gets_by_default() -> None:
    arrays = megatron_lm_flags(PRESETS["qwen2-57b-a14b"], LaunchSettings())
    words = arrays.words()
    assert words[words.index("--transformer-impl") + 1] == "transformer_engine"
    assert "--moe-grouped-gemm" in words
    assert not [word for word in words if re.fullmatch(r"--no-.*fusion", word)]
    assert list(arrays.groups) == ["GPT_MODEL_ARGS", "MOE_ARGS", "MODEL_PARALLEL_ARGS", "TRAINING_ARGS"]


def test_bash_arrays_hold_exactly_the_words(tmp_path: Any) -> None:
    folder = tmp_path / "a tokenizer's folder"
    arrays = megatron_lm_flags(tiny_dense(), replace(LOCAL, seq_length=64, tokenizer=str(folder)))
    script = arrays.as_bash() + "\nprintf '%s\\0' " + " ".join(f'"${{{name}[@]}}"' for name in arrays.groups)
    output = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    assert tuple(output.split("\0")[:-1]) == arrays.words()


def test_json_holds_groups_and_notes() -> None:
    arrays = megatron_lm_flags(PRESETS["qwen2.5-7b-instruct-1m"], LOCAL)
    content = json.loads(arrays.as_json())
    assert {name: tuple(words) for name, words in content["groups"].items()} == arrays.groups
    assert "Dual chunk attention" in content["notes"][0]


def broken_layouts() -> Iterator[Any]:
    yield pytest.param({"layout": ParallelLayout(tp=3)}, "tp=3", id="tp does not divide heads")
    yield pytest.param({"layout": ParallelLayout(pp=5), "world_size": 5}, "28", id="layers do not divide")
    yield pytest.param({"global_batch_size": 3, "world_size": 2}, "global batch size 3", id="batch")
    yield pytest.param({"layout": ParallelLayout(tp=4), "world_size": 6}, "world size 6", id="world")


@pytest.mark.parametrize(("changes", "words"), broken_layouts())
def test_a_layout_that_cannot_run_gets_no_flags(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        megatron_lm_flags(PRESETS["qwen2.5-7b"], replace(LOCAL, **changes))


def test_bad_settings_are_listed_together() -> None:
    with pytest.raises(ConfigError, match=r"dtype: got 'int8'.*recompute: got 'some'"):
        LaunchSettings(dtype="int8", recompute="some")


def test_a_fractional_rotary_base_is_refused_because_the_flag_would_cut_it() -> None:
    with pytest.raises(ConfigError, match=r"rope_theta: got 10000\.5"):
        megatron_lm_flags(tiny_dense(rope_theta=10000.5), replace(LOCAL, seq_length=64))


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [((True, True), "1"), ((False, True, True), "([0]*1+[1]*2)"), ((True, False), "([1]*1+[0]*1)")],
)
def test_layer_pattern_is_what_megatron_evaluates(layers: tuple[bool, ...], pattern: str) -> None:
    assert layer_pattern(layers) == pattern


def test_flags_keep_their_values_together() -> None:
    assert split_flags(("--a", "1", "--b", "--c", "x", "y")) == [["--a", "1"], ["--b"], ["--c", "x", "y"]]
