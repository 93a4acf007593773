"""`verify --logits` names the layer and the module that a planted fault is in."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qwen import conversion
from megatron_qwen.conversion import compare_logits
from megatron_qwen.conversion.comparison.layer_trace import measure
from megatron_qwen.errors import ConfigError, MismatchError
from megatron_qwen.model.config import YarnScaling
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

Weights = dict[str, torch.Tensor]
DENSE = tiny_dense(layers=4, hidden=96, heads=6, kv_heads=3, ffn=70, vocab=131)
MOE = tiny_moe(layers=3, experts=6, topk=2, mlp_only_layers=(0,))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sound")
    return {
        "dense": write_tiny_hf(root / "dense", DENSE, dtype=torch.bfloat16),
        "moe": write_tiny_hf(root / "moe", MOE, dtype=torch.bfloat16),
    }


def planted(source: Path, target: Path, change: Callable[[Weights], object] = lambda weights: None, **fields) -> Path:
    """Copy a folder with its weights, or its config.json, changed."""
    target.mkdir()
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if "rope_theta" in fields:
        config["rope_parameters"]["rope_theta"] = fields["rope_theta"]
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def exchange_rows(name: str, first: slice, second: slice) -> Callable[[Weights], object]:
    def change(weights: Weights) -> None:
        tensor = weights[name].clone()
        tensor[first], tensor[second] = weights[name][second], weights[name][first]
        weights[name] = tensor

    return change


def exchange(*pairs: tuple[str, str]) -> Callable[[Weights], object]:
    def change(weights: Weights) -> None:
        for first, second in pairs:
            weights[first], weights[second] = weights[second], weights[first]

    return change


def exchange_heads(layer: int, part: str, first: int, second: int) -> Callable[[Weights], object]:
    rows = [slice(head * 16, head * 16 + 16) for head in (first, second)]
    changes = [exchange_rows(f"model.layers.{layer}.self_attn.{part}.{leaf}", *rows) for leaf in ("weight", "bias")]
    return lambda weights: [change(weights) for change in changes]


def zero(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights[name].zero_()


def exchange_layers(first: int, second: int) -> Callable[[Weights], object]:
    def change(weights: Weights) -> None:
        old = dict(weights)
        for name in old:
            for a, b in ((first, second), (second, first)):
                if name.startswith(f"model.layers.{a}."):
                    weights[name] = old[name.replace(f"layers.{a}.", f"layers.{b}.")]

    return change


def shift_layers(weights: Weights) -> None:
    """Every layer but the first holds the one before."""
    old = dict(weights)
    for name in old:
        if name.startswith("model.layers.") and not name.startswith("model.layers.0."):
            number = int(name.split(".")[2])
            weights[name] = old[name.replace(f"layers.{number}.", f"layers.{number - 1}.")].clone()


def exchange_experts(layer: int, first: int, second: int) -> Callable[[Weights], object]:
    stem = f"model.layers.{layer}.mlp.experts."
    return exchange(
        *[(f"{stem}{first}.{p}.weight", f"{stem}{second}.{p}.weight") for p in ("gate_proj", "up_proj", "down_proj")]
    )


def nudge(name: str, by: float) -> Callable[[Weights], object]:
    return lambda weights: weights[name].view(-1)[3].add_(by)


def rewrite(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: change(weights[name]).contiguous()})


def exchange_parts(stem: str, first: str, second: str, leaves: tuple[str, ...] = ("weight",)):
    return exchange(*[(f"{stem}.{first}.{leaf}", f"{stem}.{second}.{leaf}") for leaf in leaves])


def nothing(weights: Weights) -> None: ...


LAYER = "model.layers."
QKV, ROTARY, WHOLE = "self_attention.linear_qkv", "self_attention.rotary_pos_emb", "whole layer"
EXPERTS = "mlp.experts.local_experts."
# fault: weights changed, config.json changed, layer and module to be named, part of the reason
DENSE_FAULTS = {
    "k heads": (exchange_heads(2, "k_proj", 0, 1), {}, 2, QKV, "k heads 0 and 1 exchanged"),
    "v heads": (exchange_heads(1, "v_proj", 1, 2), {}, 1, QKV, "v heads 1 and 2 exchanged"),
    "q heads": (exchange_heads(3, "q_proj", 4, 1), {}, 3, QKV, "q heads 1 and 4 exchanged"),
    "q bias of two heads": (
        exchange_rows(f"{LAYER}1.self_attn.q_proj.bias", slice(0, 16), slice(16, 32)),
        {}, 1, QKV, "q heads 0 and 1 exchanged (bias only)",
    ),
    "k for v": (
        exchange_parts(f"{LAYER}2.self_attn", "k_proj", "v_proj", ("weight", "bias")),
        {}, 2, QKV, "k head 0 and v head 0 exchanged",
    ),
    "k bias zero": (zero(f"{LAYER}1.self_attn.k_proj.bias"), {}, 1, QKV, "k_proj.bias: zero in B"),
    "one value of a v weight": (
        nudge(f"{LAYER}2.self_attn.v_proj.weight", 0.01), {}, 2, QKV, "v_proj.weight: 1 of 48 rows differ"
    ),
    "projection transposed": (
        rewrite(f"{LAYER}0.self_attn.o_proj.weight", torch.t), {}, 0, "self_attention.linear_proj", "transposed"
    ),
    "layers exchanged": (exchange_layers(1, 2), {}, 1, WHOLE, "B's layers 1, 2 hold A's layers 2, 1"),
    "layers shifted": (shift_layers, {}, 1, WHOLE, "B's layers 1, 2, 3 hold A's layers 0, 1, 2"),
    "rope theta": (nothing, {"rope_theta": 5e5}, 0, ROTARY, "config.rope_theta: 10000.0 and 500000.0"),
    "eps": (nothing, {"rms_norm_eps": 1e-5}, 0, "input_layernorm", "config.rms_norm_eps: 1e-06 and 1e-05"),
    "norms exchanged": (
        exchange_parts(f"{LAYER}2", "input_layernorm", "post_attention_layernorm"),
        {}, 2, "input_layernorm", "of 96 values differ",
    ),
    "gate and up": (
        exchange_parts(f"{LAYER}3.mlp", "gate_proj", "up_proj"), {}, 3, "mlp.linear_fc1", "gate and up exchanged"
    ),
    "down columns": (
        rewrite(f"{LAYER}1.mlp.down_proj.weight", lambda x: x.roll(1, 1)),
        {}, 1, "mlp.linear_fc2", "96 of 96 rows differ",
    ),
    "final norm": (nudge("model.norm.weight", 0.25), {}, None, "decoder.final_layernorm", "1 of 96 values differ"),
    "output rows": (
        exchange_rows("lm_head.weight", slice(5, 6), slice(9, 10)), {}, None, "output_layer", "rows 5 and 9 exchanged"
    ),
    "embedding": (
        rewrite("model.embed_tokens.weight", lambda x: x * 1.01),
        {}, None, "embedding.word_embeddings", "131 of 131 rows differ",
    ),
}  # fmt: skip
MOE_FAULTS = {
    "scoring order of the router": (
        nothing, {"norm_topk_prob": True}, 1, "mlp.router.routing", "config.norm_topk_prob: False and True"
    ),
    "router rows": (
        exchange_rows(f"{LAYER}2.mlp.gate.weight", slice(1, 2), slice(4, 5)),
        {}, 2, "mlp.router.gating", "rows 1 and 4 exchanged",
    ),
    "experts": (exchange_experts(1, 2, 5), {}, 1, f"{EXPERTS}2.linear_fc1", "experts 2 and 5 exchanged"),
    "down of two experts": (
        exchange((f"{LAYER}2.mlp.experts.0.down_proj.weight", f"{LAYER}2.mlp.experts.3.down_proj.weight")),
        {}, 2, f"{EXPERTS}0.linear_fc2", "experts 0 and 3 exchanged",
    ),
    "gate and up of an expert": (
        exchange_parts(f"{LAYER}1.mlp.experts.4", "gate_proj", "up_proj"),
        {}, 1, f"{EXPERTS}4.linear_fc1", "gate and up exchanged",
    ),
    "shared gate": (
        zero(f"{LAYER}2.mlp.shared_expert_gate.weight"),
        {}, 2, "mlp.shared_experts.gate_weight", "shared_expert_gate.weight: zero in B",
    ),
    "shared expert": (
        exchange_parts(f"{LAYER}1.mlp.shared_expert", "gate_proj", "up_proj"),
        {}, 1, "mlp.shared_experts.linear_fc1", "gate and up exchanged",
    ),
    "dense layer of a mixed model": (
        nudge(f"{LAYER}0.mlp.down_proj.weight", 0.5), {}, 0, "mlp.linear_fc2", "1 of 64 rows differ"
    ),
}  # fmt: skip
FAULTS = {name: ("dense", *fault) for name, fault in DENSE_FAULTS.items()} | {
    name: ("moe", *fault) for name, fault in MOE_FAULTS.items()
}
# Faults of the arithmetic are in every layer.
EVERYWHERE = ("rope theta", "eps", "scoring order of the router")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_with_layer_and_module(tmp_path, folders, name):
    kind, change, fields, layer, module, reason = FAULTS[name]
    report = compare_logits(folders[kind], planted(folders[kind], tmp_path / "b", change, **fields), tokens=32)
    assert report.first is not None
    assert (report.first.layer, report.first.module) == (layer, module), report.verdict
    assert reason in report.first.reason, report.verdict
    assert report.first.gap is not None
    assert report.first.gap.max_abs > 0
    assert report.max_abs > 0
    # Whatever lies behind the fault is judged on its own, so nothing else is reported.
    if module != WHOLE and name not in EVERYWHERE:
        assert {divergence.layer for divergence in report.divergences} == {layer}, report.divergences
        found = {divergence.module for divergence in report.divergences}
        also = {"norms exchanged": {"pre_mlp_layernorm"}}.get(name, set())
        experts = {each for each in found if each.startswith("mlp.experts")} if module.startswith(EXPERTS) else set()
        assert found == {module} | also | experts, report.divergences


def test_equal_models_are_equal_to_the_last_bit_in_any_format(tmp_path, folders):
    for kind, folder in folders.items():
        conversion.import_hf(folder, tmp_path / kind, progress=False)
        for pair in ((folder, tmp_path / kind), (tmp_path / kind, folder), (folder, folder)):
            report = compare_logits(*pair, tokens=40, tolerance=0.0)
            assert report.is_equal, report.verdict
            assert report.verdict == "no divergence: every module is equal to the last bit"
            assert (report.max_abs, report.same_top1) == (0.0, 40)
            assert len(report.layers) == {"dense": 4, "moe": 3}[kind]
    fault = planted(folders["moe"], tmp_path / "faulty", exchange_experts(2, 0, 4))
    report = compare_logits(tmp_path / "moe", fault)
    assert (report.first.layer, report.first.module) == (2, f"{EXPERTS}0.linear_fc1")


def test_megatron_lm_arguments_that_say_another_scoring_order_are_followed_and_named(tmp_path, folders):
    """Megatron-LM builds the model from the arguments in the checkpoint, whatever config.json beside it says."""
    conversion.import_hf(folders["moe"], tmp_path / "dist", progress=False)
    conversion.import_hf(folders["moe"], tmp_path / "ranks", progress=False, ckpt_format="torch")
    for folder, file, epsilon, absent in (
        ("dist", "common.pt", "norm_epsilon", "layernorm_epsilon"),
        ("ranks", "mp_rank_00/model_optim_rng.pt", "layernorm_epsilon", "norm_epsilon"),
    ):
        path = tmp_path / folder / "release" / file
        assert compare_logits(folders["moe"], tmp_path / folder, allow_pickle=True).is_equal
        content = torch.load(path, weights_only=False)
        content["args"].moe_router_pre_softmax = False
        setattr(content["args"], epsilon, 1e-4)
        delattr(content["args"], absent)  # as releases save it that know one of the names
        torch.save(content, path)
        (path.parent / "manifest.json").unlink(missing_ok=True)
        (tmp_path / folder / "release" / "manifest.json").unlink(missing_ok=True)
        report = compare_logits(folders["moe"], tmp_path / folder, allow_pickle=True)
        modules = list(dict.fromkeys(divergence.module for divergence in report.divergences))
        assert modules == ["input_layernorm", "pre_mlp_layernorm", "mlp.router.routing", "decoder.final_layernorm"]
        assert report.first.reason == "config.rms_norm_eps: 1e-06 and 0.0001"
        assert len(report.notes) == 2
        assert "norm_topk_prob is False in hf/config.json, True by moe_router_pre_softmax" in report.notes[1]
        found = conversion.verify(folders["moe"], tmp_path / folder, allow_pickle=True).differences
        assert [item.name for item in found] == [f"B: args.{epsilon}", "B: args.moe_router_pre_softmax"]


def test_a_tolerance_lets_rounding_pass_and_nothing_more(tmp_path):
    write_tiny_hf(tmp_path / "a", DENSE)
    rounded = planted(tmp_path / "a", tmp_path / "b", lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    strict = compare_logits(tmp_path / "a", rounded)
    assert strict.first.module == "embedding.word_embeddings"
    assert compare_logits(tmp_path / "a", rounded, tolerance=0.02).is_equal
    worse = planted(rounded, tmp_path / "c", exchange_heads(2, "k_proj", 0, 1))
    report = compare_logits(tmp_path / "a", worse, tolerance=0.02)
    assert (report.first.layer, report.first.module, report.first.reason) == (2, QKV, "k heads 0 and 1 exchanged")


def test_models_of_other_shapes_are_told_apart_by_their_configuration(tmp_path, folders):
    write_tiny_hf(tmp_path / "wide", tiny_dense(layers=4, hidden=64, heads=4))
    report = compare_logits(folders["dense"], tmp_path / "wide")
    assert (report.first.module, report.first.reason) == ("config.hidden_size", "96 and 64")
    assert not report.is_equal
    # Fewer layers: the others are compared, the missing one is named.
    shorter = write_tiny_hf(tmp_path / "short", dataclasses.replace(DENSE, num_hidden_layers=3), dtype=torch.bfloat16)
    weights = load_file(folders["dense"] / "model.safetensors")
    save_file({name: weights[name] for name in load_file(shorter / "model.safetensors")}, shorter / "model.safetensors")
    report = compare_logits(folders["dense"], shorter)
    assert len(report.divergences) == 1
    assert str(report.first) == "layer 3, whole layer (config.num_hidden_layers: 4 and 3)"
    mixed = write_tiny_hf(tmp_path / "mixed", dataclasses.replace(MOE, mlp_only_layers=(0, 1)))
    report = compare_logits(folders["moe"], mixed)
    assert str(report.first) == "layer 1, mlp (MoE and dense)"


def test_yarn_and_tied_embeddings_are_computed_as_configured(tmp_path):
    yarn = YarnScaling(factor=4.0, original_max_position_embeddings=16)
    tied = tiny_dense(layers=1, tied=True, rope_scaling=yarn, max_position_embeddings=64)
    write_tiny_hf(tmp_path / "a", tied)
    plain = planted(tmp_path / "a", tmp_path / "b", rope_scaling=None, rope_parameters={"rope_theta": 1e4})
    report = compare_logits(tmp_path / "a", plain)
    assert report.first.module == ROTARY
    assert "config.rope_scaling: YarnScaling(factor=4.0" in report.first.reason
    head = planted(tmp_path / "a", tmp_path / "c", exchange_rows("model.embed_tokens.weight", slice(0, 1), slice(1, 2)))
    modules = [divergence.module for divergence in compare_logits(tmp_path / "a", head, tokens=256).divergences]
    assert modules == ["embedding.word_embeddings", "output_layer"]


def test_a_missing_bias_is_refused_by_name(tmp_path, folders):
    missing = "model.layers.2.self_attn.k_proj.bias"
    faulty = planted(folders["dense"], tmp_path / "b", lambda weights: weights.pop(missing))
    with pytest.raises(
        MismatchError, match=re.escape("model.layers.*.self_attn.k_proj.bias: missing") + f".*{missing}"
    ):
        compare_logits(folders["dense"], faulty)


def test_nan_on_one_side_is_an_infinite_difference():
    x = torch.tensor([1.0, float("nan"), 3.0])
    assert measure("x", x, x.clone()).max_abs == 0.0
    gap = measure("x", x, torch.tensor([1.0, 2.0, 3.0]))
    assert (gap.max_abs, gap.where) == (float("inf"), (1,))


@pytest.mark.parametrize("wrong", [{"tokens": 1}, {"tolerance": -1.0}, {"tolerance": float("nan")}, {"against": "jax"}])
def test_arguments_are_checked(folders, wrong):
    with pytest.raises(ConfigError):
        compare_logits(folders["dense"], folders["dense"], **wrong)


def test_transformers_agrees_with_our_forward_pass_of_a_mixed_model(folders):
    report = compare_logits(folders["moe"], folders["moe"], against="transformers")
    assert report.is_equal, report.verdict
    assert 0 < report.max_abs < 1e-4 * report.logit_range
    assert len(report.layers) == 3


def test_transformers_names_the_faulty_layer_of_a_conversion(tmp_path, folders):
    faulty = planted(folders["dense"], tmp_path / "faulty", exchange_heads(2, "k_proj", 0, 1))
    conversion.import_hf(faulty, tmp_path / "mg", progress=False)
    report = compare_logits(folders["dense"], tmp_path / "mg", against="transformers", tokens=80)
    assert str(report.first).startswith("layer 2, self_attention (k heads 0 and 1 exchanged): max |A-B| ")
    assert {divergence.layer for divergence in report.divergences} == {2}
    with pytest.raises(ConfigError, match="Hugging Face"):
        compare_logits(tmp_path / "mg", folders["dense"], against="transformers")
