"""`convert upcycle`: the recipe tensor by tensor, and what transformers and Megatron make of the result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from megatron_qwen import conversion
from megatron_qwen.cli import convert
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.parameters import Shard, parameters
from megatron_qwen.conversion.upcycle import UpcycledModel, UpcyclingRecipe, make_recipe, prepare_upcycle
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.testing.judge import transformers_logits
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

DENSE = tiny_dense(layers=2, ffn=24, hidden=32, heads=2, kv_heads=1, vocab=131)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = write_tiny_hf(tmp_path_factory.mktemp("dense") / "hf", DENSE)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    return folder


def recipe(**fields) -> UpcyclingRecipe:
    widths = {} if "expert_width" in fields else {"granularity": 4}
    return make_recipe(DENSE, **({"num_experts": 9, "topk": 2} | widths | fields))


def upcycle(dense: Path, out: Path, chosen: UpcyclingRecipe, **options) -> Weights:
    conversion.upcycle_hf(dense, out, chosen, progress=False, **options)
    return {name: x for file in sorted(out.glob("*.safetensors")) for name, x in load_file(file).items()}


def neurons(weights: Weights, prefix: str) -> torch.Tensor:
    """Every neuron of an MLP as one row: its rows of gate and up and its column of down."""
    gate, up, down = (weights[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return torch.cat([gate, up, down.T], dim=1)


def origins(expert: torch.Tensor, dense: torch.Tensor) -> list[int]:
    """For every neuron of an expert, the one of the dense MLP that it is, whole and to the last bit."""
    found = [(dense == neuron).all(dim=1).nonzero().flatten().tolist() for neuron in expert]
    assert all(len(each) == 1 for each in found), found
    return [each[0] for each in found]


def mlp(weights: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (weights[f"{prefix}.{part}_proj.weight"].double() for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("width", [6, 7, 30])  # a divisor of 24, one that straddles copies, one wider than the MLP
def test_experts_are_cut_from_shuffled_copies_of_the_dense_mlp(tmp_path, dense, width):
    before = load_file(dense / "model.safetensors")
    after = upcycle(dense, tmp_path / "moe", recipe(expert_width=width, shared_width=29, reinit=0.0))
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        source = neurons(before, prefix)
        row = [n for e in range(9) for n in origins(neurons(after, f"{prefix}.experts.{e}"), source)]
        assert len(row) == 9 * width
        copies = [row[begin : begin + 24] for begin in range(0, len(row), 24)]
        for copy in copies[:-1]:
            assert sorted(copy) == list(range(24))
            assert copy != sorted(copy)
        assert len(set(copies[-1])) == len(copies[-1])
        assert len({tuple(copy[:10]) for copy in copies}) == len(copies), "the copies are shuffled alike"
        shared = origins(neurons(after, f"{prefix}.shared_expert"), source)
        assert sorted(shared[:24]) == list(range(24))
        assert len(shared) == 29
    rest = [name for name in before if ".mlp." not in name]
    assert rest
    assert all(torch.equal(before[name], after[name]) for name in rest)


def test_a_random_share_of_each_experts_parameters_is_drawn_anew(tmp_path, dense):
    cut = upcycle(dense, tmp_path / "cut", recipe(reinit=0.0))
    after = upcycle(dense, tmp_path / "moe", recipe(reinit=0.3, reinit_std=0.05))
    drawn, masks = [], []
    for name in (name for name in after if ".experts." in name):
        mask = after[name] != cut[name]
        share, deviation = float(mask.float().mean()), (0.3 * 0.7 / mask.numel()) ** 0.5
        assert abs(share - 0.3) < 5 * deviation, name
        drawn.append(after[name][mask])
        masks.append(mask.flatten())
    values = torch.cat(drawn)
    assert abs(float(values.mean())) < 5 * 0.05 / len(values) ** 0.5
    assert abs(float(values.std()) / 0.05 - 1) < 5 / (2 * len(values)) ** 0.5
    fourth = float((values / 0.05).pow(4).mean())  # 3 for a normal distribution, 1.8 for a uniform one
    assert 2.7 < fourth < 3.3
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks), "two tensors have the same mask"
    for name in (name for name in after if ".experts." not in name):
        assert torch.equal(after[name], cut[name]), name
    everything = upcycle(dense, tmp_path / "all", recipe(reinit=1.0, reinit_shared=True))
    assert not any(bool((everything[name] == cut[name]).any()) for name in cut if ".experts." in name)
    assert not torch.equal(*(each["model.layers.0.mlp.shared_expert.up_proj.weight"] for each in (everything, cut)))


def test_whole_neurons_can_be_drawn_anew(tmp_path, dense):
    cut = upcycle(dense, tmp_path / "cut", recipe(expert_width=10, reinit=0.0))
    after = upcycle(dense, tmp_path / "moe", recipe(expert_width=10, reinit=0.25, reinit_unit="neuron"))
    chosen = []
    for layer in range(2):
        for expert in range(9):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            new, old = neurons(after, prefix), neurons(cut, prefix)
            differs = (new != old).any(dim=1)
            assert int(differs.sum()) == round(0.25 * 10)
            assert bool((new != old)[differs].all())
            chosen.append(tuple(differs.tolist()))
    assert len(set(chosen)) > 5


def test_router_and_gate_are_normal(tmp_path, dense):
    after = upcycle(dense, tmp_path / "moe", recipe(num_experts=50, router_std=0.5, gate_std=0.5))
    values = torch.cat(
        [x.flatten() for name, x in after.items() if name.endswith(("mlp.gate.weight", "expert_gate.weight"))]
    )
    assert values.numel() == 2 * 51 * 32
    assert abs(float(values.std()) / 0.5 - 1) < 5 / (2 * len(values)) ** 0.5
    assert not torch.equal(after["model.layers.0.mlp.gate.weight"], after["model.layers.1.mlp.gate.weight"])


def test_the_seed_decides_every_byte_and_nothing_else_does(tmp_path, dense):
    for unit in ("parameter", "neuron"):
        chosen = recipe(reinit_unit=unit, seed=7)
        one = upcycle(dense, tmp_path / f"{unit}1", chosen, threads=1)
        others = (
            upcycle(dense, tmp_path / f"{unit}2", chosen, threads=4, max_memory=20_000),
            upcycle(dense, tmp_path / f"{unit}3", chosen, max_shard_bytes=5_000),
        )
        for other in others:
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        seeded = upcycle(dense, tmp_path / f"{unit}4", recipe(reinit_unit=unit, seed=8))
        assert all(
            not torch.equal(one[name], seeded[name])
            for name in one
            if ".experts." in name or name.endswith("gate.weight")
        )
    again, seeded = (prepare_upcycle(dense, tmp_path / "x", recipe(seed=seed)).fingerprint for seed in (7, 8))
    assert again == prepare_upcycle(dense, tmp_path / "x", recipe(seed=7)).fingerprint
    assert again != seeded, "--resume would go on with another seed's files"


@pytest.mark.parametrize("unit", ["parameter", "neuron"])
def test_any_slice_of_rows_is_that_of_the_whole(dense, unit):
    model = UpcycledModel(HfFolder(dense), recipe(expert_width=10, reinit_unit=unit, reinit_shared=True))
    for parameter in (item for item in parameters(model.config) if item.layer == 1):
        for index, whole in enumerate(model.hf_tensors(parameter)):
            rows = len(whole)
            for begin, end in ((0, 1), (rows // 2, rows), (rows // 3, rows // 2 + 1)):
                assert torch.equal(model.hf_rows(parameter, index, begin, end), whole[begin:end]), parameter.hf_names


def test_random_numbers_are_those_of_other_machines_and_versions(dense):
    model = UpcycledModel(HfFolder(dense), recipe(num_experts=5, seed=3, reinit=0.0))
    router, up, down = (
        next(item for item in parameters(model.config) if item.hf_names[0].endswith(f"layers.1.mlp.{name}.weight"))
        for name in ("gate", "experts.4.gate_proj", "experts.4.down_proj")
    )
    drawn = model.hf_rows(router, 0, 0, 5)
    assert torch.equal(model.hf_rows(router, 0, 2, 4), drawn[2:4])
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16] == "8cb16d154f42a973"
    source = load_file(dense / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    assert origins(model.hf_tensors(up)[0], source) == [4, 1, 3, 16, 17, 9]
    whole = model.read(down)
    assert torch.equal(model.read(down, Shard(rank=1, size=2)), whole[:, 3:])


def test_with_all_experts_active_and_nothing_drawn_anew_it_is_the_dense_function(tmp_path, dense):
    """Two half-width experts at probability 1/2 each, and a full-width shared expert at sigmoid(0) = 1/2: 1 MLP."""
    chosen = recipe(num_experts=2, topk=2, granularity=2, shared_width=24, reinit=0.0, router_std=0.0, gate_std=0.0)
    after, before = upcycle(dense, tmp_path / "moe", chosen), load_file(dense / "model.safetensors")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).double()
    for prefix in ("model.layers.0.mlp", "model.layers.1.mlp"):
        expected = mlp(before, prefix, x)
        experts = sum(mlp(after, f"{prefix}.experts.{e}", x) for e in range(2))
        torch.testing.assert_close(experts, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mlp(after, f"{prefix}.shared_expert", x), expected, rtol=1e-12, atol=1e-12)
    ids = torch.randint(0, 131, (1, 40), generator=torch.Generator().manual_seed(1))
    logits = logits_of(conversion.load_model(dense, torch.float32), ids)
    ours = logits_of(conversion.load_model(tmp_path / "moe", torch.float32), ids)
    theirs = torch.from_numpy(transformers_logits(tmp_path / "moe", ids.numpy()))
    limit = 1e-5 * float(logits.max() - logits.min())
    assert float((ours - logits).abs().max()) < limit
    assert float((theirs - logits).abs().max()) < limit


def test_scales_let_it_begin_as_the_dense_model(tmp_path, dense):
    """A shared expert at twice the dense MLP counts one half; experts scaled to nothing add nothing: equal bits."""
    chosen = recipe(reinit=0.0, shared_width=24, shared_scale=2.0, expert_scale=0.0, gate_std=0.0)
    after = upcycle(dense, tmp_path / "moe", chosen)
    plain = upcycle(dense, tmp_path / "plain", recipe(reinit=0.0, shared_width=24, gate_std=0.0))
    for name in after:
        factor = {"experts": 0.0, "shared_expert": 2.0}.get(name.split(".")[4], 1.0) if "down" in name else 1.0
        assert torch.equal(after[name], plain[name] * factor), name
    ids = torch.randint(0, 131, (1, 40), generator=torch.Generator().manual_seed(1))
    logits, ours = (logits_of(conversion.load_model(each, torch.float32), ids) for each in (dense, tmp_path / "moe"))
    assert float((ours - logits).abs().max()) < 1e-5 * float(logits.max() - logits.min())


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None).float()


def test_it_imports_into_megatron_and_learns(tmp_path, dense):
    weights = upcycle(dense, tmp_path / "moe", recipe(num_experts=8), verify=True)
    assert all(bool(x.isfinite().all()) for x in weights.values())
    conversion.import_hf(tmp_path / "moe", tmp_path / "mg", progress=False)
    assert conversion.verify(tmp_path / "moe", tmp_path / "mg").is_equal
    model = conversion.load_model(tmp_path / "mg", torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 131, (2, 33), generator=torch.Generator().manual_seed(2))
    tokens, labels = ids[:, :-1], ids[:, 1:]
    losses = []
    for _ in range(12):
        loss = model(tokens, torch.arange(32).expand_as(tokens), None, labels=labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5, losses


def test_the_folder_is_complete(tmp_path):
    tied = tiny_dense(layers=3, tied=True, ffn=24, hidden=32, heads=2, kv_heads=1)
    source = write_tiny_hf(tmp_path / "dense", tied, dtype=torch.bfloat16)
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    chosen = make_recipe(tied, num_experts=4, topk=3, granularity=3, norm_topk_prob=True, dense_layers=(1,))
    after = upcycle(source, tmp_path / "moe", chosen)
    config = QwenConfig.from_hf(tmp_path / "moe")
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 3, 8)
    assert (config.shared_expert_intermediate_size, config.norm_topk_prob) == (24, True)
    assert config.moe_layers() == (True, False, True)
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in after
    assert {x.dtype for x in after.values()} == {torch.bfloat16}
    before = load_file(source / "model.safetensors")
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert (tmp_path / "moe" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
    assert open_source(tmp_path / "moe").config == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": 5}, "divisor of intermediate_size 24, such as 1, 2, 3, 4, 6, 8, 12, 24"),
        ({"granularity": 0}, "divisor"),
        ({"granularity": 2, "expert_width": 7}, "either"),
        ({"granularity": None}, "either"),
        ({"topk": 10}, "topk: got 10, expected at most num_experts, 9"),
        ({"topk": 0, "num_experts": 0}, "num_experts: got 0, expected at least 1; topk: got 0"),
        ({"reinit": 1.5}, "reinit: got 1.5"),
        ({"reinit": float("nan")}, "reinit"),
        ({"reinit_std": -1.0}, "reinit_std"),
        ({"reinit_unit": "layer"}, "reinit_unit"),
        ({"shared_width": 0}, "shared_width"),
    ],
)
def test_wrong_recipes_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_recipe(DENSE, **({"num_experts": 9, "topk": 2, "granularity": 4} | fields))


def test_models_that_do_not_fit_are_refused(tmp_path, dense):
    moe = write_tiny_hf(tmp_path / "moe", tiny_moe())
    with pytest.raises(ConfigError, match="MoE already"):
        prepare_upcycle(moe, tmp_path / "out", recipe())
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        prepare_upcycle(dense, tmp_path / "out", recipe(dense_layers=(0, 5)))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, dense):
    app = typer.Typer()
    convert.register(app)
    arguments = ["convert", "upcycle", str(dense), str(tmp_path / "moe"), "--num-experts", "9", "--topk", "2"]
    plan = CliRunner().invoke(app, [*arguments, "--granularity", "4", "--dry-run", "--json"])
    assert plan.exit_code == 0, plan.output
    content = json.loads(plan.stdout)
    assert content["model"]["copies_of_each_mlp"] == 3
    assert content["model"]["neurons_dropped"] == 18
    assert not (tmp_path / "moe").exists()
    shown = CliRunner().invoke(app, [*arguments, "--expert-width", "6", "--seed", "4", "--dense-layers", "1"])
    assert shown.exit_code == 0, shown.output
    config = QwenConfig.from_hf(tmp_path / "moe")
    assert config.mlp_only_layers == (1,)
    total = sum(x.numel() for x in load_file(tmp_path / "moe" / "model.safetensors").values())
    assert f"{total:,}" in shown.output
    wrong = CliRunner().invoke(app, [*arguments, "--granularity", "4", "--dense-layers", "one", "--overwrite"])
    assert isinstance(wrong.exception, ConfigError)
