"""Hugging Face -> Megatron -> Hugging Face, bit for bit, over kinds of models, both formats and many layouts."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_qwen.conversion import export_hf, import_hf, reshard
from megatron_qwen.conversion.formats.legacy.layout import rank_files
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

SIZES = {"layers": 8, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 131}
MOE = {**SIZES, "experts": 8, "topk": 3, "expert_ffn": 16, "shared_ffn": 24}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

DENSE: dict[str, tuple[QwenConfig, torch.dtype]] = {
    "tied": (tiny_dense(tied=True, **SIZES), BF16),
    "untied": (tiny_dense(**SIZES), F32),
    "half": (tiny_dense(**SIZES), F16),
}
MOES: dict[str, tuple[QwenConfig, torch.dtype]] = {
    "renormalised": (tiny_moe(norm_topk_prob=True, **MOE), F32),
    "plain": (tiny_moe(**MOE), BF16),
    "half_moe": (tiny_moe(**MOE), F16),
    "some_dense": (tiny_moe(mlp_only_layers=(0, 5), **MOE), BF16),
    "every_second": (tiny_moe(decoder_sparse_step=2, norm_topk_prob=True, **MOE), F32),
    "tied_moe": (tiny_moe(tied=True, **MOE), F32),
    "fused": (tiny_moe(norm_topk_prob=True, **MOE), BF16),  # transformers 5: all experts of a layer in one tensor
}
MODELS = DENSE | MOES

PIPELINES: dict[str, dict[str, object]] = {
    "": {},
    "pp2": {"pp": 2},
    "pp2_3.5": {"pp": 2, "pp_layout": (3, 5)},
    "pp3_2.3.3": {"pp": 3, "pp_layout": (2, 3, 3)},
    "pp4": {"pp": 4},
    "pp2vpp2": {"pp": 2, "vpp": 2},
    "pp2vpp2_1.3.2.2": {"pp": 2, "vpp": 2, "pp_layout": (1, 3, 2, 2)},
    "pp4vpp2": {"pp": 4, "vpp": 2},
}
SPLITS: dict[str, dict[str, int]] = {"tp1": {}, "tp2": {"tp": 2}, "tp4": {"tp": 4}}
EXPERTS: dict[str, dict[str, int]] = {
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "tp2ep2": {"tp": 2, "ep": 2},
    "tp2ep4": {"tp": 2, "ep": 4},
    "tp2etp1": {"tp": 2, "etp": 1},
    "tp2ep2etp1": {"tp": 2, "ep": 2, "etp": 1},
    "tp2ep4etp1": {"tp": 2, "ep": 4, "etp": 1},
    "tp4ep2etp2": {"tp": 4, "ep": 2, "etp": 2},
    "tp4ep4etp1": {"tp": 4, "ep": 4, "etp": 1},
}


def layouts(splits: dict[str, dict[str, int]]) -> dict[str, ParallelLayout]:
    return {f"{a}{b and '_'}{b}": ParallelLayout(**splits[a], **PIPELINES[b]) for a, b in product(splits, PIPELINES)}


DENSE_LAYOUTS = layouts(SPLITS)
MOE_LAYOUTS = layouts(EXPERTS)
LAYOUTS = DENSE_LAYOUTS | MOE_LAYOUTS

# A spread for every run of the tests: each axis, each kind of model.
SPREAD = (
    ("tied", "tp2_pp2"),
    ("untied", "tp4_pp3_2.3.3"),
    ("half", "tp1_pp2vpp2_1.3.2.2"),
    ("plain", "ep4"),
    ("some_dense", "tp2ep2etp1_pp2"),
    ("every_second", "tp4ep2etp2"),
    ("tied_moe", "tp2ep2_pp2vpp2"),
    ("fused", "tp2etp1_pp4"),
)


def fuse_experts(folder: Path, config: QwenConfig) -> None:
    """Store each layer's experts as transformers 5 keeps them in memory."""
    tensors = load_file(folder / "model.safetensors")
    for layer, is_moe in enumerate(config.moe_layers()):
        if is_moe:
            prefix = f"model.layers.{layer}.mlp.experts"
            parts = {
                leaf: [tensors.pop(f"{prefix}.{expert}.{leaf}.weight") for expert in range(config.num_experts)]
                for leaf in ("gate_proj", "up_proj", "down_proj")
            }
            pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
            tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            tensors[f"{prefix}.down_proj"] = torch.stack(parts["down_proj"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by name, and the tensors that must come back."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for seed, (name, (config, dtype)) in enumerate(MODELS.items()):
        folder = write_tiny_hf(root / name, config, seed=seed, dtype=dtype)
        made[name] = (folder, load_file(folder / "model.safetensors"))
        if name == "fused":
            fuse_experts(folder, config)
    return made


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_round_trip(models, name: str, layout: ParallelLayout | None, folder: Path) -> None:
    source, expected = models[name]
    target = {"ckpt_format": "torch", "layout": layout} if layout else {}
    import_hf(source, folder / "megatron", progress=False, **target)
    export_hf(folder / "megatron", folder / "back", progress=False, allow_pickle=True)
    assert_same(folder / "back", expected)
    kept = {
        name: json.loads((place / "config.json").read_text())
        for name, place in (("source", source), ("back", folder / "back"))
    }
    assert QwenConfig.from_hf(kept["source"]) == QwenConfig.from_hf(kept["back"])
    if layout:
        written = {path.parent.name for path in (folder / "megatron" / "release").glob("*/model_optim_rng.pt")}
        assert written == {file.folder for file in rank_files(MODELS[name][0], layout)}


def test_the_grid_is_as_wide_as_promised() -> None:
    assert len(LAYOUTS) >= 90
    for axis, sizes in {
        "tp": {1, 2, 4},
        "pp": {1, 2, 3, 4},
        "vpp": {1, 2},
        "ep": {1, 2, 4},
        "etp": {None, 1, 2},
    }.items():
        assert {getattr(layout, axis) for layout in LAYOUTS.values()} == sizes
    assert {name for name, _ in SPREAD} | {"renormalised", "half_moe"} == set(MODELS)


@pytest.mark.parametrize(("name", "layout"), SPREAD, ids=lambda value: value)
def test_weights_come_back_from_rank_files_of_a_spread_of_layouts(models, name, layout, tmp_path):
    check_round_trip(models, name, LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_from_torch_dist(models, name, tmp_path):
    check_round_trip(models, name, None, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("name", DENSE)
def test_dense_weights_come_back_from_every_layout(models, name, layout, tmp_path):
    check_round_trip(models, name, DENSE_LAYOUTS[layout], tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
@pytest.mark.parametrize("name", MOES)
def test_moe_weights_come_back_from_every_layout(models, name, layout, tmp_path):
    check_round_trip(models, name, MOE_LAYOUTS[layout], tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", SPLITS)
def test_moe_weights_come_back_without_expert_parallelism(models, layout, tmp_path):
    check_round_trip(models, "some_dense", ParallelLayout(**SPLITS[layout]), tmp_path)


@pytest.mark.parametrize("name", ["tied", "some_dense"])
def test_a_chain_of_layouts_and_formats_changes_nothing(models, name, tmp_path):
    source, expected = models[name]
    chain = (
        {"ckpt_format": "torch", "layout": ParallelLayout(tp=2, pp=2, pp_layout=(5, 3))},
        {"ckpt_format": "torch", "layout": ParallelLayout(tp=4, etp=1 if MODELS[name][0].is_moe else None)},
        {"ckpt_format": "torch_dist"},
        {"ckpt_format": "torch", "layout": ParallelLayout(pp=4, vpp=2)},
    )
    import_hf(source, tmp_path / "0", progress=False, **chain[0])
    for step, target in enumerate(chain[1:], start=1):
        reshard(tmp_path / str(step - 1), tmp_path / str(step), progress=False, allow_pickle=True, **target)
    export_hf(tmp_path / "3", tmp_path / "back", progress=False, allow_pickle=True)
    assert_same(tmp_path / "back", expected)


def test_a_planted_swap_of_ranks_is_seen(models, tmp_path):
    """The comparison can fail: two expert ranks that change places give other weights, though every tensor is there."""
    source, expected = models["renormalised"]
    import_hf(source, tmp_path / "megatron", progress=False, ckpt_format="torch", layout=MOE_LAYOUTS["ep2"])
    step = tmp_path / "megatron" / "release"
    (step / "manifest.json").unlink(missing_ok=True)
    for a, b in (("mp_rank_00_000", "aside"), ("mp_rank_00_001", "mp_rank_00_000"), ("aside", "mp_rank_00_001")):
        (step / a).rename(step / b)
    export_hf(step, tmp_path / "back", progress=False, allow_pickle=True)
    with pytest.raises(AssertionError, match="experts"):
        assert_same(tmp_path / "back", expected)
