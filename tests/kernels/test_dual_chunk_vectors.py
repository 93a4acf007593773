"""Stored numbers by the rules of the released implementations; make_dual_chunk_vectors.py says how they were made."""

from __future__ import annotations

import json
from typing import Any

import make_dual_chunk_vectors
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.kernels.dual_chunk_attention import layout
from megatron_qwen.kernels.dual_chunk_attention.segments import runs

STORED: dict[str, Any] = json.loads(make_dual_chunk_vectors.FILE.read_text(encoding="utf-8"))
WIDE = torch.float64


def test_the_file_is_what_its_script_makes() -> None:
    again = json.loads(json.dumps(make_dual_chunk_vectors.vectors()))
    assert again.keys() == STORED.keys()
    for name in ("toy", "toy_tables", "million"):
        assert again[name] == STORED[name]
    for mine, stored in zip(again["attention"]["cases"], STORED["attention"]["cases"], strict=True):
        assert mine["lse"] == pytest.approx(stored["lse"], rel=1e-12)


@pytest.mark.parametrize("name", ["released", "paper"])
def test_positions_of_the_example_of_the_papers(name: str) -> None:
    """c = 8, w = 3 (arXiv 2501.15383, figure 2): no distance above 7; above 8 in the released code."""
    chunks = getattr(ops.ChunkLayout, name)(8, 3)
    tokens = torch.arange(17)
    matrix = layout.relative_positions(chunks, tokens, tokens)
    assert matrix.tolist() == STORED["toy"][name]
    assert int(matrix.max()) == {"released": 8, "paper": 7}[name]
    within = layout.query_positions(chunks, torch.arange(chunks.stride))
    assert [each.tolist() for each in within] == list(STORED["toy_tables"][name].values())


@pytest.mark.parametrize("name", ["released", "paper"])
def test_positions_and_segments_of_the_models_of_a_million_tokens(name: str) -> None:
    """chunk_size 262144, local_size 8192, as in config.json of Qwen2.5-7B-Instruct-1M."""
    chunks = getattr(ops.ChunkLayout, name)(262_144, 8192)
    assert (chunks.stride, chunks.alike_from) == (253_952, 8192 if name == "released" else 8191)
    suffix = "" if name == "released" else "_paper"
    for stored in STORED["million"]:
        row = torch.tensor([stored["row"]])
        intra, succ, inter = layout.query_positions(chunks, row)
        assert (int(intra), int(succ), int(inter)) == (
            stored["intra"],
            stored["succ" + suffix],
            stored["inter" + suffix],
        )
        assert int(layout.key_positions(chunks, row)) == stored["key"]
        found = [0, 0, 0]
        for piece in next(runs(chunks, int(row), 1, 0, int(row) + 1, 1)).pieces:
            found[piece.variant] += 1 if piece.is_causal else piece.last_key - piece.first_key
        assert found == [stored["intra_keys"], stored["succ_keys"], stored["inter_keys"]]


def test_temperature() -> None:
    for length, original, s, square in STORED["temperature"]:
        found = ops.log_length_temperature(torch.tensor([length]), original)
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(s, rel=1e-7)
        assert float(found.square()) == pytest.approx(square, rel=2e-7)
    printed = ops.log_length_temperature(torch.tensor([1_010_000, 131_072 * 8]), 262_144)
    assert printed.tolist() == pytest.approx([1.13488, 1.13863], abs=5e-6)


def test_merge() -> None:
    stored = STORED["merge"]
    outputs = [torch.tensor(each, dtype=WIDE).view(1, 1, 4) for each in stored["outputs"]]
    output, lse = ops.merge_attention(outputs, [torch.tensor([[each]], dtype=WIDE) for each in stored["lses"]])
    assert output.flatten().tolist() == pytest.approx(stored["output"], rel=1e-14)
    assert float(lse) == pytest.approx(stored["lse"], rel=1e-14)


@pytest.mark.parametrize("index", range(len(STORED["attention"]["cases"])))
def test_attention_by_three_calls(index: int) -> None:
    """Keys scaled and softmax_scale scaled, as vLLM does it, equal logits times s^2; with both of ours."""
    data = STORED["attention"]
    case = data["cases"][index]
    q, k, v = (torch.tensor(data[name], dtype=WIDE).view(1, 17, 1, 8) for name in ("q", "k", "v"))
    frequencies = data["base"] ** (-torch.arange(4, dtype=WIDE) / 4)
    angles = torch.outer(torch.arange(33, dtype=WIDE), frequencies)
    options: dict[str, Any] = {
        "chunks": ops.ChunkLayout(*case["layout"]),
        "tables": (angles.cos(), angles.sin()),
    }
    s = torch.full((17,), case["s"], dtype=WIDE)
    clean = ops.dual_chunk_attention(q, k, v, **options, logit_scale=s.square())
    prescaled = ops.dual_chunk_attention(q, ops.prescaled_keys(k, s), v, **options, logit_scale=s)
    for output, lse in (clean, prescaled):
        torch.testing.assert_close(output.view(17, 8), torch.tensor(case["output"], dtype=WIDE), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse.view(17), torch.tensor(case["lse"], dtype=WIDE), rtol=1e-11, atol=1e-12)


def test_prescaled_keys_are_rounded_once() -> None:
    k, s = torch.randn(5, 2, 8).bfloat16(), torch.linspace(1.0, 1.3, 5)
    assert torch.equal(ops.prescaled_keys(k, s), (k.float() * s[:, None, None]).bfloat16())
