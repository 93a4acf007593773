"""Per-rank checkpoints against megatron-core's own GPTModel: it loads ours strictly, and we read what it saves.

One group of four ranks goes through all layouts: importing Megatron costs more than any of them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stock_model import enter, poison, rank_folder, same, snapshot, stock_chunks

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE, rank_files
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.formats.megatron_lm_args import megatron_lm_args
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

CASES: dict[str, tuple[QwenConfig, ParallelLayout]] = {
    "tp2_pp2": (tiny_dense(layers=2, vocab=131, tied=True), ParallelLayout(tp=2, pp=2)),
    "uneven": (tiny_dense(layers=3, vocab=96, torch_dtype="bfloat16"), ParallelLayout(pp=2, pp_layout=(1, 2))),
    "vpp2": (tiny_dense(layers=4, vocab=96, tied=True), ParallelLayout(pp=2, vpp=2)),
    "uneven_vpp2": (tiny_dense(layers=5, vocab=96), ParallelLayout(tp=2, pp=2, vpp=2, pp_layout=(1, 2, 1, 1))),
    "tp4_two_groups": (tiny_dense(layers=1, vocab=130), ParallelLayout(tp=4)),
    "ep2": (tiny_moe(layers=2, vocab=96, norm_topk_prob=True), ParallelLayout(ep=2)),
    "tp2_ep2": (tiny_moe(layers=1, vocab=131), ParallelLayout(tp=2, ep=2)),
    "tp2_ep2_etp1": (tiny_moe(layers=3, vocab=96, mlp_only_layers=(1,)), ParallelLayout(tp=2, ep=2, etp=1)),
    "tp2_etp1": (tiny_moe(layers=2, vocab=96, tied=True), ParallelLayout(tp=2, pp=2, etp=1)),
}
STEP = "iter_0000007"


def arguments_of_a_run(config: QwenConfig, layout: ParallelLayout) -> argparse.Namespace:
    """Arguments with the kinds of values that Megatron-LM's parser leaves in them."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    arguments = megatron_lm_args(config, layout, ckpt_format="torch", transformer_impl="local")
    arguments.attention_backend = AttnBackend.auto
    arguments.model_type = ModelType.encoder_or_decoder
    arguments.data_path = None
    arguments.lr = 1e-4
    return arguments


def random_states() -> list[dict[str, object]]:
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
    ]


def put_into_one_buffer(chunk) -> None:
    """Make the parameters views of one buffer, as Megatron's DDP does: torch.save then stores the buffer."""
    parameters = list(chunk.parameters())
    buffer = torch.full((sum(each.numel() for each in parameters) + 64,), 7.0, dtype=parameters[0].dtype)
    offset = 13
    for parameter in parameters:
        view = buffer[offset : offset + parameter.numel()].view(parameter.shape)
        view.copy_(parameter.data)
        parameter.data = view
        offset += parameter.numel()


def save_as_megatron_lm(chunks, config: QwenConfig, layout: ParallelLayout, folder: Path) -> None:
    from megatron.core import parallel_state as state

    content: dict[str, object] = {
        "args": arguments_of_a_run(config, layout),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "rng_state": random_states(),
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 7},
        "num_floating_point_operations_so_far": 1e12,
    }
    for i, chunk in enumerate(chunks):
        put_into_one_buffer(chunk)
        content[f"model{i}" if len(chunks) > 1 else "model"] = chunk.state_dict_for_save_checkpoint()
    file = folder / "theirs" / STEP / rank_folder() / RANK_FILE
    # Who writes, from 0.19 on; before, only ranks of the second kind, which lose shards where etp < tp.
    if state.get_data_parallel_rank() == 0 or state.get_expert_data_parallel_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, file)


def go_through_case(config: QwenConfig, layout: ParallelLayout, folder: Path) -> dict[str, object]:
    from megatron_qwen.conversion import load_weights_into

    chunks = stock_chunks(config, layout)
    dtype = getattr(torch, config.torch_dtype)
    poison(chunks)
    load_weights_into(chunks, folder / "hf", config)
    expected = snapshot(chunks)
    poison(chunks)
    load_weights_into(chunks, folder / "ours", config, allow_pickle=True)
    result: dict[str, object] = {"our_loader": same(snapshot(chunks), expected)}
    poison(chunks)
    ours = torch.load(folder / "ours" / "release" / rank_folder() / RANK_FILE, map_location="cpu", weights_only=False)
    keys = [f"model{i}" if len(chunks) > 1 else "model" for i in range(len(chunks))]
    result["keys"] = sorted(key for key in ours if key.startswith("model")) == keys
    for key, chunk in zip(keys, chunks, strict=True):
        chunk.load_state_dict(ours[key], strict=True)
    result["strict"] = same(snapshot(chunks), expected)
    result["names"] = [list(chunk.state_dict()) for chunk in chunks]
    result["held"] = [sorted(ours[key]) for key in keys]
    result["order"] = [[name for name, _ in chunk.named_parameters()] for chunk in chunks]
    result["folder"] = rank_folder()
    result["dtypes"] = {tensor.dtype for key in keys for tensor in ours[key].values() if tensor is not None} == {dtype}
    save_as_megatron_lm(chunks, config, layout, folder)
    torch.distributed.barrier()
    return result


def go_through_all(root: Path) -> dict[str, dict[str, object]]:
    results = {}
    for name, (config, layout) in CASES.items():
        enter(layout)
        results[name] = go_through_case(config, layout, root / name)
    return results


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    root = tmp_path_factory.mktemp("legacy")
    for seed, (name, (config, layout)) in enumerate(CASES.items()):
        dtype = getattr(torch, config.torch_dtype)
        write_tiny_hf(root / name / "hf", config, seed=seed, dtype=dtype)
        import_hf(root / name / "hf", root / name / "ours", ckpt_format="torch", layout=layout, progress=False)
    results = run_ranks(go_through_all, 4, root, timeout=500)
    for name in CASES:
        (root / name / "theirs" / "latest_checkpointed_iteration.txt").write_text("7")
    return root, results


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_our_rank_file_loads_in_the_stock_model_with_strict_checking(outcome, name):
    _, ranks = outcome
    assert [each[name]["keys"] and each[name]["strict"] and each[name]["dtypes"] for each in ranks] == [True] * 4


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_our_rank_file_holds_exactly_the_keys_of_the_stock_state_dict(outcome, name):
    _, ranks = outcome
    assert all(each[name]["held"] == [sorted(names) for names in each[name]["names"]] for each in ranks)


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_our_loader_takes_rank_files_of_another_layout_or_the_same(outcome, name):
    _, ranks = outcome
    assert all(each[name]["our_loader"] for each in ranks)


@pytest.mark.multirank
@pytest.mark.parametrize("name", CASES)
def test_the_layout_lists_files_and_parameters_as_stock_ranks_have_them(outcome, name):
    _, ranks = outcome
    files = {file.folder: file for file in rank_files(*CASES[name])}
    assert {each[name]["folder"] for each in ranks} == files.keys()
    for each in ranks:
        chunks = files[each[name]["folder"]].chunks
        assert [[tensor.name for tensor in chunk.tensors] for chunk in chunks] == each[name]["order"]


@pytest.mark.multirank
@pytest.mark.parametrize("knows_the_model", [True, False], ids=["config", "args"])
@pytest.mark.parametrize("name", CASES)
def test_what_stock_megatron_saves_exports_bit_for_bit(outcome, name, knows_the_model, tmp_path):
    root, _ = outcome
    config, layout = CASES[name]
    if not knows_the_model and config.vocab_size % layout.tp:
        pytest.skip("the arguments do not say which vocabulary rows are padding")
    theirs = root / name / "theirs"
    source = LegacyFolder(theirs, config=config, allow_pickle=True)
    found = source.layout
    assert (found.tp, found.pp, found.vpp, found.ep) == (layout.tp, layout.pp, layout.vpp, layout.ep)
    assert not config.is_moe or found.etp == layout.expert_tensor_parallel_size
    given = {"config": config} if knows_the_model else {}
    export_hf(theirs, tmp_path / "back", progress=False, allow_pickle=True, **given)
    left, right = (load_file(folder / "model.safetensors") for folder in (root / name / "hf", tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)
    assert knows_the_model or QwenConfig.from_hf(tmp_path / "back").shape() == config.shape()
