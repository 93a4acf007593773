from __future__ import annotations

import json

import torch

from megatron_qwen.conversion import verify
from megatron_qwen.conversion.comparison import compare_tensors
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf


def test_bits_are_compared_not_values():
    zero = torch.zeros(3)
    assert compare_tensors("x", zero, zero.clone()) == []
    (difference,) = compare_tensors("x", zero, torch.tensor([0.0, -0.0, 0.0]))
    assert (difference.kind, difference.count, difference.first, difference.max_abs) == ("values", 1, (1,), 0.0)
    nan = torch.full((2, 2), float("nan"))
    assert compare_tensors("x", nan, nan.clone()) == []


def test_shape_and_dtype_are_named():
    assert compare_tensors("x", torch.zeros(2), torch.zeros(3))[0].kind == "shape"
    assert compare_tensors("x", torch.zeros(2), torch.zeros(2).bfloat16())[0].kind == "dtype"


def test_every_difference_of_two_folders_is_listed(tmp_path):
    write_tiny_hf(tmp_path / "a", tiny_dense(layers=2))
    write_tiny_hf(tmp_path / "b", tiny_dense(layers=3, tied=True, rope_theta=5e5), seed=1)
    report = verify(tmp_path / "a", tmp_path / "b")
    kinds = {difference.name: difference.kind for difference in report.differences}
    assert kinds["config.rope_theta"] == kinds["config.num_hidden_layers"] == "config"
    assert kinds["model.layers.2.mlp.up_proj.weight"] == "missing in A"
    assert kinds["lm_head.weight"] == "missing in B"
    assert kinds["model.layers.1.self_attn.k_proj.bias"] == "values"
    json.dumps(report.to_json())
