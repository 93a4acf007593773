"""Interchange with Megatron-Core's own GPTModel and dist_checkpointing, and loading under every kind of layout.

One pair of ranks goes through all cases: importing Megatron costs more than any of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_model import enter, poison, same, snapshot, stock_chunks

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.parameters import extra_state_keys, is_homogeneous, parameters, stored_place
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

CASES = {
    "dense_tp2": (tiny_dense(layers=3, vocab=131), ParallelLayout(tp=2)),
    "tied_pp2": (tiny_dense(layers=2, vocab=96, tied=True), ParallelLayout(pp=2)),
    "moe_ep2": (tiny_moe(layers=2, norm_topk_prob=True), ParallelLayout(ep=2)),
    "mixed_tp2": (tiny_moe(layers=3, mlp_only_layers=(1,)), ParallelLayout(tp=2)),
}
INTERLEAVED = (tiny_dense(layers=4), ParallelLayout(pp=2, vpp=2))


def stored_by(model) -> tuple[set[str], set[str]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    items = list(nested_values(state))
    return (
        {item.key for item in items if isinstance(item, ShardedTensor)},
        {item.unique_key for item in items if isinstance(item, ShardedObject)},
    )


def go_through_case(config: QwenConfig, layout: ParallelLayout, folder: Path) -> dict[str, object]:
    from megatron.core import dist_checkpointing

    from megatron_qwen.conversion import load_weights_into

    (model,) = stock_chunks(config, layout, dtype=torch.float32)
    poison([model])
    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder / "ours" / "release"), strict="raise_all")
    known = model.state_dict().keys()
    model.load_state_dict({key: value for key, value in state.items() if key in known})
    expected = snapshot([model])
    result: dict[str, object] = {
        "finite": all(bool(tensor.isfinite().all()) for tensor in expected.values()),
        "keys": stored_by(model),
    }
    for source in ("hf", "ours"):
        poison([model])
        load_weights_into([model], folder / source, config)
        result[source] = same(snapshot([model]), expected)
    theirs = folder / "theirs" / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        theirs.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(theirs))
    return result


def logits_of(model) -> torch.Tensor:
    ids_BS = (torch.arange(24) * 7 % 90).view(2, 12)
    with torch.inference_mode():
        return model.eval()(ids_BS, torch.arange(12).expand_as(ids_BS), None)


def go_through_all(root: Path) -> dict[str, object]:
    from megatron_qwen.conversion import load_model

    results: dict[str, object] = {}
    for name, (config, layout) in CASES.items():
        enter(layout)
        results[name] = go_through_case(config, layout, root / name)
        if layout.pp == 1:
            logits = [logits_of(load_model(root / name / source, layout=layout)) for source in ("hf", "ours")]
            results[name]["logits"] = torch.equal(*logits) and bool(logits[0].isfinite().all())
    config, layout = INTERLEAVED
    enter(layout)
    chunks = [load_model(root / "interleaved" / source, layout=layout) for source in ("hf", "ours")]
    results["interleaved"] = (len(chunks[0]), same(snapshot(chunks[0]), snapshot(chunks[1])))
    return results


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("stock")
    for name, (config, _) in {**CASES, "interleaved": INTERLEAVED}.items():
        write_tiny_hf(root / name / "hf", config)
        import_hf(root / name / "hf", root / name / "ours", progress=False)
    return root, run_ranks(go_through_all, 2, root, timeout=400)


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_our_checkpoint_loads_in_the_stock_model_with_strict_checking(outcome, name):
    _, ranks = outcome
    assert all(results[name]["finite"] for results in ranks)


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_our_loader_gives_each_rank_the_shards_that_stock_loading_gives(outcome, name):
    _, ranks = outcome
    assert all(results[name]["hf"] and results[name]["ours"] for results in ranks)


@pytest.mark.multirank
@pytest.mark.parametrize("name", [name for name, (_, layout) in CASES.items() if layout.pp == 1])
def test_logits_do_not_depend_on_the_kind_of_folder(outcome, name):
    _, ranks = outcome
    assert all(results[name]["logits"] for results in ranks)


@pytest.mark.multirank
def test_virtual_stages_are_filled_from_either_kind_of_folder(outcome):
    _, ranks = outcome
    assert [results["interleaved"] for results in ranks] == [(2, True)] * 2


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_keys_are_those_of_the_stock_model(outcome, name):
    _, ranks = outcome
    config, _ = CASES[name]
    tensors, objects = (set().union(*(results[name]["keys"][i] for results in ranks)) for i in (0, 1))
    assert {stored_place(p, config, stacked=is_homogeneous(config)).key for p in parameters(config)} == tensors
    assert set(extra_state_keys(config)) == objects


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_what_stock_megatron_saves_exports_bit_for_bit(outcome, name, tmp_path):
    root, _ = outcome
    (root / name / "theirs" / "latest_checkpointed_iteration.txt").write_text("7")
    export_hf(root / name / "theirs", tmp_path / "back", progress=False, config=CASES[name][0])
    left, right = (load_file(folder / "model.safetensors") for folder in (root / name / "hf", tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
