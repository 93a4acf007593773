"""Megatron-LM's own loader on our per-rank checkpoints, and our reader on the arguments its parser makes.

megatron-core ships it as `megatron.training` from 0.19 on. It runs in a process of its own: its state is global.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.formats.bridge_config import RUN_CONFIG_NAME, run_config_yaml
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE, folder_name
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.formats.megatron_lm_args import config_from_args, megatron_lm_args
from megatron_qwen.errors import ConfigError, IncompleteInputError
from megatron_qwen.model.config import DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.model.flags import LaunchSettings, megatron_lm_flags
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

needs_megatron_lm = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core does not ship megatron.training (0.19 does)",
)
CASES: dict[str, tuple[QwenConfig, ParallelLayout]] = {
    "dense": (tiny_dense(layers=4, vocab=96, torch_dtype="bfloat16"), ParallelLayout(tp=2, pp=2)),
    "tied_uneven": (tiny_dense(layers=3, vocab=131, tied=True), ParallelLayout(pp=2, pp_layout=(2, 1))),
    "moe": (
        tiny_moe(layers=4, vocab=96, mlp_only_layers=(0,)),
        ParallelLayout(tp=2, ep=2, etp=1, sequence_parallel=True),
    ),
    "moe_vpp": (tiny_moe(layers=4, vocab=96, norm_topk_prob=True), ParallelLayout(pp=2, vpp=2, ep=2)),
}


def settings(config: QwenConfig, layout: ParallelLayout) -> LaunchSettings:
    return LaunchSettings(
        layout=layout, world_size=8, seq_length=64, dtype=config.torch_dtype, transformer_impl="local", fusions=False
    )


def parse(config: QwenConfig, layout: ParallelLayout) -> argparse.Namespace:
    """The arguments of a run as Megatron-LM keeps them, parsed and validated."""
    from unittest.mock import patch

    from megatron.training.arguments import parse_args, validate_args

    flags = megatron_lm_flags(config, settings(config, layout)).words()
    with (
        patch.object(sys, "argv", ["pretrain_gpt.py", *flags]),
        patch.dict("os.environ", WORLD_SIZE="8", RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1"),
        patch("megatron.training.arguments.get_device_arch_version", lambda: 9),
        patch("megatron.training.arguments.torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        arguments = parse_args()
        validate_args(arguments)
    return arguments


def question_megatron_lm(root: Path) -> dict[str, dict[str, object]]:
    from megatron.training import checkpointing, global_vars

    answers = {}
    for name, (config, layout) in CASES.items():
        run = parse(config, layout)
        torch.save({"args": run, "checkpoint_version": 3.0}, root / name / "args.pt")
        found = checkpointing.find_checkpoint_rank_0(str(root / name / "ours"), 0, release=True)
        # What --use-checkpoint-args --use-mp-args-from-checkpoint-args takes from our file, on top of bare defaults.
        bare = argparse.Namespace(**{**vars(run), "load": str(root / name / "ours")})
        for key in TAKEN:
            setattr(bare, key, None)
        bare.use_mp_args_from_checkpoint_args = True
        taken, _ = checkpointing.load_args_from_checkpoint(bare)
        global_vars.set_args(run)
        checkpointing._CHECKPOINT_VERSION = 3.0
        ours = torch.load(found, map_location="cpu", weights_only=False)
        checkpointing.check_checkpoint_args(ours["args"])
        answers[name] = {
            "file": str(Path(found).relative_to(root / name / "ours")),
            "names": sorted(
                {
                    checkpointing.get_checkpoint_name(
                        "", 0, True, layout.pp > 1, tensor, pipeline, layout.ep > 1, expert
                    )
                    for tensor in range(layout.tp)
                    for pipeline in range(layout.pp)
                    for expert in range(layout.ep)
                }
            ),
            "taken": {key: (getattr(taken, key, None), getattr(run, key, None)) for key in TAKEN},
            "format": checkpointing._get_checkpoint_format(str(root / name / "ours" / "release"), run),
        }
        global_vars._GLOBAL_ARGS = None
    return answers


TAKEN = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "group_query_attention",
    "kv_channels",
    "max_position_embeddings",
    "position_embedding_type",
    "add_position_embedding",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "add_bias_linear",
    "add_qkv_bias",
    "squared_relu",
    "swiglu",
    "untie_embeddings_and_output_weights",
    "apply_layernorm_1p",
    "normalization",
    "attention_dropout",
    "hidden_dropout",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_router_pre_softmax",
    "moe_grouped_gemm",
    "moe_shared_expert_intermediate_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron_lm")
    for name, (config, layout) in CASES.items():
        write_tiny_hf(root / name / "hf", config, dtype=getattr(torch, config.torch_dtype))
        import_hf(root / name / "hf", root / name / "ours", ckpt_format="torch", layout=layout, progress=False)
    (answers,) = run_ranks(question_megatron_lm, 1, root, timeout=300)
    return root, answers


@needs_megatron_lm
@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_megatron_lm_finds_our_files_and_takes_the_model_from_them(outcome, name):
    _, answers = outcome
    assert answers[name]["format"] == "torch"
    assert answers[name]["file"].endswith(RANK_FILE)
    asked = [key for key in TAKEN if CASES[name][0].is_moe or not key.startswith("moe_")]
    pairs = {key: answers[name]["taken"][key] for key in asked}
    assert {key: (ours, its) for key, (ours, its) in pairs.items() if (ours or None) != (its or None)} == {}


@needs_megatron_lm
@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_files_are_named_as_megatron_lm_names_them(outcome, name):
    root, answers = outcome
    _, layout = CASES[name]
    ours = {
        f"release/{folder_name(layout, tensor, pipeline, expert)}/{RANK_FILE}"
        for tensor in range(layout.tp)
        for pipeline in range(layout.pp)
        for expert in range(layout.ep)
    }
    assert ours == set(answers[name]["names"])
    assert {
        str(path.relative_to(root / name / "ours")) for path in (root / name / "ours").glob(f"*/*/{RANK_FILE}")
    } <= ours


@needs_megatron_lm
@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_known_from_the_arguments_of_a_run(outcome, name, tmp_path):
    """No config.json: the arguments are those that Megatron-LM's parser made, opened as plain data."""
    root, _ = outcome
    config, _ = CASES[name]
    arguments = torch.load(root / name / "args.pt", weights_only=False)["args"]
    step = tmp_path / "iter_0000005"
    for file in (root / name / "ours" / "release").glob(f"mp_rank_*/{RANK_FILE}"):
        content = torch.load(file, weights_only=False)
        content["args"] = arguments
        (step / file.parent.name).mkdir(parents=True)
        torch.save(content, step / file.parent.name / RANK_FILE)
    found = LegacyFolder(step, allow_pickle=True)
    assert found.config.shape() == config.shape()
    assert found.config.moe_layers() == config.moe_layers()
    for name_ in ("rope_theta", "rms_norm_eps", "tie_word_embeddings", "norm_topk_prob", "torch_dtype"):
        assert getattr(found.config, name_) == getattr(config, name_)
    assert found.config.router_aux_loss_coef == pytest.approx(config.router_aux_loss_coef)


MODELS = {
    "dense": tiny_dense(vocab=96),
    "tied": tiny_dense(tied=True, initializer_range=0.01),
    "moe": tiny_moe(norm_topk_prob=True),
    "mixed": tiny_moe(layers=5, decoder_sparse_step=2, mlp_only_layers=(3,)),
    "yarn": tiny_dense(rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64)),
    "large_base": tiny_dense(rope_theta=1e6, torch_dtype="bfloat16"),
    "chunked": tiny_dense(dual_chunk_attention=DualChunkAttention(chunk_size=64, local_size=8, cap="paper")),
}


@pytest.mark.parametrize("name", MODELS)
def test_arguments_describe_the_model_and_give_it_back(name):
    config = MODELS[name]
    back, notes = config_from_args(megatron_lm_args(config), "here")
    assert back.shape() == config.shape()
    assert back.moe_layers() == config.moe_layers()
    same = ("rope_theta", "rope_scaling", "rms_norm_eps", "tie_word_embeddings", "norm_topk_prob", "torch_dtype")
    same = (*same, "dual_chunk_attention")
    assert {key: getattr(back, key) for key in same} == {key: getattr(config, key) for key in same}
    assert back.router_aux_loss_coef == pytest.approx(config.router_aux_loss_coef)
    assert any("padding" in note for note in notes)


def test_arguments_that_do_not_suffice_are_listed():
    arguments = megatron_lm_args(tiny_moe())
    del arguments.rotary_base, arguments.moe_ffn_hidden_size, arguments.norm_epsilon
    arguments.layernorm_epsilon = None
    with pytest.raises(IncompleteInputError, match=r"layernorm_epsilon, rotary_base, moe_ffn_hidden_size.*--config"):
        config_from_args(arguments, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "LayerNorm"),
        ("add_qkv_bias", False),
        ("qk_layernorm", True),
        ("swiglu", False),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("layernorm_zero_centered_gamma", True),
    ],
)
def test_arguments_of_another_family_are_refused(field, value):
    arguments = megatron_lm_args(tiny_dense())
    setattr(arguments, field, value)
    with pytest.raises(ConfigError, match=field):
        config_from_args(arguments, "here")


def test_arguments_of_an_older_release_are_read():
    arguments = megatron_lm_args(tiny_dense(rms_norm_eps=1e-5))
    del arguments.layernorm_epsilon, arguments.layernorm_zero_centered_gamma
    assert config_from_args(arguments, "here")[0].rms_norm_eps == 1e-5


def test_arguments_open_as_plain_data(tmp_path):
    torch.save({"args": megatron_lm_args(tiny_moe(), ParallelLayout(tp=2, ep=2))}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert torch.load(tmp_path / "a.pt", weights_only=True)["args"].params_dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_run_config_says_what_megatron_core_would_be_given(name):
    """Every entry is a TransformerConfig field with our value, or one of GPTModelProvider's own."""
    import dataclasses

    from megatron.core.transformer.transformer_config import TransformerConfig

    config, layout = MODELS[name], ParallelLayout(tp=2)
    model = yaml.safe_load(run_config_yaml(config, layout))["model"]
    assert model.pop("_target_") == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    ours = config.to_transformer_config(layout, dtype=getattr(torch, config.torch_dtype))
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    differing = {
        key: (resolve(value), getattr(ours, key))
        for key, value in model.items()
        if key in fields and resolve(value) != getattr(ours, key)
    }
    assert differing.keys() <= {"moe_grouped_gemm"}  # local modules here, Transformer Engine's there
    assert {key for key in model if key not in fields} - PROVIDER_FIELDS == set()


PROVIDER_FIELDS = {
    "autocast_dtype",
    "make_vocab_size_divisible_by",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "seq_length",
    "share_embeddings_and_output_weights",
    "should_pad_vocab",
    "transformer_layer_spec",
    "vocab_size",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "yarn_mscale",
    "yarn_mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_rotary_scaling_factor",
}


def resolve(value: object) -> object:
    """What `{_target_: name, _call_: false}` stands for."""
    if not isinstance(value, dict) or value.get("_call_") is not False:
        return value
    module, _, name = value["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_every_checkpoint_carries_run_config_beside_its_weights(ckpt_format, tmp_path):
    write_tiny_hf(tmp_path / "hf", tiny_dense(layers=2))
    layout = {"layout": ParallelLayout(tp=2, pp=2)} if ckpt_format == "torch" else {}
    import_hf(tmp_path / "hf", tmp_path / "ours", ckpt_format=ckpt_format, progress=False, **layout)
    section = yaml.safe_load((tmp_path / "ours" / "release" / RUN_CONFIG_NAME).read_text())["model"]
    sizes = [section[f"{axis}_model_parallel_size"] for axis in ("tensor", "pipeline")]
    assert sizes == ([2, 2] if layout else [1, 1])
    assert str(tmp_path) not in (tmp_path / "ours" / "release" / RUN_CONFIG_NAME).read_text()


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_a_checkpoint_without_config_json_exports_by_its_arguments(ckpt_format, tmp_path, caplog):
    config = tiny_moe(layers=3, mlp_only_layers=(1,), norm_topk_prob=True)
    write_tiny_hf(tmp_path / "hf", config)
    import_hf(tmp_path / "hf", tmp_path / "ours", ckpt_format=ckpt_format, progress=False)
    shutil.rmtree(tmp_path / "ours" / "hf")
    export_hf(tmp_path / "ours", tmp_path / "back", progress=False, allow_pickle=True)
    left, right = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert QwenConfig.from_hf(tmp_path / "back").norm_topk_prob
    assert "bos_token_id" in caplog.text


def test_a_torch_dist_checkpoint_without_config_and_arguments_asks_for_the_model(tmp_path):
    write_tiny_hf(tmp_path / "hf", tiny_dense(layers=2))
    import_hf(tmp_path / "hf", tmp_path / "ours", progress=False)
    shutil.rmtree(tmp_path / "ours" / "hf")
    (tmp_path / "ours" / "release" / "manifest.json").unlink()
    for content in ({"iteration": 0}, None):
        if content:
            torch.save(content, tmp_path / "ours" / "release" / "common.pt")
        else:
            (tmp_path / "ours" / "release" / "common.pt").unlink()
        with pytest.raises(IncompleteInputError, match="--config"):
            export_hf(tmp_path / "ours", tmp_path / "back", progress=False)
