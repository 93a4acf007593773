"""Slices of rows against whole tensors: what the table's transforms give, and what the sources read."""

from __future__ import annotations

import pytest
import torch

from megatron_qwen.conversion import import_hf
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.formats.torch_dist.source import MegatronFolder
from megatron_qwen.conversion.parameters import parameters
from megatron_qwen.conversion.rows import gather_hf_rows, gather_rows, head_sizes, row_runs
from megatron_qwen.conversion.transforms import TRANSFORMS
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

CONFIGS = {
    "gqa": tiny_dense(layers=1, heads=6, kv_heads=3, hidden=96),
    "mqa": tiny_dense(layers=1, kv_heads=1),
    "mha": tiny_dense(layers=1, kv_heads=4),
    "moe": tiny_moe(layers=2, mlp_only_layers=(1,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_of_either_side_are_those_of_the_whole_transform(name):
    config = CONFIGS[name]
    for item in parameters(config):
        sources = [torch.randn(shape) for shape in item.hf_shapes]
        merged = TRANSFORMS[item.family.transform].hf_to_megatron(sources, head_sizes(config))
        rows = merged.shape[0]
        for begin, end in {(0, rows), (rows // 3, rows // 2 + 1), (rows - 1, rows)}:
            found = gather_rows(item, config, begin, end, lambda i, a, b, sources=sources: sources[i][a:b])
            assert torch.equal(found, merged[begin:end]), item.megatron_name
        for index, source in enumerate(sources):
            for begin, end in {(0, len(source)), (len(source) // 3, len(source) // 2 + 1)}:
                found = gather_hf_rows(item, config, index, begin, end, lambda a, b, merged=merged: merged[a:b])
                assert torch.equal(found, source[begin:end]), item.hf_names[index]


def test_runs_are_as_long_as_they_can_be():
    config = CONFIGS["gqa"]
    lengths = {item.family.megatron: len(row_runs(item, config)) for item in parameters(config)}
    assert lengths["embedding.word_embeddings.weight"] == 1
    assert lengths["mlp.linear_fc1.weight"] == 2
    assert lengths["self_attention.linear_qkv.weight"] == 3 * config.num_key_value_heads


@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_both_kinds_of_folder_give_the_same_slices(tmp_path, name):
    config = CONFIGS[name]
    write_tiny_hf(tmp_path / "hf", config, dtype=torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    hf, megatron = HfFolder(tmp_path / "hf"), MegatronFolder(tmp_path / "mg")
    for item in parameters(config):
        rows = item.shape[0]
        for begin, end in {(0, rows), (rows // 3, rows // 2 + 1)}:
            assert torch.equal(hf.rows(item, begin, end), megatron.rows(item, begin, end)), item.megatron_name
        for index, shape in enumerate(item.hf_shapes):
            begin, end = shape[0] // 3, shape[0] // 2 + 1
            expected = hf.hf_tensors(item)[index][begin:end]
            assert torch.equal(hf.hf_rows(item, index, begin, end), expected)
            assert torch.equal(megatron.hf_rows(item, index, begin, end), expected)
        assert megatron.dtype_of(item) == hf.dtype_of(item) == torch.bfloat16
