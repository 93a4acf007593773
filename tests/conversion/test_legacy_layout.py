"""Which rank file holds what, against a simulation of the ranks of a job."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import pytest
import torch

from megatron_qwen.conversion import import_hf
from megatron_qwen.conversion.formats.legacy.layout import rank_files, vocabulary_rows
from megatron_qwen.conversion.formats.legacy.source import shard_runs
from megatron_qwen.conversion.parameters import Shard, parameters
from megatron_qwen.errors import (
    ConfigError,
)
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

DENSE = tiny_dense(layers=4, vocab=131)
TIED = tiny_dense(layers=4, vocab=131, tied=True)
MOE = tiny_moe(layers=4, vocab=96, experts=8, mlp_only_layers=(1,))


def simulate(layout: ParallelLayout) -> dict[str, set[tuple[int, int, int, int]]]:
    """(tensor, pipeline, expert, expert tensor) rank of every rank of a job, by the file that it opens.

    Ranks in Megatron's order tp-cp-ep-dp-pp, the experts' groups over the same ranks.
    """
    etp = layout.expert_tensor_parallel_size
    dense, expert = layout.tp * layout.cp, etp * layout.ep
    per_stage = dense * expert  # a multiple of both
    found = defaultdict(set)
    for rank in range(per_stage * layout.pp):
        pipeline, within = divmod(rank, per_stage)
        tensor, expert_rank, expert_tensor = within % layout.tp, within // etp % layout.ep, within % etp
        name = f"mp_rank_{tensor:02d}"
        name += f"_{pipeline:03d}" if layout.pp > 1 else ""
        name += f"_{expert_rank:03d}" if layout.ep > 1 else ""
        found[name].add((tensor, pipeline, expert_rank, expert_tensor))
    return found


GRID = [
    ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)
    for tp, pp, ep, etp, cp in product((1, 2, 4), (1, 2), (1, 2, 4, 8), (1, 2, 4, None), (1, 2))
    if etp is None or tp % etp == 0
]


@pytest.mark.parametrize("layout", GRID, ids=lambda each: f"tp{each.tp}pp{each.pp}ep{each.ep}etp{each.etp}cp{each.cp}")
def test_every_rank_of_a_job_finds_its_file_and_its_experts_in_it(layout):
    ranks = simulate(layout)
    files = {file.folder: file for file in rank_files(MOE, layout)}
    assert files.keys() == ranks.keys()
    for folder, places in ranks.items():
        file = files[folder]
        assert places == {(file.tensor_rank, file.pipeline_rank, file.expert_rank, file.expert_tensor_rank)}


@pytest.mark.parametrize("layout", [*GRID[::7], ParallelLayout(pp=2, vpp=2), ParallelLayout(pp=3, pp_layout=(1, 2, 1))])
@pytest.mark.parametrize("config", [DENSE, TIED, MOE], ids=["dense", "tied", "moe"])
def test_every_element_is_in_a_file(config, layout):
    if layout.ep > 1 and not config.is_moe:
        return
    held: dict[Any, set[Shard]] = defaultdict(set)
    for file in rank_files(config, layout):
        for chunk in file.chunks:
            assert len({tensor.name for tensor in chunk.tensors}) == len(chunk.tensors)
            for tensor in chunk.tensors:
                held[tensor.parameter].add(tensor.shard)
                whole = list(tensor.parameter.shape)
                if tensor.vocabulary_rows:
                    whole[0] = tensor.vocabulary_rows
                if tensor.parameter.family.shard_axis is not None:
                    whole[tensor.parameter.family.shard_axis] //= tensor.shard.size
                assert tensor.shape == tuple(whole)
    assert held.keys() == set(parameters(config))
    for shards in held.values():
        (size,) = {shard.size for shard in shards}
        assert {shard.rank for shard in shards} == set(range(size))


def test_a_tied_model_has_a_copy_of_its_embedding_in_the_last_stage_only():
    names = {
        (file.folder, chunk.key): [tensor.name for tensor in chunk.tensors if tensor.vocabulary_rows]
        for file in rank_files(TIED, ParallelLayout(pp=2, vpp=2))
        for chunk in file.chunks
    }
    assert names == {
        ("mp_rank_00_000", "model0"): ["embedding.word_embeddings.weight"],
        ("mp_rank_00_000", "model1"): [],
        ("mp_rank_00_001", "model0"): [],
        ("mp_rank_00_001", "model1"): ["output_layer.weight"],
    }
    (alone,) = rank_files(TIED, ParallelLayout())
    assert "output_layer.weight" not in {tensor.name for tensor in alone.chunks[0].tensors}


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        (MOE, ParallelLayout(tp=2, etp=4), "etp=4 does not divide tp=2"),
        (MOE, ParallelLayout(etp=2), "etp=2 does not divide tp=1"),
        (MOE, ParallelLayout(ep=3), "ep=3"),
        (DENSE, ParallelLayout(ep=2), "mixture of experts"),
        (DENSE, ParallelLayout(tp=3), "tp=3"),
        (DENSE, ParallelLayout(pp=3), "pp_layout 2,1,1"),
        (DENSE, ParallelLayout(pp=2, pp_layout=(1, 2)), "sums to 3"),
        (DENSE, ParallelLayout(vpp=2), "vpp=2 needs pp > 1"),
        (DENSE, ParallelLayout(tp=0), "tp=0"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_before_anything_is_written(config, layout, words, tmp_path):
    write_tiny_hf(tmp_path / "hf", config)
    with pytest.raises(ConfigError, match=words):
        import_hf(tmp_path / "hf", tmp_path / "out", ckpt_format="torch", layout=layout, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_runs_of_rows_put_shards_together(pieces, shards):
    whole = torch.arange(12 * shards * pieces // 2)
    size = len(whole) // (shards * pieces)
    blocks = whole.view(pieces, shards, size)
    parts = [blocks[:, shard].reshape(-1) for shard in range(shards)]
    for begin, end in product(range(len(whole) + 1), repeat=2):
        if begin <= end:
            runs = shard_runs(begin, end, len(whole), shards, pieces)
            found = [row for shard, low, high in runs for row in parts[shard][low:high].tolist()]
            assert found == whole[begin:end].tolist()


def test_padding_of_the_vocabulary_is_to_a_multiple_of_tp():
    assert [vocabulary_rows(DENSE, ParallelLayout(tp=tp)) for tp in (1, 2, 4)] == [131, 132, 132]
