"""Optimizer state that is damaged, incomplete or inconsistent is refused by rank file and parameter.

Made without Megatron: a small model with a made-up optimizer, written by `reshard`'s own output.
"""

from __future__ import annotations

import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_run import QUIET, change, load, rank_path, run_at, save

from megatron_qwen.conversion import reshard
from megatron_qwen.conversion.run import prepare_reshard
from megatron_qwen.errors import (
    ConfigError,
    CorruptInputError,
    IncompleteInputError,
    InputError,
    MismatchError,
    UnsafeInputError,
)
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe

DENSE, MOE = tiny_dense(layers=2, vocab=131), tiny_moe(layers=2, vocab=132)
TP2, EP2 = ParallelLayout(tp=2), ParallelLayout(ep=2)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return run_at(tmp_path, DENSE, TP2)


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return run_at(tmp_path, MOE, EP2)


def refused(kind: type[InputError], run: Path, **options: Any) -> str:
    target = run.parent / "out"
    with pytest.raises(kind) as error:
        reshard(run, target, **{**QUIET, **options})
    assert not target.exists()
    return str(error.value)


def test_the_made_up_run_reshards_and_comes_back(dense):
    back = dense.parent / "back"
    reshard(dense, dense.parent / "torch_dist", **QUIET)
    reshard(dense.parent / "torch_dist", back, ckpt_format="torch", layout=TP2, **QUIET)
    for folder in ("mp_rank_00", "mp_rank_01"):
        one, other = (load(rank_path(run, folder))["optimizer"] for run in (dense, back))
        assert one["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
        for number, state in one["optimizer"]["state"].items():
            for role, value in state.items():
                assert torch.equal(value, other["optimizer"]["state"][number][role])
        for masters, others in zip(one["fp32_from_fp16_params"], other["fp32_from_fp16_params"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(masters, others, strict=True))


def test_a_missing_moment_is_named(dense):
    change(dense, "mp_rank_01", lambda content: content["optimizer"]["optimizer"]["state"][2].pop("exp_avg_sq"))
    message = refused(IncompleteInputError, dense)
    assert "mp_rank_01/model_optim_rng.pt: decoder.layers.0.self_attention.linear_qkv.weight: exp_avg_sq" in message


def test_a_moment_of_another_shape_is_named(dense):
    def edit(content: Any) -> None:
        content["optimizer"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 4)

    change(dense, "mp_rank_00", edit)
    message = refused(CorruptInputError, dense)
    assert (
        "embedding.word_embeddings.weight: exp_avg: torch.float32 (3, 4), expected a float tensor (66, 64)" in message
    )


def test_a_master_weight_that_is_not_the_weight_is_named(dense):
    def edit(content: Any) -> None:
        content["optimizer"]["fp32_from_fp16_params"][0][1][5, 3] += 1.0

    change(dense, "mp_rank_01", edit)
    message = refused(MismatchError, dense)
    assert "decoder.layers.0.self_attention.linear_proj.weight: the master weight does not round" in message
    assert "mp_rank_01" in message
    assert "(5, 35) of" in message
    assert "--no-optimizer" in message


def test_a_master_weight_may_hold_more_than_the_weight(dense):
    def edit(content: Any) -> None:
        content["optimizer"]["fp32_from_fp16_params"][0][1].mul_(1 + 2**-12)

    change(dense, "mp_rank_01", edit)
    reshard(dense, dense.parent / "out", **QUIET)


def test_a_rank_file_without_optimizer_is_named(dense):
    change(dense, "mp_rank_01", lambda content: content.pop("optimizer"))
    assert "mp_rank_01/model_optim_rng.pt: no `optimizer`" in refused(IncompleteInputError, dense)


def test_rank_files_of_two_steps_are_refused(dense):
    def edit(content: Any) -> None:
        for each in content["optimizer"]["optimizer"]["param_groups"]:
            each["step"] = 8

    change(dense, "mp_rank_01", edit)
    message = refused(MismatchError, dense)
    assert "mp_rank_01" in message
    assert "mp_rank_00" in message
    assert "decay" in message


@pytest.mark.parametrize(
    ("edit", "kind", "expected"),
    [
        (lambda groups: groups[0].update(lr_mult=0.5), MismatchError, "lr_mult 0.5"),
        (lambda groups: groups[0].update(wd_mult=0.3), MismatchError, "wd_mult 0.3"),
        (lambda groups: groups.pop(1), IncompleteInputError, "wd_mult 0.0"),
        (lambda groups: groups[0]["params"].pop(), MismatchError, "9 parameters with wd_mult 1.0, expected 10"),
        (lambda groups: [each.pop("step") for each in groups], IncompleteInputError, "no step"),
        (lambda groups: groups.clear(), IncompleteInputError, "no parameter group"),
    ],
)
def test_parameter_groups_that_do_not_fit_are_refused(dense, edit, kind, expected):
    for folder in ("mp_rank_00", "mp_rank_01"):
        change(dense, folder, lambda content: edit(content["optimizer"]["optimizer"]["param_groups"]))
    message = refused(kind, dense)
    assert expected in message
    assert "mp_rank_00" in message


def test_the_step_of_plain_torch_optimizers_is_found_with_the_parameters(dense):
    def edit(content: Any) -> None:
        inner = content["optimizer"]["optimizer"]
        for each in inner["param_groups"]:
            del each["step"]
        for state in inner["state"].values():
            state["step"] = torch.tensor(7.0)

    for folder in ("mp_rank_00", "mp_rank_01"):
        change(dense, folder, edit)
    reshard(dense, dense.parent / "out", **QUIET)
    common = load(dense.parent / "out" / "iter_0000007" / "common.pt")
    assert [each["step"] for each in common["optimizer"]["optimizer"]["param_groups"]] == [7, 7]


def test_copies_that_drifted_apart_are_named(moe):
    def edit(content: Any) -> None:
        content["optimizer"][0]["optimizer"]["state"][0]["exp_avg"][0, 0] += 1

    change(moe, "mp_rank_00_001", edit)
    message = refused(MismatchError, moe)
    assert "mp_rank_00_000" in message
    assert "mp_rank_00_001" in message
    assert "word_embeddings" in message


def test_experts_under_other_hyper_parameters_are_refused(moe):
    for folder in ("mp_rank_00_000", "mp_rank_00_001"):
        change(moe, folder, lambda content: content["optimizer"][1]["optimizer"]["param_groups"][0].update(lr=1.0))
    assert "experts' parameter group differs from the other in lr" in refused(MismatchError, moe)


def test_trained_padding_is_refused(dense):
    def edit(content: Any) -> None:
        content["optimizer"]["optimizer"]["state"][0]["exp_avg"][-1] = 1.0  # row 132 of 131

    change(dense, "mp_rank_01", edit)
    assert "word_embeddings" in refused(MismatchError, dense)


@pytest.fixture
def distributed(dense: Path) -> Path:
    run = dense.parent / "distributed"
    reshard(dense, run, ckpt_format="torch", layout=TP2, distributed_optimizer=True, **QUIET)
    (run / "iter_0000007" / "manifest.json").unlink()
    return run


def test_a_missing_distributed_file_is_named(distributed):
    rank_path(distributed, "mp_rank_01", "distrib_optim.pt").unlink()
    message = refused(IncompleteInputError, distributed)
    assert "no optimizer state for a part of 12 parameters" in message
    assert "mp_rank_01" in message


@pytest.mark.parametrize(
    ("edit", "kind", "expected"),
    [
        (lambda state: state[0][key_of(state)].update(numel_unpadded=12), MismatchError, "12 elements, expected"),
        (lambda state: state.pop(0), MismatchError, "0 buffers, expected 1"),
        (lambda state: state.pop("buckets_coalesced"), MismatchError, "before February 2024"),
        (lambda state: state[0][key_of(state)].pop("exp_avg"), IncompleteInputError, "exp_avg: missing"),
        (lambda state: shift(state[0][key_of(state)]), MismatchError, "does not round to the model's weight"),
    ],
)
def test_a_distributed_file_that_does_not_fit_is_refused(distributed, edit, kind, expected):
    change(distributed, "mp_rank_01", edit, "distrib_optim.pt")
    message = refused(kind, distributed)
    assert expected in message
    assert "mp_rank_01/distrib_optim.pt" in message


def key_of(state: Any) -> Any:
    return next(iter(state[0]))


def shift(flat: dict[str, Any]) -> None:
    """What Megatron-Core does to parameters behind padded buckets."""
    flat["param"][20_000:24_000] = flat["param"][20_000:24_000].roll(64)


def test_a_truncated_distributed_file_is_refused(distributed):
    path = rank_path(distributed, "mp_rank_00", "distrib_optim.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    assert "distrib_optim.pt" in refused(CorruptInputError, distributed)


def test_a_distributed_file_that_changes_meanwhile_is_refused(distributed):
    conversion = prepare_reshard(distributed, distributed.parent / "out", **QUIET)
    path = rank_path(distributed, "mp_rank_00", "distrib_optim.pt")
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorruptInputError, match="distrib_optim"):
        conversion.run()


@pytest.fixture
def torch_dist(dense: Path) -> Path:
    run = dense.parent / "torch_dist"
    reshard(dense, run, distributed_optimizer=True, **QUIET)
    (run / "iter_0000007" / "manifest.json").unlink()
    return run


def edit_index(run: Path, edit: Callable[[Any], None]) -> None:
    path = run / "iter_0000007" / ".metadata"
    index = pickle.loads(path.read_bytes())
    edit(index)
    path.write_bytes(pickle.dumps(index))


def test_a_missing_tensor_of_a_torch_dist_optimizer_is_named(torch_dist):
    key = "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"
    edit_index(torch_dist, lambda index: index.state_dict_metadata.pop(key))
    assert key in refused(IncompleteInputError, torch_dist)


def test_another_optimizers_state_is_refused(torch_dist):
    def edit(index: Any) -> None:
        name = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
        index.state_dict_metadata["optimizer.state.momentum_buffer.x"] = index.state_dict_metadata[name]

    edit_index(torch_dist, edit)
    assert "momentum_buffer is not of Megatron's Adam" in refused(MismatchError, torch_dist)


def test_a_torch_dist_master_weight_that_is_not_the_weight_is_named(torch_dist):
    def edit(index: Any) -> None:
        places = {(each.fqn, each.offset): each for each in index.storage_data}
        shape = torch.Size([0])
        swapped = places["optimizer.state.exp_avg.decoder.final_layernorm.weight", shape]
        damaged = places["optimizer.state.param.decoder.final_layernorm.weight", shape]
        index.storage_data[damaged] = index.storage_data[swapped]

    edit_index(torch_dist, edit)
    message = refused(MismatchError, torch_dist)
    assert "decoder.final_layernorm.weight: the master weight does not round" in message


def test_bucket_space_is_refused_by_name(torch_dist):
    def edit(index: Any) -> None:
        for key in [key for key in index.state_dict_metadata if key.startswith("optimizer.state.")]:
            value = index.state_dict_metadata.pop(key)
            index.state_dict_metadata[key.replace(".state.", ".distributed.dp_group_idx_0.gbuf_idx_0.")] = value

    edit_index(torch_dist, edit)
    message = refused(MismatchError, torch_dist)
    assert "dp_reshardable" in message
    assert "checkpoint.optimizer_format" in message


def test_objects_of_other_classes_in_the_optimizer_are_refused(dense):
    from numpy import float64

    def edit(content: Any) -> None:
        content["optimizer"]["optimizer"]["param_groups"][0]["lr"] = float64(1e-3)

    for folder in ("mp_rank_00", "mp_rank_01"):
        change(dense, folder, edit)
    assert "a parameter group: holds a Inert" in refused(CorruptInputError, dense)


def test_common_state_with_code_is_refused(torch_dist):
    class Bomb:
        def __reduce__(self) -> Any:
            return (print, ("code ran",))

    path = torch_dist / "iter_0000007" / "common.pt"
    save(path, load(path) | {"bomb": Bomb()})
    assert "asks for builtins.print" in refused(UnsafeInputError, torch_dist)


def test_a_step_record_of_another_step_is_refused(torch_dist):
    path = torch_dist / "iter_0000007" / "step.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 8}))
    assert "of step 8" in refused(CorruptInputError, torch_dist)


def test_without_the_optimizer_weights_alone_are_written(dense):
    reshard(dense, dense.parent / "out", optimizer=False, **QUIET)
    assert not list((dense.parent / "out").glob("iter_*"))
    common = load(dense.parent / "out" / "release" / "common.pt")
    assert "optimizer" not in common
    assert isinstance(common["args"], Namespace)


def test_a_cast_does_not_go_with_optimizer_state(dense):
    with pytest.raises(ConfigError, match="--dtype"):
        reshard(dense, dense.parent / "out", dtype="float32", **QUIET)
    reshard(dense, dense.parent / "out", dtype="float32", optimizer=False, **QUIET)


def test_what_megatron_lm_counts_is_kept(dense):
    for folder in ("mp_rank_00", "mp_rank_01"):
        change(dense, folder, lambda content: vars(content["args"]).update(consumed_train_samples=112))
    reshard(dense, dense.parent / "out", ckpt_format="torch", layout=ParallelLayout(pp=2), **QUIET)
    for folder in ("mp_rank_00_000", "mp_rank_00_001"):
        content = load(rank_path(dense.parent / "out", folder))
        assert content["args"].consumed_train_samples == 112
        assert content["args"].use_distributed_optimizer is False
        assert content["iteration"] == 7
        assert content["opt_param_scheduler"] == {"num_steps": 7}
