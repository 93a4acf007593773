"""Recipes validate themselves, survive text, and take overrides that are typed and spelt right."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_qwen.errors import ConfigError
from megatron_qwen.recipes.pretrain import pretrain
from megatron_qwen.training.overrides import (
    apply_overrides,
    dump_recipe,
    field_paths,
    load_recipe,
    recipe_diff,
    recipe_from_dict,
    recipe_to_dict,
)
from megatron_qwen.training.recipe import OptimizerRecipe, Recipe, ScheduleRecipe

UNUSUAL = [
    "optimizer.lr=1e-5",
    "optimizer.min_lr=3.3e-7",
    "parallel.pp_layout=3,5",
    "performance.recompute=selective",
    "performance.recompute_modules=core_attn,mlp",
    "performance.overlap_p2p_comm=true",
    "data.blend=[[0.7, a/b], [0.3, 'c:d']]",
    "data.split=90,5,5",
    "schedule.warmup_steps=0",
    "model.source=Qwen2.5-7B",
    "seed=7",
]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_recipe_survives_a_file(tmp_path, suffix):
    recipe = apply_overrides(Recipe(), UNUSUAL)
    path = tmp_path / f"recipe{suffix}"
    path.write_text(dump_recipe(recipe) if suffix == ".yaml" else json.dumps(recipe_to_dict(recipe)))
    assert load_recipe(path) == recipe


def test_overrides_have_the_type_of_their_field():
    recipe = apply_overrides(Recipe(), UNUSUAL)
    assert recipe.optimizer.lr == 1e-5
    assert recipe.parallel.pp_layout == (3, 5)
    assert recipe.performance.recompute_modules == ("core_attn", "mlp")
    assert recipe.performance.overlap_p2p_comm is True
    assert recipe.data.blend == ((0.7, "a/b"), (0.3, "c:d"))
    assert recipe.data.split == "90,5,5"
    assert recipe.seed == 7
    assert apply_overrides(recipe, ["performance.overlap_p2p_comm=null"]).performance.overlap_p2p_comm is None
    assert apply_overrides(recipe, ["data.tokenizer=123"]).data.tokenizer == "123"
    assert apply_overrides(recipe, ["parallel.pp_layout=8"]).parallel.pp_layout == (8,)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("optimizer.learning_rate=1", ["no such field"]),
        ("optimiser.lr=1", ["optimiser", "optimizer.lr"]),
        ("schedule.stpes=10", ["schedule.stpes", "schedule.steps"]),
        ("lr=1", ["optimizer.lr"]),
        ("optimizer.lr", ["group.field=value"]),
        ("optimizer=1", ["expected a group"]),
        ("schedule.steps=1.5", ["schedule.steps", "1.5", "whole number"]),
        ("schedule.steps=ten", ["schedule.steps", "ten", "whole number"]),
        ("schedule.steps=true", ["whole number"]),
        ("optimizer.lr=nan", ["optimizer.lr"]),
        ("optimizer.lr=-1", ["lr", "-1"]),
        ("performance.overlap_grad_reduce=1", ["true or false"]),
        ("parallel.pp_layout=3,x", ["pp_layout[1]"]),
        ("performance.recompute=some", ["none, selective, full"]),
        ("model.dtype=fp16", ["bf16, fp32"]),
        ("data.split=1,2", ["split"]),
        ("schedule.global_batch_size=3 ", ["multiple"]),
    ],
)
def test_a_bad_override_says_what_and_what_else(assignment, words):
    base = dataclasses.replace(Recipe(), schedule=ScheduleRecipe(micro_batch_size=2, global_batch_size=4))
    with pytest.raises(ConfigError) as error:
        apply_overrides(base, [assignment])
    assert all(word in str(error.value) for word in words), error.value


def test_fields_that_fit_only_together_change_together():
    recipe = apply_overrides(Recipe(), ["schedule.micro_batch_size=4", "schedule.global_batch_size=8"])
    assert recipe.schedule.global_batch_size == 8


def test_every_problem_of_a_group_is_named():
    with pytest.raises(ConfigError, match=r"beta1.*beta2.*eps"):
        OptimizerRecipe(beta1=1.0, beta2=-0.1, eps=0.0)
    with pytest.raises(ConfigError, match=r"min_lr.*at most lr"):
        OptimizerRecipe(lr=1e-4, min_lr=1e-3)
    with pytest.raises(ConfigError, match="warmup_steps"):
        ScheduleRecipe(steps=10, warmup_steps=10)
    with pytest.raises(ConfigError, match="wsd_decay_steps"):
        ScheduleRecipe(steps=10, style="wsd", warmup_steps=5, wsd_decay_steps=6)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "optimizer: 3", "optimizer: {lrr: 1}", "a: [", "1: 2", "!!python/object:x {}"]
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_recipe(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "missing.yaml")


def test_the_fields_left_out_of_a_file_stay():
    base = pretrain("tiny")
    assert recipe_from_dict({"seed": 5}, base) == dataclasses.replace(base, seed=5)


def test_recipe_diff_names_fields():
    changed = apply_overrides(Recipe(), ["optimizer.lr=1", "seed=2"])
    difference = recipe_diff(recipe_to_dict(Recipe()), recipe_to_dict(changed))
    assert difference == {"seed": (1234, 2), "optimizer.lr": (3e-4, 1.0)}


def test_every_field_is_documented():
    for path in field_paths():
        group = getattr(Recipe(), path.partition(".")[0])
        owner = Recipe if "." not in path else type(group)
        assert path.rpartition(".")[2] in (owner.__doc__ or "") or owner.__name__ == "ParallelRecipe", path


def test_micro_batches_per_rank():
    recipe = apply_overrides(Recipe(), ["schedule.micro_batch_size=2", "schedule.global_batch_size=12"])
    assert recipe.num_microbatches(dp=3) == 2
    with pytest.raises(ConfigError, match=r"nearest are 8 and 16"):
        recipe.num_microbatches(dp=4)
