"""Optimizer state through `reshard`: our trainer and stock Megatron-Core go on from it as from the original.

Two groups of ranks, each through all cases: importing Megatron costs more than any of them. The first trains and
saves; then everything is resharded here; the second loads both and compares.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_qwen.conversion import reshard
from megatron_qwen.errors import ConfigError, MismatchError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import leave_layout, run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe
from megatron_qwen.training.overrides import dump_recipe, recipe_from_dict

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import stock_optimizer as stock
import training_runs

QUIET: dict[str, Any] = {"progress": False, "allow_pickle": True}


@dataclass(frozen=True)
class Case:
    """A run of stock Megatron-Core, saved at one layout and loaded at another."""

    config: QwenConfig
    saved: ParallelLayout
    loaded: ParallelLayout
    distributed: bool = True
    dtype: torch.dtype = torch.bfloat16


TIED = tiny_dense(layers=2, vocab=132, hidden=72, ffn=52, tied=True)
MIXED = tiny_moe(layers=3, vocab=132, mlp_only_layers=(1,), expert_ffn=20)
CASES = {
    "tied_tp2_to_pp2": Case(TIED, ParallelLayout(tp=2), ParallelLayout(pp=2)),
    "tied_pp2_to_tp2_plain": Case(TIED, ParallelLayout(pp=2), ParallelLayout(tp=2), distributed=False),
    "moe_ep2_to_tp2": Case(MIXED, ParallelLayout(ep=2), ParallelLayout(tp=2)),
    "moe_tp2_to_ep2_plain": Case(tiny_moe(layers=2), ParallelLayout(tp=2), ParallelLayout(ep=2), distributed=False),
    "moe_tp2_to_tp2_ep2_etp1": Case(MIXED, ParallelLayout(tp=2), ParallelLayout(tp=2, ep=2, etp=1)),
    "interleaved_to_dp2": Case(
        tiny_dense(layers=4, vocab=132), ParallelLayout(pp=2, vpp=2), ParallelLayout(), distributed=True
    ),
    "fp32_pp2_to_tp2": Case(TIED, ParallelLayout(pp=2), ParallelLayout(tp=2), distributed=False, dtype=torch.float32),
    "fp32_dp2_to_pp2": Case(TIED, ParallelLayout(), ParallelLayout(pp=2), dtype=torch.float32),
}

# Our own runs, by name: model, layout, and the layouts of the per-rank checkpoints on the way.
RUNS = {
    "dense": ("tiny", {"tp": 2}, [ParallelLayout(), ParallelLayout(tp=2, pp=2)]),
    "moe": ("tiny-moe", {"ep": 2}, [ParallelLayout(tp=2, ep=2, etp=1), ParallelLayout(pp=2, vpp=2)]),
}


def run_options(root: Path, name: str, folder: str) -> dict[str, Any]:
    source, layout, _ = RUNS[name]
    values = training_runs.options(root / "data", root / name / folder, **layout)
    values["model"] |= {"source": source, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    values["data"]["cache_dir"] = str(root / "cache")
    values["schedule"]["steps"] = 4
    return values


def train(values: dict[str, Any], **arguments: Any) -> Any:
    leave_layout()
    return training_runs.train(values, **arguments)


def check_numbers(config: QwenConfig, layout: ParallelLayout, bucket_size: int | None) -> list[str]:
    """Compare numbers and offsets of parameters with those of stock optimizers on this rank."""
    from megatron.core import parallel_state

    from megatron_qwen.compat import _without_bucket_padding
    from megatron_qwen.conversion.formats.legacy.layout import rank_files
    from megatron_qwen.conversion.optimizer.layout import members

    built = stock.build(config, layout, bucket_size=bucket_size)
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    (file,) = [
        each for each in rank_files(config, layout) if (each.tensor_rank, each.pipeline_rank, each.expert_rank) == place
    ]
    chain = members(file, layout, is_tied=config.tie_word_embeddings, splits_experts=len(built.members()) > 1)
    names = {id(p): name for chunk in built.chunks for name, p in chunk.module.named_parameters()}
    problems = []
    for member, theirs in zip(chain, built.members(), strict=True):
        buffers = member.buffers(None if place[1] else bucket_size)
        found = [
            ([(each.tensor.name, each.begin, each.end) for each in buffer.places], buffer.num_elements)
            for buffer in buffers
        ]
        expected = [
            (
                [(names[id(p)], begin, end) for p, (begin, end, _) in _without_bucket_padding(buffer).items()],
                buffer.numel_unpadded,
            )
            for buffer in theirs.buffers
        ]
        if found != expected:
            problems.append(f"buffers: {found} instead of {expected}")
    plain = stock.build(config, layout, distributed=False)
    names = {id(p): name for chunk in plain.chunks for name, p in chunk.module.named_parameters()}
    for member, theirs in zip(chain, plain.members(), strict=True):
        found = [[tensor.name for tensor in group.tensors] for group in member.groups]
        expected = [[names[id(p)] for p in group] for group in theirs.float16_groups]
        decays = [group["wd_mult"] for group in theirs.optimizer.param_groups]
        if found != expected or decays != [float(group.decays) for group in member.groups]:
            problems.append(f"numbers: {found} instead of {expected}")
    return problems


NUMBERED = [
    (tiny_dense(layers=2, vocab=131, hidden=72, ffn=52), ParallelLayout(tp=2)),
    (tiny_dense(layers=3, vocab=131, tied=True, hidden=72, ffn=52), ParallelLayout(pp=2, pp_layout=(2, 1))),
    (tiny_dense(layers=4, vocab=77, tied=True), ParallelLayout(pp=2, vpp=2)),
    (tiny_moe(layers=4, mlp_only_layers=(0, 1), expert_ffn=20), ParallelLayout(pp=2, vpp=2)),
    (tiny_moe(layers=3, mlp_only_layers=(0,), vocab=77), ParallelLayout(tp=2, ep=2, etp=1)),
    (tiny_moe(layers=2, tied=True), ParallelLayout(tp=2, etp=1)),
    (tiny_moe(layers=2, tied=True), ParallelLayout()),
]


def check_saved_masters(root: Path) -> list[str]:
    """Save an optimizer whose buckets are padded; return the keys whose master weights are not the weights."""
    from megatron.core import dist_checkpointing

    config = tiny_dense(layers=2, vocab=132, hidden=72, ffn=52, tied=True)
    built = stock.build(config, ParallelLayout(pp=2), bucket_size=5000)
    built.step(0)
    stock.save_torch_dist(built, root / "buckets", 1, distributed=True)
    saved = dist_checkpointing.load_plain_tensors(str(root / "buckets" / "iter_0000001"))
    prefix = "optimizer.state.param."
    masters = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    assert len(masters) > 8, masters.keys()
    return sorted(key for key, value in masters.items() if not torch.equal(value.to(torch.bfloat16), saved[key]))


def first_group(root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        "numbers": [
            check_numbers(config, layout, bucket_size) for config, layout in NUMBERED for bucket_size in (None, 5000)
        ],
        "masters": check_saved_masters(root),
    }
    for name, case in CASES.items():
        built = stock.build(case.config, case.saved, distributed=case.distributed, dtype=case.dtype)
        built.step(1)
        built.step(2)
        stock.save_torch_dist(built, root / name / "torch_dist", 2, distributed=case.distributed)
        stock.save_legacy(built, case.config, root / name / "legacy", 2, distributed=case.distributed)
    for name in RUNS:
        train(run_options(root, name, "run"), stop_at=2)
    values = run_options(root, "dense", "bucket_space")
    values["checkpoint"]["optimizer_format"] = "dp_reshardable"
    train(values, stop_at=1)
    save_foreign(root)
    return results


def save_foreign(root: Path) -> None:
    """Save a model of our trainer's as Megatron-LM would have trained it, after two steps."""
    from megatron_qwen.training.source import resolve_source

    recipe = training_runs.recipe_of(run_options(root, "dense", "foreign"))
    config, adam = resolve_source(recipe).config, recipe.optimizer
    built = stock.build(config, ParallelLayout(pp=2), lr=adam.lr, min_lr=adam.final_lr)
    built.step(1)
    built.step(2)
    stock.save_legacy(built, config, root / "dense" / "foreign_legacy", 2, distributed=True)
    if torch.distributed.get_rank() == 0:
        (root / "dense" / "foreign_legacy" / "hf").mkdir()
        (root / "dense" / "foreign_legacy" / "hf" / "config.json").write_text(json.dumps(config.to_hf()))


def reshard_all(root: Path) -> None:
    for name, case in CASES.items():
        folder = root / name
        for source in ("torch_dist", "legacy"):
            reshard(
                folder / source,
                folder / f"{source}_to_legacy",
                ckpt_format="torch",
                layout=case.loaded,
                config=case.config,
                verify=True,
                **QUIET,
            )
        reshard(folder / "legacy", folder / "legacy_to_torch_dist", config=case.config, verify=True, **QUIET)
    for name, (_, _, layouts) in RUNS.items():
        shutil.copytree(root / name / "run", root / name / "direct")
        before = root / name / "run"
        for number, layout in enumerate(layouts):
            reshard(before, root / name / f"hop{number}", ckpt_format="torch", layout=layout, **QUIET)
            before = root / name / f"hop{number}"
        reshard(before, root / name / "back", **QUIET)
    reshard(root / "dense" / "foreign_legacy", root / "dense" / "foreign", **QUIET)


def second_group(root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        snapshots = {}
        for source in ("torch_dist", "legacy_to_torch_dist", "torch_dist_to_legacy", "legacy_to_legacy"):
            built = stock.build(case.config, case.loaded, distributed=case.distributed, dtype=case.dtype)
            load = stock.load_legacy if source.endswith("to_legacy") else stock.load_torch_dist
            load(built, root / name / source, 2, distributed=case.distributed)
            built.step(3)
            snapshots[source] = built.snapshot()
        reference = snapshots.pop("torch_dist")
        results[name] = {source: stock.same(snapshot, reference) for source, snapshot in snapshots.items()}
        results[name]["moves"] = any(bool(tensor.float().abs().sum()) for tensor in reference)
    for name in RUNS:
        step = "iter_0000002"
        leave_layout()
        results[f"{name}_step"] = training_runs.differing_tensors(
            root / name / "run" / step, root / name / "back" / step
        )
        for folder in ("direct", "back"):
            train(run_options(root, name, folder))
    everything = ["model", "tokenizer", "data", "batch", "seed", "optimizer", "schedule"]
    results["foreign"] = train(run_options(root, "dense", "foreign"), allow_changed=everything)
    return results


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], list[Any]]:
    root = tmp_path_factory.mktemp("optimizer")
    (root / "data").mkdir()
    training_runs.write_data(root / "data")
    first = run_ranks(first_group, 2, root, timeout=400)
    reshard_all(root)
    return root, first, run_ranks(second_group, 2, root, timeout=400)


@pytest.mark.multirank
def test_numbers_and_offsets_are_those_of_stock_optimizers(outcome):
    _, first, _ = outcome
    assert [results["numbers"] for results in first] == [[[]] * 2 * len(NUMBERED)] * 2


@pytest.mark.multirank
def test_master_weights_are_saved_at_their_places_where_buckets_are_padded(outcome):
    _, first, _ = outcome
    assert [results["masters"] for results in first] == [[], []]


@pytest.mark.multirank
@pytest.mark.parametrize("source", ["legacy_to_torch_dist", "torch_dist_to_legacy", "legacy_to_legacy"])
@pytest.mark.parametrize("name", CASES)
def test_stock_optimizer_steps_from_the_resharded_checkpoint_as_from_the_original(outcome, name, source):
    _, _, second = outcome
    assert all(results[name][source] and results[name]["moves"] for results in second)


@pytest.mark.multirank
@pytest.mark.parametrize("name", RUNS)
def test_every_tensor_of_a_run_comes_back_from_per_rank_checkpoints(outcome, name):
    _, _, second = outcome
    assert [results[f"{name}_step"] for results in second] == [[], []]


@pytest.mark.multirank
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_the_resharded_checkpoint_as_from_its_own(outcome, name):
    root, _, _ = outcome
    direct, back = (training_runs.metrics(root / name / folder) for folder in ("direct", "back"))
    assert [each["step"] for each in back] == [3, 4]
    assert direct[2:] == back
    record = json.loads((root / name / "back" / "iter_0000004" / "step.json").read_text())
    assert record["common"]["progress"]["tokens"] == 4 * training_runs.BATCH * training_runs.SEQ_LENGTH


@pytest.mark.multirank
def test_a_run_that_saves_buckets_is_refused_by_name(outcome):
    root, _, _ = outcome
    run = root / "dense" / "bucket_space"
    assert (
        json.loads((run / "iter_0000001" / "step.json").read_text())["common"]["optimizer_format"] == "dp_reshardable"
    )
    with pytest.raises(MismatchError, match="dp_reshardable"):
        reshard(run, root / "dense" / "refused", **QUIET)
    reshard(run, root / "dense" / "weights", optimizer=False, **QUIET)


def test_the_recipe_checks_the_format_of_the_optimizer_state():
    for values in ({"optimizer_format": "sharded"}, {"optimizer_format": "dp_reshardable"}):
        with pytest.raises(ConfigError, match="optimizer_format"):
            recipe_from_dict({"checkpoint": values, "optimizer": {"distributed": False}})
    recipe = recipe_from_dict({"checkpoint": {"optimizer_format": "dp_reshardable"}})
    assert load_recipe_text(dump_recipe(recipe)) == recipe


def load_recipe_text(text: str) -> Any:
    return recipe_from_dict(yaml.safe_load(text))


@pytest.mark.multirank
def test_our_trainer_goes_on_from_a_run_of_megatron_lm(outcome):
    root, _, second = outcome
    record = json.loads((root / "dense" / "foreign" / "iter_0000002" / "step.json").read_text())
    assert record["common"]["progress"]["tokens"] == 2 * 16 * 8
    assert [results["foreign"]["resumed_from"] for results in second] == [2, 2]
    assert [results["foreign"]["steps"] for results in second] == [4, 4]


@pytest.mark.multirank
def test_what_is_not_carried_over_is_said_at_the_resume(outcome):
    root, _, _ = outcome
    layout = json.loads((root / "dense" / "back" / "iter_0000002" / "step.json").read_text())["common"]["layout"]
    assert layout["random_streams"] == "not carried over by convert reshard"
    assert (layout["tp"], layout["pp"]) == (2, 2)
