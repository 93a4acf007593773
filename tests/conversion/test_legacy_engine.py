"""Per-rank checkpoints for Transformer Engine models, and those with experts in one tensor.

megatron-core builds the models of its own Transformer Engine spec; Transformer Engine itself, which needs CUDA, is
stood in for by modules that have its parameters and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import transformer_engine_stand_in
from safetensors.torch import load_file
from stock_model import enter, poison, rank_folder, stock_chunks

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE, TRANSFORMER_ENGINE, rank_files
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder, read_rows
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

CASES: dict[str, tuple[QwenConfig, ParallelLayout]] = {
    "dense_tp2": (tiny_dense(layers=2, vocab=131, tied=True), ParallelLayout(tp=2)),
    "dense_pp2": (tiny_dense(layers=3, vocab=96), ParallelLayout(pp=2, pp_layout=(1, 2))),
    "moe_ep2": (tiny_moe(layers=2, vocab=96), ParallelLayout(ep=2)),
    "moe_tp2": (tiny_moe(layers=2, vocab=96, mlp_only_layers=(1,)), ParallelLayout(tp=2)),
    "moe_tp2_ep2_etp1": (tiny_moe(layers=2, vocab=96, mlp_only_layers=(0,)), ParallelLayout(tp=2, ep=2, etp=1)),
}


def write_both(root: Path, config: QwenConfig, layout: ParallelLayout, **options) -> None:
    write_tiny_hf(root / "hf", config)
    import_hf(root / "hf", root / "ours", ckpt_format="torch", layout=layout, progress=False, **options)


def load_into_stock_models(root: Path) -> dict[str, tuple[str, list[tuple[str, tuple[int, ...]]], bool]]:
    transformer_engine_stand_in.install()
    results = {}
    for name, (config, layout) in CASES.items():
        enter(layout)
        (model,) = stock_chunks(config, layout, transformer_impl="transformer_engine")
        file = root / name / "ours" / "release" / rank_folder() / RANK_FILE
        state = torch.load(file, map_location="cpu", weights_only=False)["model"]
        poison([model])
        model.load_state_dict(state, strict=True)
        is_filled = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        results[name] = (rank_folder(), shapes, is_filled)
    return results


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("engine")
    for name, (config, layout) in CASES.items():
        write_both(root / name, config, layout, transformer_impl="transformer_engine")
    return root, run_ranks(load_into_stock_models, 2, root, timeout=300, fresh=True)


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_order_are_those_of_the_stock_transformer_engine_spec(outcome, name):
    _, ranks = outcome
    files = {file.folder: file for file in rank_files(*CASES[name], TRANSFORMER_ENGINE)}
    assert {each[name][0] for each in ranks} == files.keys()
    for each in ranks:
        folder, shapes, is_filled = each[name]
        (chunk,) = files[folder].chunks
        assert [(tensor.name, tensor.shape) for tensor in chunk.tensors] == shapes
        assert is_filled


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_fused_norms_and_grouped_experts_are_read_back(outcome, name, tmp_path):
    root, _ = outcome
    names = {key for chunk in open_first(root / name / "ours").values() for key in chunk}
    assert any(key.endswith("linear_qkv.layer_norm_weight") for key in names)
    assert not any("input_layernorm" in key or "local_experts" in key for key in names)
    assert_exports(root / name, tmp_path, CASES[name][0])


def open_first(folder: Path):
    return next(iter(LegacyFolder(folder, allow_pickle=True).contents.values())).chunks


def assert_exports(root: Path, tmp_path: Path, config: QwenConfig) -> None:
    export_hf(root / "ours", tmp_path / "back", progress=False, allow_pickle=True, config=config)
    left, right = (load_file(folder / "model.safetensors") for folder in (root / "hf", tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_transformer_engine_names_of_a_dense_and_of_a_moe_layer():
    """The names that Megatron-LM's users know, written down; experts count from a rank's first."""
    config = tiny_moe(layers=2, hidden=64, mlp_only_layers=(1,), experts=4, expert_ffn=48, shared_ffn=96, ffn=112)
    (second,) = rank_files(config, ParallelLayout(ep=2), TRANSFORMER_ENGINE)[1].chunks
    layers = {
        t.name.removeprefix("decoder.layers."): t.shape for t in second.tensors if t.name.startswith("decoder.la")
    }
    qkv = {
        "self_attention.linear_proj.weight": (64, 64),
        "self_attention.linear_qkv.layer_norm_weight": (64,),
        "self_attention.linear_qkv.weight": (128, 64),
        "self_attention.linear_qkv.bias": (128,),
    }
    moe = {
        **qkv,
        "pre_mlp_layernorm.weight": (64,),
        "mlp.router.weight": (4, 64),
        "mlp.experts.linear_fc1.weight0": (96, 64),
        "mlp.experts.linear_fc1.weight1": (96, 64),
        "mlp.experts.linear_fc2.weight0": (64, 48),
        "mlp.experts.linear_fc2.weight1": (64, 48),
        "mlp.shared_experts.gate_weight": (1, 64),
        "mlp.shared_experts.linear_fc1.weight": (192, 64),
        "mlp.shared_experts.linear_fc2.weight": (64, 96),
    }
    dense = {
        **qkv,
        "mlp.linear_fc1.layer_norm_weight": (64,),
        "mlp.linear_fc1.weight": (224, 64),
        "mlp.linear_fc2.weight": (64, 112),
    }
    assert layers == {f"0.{k}": v for k, v in moe.items()} | {f"1.{k}": v for k, v in dense.items()}


def test_transformer_engine_norms_go_with_experts_one_by_one(tmp_path):
    """Megatron-LM without --moe-grouped-gemm: norms fused, experts as local modules."""
    config, layout = tiny_moe(layers=2, vocab=96), ParallelLayout(ep=2)
    write_both(tmp_path, config, layout, transformer_impl="transformer_engine")
    rewrite(tmp_path / "ours", lambda state: {local_expert(name): tensor for name, tensor in state.items()})
    assert_exports(tmp_path, tmp_path, config)


def local_expert(name: str) -> str:
    head, mark, leaf = name.partition(".experts.linear_fc")
    return (
        name
        if not mark or not leaf[-1].isdigit()
        else f"{head}.experts.local_experts.{leaf[-1]}.linear_fc{leaf[0]}.weight"
    )


def rewrite(folder: Path, change) -> None:
    (folder / "release" / "manifest.json").unlink(missing_ok=True)
    for file in (folder / "release").glob(f"mp_rank_*/{RANK_FILE}"):
        content = torch.load(file, weights_only=False)
        content["model"] = change(content["model"])
        torch.save(content, file)


def group_experts(state: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """Merge local experts into GroupedMLP's weight1 and weight2."""
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    for name in [name for name in state if "local_experts.0.linear_fc1" in name]:
        prefix = name.partition("local_experts.")[0]
        for number in ("1", "2"):
            leaf = f"linear_fc{number}.weight"
            parts = [state.pop(f"{prefix}local_experts.{expert}.{leaf}") for expert in range(experts)]
            blocks = torch.stack([part.t().contiguous() for part in parts])
            shape = (blocks.shape[1], -1) if number == "1" else (-1, blocks.shape[2])
            state[f"{prefix}weight{number}"] = blocks.reshape(shape)
    return state


@pytest.mark.parametrize("layout", [ParallelLayout(ep=2), ParallelLayout(tp=2), ParallelLayout(tp=2, ep=2, etp=1)])
def test_experts_of_grouped_mlp_are_read(layout, tmp_path):
    config = tiny_moe(layers=2, vocab=96)
    write_both(tmp_path, config, layout)
    rewrite(tmp_path / "ours", lambda state: group_experts(state, config.num_experts // layout.ep))
    assert_exports(tmp_path, tmp_path, config)


def grouped_and_sequential_outputs(folder: Path) -> list[float]:
    """The greatest difference between GroupedMLP with weight1 and weight2, and SequentialMLP with what we read."""
    from megatron_qwen.parallel import groups

    groups.initialize(ParallelLayout())
    experts = sys.modules.get("megatron.core.transformer.moe.experts") or __import__(
        "megatron.core.transformer.moe.experts", fromlist=["experts"]
    )
    from megatron.core.process_groups_config import ProcessGroupCollection

    def gmm(tokens, weights, counts, trans_b):
        assert not trans_b
        parts = zip(tokens.split(counts.tolist()), weights, strict=True)
        return torch.cat([part @ weight for part, weight in parts])

    gg = types.SimpleNamespace(ops=types.SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=lambda: None)
    experts.gg = gg
    source = LegacyFolder(folder, allow_pickle=True)
    config = source.config
    transformer_config = config.to_transformer_config(dtype=torch.bfloat16)
    transformer_config.use_cpu_initialization = True
    groups_of = ProcessGroupCollection.use_mpu_process_groups()
    grouped = experts.GroupedMLP(config.num_experts, transformer_config, groups_of).bfloat16()
    (content,) = source.contents.values()
    raw = torch.load(content.file, weights_only=False)["model"]
    differences = []
    counts = torch.tensor([3, 0, 5, 2])
    tokens = torch.randn(10, config.hidden_size).bfloat16()
    weights = torch.rand(10)
    for layer in range(config.num_hidden_layers):
        prefix = f"decoder.layers.{layer}.mlp.experts."
        grouped.weight1.data.copy_(raw[f"{prefix}weight1"])
        grouped.weight2.data.copy_(raw[f"{prefix}weight2"])
        found, _ = grouped(tokens, counts, weights)
        expected = []
        for expert, part in enumerate(tokens.split(counts.tolist())):
            names = [f"{prefix}local_experts.{expert}.linear_fc{number}.weight" for number in (1, 2)]
            places = [content.place("model", name) for name in names]
            fc1, fc2 = (read_rows(place, 0, place.shape[0]) for place in places)
            gate, up = (part @ fc1.t()).chunk(2, dim=-1)
            middle = torch.nn.functional.silu(gate) * up
            expected.append((middle * weights.split(counts.tolist())[expert].unsqueeze(-1)).bfloat16() @ fc2.t())
        differences.append(float((found - torch.cat(expected)).abs().max()))
    return differences


@pytest.mark.multirank
def test_grouped_mlp_computes_with_weight1_and_weight2_as_we_read_them(tmp_path):
    if not has_grouped_mlp():
        pytest.skip("this megatron-core has no GroupedMLP (0.16 does)")
    config = dataclasses.replace(tiny_moe(layers=2, vocab=96), torch_dtype="bfloat16")
    write_tiny_hf(tmp_path / "hf", config, dtype=torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "ours", ckpt_format="torch", progress=False)
    rewrite(tmp_path / "ours", lambda state: group_experts(state, config.num_experts))
    (differences,) = run_ranks(grouped_and_sequential_outputs, 1, tmp_path / "ours", timeout=200)
    assert max(differences) < 0.02


def has_grouped_mlp() -> bool:
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    return "class GroupedMLP(" in (Path(spec.origin).parent / "transformer/moe/experts.py").read_text()
